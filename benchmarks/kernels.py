"""Each kernel against its roofline: what the machine's memory and arithmetic allow, both measured here.

    python -m benchmarks.kernels [--devices cpu cuda] [--folder FOLDER] [--values N] [--block N]

On the CPU with one thread and with two (or as many as ``--threads`` says), each doing whole blocks as the engine has
them; on a GPU, where torch finds one, on data that lies there. ``--folder`` keeps the figures as
FOLDER/kernels-DEVICE.json, from where ``benchmarks.speed --write`` takes them. Only what worker/engine/kernels imports
is imported, so this runs on a bare GPU machine.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cpu_name
from benchmarks.merge_in_memory import DENSITY, LAYERS_8B, RANK, RULE, SOURCES, lora_seconds
from benchmarks.timing import seconds_of, wait
from worker.engine.kernels import Kernels, load, warm_up
from worker.engine.kernels.signature import COARSE_BINS, FINE_BINS, Delta, Difference, Product, Trim

COLUMNS = 2048
INSIDE = 0.01  # share of the values that a bracket holds
BANDWIDTH_VALUES = {"cpu": 1 << 26, "cuda": 1 << 29}  # float32; far beyond any cache
MATRIX = {"cpu": 4096, "cuda": 8192}
VALUES = {"cpu": 1 << 24, "cuda": 1 << 27}  # of the tensor whose blocks are worked on
BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}
OPERANDS = ("dense", "product", "difference")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel on one kind of operand: seconds a value of δ (of a parameter where N δs are merged: of all N).

    ``bytes``, ``operations``: moved to or from memory, and of float32 arithmetic (comparisons are some), a parameter.
    """

    kernel: str
    operand: str
    threads: int
    parameters: int
    seconds: float
    deltas: int
    bytes: float
    operations: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """``bandwidth`` in bytes/s and ``peak`` in FLOP/s, by number of threads ("0" on a GPU)."""

    device: str
    machine: str
    block: int
    bandwidth: Mapping[str, float]
    peak: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one thread works on: its blocks of base, result and each δ, and memory of its own for what is found."""

    bases: Sequence[torch.Tensor]
    results: Sequence[torch.Tensor]
    deltas: Sequence[Sequence[Delta]]  # by block
    floats: torch.Tensor
    coarse: torch.Tensor
    fine: torch.Tensor
    found: torch.Tensor


def main() -> None:
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description="Each kernel against its roofline.")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, min(2, len(os.sched_getaffinity(0)))])
    parser.add_argument("--values", type=int, help="parameters of the tensor")
    parser.add_argument("--block", type=int, help="parameters of a block")
    parser.add_argument("--folder", type=Path, help="keep the figures there")
    options = parser.parse_args()
    for device in options.devices:
        values, block = options.values or VALUES[device], options.block or BLOCK[device]
        found = measure(device, sorted(set(options.threads)), values=values, block=min(block, values))
        print(markdown(asdict(found)))
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
            (options.folder / f"kernels-{device}.json").write_text(json.dumps(asdict(found), indent=2))


def measure(device: str, threads: Sequence[int], *, values: int, block: int) -> Found:
    """Everything about one device. ``values``, ``block``: multiples of COLUMNS."""
    kernels = load("cuda" if device == "cuda" else "cpu")
    warm_up(kernels)
    counts = [0] if device == "cuda" else threads
    bandwidth = {str(count): bandwidth_of(device, max(1, count)) for count in counts}
    peak = {str(count): peak_of(device, max(1, count)) for count in counts}
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [
            row
            for count in counts
            for operand in OPERANDS
            for row in rows_of(kernels, device, operand, max(1, count), values=values, block=block)
        ]
    finally:
        torch.set_num_threads(held)
    figures = gpu_figures(kernels, rows, bandwidth["0"]) if device == "cuda" else {}
    return Found(
        device=device,
        machine=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        block=block,
        bandwidth=bandwidth,
        peak=peak,
        rows=[{**asdict(row), "threads": row.threads if device == "cpu" else 0} for row in rows],
        figures=figures,
    )


def bandwidth_of(device: str, threads: int) -> float:
    """Bytes/s, read plus written: the better of a copy and a triad, each thread on a part of its own."""
    size = BANDWIDTH_VALUES[device]
    parts = [torch.ones(3, size // 4 // threads, device=device) for _ in range(threads)]
    nbytes = 4 * parts[0].shape[1] * threads

    def copy(thread: int) -> None:
        parts[thread][0].copy_(parts[thread][1])

    def triad(thread: int) -> None:
        torch.add(parts[thread][1], parts[thread][2], alpha=3.0, out=parts[thread][0])

    held = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return max(2 * nbytes / seconds_of(copy, device, threads), 3 * nbytes / seconds_of(triad, device, threads))
    finally:
        torch.set_num_threads(held)


def peak_of(device: str, threads: int) -> float:
    """FLOP/s of a large float32 matrix product, a multiplication and an addition counted each (TF32 is off)."""
    size = MATRIX[device]
    left, right = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    out = torch.empty_like(left)
    held = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return 2 * size**3 / seconds_of(lambda _: torch.mm(left, right, out=out), device, 1, pool=False)
    finally:
        torch.set_num_threads(held)


def rows_of(kernels: Kernels, device: str, operand: str, threads: int, *, values: int, block: int) -> Iterator[Row]:
    """Every kernel on one kind of operand."""
    parts = make_parts(kernels, device, operand, threads, values=values, block=block)
    trim = Trim(threshold=threshold_of(kernels, parts[0].deltas[0][0], parts[0].floats, DENSITY))
    bracket = (
        threshold_of(kernels, parts[0].deltas[0][0], parts[0].floats, DENSITY + INSIDE / 2),
        threshold_of(kernels, parts[0].deltas[0][0], parts[0].floats, DENSITY - INSIDE / 2),
    )
    prefix = trim.threshold >> 16
    trims, weights = [trim] * SOURCES, [1.0] * SOURCES

    def each(work: Callable[[Part, int, Delta], object]) -> Callable[[int], None]:
        """One δ a call: the first source's of every block."""

        def run(thread: int) -> None:
            part = parts[thread]
            for index, deltas in enumerate(part.deltas):
                work(part, index, deltas[0])

        return run

    def together(work: Callable[[Part, int, Sequence[Delta]], object]) -> Callable[[int], None]:
        """All sources in one call."""

        def run(thread: int) -> None:
            part = parts[thread]
            for index, deltas in enumerate(part.deltas):
                work(part, index, deltas)

        return run

    # per δ: bytes read of it, operations that form it
    own_bytes = {"dense": 4.0, "product": 0.0, "difference": 4.0}[operand]
    forming = {"dense": 0.0, "product": 2.0 * RANK, "difference": 1.0}[operand]
    shared = 2.0 if operand == "difference" else own_bytes  # merged, the base of all differences is read once
    plans: Sequence[tuple[str, Callable[[int], None], int, float, float]] = (
        # what it writes stays in the caches, as in the engine
        ("form", each(lambda part, _, delta: kernels.form(delta, part.floats)), 1, own_bytes, forming),
        (
            "histogram, coarse",
            each(lambda part, _, delta: kernels.histogram(delta, part.coarse, None)),
            1,
            own_bytes,
            forming,
        ),
        (
            "histogram, fine",
            each(lambda part, _, delta: kernels.histogram(delta, part.fine, prefix)),
            1,
            own_bytes,
            forming + 1,
        ),
        (
            "collect",
            together(lambda part, _, deltas: kernels.collect(deltas, [bracket] * SOURCES, part.found)),
            SOURCES,
            SOURCES * (own_bytes + 4 * INSIDE),
            SOURCES * (forming + 2),
        ),
        (
            "count_equal",
            each(lambda _, __, delta: kernels.count_equal(delta, trim.threshold)),
            1,
            own_bytes,
            forming + 1,
        ),
        ("kept_l1", each(lambda _, __, delta: kernels.kept_l1(delta, trim)), 1, own_bytes, forming + 2),
        (
            "elected_balance",
            together(lambda _, __, deltas: kernels.elected_balance(deltas, trims, weights, RULE)),
            SOURCES,
            SOURCES * shared + (2 if operand == "difference" else 0),
            SOURCES * (forming + 2) + 1,
        ),
        (
            "merge",
            together(
                lambda part, index, deltas: kernels.merge(
                    part.bases[index], deltas, trims, weights, RULE, part.results[index]
                )
            ),
            SOURCES,
            SOURCES * shared + 4,  # base in, result out
            SOURCES * (forming + 4) + 4,
        ),
    )
    for name, work, deltas, nbytes, operations in plans:
        yield Row(
            kernel=name,
            operand=operand,
            threads=threads,
            parameters=values,
            seconds=seconds_of(work, device, threads),
            deltas=deltas,
            bytes=nbytes,
            operations=operations,
        )


def make_parts(kernels: Kernels, device: str, operand: str, threads: int, *, values: int, block: int) -> list[Part]:
    """A tensor of bfloat16 with SOURCES changes, cut into blocks, which go round the threads."""
    generator = torch.Generator(device=device).manual_seed(1)

    def noise(*shape: int, sigma: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(sigma)

    base = noise(values, sigma=0.02).bfloat16()
    result = torch.empty_like(base)
    rows = values // COLUMNS
    sources: list[Callable[[int, int], Delta]] = []
    for _ in range(SOURCES):
        if operand == "dense":
            dense = noise(values, sigma=1e-3)
            sources.append(lambda start, stop, dense=dense: dense[start:stop])
        elif operand == "difference":
            own = (base.float() + noise(values, sigma=1e-3)).bfloat16()
            sources.append(lambda start, stop, own=own: Difference(own[start:stop], base[start:stop]))
        else:
            left = kernels.place(noise(rows, RANK, sigma=0.02))
            right = kernels.place(noise(RANK, COLUMNS, sigma=0.02))
            sources.append(
                lambda start, stop, left=left, right=right: Product(
                    left[start // COLUMNS : stop // COLUMNS], right, 2.0
                )
            )
    cuts = [(start, min(start + block, values)) for start in range(0, values, block)]

    def part(thread: int) -> Part:
        own = cuts[thread::threads]
        return Part(
            bases=[base[start:stop] for start, stop in own],
            results=[result[start:stop] for start, stop in own],
            deltas=[[source(start, stop) for source in sources] for start, stop in own],
            floats=torch.empty(block, device=device),
            coarse=torch.zeros(COARSE_BINS, dtype=torch.int64, device=device),
            fine=torch.zeros(FINE_BINS, dtype=torch.int64, device=device),
            found=torch.empty(SOURCES, block // 16, dtype=torch.int32, device=device),
        )

    return [part(thread) for thread in range(threads)]


def threshold_of(kernels: Kernels, delta: Delta, room: torch.Tensor, density: float) -> int:
    """The magnitude, as bits, that about ``density`` of a block's values exceed."""
    kernels.form(delta, room)
    wait(room.device.type)
    magnitudes = room.abs()
    k = max(1, int(density * len(magnitudes)))
    return int(magnitudes.topk(k).values[-1].view(torch.int32))


def gpu_figures(kernels: Kernels, rows: Sequence[Row], bandwidth: float) -> dict[str, float]:
    """What the issue on speed asks of a GPU."""
    (apply,) = (row for row in rows if (row.kernel, row.operand) == ("merge", "difference"))
    return {
        "apply_bandwidth_percent": 100 * apply.bytes * apply.parameters / apply.seconds / bandwidth,
        "lora_8b_seconds": lora_seconds(kernels, "cuda", layers=LAYERS_8B),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """A section of RESULTS.md."""
    on_gpu = found["device"] == "cuda"
    rows = [
        f"## Kernels: {found['machine']}",
        "",
        *(_limits(found, threads) for threads in found["bandwidth"]),
        "",
        f"Blocks of {found['block']} parameters; {SOURCES} sources, rank {RANK}, bfloat16. Times are a value of δ. "
        "Bytes are those of the operands that come and go, operations those of float32. Share of the roofline: the "
        "least time that bandwidth and peak allow ÷ the time taken. The peak is of fused multiply-adds, which the "
        "kernels do not use (results must not depend on them), so half of it is the most a product can reach.",
        "",
        f"| kernel | δ | {'' if on_gpu else 'threads | '}ns a value | GB/s | of bandwidth | GOP/s | of peak "
        "| of roofline |",
        "| --- | --- | " + ("" if on_gpu else "--- | ") + "--- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        threads = str(row["threads"])
        bandwidth, peak = found["bandwidth"][threads], found["peak"][threads]
        moved, calculated = (row[what] * row["parameters"] / row["seconds"] for what in ("bytes", "operations"))
        nanoseconds = row["seconds"] / row["parameters"] / row["deltas"] * 1e9
        cells = [
            row["kernel"],
            row["operand"],
            *([] if on_gpu else [threads]),
            f"{nanoseconds:.{3 if nanoseconds < 0.1 else 2}f}",
            f"{moved / 1e9:.1f}",
            f"{moved / bandwidth:.0%}",
            f"{calculated / 1e9:.1f}",
            f"{calculated / peak:.0%}",
            f"{max(moved / bandwidth, calculated / peak):.0%}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    if found["figures"]:
        rows.append("\n" + "; ".join(f"{name}: {value:.3f}" for name, value in found["figures"].items()) + ".")
    return "\n".join(rows)


def _limits(found: Mapping[str, Any], threads: str) -> str:
    who = "" if found["device"] == "cuda" else f"{threads} thread{'s' if threads != '1' else ''}: "
    bandwidth, peak = found["bandwidth"][threads], found["peak"][threads]
    return f"- {who}{bandwidth / 1e9:.1f} GB/s (copy or triad), {peak / 1e9:.0f} GFLOP/s (float32 matrix product)"


if __name__ == "__main__":
    main()
