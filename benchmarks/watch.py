"""Running one participant and watching its whole process tree: time, memory, disk, and the limits it may not pass."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

SAMPLE_SECONDS = 0.05
# A process of 20 GB takes the kernel a tenth of a second to add up: looked at every 50 ms it would be slowed by that.
WATCH_SHARE = 0.1
DISK_EVERY = 5  # samples
LEAST_AVAILABLE = 1_000_000_000  # bytes; a machine that has fewer left begins to evict what the others' files need
TAIL = 2000  # characters of what a failed run said

Outcome = Literal["done", "over time", "over memory", "failed"]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One run. Times in seconds, sizes in bytes.

    ``seconds``, ``processor``: of the work, the start-up of the process and its imports not in it; ``whole``: of the
    process by the clock, with them. ``rss``, ``private`` (Private_Clean + Private_Dirty): the peaks of the sums over
    the process tree. ``disk``: the most that lay in the run's folder. ``others``: processor time that anybody else took
    meanwhile, in seconds. ``said``: by a run that failed.
    """

    outcome: Outcome
    seconds: float
    processor: float
    whole: float
    rss: int
    private: int
    disk: int
    others: float = 0.0
    device: str = ""
    said: str = ""


@dataclass
class _Peaks:
    rss: int = 0
    private: int = 0
    disk: int = 0
    stopped: Outcome | None = None


def watch(
    command: Sequence[str], *, folder: Path, run: Path, cap: float, environment: Mapping[str, str] | None = None
) -> Watched:
    """Run ``command`` in ``folder``; its files go to ``run``. It is killed after ``cap`` seconds, or when memory ends.

    A command whose last line of output is what ``Clock.report`` prints is taken at its word; any other's time is that
    of its process.
    """
    used, busy = _children_processor(), machine_seconds()
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    peaks = _Peaks()
    watcher = threading.Thread(target=_look, args=(process.pid, run, began + cap, peaks))
    watcher.start()
    output, errors = process.communicate()
    whole = time.perf_counter() - began
    watcher.join()
    processor = _children_processor() - used
    others = max(0.0, machine_seconds() - busy - processor)
    stopped = peaks.stopped
    if stopped is None and process.returncode == -signal.SIGKILL:
        stopped = "over memory"  # by the kernel, faster than we looked
    failed = stopped is None and process.returncode != 0
    own = {} if stopped or failed else _reported(output)
    return Watched(
        outcome=stopped or ("failed" if failed else "done"),
        seconds=own.get("seconds", whole),
        processor=own.get("processor", processor),
        whole=whole,
        rss=peaks.rss,
        private=peaks.private,
        disk=peaks.disk,
        others=others,
        device=own.get("device", ""),
        said=errors[-TAIL:] if failed else "",
    )


def _children_processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def machine_seconds() -> float:
    """Processor time of everybody on all cores, and what the machine below took away."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice  # guests are in user and nice


def _reported(output: str) -> dict[str, float | str]:
    lines = output.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith('{"seconds"') else {}


def _look(pid: int, run: Path, deadline: float, peaks: _Peaks) -> None:
    """Until the process ends: its peaks, every 50 ms or, where looking takes long, a tenth of the time."""
    samples = 0
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")  # if the kernel must kill, then this one
    except OSError:
        return  # it has ended
    while True:
        began = time.perf_counter()
        try:
            root = psutil.Process(pid)
            if root.status() == psutil.STATUS_ZOMBIE:
                break
            sums = [_memory(process) for process in (root, *root.children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        peaks.rss = max(peaks.rss, sum(rss for rss, _ in sums))
        peaks.private = max(peaks.private, sum(private for _, private in sums))
        if samples % DISK_EVERY == 0:
            peaks.disk = max(peaks.disk, disk_usage(run))
        samples += 1
        next_look = began + max(SAMPLE_SECONDS, (time.perf_counter() - began) / WATCH_SHARE)
        while peaks.stopped is None and (left := next_look - time.perf_counter()) > 0:
            time.sleep(min(left, SAMPLE_SECONDS))
            peaks.stopped = _limit_passed(deadline)
        if peaks.stopped is not None:
            os.killpg(pid, signal.SIGKILL)
            break
    peaks.disk = max(peaks.disk, disk_usage(run))


def _limit_passed(deadline: float) -> Outcome | None:
    if time.perf_counter() > deadline:
        return "over time"
    if psutil.virtual_memory().available < LEAST_AVAILABLE:
        return "over memory"
    return None


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Resident and private bytes of one process; zeros where it has just gone."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    return fields.get("Rss", 0), fields.get("Private_Clean", 0) + fields.get("Private_Dirty", 0)


def disk_usage(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk; some may go while it is looked at."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118 (often)
            except FileNotFoundError:
                continue
    return total
