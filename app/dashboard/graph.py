"""A lineage drawn as a graph, from left to right: what a merge is made of, the merge, what is made of it.

Columns by the longest way that leads to a node, rows by the middle of its neighbours (the barycentre heuristic of
Sugiyama, Tagawa and Toda, 1981). No coordinates but these are kept: the template writes them as attributes of SVG.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

from app.records.lineage import Lineage, Relative, Tie

WIDTH, HEIGHT = 216, 48  # of a node, in user units
ACROSS, DOWN = 64, 16  # between nodes
MARGIN = 4
SWEEPS = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A relative and the upper left corner of its box."""

    relative: Relative
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Edge:
    """A tie and its line, as the ``d`` of an SVG path."""

    tie: Tie
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Nodes column by column, edges, and the size of it all in user units."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    width: float
    height: float


def draw(lineage: Lineage) -> Drawing:
    """Every relative and tie of the lineage has its node or edge."""
    columns = _ordered(_columns(lineage), lineage.ties)
    tallest = max(map(len, columns))
    places: dict[str, tuple[float, float]] = {}
    for number, column in enumerate(columns):
        above = (tallest - len(column)) * (HEIGHT + DOWN) / 2
        for row, name in enumerate(column):
            places[name] = (MARGIN + number * (WIDTH + ACROSS), MARGIN + above + row * (HEIGHT + DOWN))
    return Drawing(
        nodes=tuple(Node(lineage.relatives[name], *places[name]) for column in columns for name in column),
        edges=tuple(Edge(tie, _line(places[tie.source], places[tie.target])) for tie in lineage.ties),
        width=2 * MARGIN + len(columns) * (WIDTH + ACROSS) - ACROSS,
        height=2 * MARGIN + tallest * (HEIGHT + DOWN) - DOWN,
    )


def _columns(lineage: Lineage) -> list[list[str]]:
    """The names in each column. What comes from nowhere stands just before the first that it leads to."""
    before: dict[str, set[str]] = {name: set() for name in lineage.relatives}
    after: dict[str, set[str]] = {name: set() for name in lineage.relatives}
    for tie in lineage.ties:
        before[tie.target].add(tie.source)
        after[tie.source].add(tie.target)
    column: dict[str, int] = {}
    for name in TopologicalSorter(before).static_order():
        column[name] = max((column[source] + 1 for source in before[name]), default=0)
    for name in lineage.relatives:
        if not before[name] and after[name]:
            column[name] = min(column[target] for target in after[name]) - 1
    first = min(column.values())
    found: list[list[str]] = [[] for _ in range(max(column.values()) - first + 1)]
    for name in lineage.relatives:
        found[column[name] - first].append(name)
    return found


def _ordered(columns: Sequence[Sequence[str]], ties: Iterable[Tie]) -> list[list[str]]:
    """The columns with their rows in an order that lets fewer lines cross: swept rightwards and leftwards in turn."""
    before: dict[str, list[str]] = {name: [] for column in columns for name in column}
    after: dict[str, list[str]] = {name: [] for column in columns for name in column}
    for tie in ties:
        before[tie.target].append(tie.source)
        after[tie.source].append(tie.target)
    found = [list(column) for column in columns]
    middle = {name: height for column in found for name, height in _spread(column).items()}
    for sweep in range(SWEEPS):
        rightwards = sweep % 2 == 1
        neighbours = before if rightwards else after
        for column in found if rightwards else reversed(found):
            heights = {name: _mean([middle[other] for other in neighbours[name]], middle[name]) for name in column}
            column.sort(key=heights.__getitem__)
            middle |= _spread(column)
    return found


def _spread(column: Sequence[str]) -> Mapping[str, float]:
    return {name: row - (len(column) - 1) / 2 for row, name in enumerate(column)}


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _line(source: tuple[float, float], target: tuple[float, float]) -> str:
    x1, y1 = source[0] + WIDTH, source[1] + HEIGHT / 2
    x2, y2 = target[0], target[1] + HEIGHT / 2
    bend = max(ACROSS / 2, (x2 - x1) / 2)
    return f"M{x1:g},{y1:g} C{x1 + bend:g},{y1:g} {x2 - bend:g},{y2:g} {x2:g},{y2:g}"
