"""Drawings of a sweep as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files alone: no window is opened, wherever this runs

from matplotlib import pyplot

if TYPE_CHECKING:
    from app.sweeps.drawings import Drawing
    from app.sweeps.results import Row

FORMATS = ("png", "svg")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the drawings that the grid allows into ``folder``; their paths."""
    from app.sweeps.drawings import drawings  # noqa: PLC0415 — the client is installable without the app

    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for drawing in drawings(rows):
        figure, plot = pyplot.subplots()
        _DRAWN[drawing.kind](drawing, figure, plot)
        plot.set(xlabel=drawing.x, ylabel=drawing.y)
        figure.tight_layout()
        for kind in FORMATS:
            made.append(folder / f"{drawing.name}.{kind}")
            figure.savefig(made[-1], dpi=150)
        pyplot.close(figure)
    return made


def _lines(drawing: Drawing, _figure: Any, plot: Any) -> None:
    for label, pairs in drawing.series.items():
        plot.plot(*zip(*pairs, strict=True), marker="o", label=label)
    plot.legend()


def _steps(drawing: Drawing, _figure: Any, plot: Any) -> None:
    best, each = drawing.series.items()
    plot.step(*zip(*best[1], strict=True), where="post", label=best[0])
    plot.plot(*zip(*each[1], strict=True), "o", markersize=3, label=each[0])
    plot.legend()


def _front(drawing: Drawing, _figure: Any, plot: Any) -> None:
    every, front = drawing.series.items()
    plot.plot(*zip(*every[1], strict=True), "o", markersize=4, color="0.6", label=every[0])
    plot.plot(*zip(*front[1], strict=True), "o-", label=front[0])
    plot.legend()


def _cells(drawing: Drawing, figure: Any, plot: Any) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in drawing.cells]
    image = plot.imshow(values, origin="lower", aspect="auto")
    plot.set_xticks(range(len(drawing.columns)), [f"{value:g}" for value in drawing.columns])
    plot.set_yticks(range(len(drawing.rows)), [f"{value:g}" for value in drawing.rows])
    figure.colorbar(image, label=drawing.title)


_DRAWN: Mapping[str, Callable[[Drawing, Any, Any], None]] = {
    "lines": _lines,
    "cells": _cells,
    "steps": _steps,
    "front": _front,
}
