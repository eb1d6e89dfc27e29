"""Numbers as text, the same way in tables, figures and messages."""

import math


def density_text(density: float, digits: int = 4) -> str:
    """A density or another fraction, to `digits` significant places: 0.03518, 5e-07. A sparse network is never 0."""
    return f"{density:.{digits}g}"


def percent_text(fraction: float, digits: int = 3) -> str:
    """A fraction in percent, without the sign: 3.52, 100, 5e-05."""
    return f"{100 * fraction:.{digits}g}"


def places_for(value: float, least: int) -> int:
    """Decimal places that show two significant digits of a number, and at least `least`."""
    return max(least, 1 - math.floor(math.log10(abs(value)))) if value else least
