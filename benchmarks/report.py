"""RESULTS.md and its plot, made of the runs that are kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import matplotlib as mpl
import psutil
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import Case
from benchmarks.kernels import markdown as kernels_markdown
from benchmarks.machine import cpu_name
from benchmarks.participants import PARTICIPANTS
from benchmarks.runs import Run, Runs
from benchmarks.targets import MISSED, OURS, OURS_LATER, TARGETS, Figure, Kernels, Target, floor_seconds

PLOT = "speed.svg"
PROFILE = "PROFILE.md"
COLOURS = ("#999999", "#bbbbbb", "#d9d9d9", "#d62728", "#ff9896", "#e377c2", "#1f77b4", "#2ca02c", "#98df8a", "#9467bd")
BUSY = 0.1  # of all cores: watching a run takes a few hundredths itself
HOW = """\
How: a round runs every participant of every case once, one after the other, so that what slows the machine slows
all of them alike. Before each run its sources are read once (page cache warm) and all that was written is synced.
Times are of the work: the start of the process and its imports are in nobody's (the last column has the whole
process), nor is Numba's compilation, which happens once a machine. Ours hashes every byte of its sources and of its
result and syncs what it writes; no other does either. Memory is the peak of the sum over the process tree, looked
at every 50 ms (at processes so large that looking slows them, less often), imports included; private is
Private_Clean + Private_Dirty. Temporary disk is the most that lay in the run's folder, less the result. A peer that
takes more than a minute runs twice; one that was stopped, after the cap (600 s) or at the end of memory, once.

The bare products are made in two ways, each judged in a row of its own: a fresh result each, as `torch.mm(B, A)`
gives it, and all into one buffer that is there already (`out=`), which spares the page faults. In the tables of runs
÷ floor is by the faster one, which is harder to be near to.

"Digests known": the same with a merge whose sources were hashed by an earlier one (every further merge of a base, every
point of a sweep). It is a remark; what is judged hashes everything."""


def write_report(runs: Runs, cases: Sequence[Case], *, folder: Path, cores: int, into: Path | None) -> str:
    """The text of RESULTS.md; it and the plot are written ``into`` a folder where one is given.

    Figures of kernels come from FOLDER/kernels*.json, which benchmarks.kernels writes.
    """
    kernels = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels*.json"))]
    shown = [case for case in cases if any(runs.of(case.name, name) for name in case.participants)]
    text = "\n\n".join(
        [
            "# Measured",
            "Made by `python -m benchmarks.speed --write` (and `python -m benchmarks.kernels`); do not edit.",
            machine(runs, cores),
            HOW,
            "## What must be reached\n\n" + targets_table(runs, kernels),
            *([growth] if (growth := growth_tables(runs, shown)) else []),
            f"## Runs\n\n![Wall and private memory of every participant]({PLOT})",
            *(f"### {case.title}\n\n" + case_table(runs, case) for case in shown),
            *(kernels_markdown(found) for found in kernels),
        ]
    )
    if into is not None:
        into.mkdir(parents=True, exist_ok=True)
        (into / "RESULTS.md").write_text(text + "\n")
        plot(runs, shown, into / PLOT)
    return text + "\n"


def machine(runs: Runs, cores: int) -> str:
    load = next((run.load for run in runs.all()), 0.0)
    busy = f"load average at start {load:.1f}; others took {others_share(runs):.0%} of all cores meanwhile"
    commits = sorted({run.commit for run in runs.all() if PARTICIPANTS[run.participant].role == "ours" and run.commit})
    days = sorted({run.began[:10] for run in runs.all()})
    flattering = (
        "\n\n**The machine was busy.** torch's threads wait for one another, so the floor and the peers suffer more "
        "from that than we do: every ratio flatters us, and none is judged."
    )
    return (
        f"Machine: {cpu_name()}, {os.cpu_count()} cores of which {cores} are used, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB of memory, Linux {platform.release()}; Python "
        f"{platform.python_version()}, torch {version('torch')}, Numba {version('numba')}; {busy}. "
        f"Runs of {', '.join(days) or 'no day'}; ours at {', '.join(commits) or 'no commit'}."
        + (flattering if was_busy(runs) else "")
    )


def others_share(runs: Runs) -> float:
    """Of the processor time that there was while runs were made, what neither they nor idleness had."""
    there = sum(run.watched.whole for run in runs.all()) * (os.cpu_count() or 1)
    return sum(run.watched.others for run in runs.all()) / there if there else 0.0


def was_busy(runs: Runs) -> bool:
    return others_share(runs) > BUSY


def targets_table(runs: Runs, kernels: Kernels) -> str:
    rows = [
        "| case | must reach | measured | | digests known |",
        "| --- | --- | --- | --- | --- |",
    ]
    for target in TARGETS:
        found = target.figure(runs, kernels, OURS)
        later = target.figure(runs, kernels, OURS_LATER) if target.later else None
        limit = ("≥ " if target.floor else "≤ ") + target.show.format(target.limit)
        verdict = "not judged" if was_busy(runs) and target.timed and found else target.verdict(found)
        if verdict == MISSED and target.timed:
            verdict += f": [what bounds it]({PROFILE})"
        rows.append(f"| {target.title} | {limit} | {_shown(target, found)} | {verdict} | {_shown(target, later)} |")
    if not any(found["device"] == "cuda" for found in kernels):
        rows.append("\nNo GPU was at hand: its rows stay open.")
    return "\n".join(rows)


def _shown(target: Target, found: Figure | None) -> str:
    if found is None:
        return "–"
    return ("over " if found.least else "") + target.show.format(found.value)


def case_table(runs: Runs, case: Case) -> str:
    """Medians of times, the highest of peaks."""
    floor = floor_seconds(runs, case.name) or runs.seconds(case.name, "cp")
    rows = [
        "| what | wall | each run (s) | ÷ floor | CPU | peak RSS | peak private | temporary disk | whole process |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in case.participants:
        made = runs.of(case.name, name)
        if made:
            rows.append(f"| {PARTICIPANTS[name].title} | " + " | ".join(_cells(made, floor)) + " |")
    if floor is not None:
        rows.append(f"\nFloor: {_seconds(floor)}.")
    return "\n".join(rows)


def growth_tables(runs: Runs, cases: Sequence[Case]) -> str:
    """How our time and memory grow with the number of adapters, for each model with two such cases or more."""
    parts = []
    for model in dict.fromkeys(case.model for case in cases):
        own = [case for case in cases if case.model == model and not case.finetunes and not case.parameters]
        points = [(case.adapters, done) for case in own if (done := _done(runs, case))]
        if len(points) > 1:
            parts.append(
                "\n".join([f"### {model.title}", "", *_growth_rows(sorted(points, key=lambda point: point[0]))])
            )
    return "\n\n".join(["## Time and memory by number of adapters", *parts]) if parts else ""


def _done(runs: Runs, case: Case) -> list[Run]:
    return [run for run in runs.of(case.name, OURS) if run.done]


def _growth_rows(points: Sequence[tuple[int, Sequence[Run]]]) -> list[str]:
    """The last two columns: what each adapter more than in the row before takes."""
    rows = [
        "| adapters | wall | CPU | peak private | CPU, each further adapter | private, each further adapter |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    before: tuple[int, float, float] | None = None
    for adapters, made in points:
        wall = median(run.watched.seconds for run in made)
        processor = median(run.watched.processor for run in made)
        private = median(run.watched.private for run in made)
        more = "– | –"
        if before is not None:
            count = adapters - before[0]
            more = f"{(processor - before[1]) / count:.3f} s | {(private - before[2]) / count / 1e6:.1f} MB"
        rows.append(f"| {adapters} | {_seconds(wall)} | {_seconds(processor)} | {private / 1e6:.0f} MB | {more} |")
        before = adapters, processor, private
    return rows


def _cells(made: Sequence[Run], floor: float | None) -> list[str]:
    done = [run.watched for run in made if run.done]
    peaks = [_size(max(getattr(run.watched, name) for run in made), least=not done) for name in ("rss", "private")] + [
        _size(max(run.temporary for run in made), least=not done)
    ]
    if not done:
        last = made[-1].watched
        words = {"over time": f"over {last.whole:.0f} s", "over memory": "out of memory", "failed": "failed"}
        return [words[last.outcome], f"stopped at {last.whole:.0f}", "–", "–", *peaks, "–"]
    wall = median(run.seconds for run in done)
    return [
        _seconds(wall),
        ", ".join(f"{run.seconds:.{_places(wall)}f}" for run in done),
        f"{wall / floor:.{1 if wall < 100 * floor else 0}f}" if floor else "–",
        _seconds(median(run.processor for run in done)),
        *peaks,
        _seconds(median(run.whole for run in done)),
    ]


def _seconds(value: float) -> str:
    return f"{value:.{_places(value)}f} s"


def _places(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0


def _size(value: int, *, least: bool) -> str:
    return "–" if value < 5e6 else ("over " if least else "") + f"{value / 1e9:.2f} GB"


def plot(runs: Runs, cases: Sequence[Case], path: Path) -> None:
    """A dot for each participant of each case: wall, and private memory, both on a logarithmic axis."""
    # the same runs give the same bytes, and text stays text
    with mpl.rc_context({"svg.hashsalt": "mergeyard", "svg.fonttype": "none", "font.size": 9}):
        drawing = Drawing(figsize=(9, 1.2 + 0.55 * max(1, len(cases))), layout="constrained")
        walls, memory = drawing.subplots(1, 2, sharey=True)
        for colour, (name, participant) in zip(COLOURS, PARTICIPANTS.items(), strict=True):
            made = [(row, runs.of(case.name, name)) for row, case in enumerate(cases)]
            label = participant.title.replace("`", "").replace("**", "")
            _dots(walls, [(row, _wall(of), _stopped(of)) for row, of in made if of], colour, label)
            if participant.role != "floor":
                sizes = [(row, max(run.watched.private for run in of) / 1e9, _stopped(of)) for row, of in made if of]
                _dots(memory, sizes, colour, None)
        walls.set_yticks(range(len(cases)), [case.title.replace("`", "") for case in cases])
        walls.set_ylim(len(cases) - 0.5, -0.5)
        for axes, title in ((walls, "wall (s); ▸ stopped"), (memory, "peak private memory (GB)")):
            axes.set_xscale("log")
            axes.set_xlabel(title)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(axis="x", which="both", alpha=0.2)
        drawing.legend(loc="outside lower center", ncols=2, frameon=False)
        drawing.savefig(path, metadata={"Date": None})


def _wall(made: Sequence[Run]) -> float:
    return median([run.watched.seconds for run in made if run.done] or [run.watched.whole for run in made])


def _stopped(made: Sequence[Run]) -> bool:
    return not any(run.done for run in made)


def _dots(axes: Axes, points: Sequence[tuple[int, float, bool]], colour: str, label: str | None) -> None:
    for stopped, marker in ((False, "o"), (True, ">")):
        own = [(x, row) for row, x, was in points if was == stopped]
        if own:
            axes.scatter(*zip(*own, strict=True), color=colour, marker=marker, s=36, label=label, zorder=3)
            label = None  # one line of the legend for both
