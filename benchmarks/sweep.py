"""What a sweep costs beside its scoring: ``python -m benchmarks.sweep [--write]``.

The demo's two adapters on SmolLM2-135M, a grid of 16 points (density × lambda), 200 examples a task judged by their
negative log-likelihood. Against it: the same two tasks scored 16 times on one loaded model, which is the least that 16
points could take. The two take turns, point by point, in processes of their own, so that what slows the machine slows
both alike. Targets: the sweep takes at most 1.2 times as long, and at its peak at most 1 GB more memory. And every
point's scores are those of the checkpoint that its recipe writes, to the last digit. ``--write`` makes
benchmarks/SWEEP.md of this run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.scale import _machine
from benchmarks.speed import _commit
from benchmarks.turns import Turn, own_seconds, peak_memory, tell
from benchmarks.watch import machine_seconds

ROOT = Path(__file__).resolve().parent.parent
DENSITIES = (0.2, 0.4, 0.6, 0.8)
LAMBDAS = (0.5, 0.75, 1.0, 1.25)
EXAMPLES = 200
CHECKED = (0, 5, 10, 15)  # points whose checkpoints are written and scored, too
WALL_LIMIT, MEMORY_LIMIT = 1.2, 1_000_000_000
BUSY = 0.1  # of all cores, taken by others


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, nargs="?", const=ROOT / "benchmarks", metavar="FOLDER")
    options = parser.parse_args()
    text = report(measure())
    if options.write:
        (options.write / "SWEEP.md").write_text(text)
    print(text)


def measure() -> dict[str, Any]:
    """Both processes, in turns."""
    from examples.base_model import base_model  # noqa: PLC0415 (transformers, which the processes import themselves)

    began, load = time.monotonic(), os.getloadavg()[0]
    machine, own = machine_seconds(), own_seconds()
    base = base_model(Console(stderr=True))
    with tempfile.TemporaryDirectory(prefix="mergeyard-sweep-") as scratch:
        given = _lay_out(base, Path(scratch))
        sweeping, scoring = (Turn("benchmarks.sweep", role, given) for role in ("sweep", "score"))
        seconds: dict[str, list[float]] = {"sweep": [], "score": []}
        scores: list[list[dict[str, Any]]] = []
        for number in range(len(DENSITIES) * len(LAMBDAS)):
            turns = [("sweep", sweeping), ("score", scoring)]
            for name, process in turns if number % 2 else reversed(turns):
                told = process.take()
                seconds[name].append(told["seconds"])
                if name == "sweep":
                    scores.append(told["scores"])
        peaks = {name: process.take()["peak"] for name, process in (("sweep", sweeping), ("score", scoring))}
        for process in (sweeping, scoring):
            process.end()
        written = json.loads(_run("written", given))
    whole = (time.monotonic() - began) * (os.cpu_count() or 1)
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "load": load,
        "others": max(0.0, machine_seconds() - machine - (own_seconds() - own)) / whole,
        "seconds": seconds,
        "peaks": peaks,
        "equal": sum(scores[number] == found for number, found in zip(CHECKED, written, strict=True)),
    }


def report(found: Mapping[str, Any]) -> str:
    sweep, score = sum(found["seconds"]["sweep"]), sum(found["seconds"]["score"])
    more = found["peaks"]["sweep"] - found["peaks"]["score"]
    judged = found["others"] <= BUSY
    points = len(found["seconds"]["sweep"])
    slower = sweep / score
    rows = [
        (
            f"{points} points ÷ {points} scorings of one loaded model, wall",
            f"{slower:.2f}",
            f"≤ {WALL_LIMIT:.2f}",
            slower <= WALL_LIMIT if judged else None,
        ),
        (
            "peak memory of the sweep less that of the scoring",
            f"{more / 1e6:+.0f} MB",
            f"≤ {MEMORY_LIMIT / 1e6:.0f} MB",
            more <= MEMORY_LIMIT,
        ),
        (
            "points whose checkpoint, written and loaded, has the very same scores",
            f"{found['equal']} of {len(CHECKED)}",
            "all",
            found["equal"] == len(CHECKED),
        ),
    ]
    verdicts = {True: "reached", False: "**not reached**", None: "not judged"}
    lines = [
        "# Measured: a sweep",
        "",
        "Made by `python -m benchmarks.sweep --write`; do not edit.",
        "",
        f"{found['began'][:10]}, at {found['commit']} on {found['machine']}; load average at start "
        f"{found['load']:.1f}; others took {found['others']:.0%} of all cores meanwhile.",
        "",
        f"The demo's two adapters on SmolLM2-135M-Instruct, TIES, densities {', '.join(map(str, DENSITIES))} × "
        f"lambdas {', '.join(map(str, LAMBDAS))}; {EXAMPLES} examples a task, two tasks, negative log-likelihood. The "
        "points and the scorings take turns.",
        "",
        "| | measured | must be | |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {value} | {limit} | {verdicts[good]} |" for name, value, limit, good in rows),
        "",
        f"A point took {sweep / points:.2f} s in the mean, a scoring {score / points:.2f} s; peaks "
        f"{found['peaks']['sweep'] / 1e9:.2f} and {found['peaks']['score'] / 1e9:.2f} GB of resident memory.",
        "",
    ]
    return "\n".join(lines)


# ── the processes ───────────────────────────────────────────────────────────────────────────────


def sweep(given: Mapping[str, Any]) -> None:
    """A point for every line that is read: merged in memory, and scored."""
    from benchmarks.own import Unwatched  # noqa: PLC0415
    from worker.engine.digests import DigestCache  # noqa: PLC0415
    from worker.engine.kernels import load, warm_up  # noqa: PLC0415
    from worker.evaluation.memory import ModelInMemory  # noqa: PLC0415
    from worker.evaluation.scoring import score as scored  # noqa: PLC0415

    plans, tasks = _plans(given), _tasks(given)
    kernels = load("cpu")
    warm_up(kernels)
    (folder := Path(given["scratch"]) / "model").mkdir()
    model = ModelInMemory(plans[0], folder, "cpu")
    digests = DigestCache(Path(given["scratch"]) / "digests")
    for plan in plans:
        sys.stdin.readline()
        began = time.monotonic()
        model.become(plan, kernels=kernels, control=Unwatched(), digests=digests)
        found = [asdict(scored(model.loaded, task)) for task in tasks]
        tell(seconds=time.monotonic() - began, scores=found)
    sys.stdin.readline()
    tell(peak=peak_memory())


def score(given: Mapping[str, Any]) -> None:
    """The base, scored for every line that is read."""
    from worker.evaluation.loading import loaded  # noqa: PLC0415
    from worker.evaluation.scoring import score as scored  # noqa: PLC0415

    tasks = _tasks(given)
    with loaded(Path(given["base"]), "cpu") as model:
        for _ in range(len(DENSITIES) * len(LAMBDAS)):
            sys.stdin.readline()
            began = time.monotonic()
            for task in tasks:
                scored(model, task)
            tell(seconds=time.monotonic() - began)
        sys.stdin.readline()
        tell(peak=peak_memory())


def written(given: Mapping[str, Any]) -> None:
    """The scores of checkpoints."""
    from worker.engine.run import merge_to_folder  # noqa: PLC0415
    from worker.evaluation.loading import loaded  # noqa: PLC0415
    from worker.evaluation.scoring import score as scored  # noqa: PLC0415

    plans, tasks, found = _plans(given), _tasks(given), []
    for number in CHECKED:
        out = Path(given["scratch"]) / f"point-{number}"
        merge_to_folder(plans[number], out, device="cpu")
        with loaded(out, "cpu") as model:
            found.append([asdict(scored(model, task)) for task in tasks])
    print(json.dumps(found), flush=True)


ROLES = {"sweep": sweep, "score": score, "written": written}


def _lay_out(base: Path, scratch: Path) -> dict[str, Any]:
    """The tasks as files, and what every process is told."""
    from examples.tasks import TASKS, examples  # noqa: PLC0415

    files = {}
    for task in TASKS:
        rows = [
            {"messages": [{"role": "user", "content": example.prompt}], "answer": example.answer}
            for example in examples(task, "validation", EXAMPLES)
        ]
        path = scratch / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[task] = str(path)
    adapters = [str(ROOT / "examples" / "adapters" / task) for task in TASKS]
    return {"base": str(base), "adapters": adapters, "tasks": files, "scratch": str(scratch)}


def _plans(given: Mapping[str, Any]) -> list[Any]:
    from app.planning.planner import make_plan  # noqa: PLC0415
    from app.recipe import parse_recipe  # noqa: PLC0415
    from app.sources.resolver import Resolver  # noqa: PLC0415
    from app.sweeps.grid import expand  # noqa: PLC0415

    recipe = {
        "base_model": given["base"],
        "merge_method": "ties",
        "models": [{"adapter": adapter} for adapter in given["adapters"]],
        "out_dtype": "bfloat16",
    }
    resolver = Resolver(local=Path("/"))
    points = expand(recipe, {"density": DENSITIES, "lambda": LAMBDAS})
    return [make_plan(parse_recipe(point.recipe), resolver) for point in points]


def _tasks(given: Mapping[str, Any]) -> list[Any]:
    from app.tasks.reading import read_examples  # noqa: PLC0415
    from app.tasks.task import Task  # noqa: PLC0415

    return [
        Task(
            name=name,
            metric="nll",
            examples=read_examples(Path(path).read_bytes(), name=name, metric="nll"),
            max_new_tokens=1,
        )
        for name, path in given["tasks"].items()
    ]


def _run(role: str, given: Mapping[str, Any]) -> str:
    command: Sequence[str] = [sys.executable, "-m", "benchmarks.sweep", role, json.dumps(given)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


if __name__ == "__main__":
    main()
