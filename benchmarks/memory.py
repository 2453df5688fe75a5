"""Time and memory of merging four adapters into the 1.04 B-parameter case, beside the floor that no merge can beat.

    python -m benchmarks.memory [--folder FOLDER] [--rounds 3] [--write]

The case (benchmarks/synthetic.py) is built below FOLDER once. Each round runs, one after the other so that a busy
machine slows all of them alike: ``cp -r`` of the base, the bare float32 products B·A by ``torch.mm``, and the merge
(TIES, density 0.2) in a process of its own, on two cores. ``--write`` puts the table into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
from safetensors.torch import load_file

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from benchmarks.synthetic import ADAPTERS, LAYERS, MODULES, write_case
from worker.engine.kernels import load, warm_up
from worker.engine.run import merge_to_folder

CORES = 2
LIMIT = 2_000_000_000  # bytes of peak RSS that the merge must stay below
SAMPLE_SECONDS = 0.05
RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One process: the seconds its work took by the clock and of processor time, and its peaks in bytes."""

    seconds: float
    processor: float
    rss: int
    private: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the 1.04 B-parameter merge.")
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks/llama-1b"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--do", choices=("products", "merge"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        seconds, processor = {"products": do_products, "merge": do_merge}[options.do](options.folder)
        print(json.dumps({"seconds": seconds, "processor": processor}))
        return
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)  # inherited by every process measured
    busy = os.getloadavg()[0]
    if not (options.folder / "adapter-4" / "adapter_config.json").exists():
        print("building the case", file=sys.stderr)
        write_case(options.folder)
    found: dict[str, list[Measured]] = {"cp": [], "products": [], "merge": []}
    for number in range(1, options.rounds + 1):
        print(f"round {number} of {options.rounds}", file=sys.stderr)
        found["cp"].append(copy_base(options.folder))
        for name in ("products", "merge"):
            found[name].append(
                measure([sys.executable, "-m", "benchmarks.memory", "--folder", str(options.folder), "--do", name])
            )
    text = table(found, busy=busy, cores=len(cores))
    print(text)
    if options.write:
        RESULTS.write_text(text)
    if max(run.rss for run in found["merge"]) >= LIMIT:
        sys.exit(f"the merge's peak RSS is not below {LIMIT / 1e9:.0f} GB")


def copy_base(folder: Path) -> Measured:
    target = folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    measured = measure(["cp", "-r", str(folder / "base"), str(target)])
    shutil.rmtree(target)
    return measured


def do_products(folder: Path) -> tuple[float, float]:
    """Every B·A of every adapter, in float32, into one buffer."""
    adapters = [
        load_file(folder / f"adapter-{number}" / "adapter_model.safetensors") for number in range(1, ADAPTERS + 1)
    ]
    buffer = torch.empty(max(rows * columns for rows, columns in MODULES.values()))
    buffer.zero_()  # so that its pages are there
    clock = Clock()
    for layer in range(LAYERS):
        for module, (rows, columns) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            for factors in adapters:
                out = buffer[: rows * columns].view(rows, columns)
                torch.mm(factors[f"{key}.lora_B.weight"], factors[f"{key}.lora_A.weight"], out=out)
    return clock.read()


def do_merge(folder: Path) -> tuple[float, float]:
    """Planning and merging. Numba's compilation, which happens once a machine, is not in its time."""
    warm_up(load("auto"))
    out = folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    recipe = {
        "base_model": "base",
        "merge_method": "ties",
        "models": [{"adapter": f"adapter-{number}"} for number in range(1, ADAPTERS + 1)],
        "parameters": {"density": 0.2},
    }
    clock = Clock()
    merge_to_folder(make_plan(parse_recipe(recipe), Resolver(roots=[folder])), out)
    found = clock.read()
    shutil.rmtree(out)
    return found


class Clock:
    """Seconds by the clock and of processor time since it was made: this process's, or its ended children's."""

    def __init__(self, *, children: bool = False) -> None:
        self._who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
        self._began, self._used = time.perf_counter(), self._processor()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._began, self._processor() - self._used

    def _processor(self) -> float:
        usage = resource.getrusage(self._who)
        return usage.ru_utime + usage.ru_stime


def measure(command: list[str]) -> Measured:
    """Run a command and watch the memory of its whole process tree. Raises CalledProcessError where it fails."""
    clock = Clock(children=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {"rss": 0, "private": 0}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks))
    watcher.start()
    output, _ = process.communicate()
    seconds, processor = clock.read()
    watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    own = json.loads(output) if output else {"seconds": seconds, "processor": processor}
    return Measured(**own, rss=peaks["rss"], private=peaks["private"])


def _watch(pid: int, peaks: dict[str, int]) -> None:
    """Until the process ends: the peaks of the sums over it and its children, looked at every 50 ms."""
    while True:
        try:
            root = psutil.Process(pid)
            if root.status() == psutil.STATUS_ZOMBIE:
                return
            sums = [_memory(process) for process in (root, *root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        peaks["rss"] = max(peaks["rss"], sum(rss for rss, _ in sums))
        peaks["private"] = max(peaks["private"], sum(private for _, private in sums))
        time.sleep(SAMPLE_SECONDS)


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Resident and private bytes of one process; zeros where it has just gone."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    return fields.get("Rss", 0), fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0)


def table(found: dict[str, list[Measured]], *, busy: float, cores: int) -> str:
    """RESULTS.md: medians over the rounds of times, the highest of the peaks."""
    names = {
        "cp": "`cp -r` of the base",
        "products": "bare B·A products in float32 (`torch.mm`)",
        "merge": "the merge: TIES, density 0.2, four adapters",
    }
    rows = []
    for key, runs in found.items():
        times = ", ".join(f"{run.seconds:.1f}" for run in runs)
        processor = median(run.processor for run in runs)
        memory = f"{max(run.rss for run in runs) / 1e9:.2f} GB | {max(run.private for run in runs) / 1e9:.2f} GB"
        peaks = memory if key == "merge" else "– | –"
        rows.append(
            f"| {names[key]} | {median(run.seconds for run in runs):.1f} s | {times} | {processor:.1f} s | {peaks} |"
        )
    floor = median(run.seconds for run in found["cp"]) + median(run.seconds for run in found["products"])
    ratio = median(run.seconds for run in found["merge"]) / floor
    return "\n".join(
        [
            "# Measured",
            "",
            "Made by `python -m benchmarks.memory --write`; do not edit.",
            "",
            f"Machine: {cpu_name()}, {cores} cores used; load average at start {busy:.1f}. Base: Llama shape, 1.04 B "
            "parameters, bfloat16, five shards; four adapters of rank 16 on all seven linear modules. "
            f"Interleaved rounds: {len(found['merge'])}; page cache warm.",
            "",
            "| what | median | each round (s) | processor time, median | peak RSS | peak private |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"The merge takes {ratio:.1f} times the floor (the first two together); it hashes every byte of source and "
            "output meanwhile. Start-up of the process and compilation, once a machine, are not in its time. On a busy "
            "machine only processor time can be compared with another day's.",
            "",
        ]
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


if __name__ == "__main__":
    main()
