"""What is drawn of a sweep, as numbers: each axis against every task, two axes together, the best so far, the front.

Whoever draws (matplotlib into files, Plotly on a page) draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from app.sweeps.results import Row

Kind = Literal["lines", "cells", "steps", "front"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """``name`` is that of a file; ``x`` and ``y`` say what the axes are.

    Of ``lines`` and ``steps``: ``series``, by label its (x, y) pairs in order. Of a ``front`` they are all points, and
    those of which no other is better in both. Of ``cells``: ``columns``, ``rows``, and for each row its values.
    """

    name: str
    kind: Kind
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    columns: Sequence[float] = ()
    rows: Sequence[float] = ()
    cells: Sequence[Sequence[float | None]] = ()


def drawings(rows: Sequence[Row]) -> list[Drawing]:
    """Those that the grid allows; none without a point."""
    return list(_drawings(rows)) if rows else []


def _drawings(rows: Sequence[Row]) -> Iterator[Drawing]:
    axes = [name for name in rows[0].settings if len({str(row.settings[name]) for row in rows}) > 1]
    numeric = [name for name in axes if all(_is_number(row.settings[name]) for row in rows)]
    measured = {_label(rows[0], name): [row.measures[name] for row in rows] for name in rows[0].scores}
    for axis in numeric:
        yield _by_axis(rows, axis, measured)
    for first, second in combinations(numeric, 2):
        yield _cells(rows, first, second)
    yield _best_so_far(rows)
    for first, second in combinations(measured, 2):
        yield _front(first, second, measured)


def _by_axis(rows: Sequence[Row], axis: str, measured: Mapping[str, Sequence[float]]) -> Drawing:
    """Every task along one axis: the best over the others at each value."""
    values = sorted({row.settings[axis] for row in rows})
    series = {
        name: [
            (value, max(score for row, score in zip(rows, reached, strict=True) if row.settings[axis] == value))
            for value in values
        ]
        for name, reached in measured.items()
    }
    title = f"Every task against {axis}"
    return Drawing(name=f"by-{_file_name(axis)}", kind="lines", title=title, x=axis, y=_unit(rows), series=series)


def _cells(rows: Sequence[Row], across: str, up: str) -> Drawing:
    """The mean over tasks, the best over all other axes."""
    columns, lines = (sorted({row.settings[name] for row in rows}) for name in (across, up))
    found: dict[tuple[Any, Any], float] = {}
    for row in rows:
        place = (row.settings[across], row.settings[up])
        found[place] = max(row.worth, found.get(place, row.worth))
    return Drawing(
        name=f"{_file_name(across)}-by-{_file_name(up)}",
        kind="cells",
        title=f"Mean over tasks, {_unit(rows)}",
        x=across,
        y=up,
        series={},
        columns=columns,
        rows=lines,
        cells=[[found.get((x, y)) for x in columns] for y in lines],
    )


def _best_so_far(rows: Sequence[Row]) -> Drawing:
    worths = [row.worth for row in rows]
    series = {
        "best so far": [(number + 1, max(worths[: number + 1])) for number in range(len(worths))],
        "each point": [(number + 1, worth) for number, worth in enumerate(worths)],
    }
    title = "The best so far, mean over tasks"
    return Drawing(name="best-so-far", kind="steps", title=title, x="points scored", y=_unit(rows), series=series)


def _front(first: str, second: str, measured: Mapping[str, Sequence[float]]) -> Drawing:
    points = list(zip(measured[first], measured[second], strict=True))
    front = sorted(
        point
        for point in set(points)
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    )
    return Drawing(
        name=f"{_file_name(first)}-against-{_file_name(second)}",
        kind="front",
        title=f"{first} against {second}",
        x=first,
        y=second,
        series={"each point": points, "Pareto front": front},
    )


def _label(row: Row, name: str) -> str:
    return f"{name}, negated" if name in row.losses and row.kept.get(name) is None else name


def _unit(rows: Sequence[Row]) -> str:
    return "share of the gain kept" if rows[0].mean is not None else "score"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _file_name(axis: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in axis).strip("-")
