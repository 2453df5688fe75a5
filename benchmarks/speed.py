"""Mergeyard, its floor and its peers on the same merges, in one go and interleaved.

    python -m benchmarks.speed [--quick] [--folder FOLDER] [--cases …] [--peers …] [--rounds 5] [--write]

The cases (benchmarks/cases.py) are written below FOLDER where they are missing, about 12 GB for all of them. A round
runs every participant of every case once, one after the other, so that a busy machine slows all of them alike. Every
run is kept in FOLDER/runs.jsonl: stopped and started again, the benchmark goes on where it was. ``--write`` makes
benchmarks/RESULTS.md and its plot of what is kept; with ``--rounds 0`` it only does that.

Peers run in environments of their own, FOLDER/environments/mergekit and …/peft (benchmarks/peers/environment.sh makes
them). Ours and the floor run in every round; a peer that took more than a minute runs twice, and one that was stopped
(after 600 s, or at the end of memory) once: it could only be stopped again. ``--quick`` takes two small rounds with
nothing kept from before: under two minutes once the cases are there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.cases import Case, all_cases
from benchmarks.participants import PARTICIPANTS, Participant
from benchmarks.report import write_report
from benchmarks.runs import Run, Runs
from benchmarks.watch import disk_usage, watch

ROOT = Path(__file__).resolve().parent.parent
CORES = 2
CAP = 600.0  # seconds
LONG = 60.0  # a peer that takes more runs LONG_ROUNDS times
LONG_ROUNDS = 2
QUICK = {
    "smollm2-4": ("cp", "products", "products-reused", "ours", "peft-ties"),
    "llama-1b-4": ("cp", "products", "products-reused", "ours"),
}


def main() -> None:
    options = _options()
    cases = chosen(options.cases, options.peers, quick=options.quick)
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)  # inherited by every process measured
    environments = options.environments or options.folder / "environments"
    kept = options.folder / ("runs-quick.jsonl" if options.quick else "runs.jsonl")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.quick:
        kept.unlink(missing_ok=True)
    runs = Runs(kept)
    runs.forget(options.again)
    if options.rounds:
        require_environments(cases, environments)
        for case in cases:
            case.prepare(options.folder)
    for number in range(1, options.rounds + 1):
        make_round(cases, number, runs, options.folder, environments, cap=options.cap)
    text = write_report(runs, all_cases(), folder=options.folder, cores=len(cores), into=options.write)
    print(text)


def chosen(names: Sequence[str], peers: Sequence[str] | None, *, quick: bool) -> list[Case]:
    """The cases by name (none: all), with those of their participants that are ours, the floor, or wanted."""

    def wanted(case: Case, name: str) -> bool:
        if quick and name not in QUICK.get(case.name, ()):
            return False
        return peers is None or PARTICIPANTS[name].role != "peer" or name in peers

    cases = [
        replace(case, participants=tuple(name for name in case.participants if wanted(case, name)))
        for case in all_cases()
        if not names or case.name in names
    ]
    return [case for case in cases if case.participants]


def require_environments(cases: Sequence[Case], environments: Path) -> None:
    """Ends the program where a peer that is to run has none."""
    wanted = {PARTICIPANTS[name] for case in cases for name in case.participants}
    missing = {peer.environment for peer in wanted if not Path(peer.python(environments)).exists()}
    for name in sorted(filter(None, missing)):
        print(f"missing: benchmarks/peers/environment.sh {name} {environments / name}", file=sys.stderr)
    if missing:
        sys.exit("Make these environments, or name the peers that are to run: --peers [NAME …]")


def make_round(
    cases: Sequence[Case], number: int, runs: Runs, folder: Path, environments: Path, *, cap: float = CAP
) -> None:
    """Run every participant of every case once, but those whose run of this round is kept, or that need no more."""
    for case in cases:
        for name in case.participants:
            if not is_due(runs.of(case.name, name), PARTICIPANTS[name], number):
                continue
            print(f"round {number}: {case.name}, {name} … ", end="", file=sys.stderr, flush=True)
            run = make_run(case, PARTICIPANTS[name], number, folder, environments, cap=cap)
            runs.add(run)
            print(f"{run.watched.outcome}, {run.watched.seconds:.1f} s", file=sys.stderr)
            if run.watched.said:
                print(run.watched.said, file=sys.stderr)


def is_due(made: Sequence[Run], participant: Participant, number: int) -> bool:
    if any(run.round == number for run in made):
        return False
    if participant.role != "peer":
        return True
    if any(not run.done for run in made):
        return False
    return len(made) < LONG_ROUNDS or all(run.watched.whole <= LONG for run in made)


def make_run(case: Case, participant: Participant, number: int, folder: Path, environments: Path, *, cap: float) -> Run:
    """One run from like conditions: sources in the page cache, nothing waiting to be written, an empty folder."""
    place = folder.resolve() / "run"
    shutil.rmtree(place, ignore_errors=True)
    scratch = place / "scratch"
    scratch.mkdir(parents=True)
    job = case.job(folder, place)
    path = place / "job.json"
    job.write(path)
    _read_through([job.base, *job.adapters, *job.finetunes])
    os.sync()
    load = os.getloadavg()[0]
    began = datetime.now(UTC).isoformat(timespec="seconds")
    watched = watch(
        participant.command(job, path, environments),
        folder=ROOT,
        run=place,
        cap=cap,
        environment={"TMPDIR": str(scratch), "HF_HOME": str(scratch / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    result = disk_usage(Path(job.out))
    shutil.rmtree(place)
    return Run(
        case=case.name,
        participant=participant.name,
        round=number,
        began=began,
        load=load,
        commit=_commit(),
        watched=watched,
        temporary=max(0, watched.disk - result),
    )


def _read_through(folders: Sequence[str]) -> None:
    piece = bytearray(1 << 24)
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(piece):
                    pass


def _commit() -> str:
    """Of this checkout, with a + where something in it is changed; empty outside of one."""
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mergeyard, its floor and its peers on the same merges.")
    names = [case.name for case in all_cases()]
    peers = [participant.name for participant in PARTICIPANTS.values() if participant.role == "peer"]
    parser.add_argument("--quick", action="store_true", help="two small cases, two rounds, at most one peer")
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="where cases and runs are kept")
    parser.add_argument("--environments", type=Path, help="where the peers' are; default FOLDER/environments")
    parser.add_argument("--cases", nargs="*", default=[], choices=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--peers", nargs="*", choices=peers, metavar="PEER", help=", ".join(peers))
    parser.add_argument("--rounds", type=int, help="5, or 2 with --quick; 0 only shows what is kept")
    parser.add_argument("--cores", type=int, default=CORES, help="that everybody may use")
    parser.add_argument("--cap", type=float, default=CAP, help="seconds after which a run is stopped")
    parser.add_argument(
        "--again", nargs="+", default=[], choices=PARTICIPANTS, metavar="NAME", help="forget the runs of"
    )
    parser.add_argument(
        "--write", type=Path, nargs="?", const=ROOT / "benchmarks", metavar="FOLDER", help="write RESULTS.md there"
    )
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 2 if options.quick else 5
    return options


if __name__ == "__main__":
    main()
