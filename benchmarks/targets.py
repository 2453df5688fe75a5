"""What the benchmark must show: each figure, how it follows from the runs, and its limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.runs import Runs

MAIN = "llama-1b-4"
OURS, OURS_LATER = "ours", "ours-known"
MISSED = "**not reached**"
Kernels = Sequence[Mapping[str, Any]]  # what benchmarks.kernels found, one for each machine and device
Measure: TypeAlias = Callable[[Runs, Kernels, str], "Figure | None"]


@dataclass(frozen=True)
class Figure:
    """A measured value; ``least``: it is at least that, since a run was stopped."""

    value: float
    least: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """``show`` formats a value; the value must be at most ``limit``, or at least it where ``floor``.

    ``figure`` is given who stands for ours. ``timed``: another's work on the machine changes it. ``later``: it is
    shown, too, of a merge whose sources' digests are known from an earlier one.
    """

    title: str
    limit: float
    floor: bool = False
    show: str = "{:.2f}"
    timed: bool = True
    later: bool = False
    figure: Measure

    def verdict(self, found: Figure | None) -> str:
        if found is None:
            return "open"
        if self.floor:
            if found.value >= self.limit:
                return "reached"
            return "open" if found.least else MISSED
        return "reached" if found.value <= self.limit else MISSED


def floor_seconds(runs: Runs, case: str, ways: Sequence[str] = ("products", "products-reused")) -> float | None:
    """``cp -r`` of the base plus the bare products, the fastest of the ``ways`` to make them."""
    copying = runs.seconds(case, "cp")
    products = [found for name in ways if (found := runs.seconds(case, name)) is not None]
    return None if copying is None or not products else copying + min(products)


def over_floor(way: str) -> Measure:
    return lambda runs, _, ours: _quotient(runs.seconds(MAIN, ours), floor_seconds(runs, MAIN, [way]))


def over_ours(case: str, peer: str) -> Measure:
    """A peer's wall ÷ ours. One that was stopped took at least as long as it was let run."""

    def figure(runs: Runs, _kernels: Kernels, name: str) -> Figure | None:
        ours, theirs = runs.seconds(case, name), runs.seconds(case, peer)
        if theirs is not None:
            return _quotient(theirs, ours)
        stopped = [run.watched.seconds for run in runs.of(case, peer) if run.watched.outcome == "over time"]
        return _quotient(max(stopped), ours, least=True) if stopped else None

    return figure


def between(upper: str, lower: str) -> Measure:
    """Our wall on one case ÷ on another."""
    return lambda runs, _, ours: _quotient(runs.seconds(upper, ours), runs.seconds(lower, ours))


def private_megabytes(runs: Runs, _kernels: Kernels, _ours: str) -> Figure | None:
    peaks = [run.watched.private for run in runs.of(MAIN, "ours") if run.done]
    return Figure(max(peaks) / 1e6) if peaks else None


def hashing_share(runs: Runs, _kernels: Kernels, _ours: str) -> Figure | None:
    with_hashes, without = runs.seconds(MAIN, "ours"), runs.seconds(MAIN, "ours-unhashed")
    if with_hashes is None or without is None:
        return None
    return Figure((with_hashes - without) / with_hashes * 100)


def over_copy_on_gpu(runs: Runs, _kernels: Kernels, _ours: str) -> Figure | None:
    """End to end, where the runs were made on a GPU."""
    if not any(run.watched.device == "cuda" for run in runs.of(MAIN, "ours")):
        return None
    return _quotient(runs.seconds(MAIN, "ours"), runs.seconds(MAIN, "cp"))


def of_kernels(key: str) -> Measure:
    """A figure that benchmarks.kernels measured on a GPU."""

    def figure(_runs: Runs, kernels: Kernels, _ours: str) -> Figure | None:
        found = [machine["figures"][key] for machine in kernels if key in machine.get("figures", {})]
        return Figure(found[-1]) if found else None

    return figure


def _quotient(upper: float | None, lower: float | None, *, least: bool = False) -> Figure | None:
    return None if upper is None or lower is None else Figure(upper / lower, least)


TARGETS: Sequence[Target] = (
    Target(
        title="1.04 B, four adapters, TIES per tensor: wall ÷ floor (`cp -r` plus the bare float32 B·A products, a "
        "fresh result each, as `torch.mm(B, A)` gives them)",
        limit=2.0,
        later=True,
        figure=over_floor("products"),
    ),
    Target(
        title="the same ÷ a floor whose products all go into one buffer (`torch.mm(B, A, out=…)`)",
        limit=2.0,
        later=True,
        figure=over_floor("products-reused"),
    ),
    Target(
        title="the same: mergekit's wall ÷ ours",
        limit=60,
        floor=True,
        show="{:.0f}",
        later=True,
        figure=over_ours(MAIN, "mergekit"),
    ),
    Target(
        title="the same: PEFT's plain `ties` plus `merge_and_unload` ÷ ours",
        limit=3,
        floor=True,
        later=True,
        figure=over_ours(MAIN, "peft-ties"),
    ),
    Target(title="the same: peak private memory", limit=700, show="{:.0f} MB", timed=False, figure=private_megabytes),
    Target(
        title="four full fine-tunes: mergekit's wall ÷ ours",
        limit=35,
        floor=True,
        show="{:.0f}",
        later=True,
        figure=over_ours("llama-1b-full-4", "mergekit"),
    ),
    Target(title="`trim_scope: model` ÷ `tensor`, wall", limit=1.6, figure=between("llama-1b-4-model", MAIN)),
    Target(title="16 adapters ÷ 4 adapters, wall", limit=4.2, figure=between("llama-1b-16", MAIN)),
    Target(
        title="sha256 of outputs, on against off, of the wall (statistics are counted by the merge kernel on the way, "
        "cannot be turned off, and are in both)",
        limit=20,
        show="{:.0f} %",
        figure=hashing_share,
    ),
    Target(
        title="on a GPU: apply kernel, full fine-tunes, share of measured HBM bandwidth",
        limit=75,
        floor=True,
        show="{:.0f} %",
        figure=of_kernels("apply_bandwidth_percent"),
    ),
    Target(
        title="on a GPU: LoRA TIES of four r=16 adapters over 8 B parameters in memory, kernel time",
        limit=0.5,
        show="{:.3f} s",
        figure=of_kernels("lora_8b_seconds"),
    ),
    Target(title="on a GPU: end to end ÷ copying the base on that machine", limit=1.3, figure=over_copy_on_gpu),
)
