"""The HTML page of a report: one file that loads nothing and runs no script but its own."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from utils.reports.overlap import Overlaps, pairs_table
from utils.reports.pictures import Picture

FOLDER = Path(__file__).parent
SHADES = 10  # classes shade-0 to shade-10 of page.css


@dataclass
class Contents:
    """What the page shows, section by section. Tables hold text.

    Attributes:
        title: above the page.
        facts: a line below it.
        notes: what the reader should know.
        accuracy: what "accuracy" means here.
        overlap_note: why there is no overlap; empty where there is.
    """

    title: str
    facts: str
    notes: Sequence[str]
    accuracy: str
    methods: pd.DataFrame
    runs: pd.DataFrame
    accuracy_pictures: Sequence[Picture]
    points: pd.DataFrame
    layers: Sequence[Picture]
    curves: Sequence[Picture]
    config: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]
    environment: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]
    overlaps: Sequence[Overlaps] = field(default_factory=list)
    overlap_note: str = ""


def render(contents: Contents) -> str:
    """The page as HTML. Whatever comes from runs is escaped: names may hold any characters."""
    loader = jinja2.FileSystemLoader(FOLDER)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shade": shade, "pairs_table": pairs_table}
    style, script = ((FOLDER / name).read_text() for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        c=contents, style=Markup(style), script=Markup(script), policy=_policy(style, script)
    )


def _policy(style: str, script: str) -> str:
    """Content security policy: the browser loads nothing from elsewhere, and runs this style and this script alone."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def shade(text: str) -> int:
    """Shade of a cell: intersection over union, 0 to 1, in steps of a tenth; not-a-number has none."""
    value = float(text)
    return round(SHADES * value) if value == value else 0
