"""Drawings of a sweep: each axis against every task, two axes as a heatmap, the best so far, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files alone: no window is opened, wherever this runs

from matplotlib import pyplot

if TYPE_CHECKING:
    from mergeyard.sweep import Row

FORMATS = ("png", "svg")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the drawings that the grid allows into ``folder``; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = [name for name in rows[0].settings if len({str(row.settings[name]) for row in rows}) > 1]
    numeric = [name for name in axes if all(_is_number(row.settings[name]) for row in rows)]
    measured = {_label(rows[0], name): [row.measures[name] for row in rows] for name in rows[0].scores}
    made = []
    for axis in numeric:
        made += _save(folder / f"by-{_file_name(axis)}", _by_axis(rows, axis, measured))
    for first, second in combinations(numeric, 2):
        made += _save(folder / f"{_file_name(first)}-by-{_file_name(second)}", _heatmap(rows, first, second))
    made += _save(folder / "best-so-far", _best_so_far(rows))
    for first, second in combinations(measured, 2):
        made += _save(folder / f"{_file_name(first)}-against-{_file_name(second)}", _front(first, second, measured))
    return made


def _by_axis(rows: Sequence[Row], axis: str, measured: Mapping[str, Sequence[float]]) -> Any:
    """Every task along one axis: the best over the others at each value."""
    figure, plot = pyplot.subplots()
    values = sorted({row.settings[axis] for row in rows})
    for name, reached in measured.items():
        best = [
            max(score for row, score in zip(rows, reached, strict=True) if row.settings[axis] == value)
            for value in values
        ]
        plot.plot(values, best, marker="o", label=name)
    plot.set(xlabel=axis, ylabel=_unit(rows))
    plot.legend()
    return figure


def _heatmap(rows: Sequence[Row], across: str, up: str) -> Any:
    """The mean over tasks, the best over all other axes."""
    columns, lines = (sorted({row.settings[name] for row in rows}) for name in (across, up))
    cells = [
        [
            max(
                (row.worth for row in rows if row.settings[across] == x and row.settings[up] == y), default=float("nan")
            )
            for x in columns
        ]
        for y in lines
    ]
    figure, plot = pyplot.subplots()
    image = plot.imshow(cells, origin="lower", aspect="auto")
    plot.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    plot.set_yticks(range(len(lines)), [f"{value:g}" for value in lines])
    plot.set(xlabel=across, ylabel=up)
    figure.colorbar(image, label=f"mean over tasks, {_unit(rows)}")
    return figure


def _best_so_far(rows: Sequence[Row]) -> Any:
    figure, plot = pyplot.subplots()
    worths = [row.worth for row in rows]
    best = [max(worths[: number + 1]) for number in range(len(worths))]
    plot.step(range(1, len(best) + 1), best, where="post", label="best so far")
    plot.plot(range(1, len(worths) + 1), worths, "o", markersize=3, label="each point")
    plot.set(xlabel="points scored", ylabel=f"mean over tasks, {_unit(rows)}")
    plot.legend()
    return figure


def _front(first: str, second: str, measured: Mapping[str, Sequence[float]]) -> Any:
    """One task against another; on the front no point is better in both."""
    figure, plot = pyplot.subplots()
    points = list(zip(measured[first], measured[second], strict=True))
    front = sorted(
        point
        for point in set(points)
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    )
    plot.plot(*zip(*points, strict=True), "o", markersize=4, color="0.6")
    plot.plot(*zip(*front, strict=True), "o-", label="Pareto front")
    plot.set(xlabel=first, ylabel=second)
    plot.legend()
    return figure


def _save(path: Path, figure: Any) -> list[Path]:
    figure.tight_layout()
    made = [path.with_name(f"{path.name}.{kind}") for kind in FORMATS]
    for file in made:
        figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return made


def _label(row: Row, name: str) -> str:
    return f"{name}, negated" if name in row.losses and row.kept.get(name) is None else name


def _unit(rows: Sequence[Row]) -> str:
    return "share of the gain kept" if rows[0].mean is not None else "score"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _file_name(axis: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in axis).strip("-")
