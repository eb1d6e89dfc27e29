"""Colours and markers of methods: the same in every figure, whatever else is drawn and in whatever order.

Each method of the grids in configs/grids has a colour and a marker of its own. What is made of a method (a ticket with
one thing changed, pruning that goes on, inverted scores) has a shade of its colour and hollow markers. Several recipes
of one method, such as learning rates, have shades too; if there are more recipes than shades and no other method, they
have the colours of all methods.

Colours: those of Okabe & Ito (2008) that show on white, which people with the common kinds of colour blindness can tell
apart, plus one of Tol's colours and a violet. In greyscale, markers tell the lines apart.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

from utils.plots.names import CHANGES, ITERATIVE, REWINDING
from utils.pruning.methods import METHODS

Style = dict[str, Any]

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#9010E0"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", "--"]  # of the first len(COLOURS) lines, and of the next ones
# More lines look alike, and the legend has no room for them.
MOST_LINES = len(COLOURS) * len(DASHES)
DENSE = "#767676"

# Whose the colours are, in their order; the last is DENSE's.
OWNERS = [
    *REWINDING.values(),
    *(METHODS[name].title for name in ("snip", "synflow", "random", "random_erk", "random_balanced", "grasp")),
    "Dense",
]
# Other names of a method, or its nearest relative.
RELATED = {
    METHODS["mag"].title: REWINDING["imp"],
    METHODS["er_erk"].title: METHODS["random_erk"].title,
    METHODS["er_balanced"].title: METHODS["random_balanced"].title,
}
# Mixed with white or black, far from each other and from white for every kind of sight.
SHADES = [
    ["#73B1D5", "#00446B", "#001C2C"],
    ["#E69E66", "#753400", "#351800"],
    ["#8CD3C0", "#005F45", "#00281D"],
    ["#E6BCD3", "#854F6D", "#472A3A"],
    ["#F2CF80", "#8A5F00", "#3A2800"],
    ["#ABDAF4", "#3C7EA3", "#22485D"],
    ["#737373", "#404040", "#B2B2B2"],
    ["#B26F90", "#D5B2C4", "#300C1E"],
    ["#BC70EC", "#DEB7F6", "#4F097B"],
    ["#B0B0B0", "#4A4A4A", "#1C1C1C"],
]
RELATIVES = len(SHADES[0]) * len(MARKERS)  # pairs of a shade and a marker


def line_style(place: int) -> Style:
    """Style of line number `place`, below MOST_LINES. When colours repeat, markers and dashes change."""
    lap, colour = divmod(place, len(COLOURS))
    return _style(COLOURS[colour], MARKERS[(place + lap) % len(MARKERS)], DASHES[lap])


def method_styles(lines: Sequence[tuple[str, str]]) -> list[Style]:
    """Style of each line of one figure, as arguments of `Axes.plot`: color, marker, linestyle and the marker's.

    Args:
        lines: (method, recipe) of each line: the method's name as utils/plots/names.py gives it, and what tells its
            lines apart. Their order has no influence.
    """
    recipes: dict[str, list[str]] = {}
    for method, recipe in sorted(set(lines), key=lambda line: (*_rank(line[0]), _natural(line[1]))):
        recipes.setdefault(method, []).append(recipe)
    if len(recipes) == 1 and len(set(lines)) > 1 + len(SHADES[0]):
        ((method, names),) = recipes.items()
        first = _family(method)[0] % len(COLOURS)
        found = {(method, name): _rotated(place, first) for place, name in enumerate(names)}
        return [found[line] for line in lines]
    found, taken = {}, set[tuple[str, ...]]()
    for method, names in recipes.items():
        owner, number = _family(method)
        for place, name in enumerate(names):
            colour, marker = _free(owner, number + place, taken)
            taken |= {(colour,), (colour, marker)}
            found[method, name] = _style(colour, marker, hollow=number > 0)
    return [found[line] for line in lines]


def _style(colour: str, marker: str, dashes: str = "-", hollow: bool = False) -> Style:
    face, edge, width = ("white", colour, 0.9) if hollow else (colour, "white", 0.4)
    return {
        "color": colour, "marker": marker, "linestyle": dashes,
        "markerfacecolor": face, "markeredgecolor": edge, "markeredgewidth": width,
    }  # fmt: skip


def _rotated(place: int, first: int) -> Style:
    """`line_style`, beginning with colour number `first`."""
    lap, step = divmod(place, len(COLOURS))
    colour = (first + step) % len(COLOURS)
    return line_style(lap * len(COLOURS) + colour)


def _family(method: str) -> tuple[int, int]:
    """(place of its owner in OWNERS, number of the relative; 0 = the owner itself).

    A name that no table has gets the same place each time, by a checksum.
    """
    name, _, change = method.partition(", ")
    base = name.removesuffix(" inverted")
    change = ", ".join(filter(None, ["inverted" if base != name else "", change]))
    if base.startswith(ITERATIVE):
        base, change = base.removeprefix(ITERATIVE).partition(" + ")[0], method
    elif base in RELATED:
        change = method
    base = RELATED.get(base, base)
    if base not in OWNERS:
        return _checksum(base) % len(COLOURS), 1 + _checksum(method) % RELATIVES
    if change in CHANGES:
        return OWNERS.index(base), 1 + CHANGES.index(change) % RELATIVES
    return OWNERS.index(base), 1 + _checksum(change) % RELATIVES if change else 0


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def _free(owner: int, number: int, taken: set[tuple[str, ...]]) -> tuple[str, str]:
    """(colour, marker) of the first relative from `number` on with a free colour, or else a free pair of both."""
    looks = [_look(owner, number), *(_look(owner, 1 + (number + step) % RELATIVES) for step in range(RELATIVES))]
    free = [look for look in looks if look[:1] not in taken] or [look for look in looks if look not in taken]
    return (free or looks)[0]


def _look(owner: int, number: int) -> tuple[str, str]:
    own = owner % len(MARKERS)
    if number == 0:
        return [*COLOURS, DENSE][owner], MARKERS[own]
    place = (number - 1) % RELATIVES
    shade = (place + place // len(MARKERS)) % len(SHADES[owner])  # so that all pairs with a marker come
    return SHADES[owner][shade], MARKERS[(own + 1 + place) % len(MARKERS)]


def _rank(method: str) -> tuple[int, int, str]:
    """Owners first, in their order; then their relatives."""
    owner, number = _family(method)
    return int(number > 0), owner, method


def _natural(text: str) -> list[tuple[bool, float, str]]:
    """Sorts the numbers in a text by their size: lr 0.03 before lr 0.1 before lr 1e2."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [(bool(place % 2), float(part) if place % 2 else 0.0, part) for place, part in enumerate(parts)]
