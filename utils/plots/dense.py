"""The dense networks in a figure of accuracy: a dotted line each, with a name of its own."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from matplotlib.axes import Axes

from utils.plots.colours import DENSE, Style
from utils.plots.groups import Group, Key
from utils.plots.lines import dense_accuracy

DASHES: list[Any] = [":", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 4))]  # of dense networks that several lines share


def dense_lines(ax: Axes, groups: Sequence[Group], column: str, styles: Sequence[Style]) -> None:
    """Dense accuracy, one line per training recipe: grey, or in its group's colour if only one group has the recipe."""
    recipes: dict[Key, list[int]] = {}
    for place, group in enumerate(groups):
        recipes.setdefault(group.training, []).append(place)
    found = []
    for places in recipes.values():
        members = [groups[place] for place in places]
        accuracies = dense_accuracy(members, column)
        if len(accuracies):
            own = len(recipes) > 1 and len(places) == 1
            found.append((float(accuracies.mean()), members, styles[places[0]]["color"] if own else DENSE))
    shared = 0
    names: list[str | None] = [*_names([members for _, members, _ in found])]
    for (accuracy, members, colour), label in zip(found, names):
        dashes = DASHES[shared % len(DASHES)] if colour == DENSE else ":"
        shared += colour == DENSE
        if all((group.frame["density"] == 1).all() for group in members):
            label = None  # the points on the line have an entry already
        ax.axhline(accuracy, color=colour, linestyle=dashes, linewidth=1.1, label=label, zorder=1)


def _names(recipes: Sequence[Sequence[Group]]) -> list[str]:
    """Name of each dense network: the words with which the labels of its groups begin, after their methods' names."""
    if len(recipes) == 1:
        return ["Dense"]
    names = []
    for groups in recipes:
        words = [group.label.removeprefix(group.method).removeprefix(", ").split(", ") for group in groups]
        names.append(", ".join(filter(None, ["Dense", *_common(words)])))
    if len(set(names)) == len(names):
        return names
    return [f"Dense, of {groups[0].label}" for groups in recipes]


def _common(lists: Sequence[Sequence[str]]) -> list[str]:
    """The words with which all lists begin."""
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*lists))]
