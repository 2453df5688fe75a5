"""Where the time of a merge goes, and what bounds it: PROFILE.md.

    python -m benchmarks.profile [--folder FOLDER] [--cases …] [--rounds 3] [--write]

Each round merges every case once in a process of its own, which counts its kinds of work (benchmarks/spans.py), while
this one reads every 10 ms how long each of its threads ran and waited for a core (/proc/PID/task/*/schedstat). What
one core of this machine can do at most is measured in the same minutes (benchmarks/ceilings.py). Of the rounds the one
of the median wall is shown. Linux only; the CPU room.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import ceilings, spans
from benchmarks.cases import Case, all_cases
from benchmarks.ceilings import Ceilings
from benchmarks.machine import cpu_name

ROOT = Path(__file__).resolve().parent.parent
CASES = ("llama-1b-4", "llama-1b-full-4")
CORES = 2
SAMPLE_SECONDS = 0.01
HOW = """\
A round merges each case once, sources in the page cache, nothing waiting to be written; shown is the round of the
median wall. Kinds of work are counted by wrapping the engine's functions from outside, in processor time of their
threads, each moment in the innermost; threads are looked at every 10 ms. "No work for a core" is core-time in which
fewer threads could run than there are cores: reading, hashing and arithmetic wait for one another, or for the disk.
"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """``ran``, ``waited``: seconds of each thread so far, on a core and for one."""

    at: float
    ran: Mapping[int, float]
    waited: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One merge. Seconds. ``merged``: what benchmarks.spans printed."""

    case: str
    merged: Mapping[str, Any]
    samples: Sequence[Sample]

    @property
    def wall(self) -> float:
        return float(self.merged["ended"] - self.merged["began"])

    @property
    def processor(self) -> float:
        return float(self.merged["processor"])

    def role(self, thread: int) -> str:
        """What a thread is for; those that Python did not start are the libraries' own."""
        return str(self.merged["threads"].get(str(thread), "libraries"))

    def between(self) -> Sequence[tuple[Sample, Sample]]:
        """Neighbouring samples while the merge ran."""
        began, ended = self.merged["began"], self.merged["ended"]
        within = [sample for sample in self.samples if began - SAMPLE_SECONDS <= sample.at <= ended + SAMPLE_SECONDS]
        return list(pairwise(within))

    def by_role(self) -> Mapping[str, tuple[float, float]]:
        """Of each kind of thread: how long it ran, and how long it waited for a core."""
        found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for before, after in self.between():
            for thread in after.ran:
                ran, waited = found[self.role(thread)]
                found[self.role(thread)] = (
                    ran + after.ran[thread] - before.ran.get(thread, 0.0),
                    waited + after.waited[thread] - before.waited.get(thread, 0.0),
                )
        return found

    def longest_thread(self) -> tuple[str, float]:
        """The thread that ran longest, by what it is for: a merge cannot be shorter."""
        ran: dict[int, float] = defaultdict(float)
        for before, after in self.between():
            for thread in after.ran:
                ran[thread] += after.ran[thread] - before.ran.get(thread, 0.0)
        thread = max(ran, key=lambda thread: ran[thread])
        return self.role(thread), ran[thread]

    def without_work(self, cores: int) -> Mapping[str, float]:
        """Core-seconds in which too few threads could run, by what went on meanwhile."""
        found: dict[str, float] = defaultdict(float)
        for before, after in self.between():
            took = after.at - before.at
            demand = sum(
                after.ran[thread] + after.waited[thread] - before.ran.get(thread, 0.0) - before.waited.get(thread, 0.0)
                for thread in after.ran
            )
            lacking = cores * took - demand
            if lacking > 0:
                found[self._stage(before.at, after.at)] += lacking
        return found

    def _stage(self, begun: float, ended: float) -> str:
        """What the merge was at."""
        times: Mapping[str, Sequence[tuple[float, float]]] = self.merged["times"]
        for stage in spans.STAGES:
            if any(first < ended and last > begun for first, last in times.get(stage, ())):
                return stage
        planned = times[spans.PLANNING][-1][1]
        first, last = times[spans.MERGING][0][0], times[spans.MERGING][-1][1]
        if planned < begun < first:
            return "the first tensor's thresholds"
        return "after the last block" if begun > last else "between blocks"


def main() -> None:
    options = _options()
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)
    cases = [case for case in all_cases() if case.name in options.cases]
    made: dict[str, list[Profile]] = defaultdict(list)
    limits: list[Ceilings] = []
    for case in cases:
        case.prepare(options.folder)
    for _ in range(options.rounds):
        limits.append(ceilings.measure(options.folder))
        for case in cases:
            made[case.name].append(profile_of(case, options.folder))
    text = document([(case, median_of(made[case.name])) for case in cases], ceilings.median_of(limits), len(cores))
    print(text)
    if options.write:
        (options.write / "PROFILE.md").write_text(text)


def profile_of(case: Case, folder: Path) -> Profile:
    """Merge once in a process of its own, and watch its threads."""
    place = folder.resolve() / "profile"
    shutil.rmtree(place, ignore_errors=True)
    (place / "scratch").mkdir(parents=True)
    job = case.job(folder, place)
    job.write(place / "job.json")
    ceilings.read_through([job.base, *job.adapters, *job.finetunes])
    os.sync()
    command = [sys.executable, "-m", "benchmarks.spans", str(place / "job.json")]
    samples: list[Sample] = []
    # Into a file: what it says of a large merge is more than a pipe holds, and nobody reads while it is watched.
    with (place / "said.json").open("w+") as said:
        with subprocess.Popen(command, cwd=ROOT, stdout=said) as process:
            while process.poll() is None:
                samples.append(_sample(process.pid))
                time.sleep(SAMPLE_SECONDS)
        said.seek(0)
        output = said.read()
    shutil.rmtree(place)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return Profile(case=case.name, merged=json.loads(output.splitlines()[-1]), samples=samples)


def _sample(pid: int) -> Sample:
    ran, waited = {}, {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            on_core, for_core, _ = path.read_text().split()
        except (OSError, ValueError):
            continue  # it has ended
        ran[int(path.parent.name)], waited[int(path.parent.name)] = int(on_core) / 1e9, int(for_core) / 1e9
    return Sample(at=time.monotonic(), ran=ran, waited=waited)


def median_of(profiles: Sequence[Profile]) -> Profile:
    return sorted(profiles, key=lambda profile: profile.wall)[len(profiles) // 2]


def document(profiles: Sequence[tuple[Case, Profile]], limits: Ceilings, cores: int) -> str:
    """PROFILE.md."""
    parts = [
        "# What bounds a merge",
        "Made by `python -m benchmarks.profile --write`; do not edit.",
        f"Machine: {cpu_name()}, {cores} cores.\n\n{HOW.strip()}",
        "## What one core can do at most\n\n" + ceilings.table(limits),
        *(_section(case, profile, limits, cores) for case, profile in profiles),
    ]
    return "\n\n".join(parts) + "\n"


def _section(case: Case, profile: Profile, limits: Ceilings, cores: int) -> str:
    longest, seconds = profile.longest_thread()
    work = profile.processor / cores
    lacking = profile.without_work(cores)
    waited = sum(waited for _, waited in profile.by_role().values())
    bound, what = max((work, f"core-seconds ÷ {cores} cores"), (seconds, f"the longest thread, {longest}"))
    text = [
        f"## {case.title}",
        "",
        f"Wall {profile.wall:.2f} s, {profile.processor:.2f} core-seconds. Bound: max({work:.2f} s of core-seconds ÷ "
        f"{cores} cores, {seconds:.2f} s of the longest thread, {longest}) = **{bound:.2f} s, {what}**. The wall is "
        f"{profile.wall / bound:.2f} times that: {sum(lacking.values()):.2f} core-seconds had no work, and threads "
        f"that could run waited {waited:.2f} s for a core in all.",
        "",
        "| kind of work | threads | core-s | share | amount | a core-second | of what a core can |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = sorted(profile.merged["kinds"], key=lambda kind: -kind["processor"])
    shown = [kind for kind in kinds if kind["processor"] >= SHOWN * profile.processor]
    for kind in shown:
        text.append(_row(kind, profile, limits))
    rest = profile.processor - sum(kind["processor"] for kind in shown)
    text.append(
        f"| everything else (the interpreter, queues, small kinds) | – | {rest:.2f} | {rest / profile.processor:.0%} "
        "| – | – | – |"
    )
    text += ["", "| threads | ran | waited for a core |", "| --- | --- | --- |"]
    for role, (ran, waiting) in sorted(profile.by_role().items(), key=lambda item: -item[1][0]):
        text.append(f"| {role} | {ran:.2f} s | {waiting:.2f} s |")
    text += ["", "| no work for a core, while | core-s |", "| --- | --- |"]
    for stage, took in sorted(lacking.items(), key=lambda item: -item[1]):
        text.append(f"| {stage} | {took:.2f} |")
    return "\n".join(text)


SHOWN = 0.005  # of the core-seconds; what is less goes into the rest


def _row(kind: Mapping[str, Any], profile: Profile, limits: Ceilings) -> str:
    took = kind["processor"]
    amount, rate, share = "–", "–", "–"
    limit = limits.of_kind(kind["kind"])
    if kind["kind"] in (spans.COLLECTING, spans.MERGING):
        amount, rate = f"{kind['amount'] / 1e9:.2f} G δ", f"{kind['amount'] / took / 1e9:.2f} G δ"
        if kind["operations"]:
            flops = kind["operations"] / took
            rate += f", {flops / 1e9:.0f} GFLOP"
            share = f"{flops / limits.form:.0%} (products alone)"
    elif kind["amount"]:
        amount, rate = f"{kind['amount'] / 1e9:.2f} GB", f"{kind['amount'] / took / 1e9:.1f} GB"
        share = f"{kind['amount'] / took / limit:.0%}" if limit else "–"
    return (
        f"| {kind['kind']} | {kind['role']} | {took:.2f} | {took / profile.processor:.0%} | {amount} | {rate} | "
        f"{share} |"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where the time of a merge goes, and what bounds it.")
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="where the cases are kept")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=[case.name for case in all_cases()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=CORES)
    parser.add_argument(
        "--write", type=Path, nargs="?", const=ROOT / "benchmarks", metavar="FOLDER", help="write PROFILE.md there"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
