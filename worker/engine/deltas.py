"""Task vectors, block by block: what each source changes in the values of one block.

Where that is a plain product or a plain difference the kernels are given what it is made of, and form it on the way.
Anything else is formed here, in float32. Every pass over a tensor sees the same bits: blocks are cut by shape alone,
each product formed here is one single-threaded BLAS call a block, and operands and results start at 64-byte boundaries
or at the same offset from one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, LifoQueue

import torch

from app.errors import MergeyardError
from app.planning.budgets import DELTA_BYTES, PRODUCT_RANK
from app.planning.plan import Contribution, TensorPlan
from app.sources.source import StoredTensor, TensorSpec
from worker.engine.blocks import Block, cut, row_width
from worker.engine.factors import FactorReader, Factors, norms_span_blocks
from worker.engine.kernels.signature import Delta, Difference, Kernels, Product
from worker.engine.reader import Reader, dtype_of

_ALIGNED = 16  # float32 values in 64 bytes
SAMPLE_GROUPS = 32
_SAMPLE_VALUES = 2048  # of a group of whole rows
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Scratch:
    """Memory one block needs while it is worked on. Grows to the largest block seen and stays."""

    def __init__(self, memory: Callable[[int], torch.Tensor]) -> None:
        """``memory``: the kernels'."""
        self._memory = memory
        self._parts: dict[str, torch.Tensor] = {}

    def bytes(self, part: str, size: int) -> torch.Tensor:
        """uint8 (size,), uninitialised; the same memory each time for the same ``part``."""
        held = self._parts.get(part)
        if held is None or len(held) < size:
            held = self._parts[part] = self._memory(size)
        return held[:size]

    def floats(self, part: str, size: int) -> torch.Tensor:
        """float32 (size,), uninitialised."""
        return self.bytes(part, size * 4).view(torch.float32)


class ScratchPool:
    """As many Scratches as blocks are worked on at once."""

    def __init__(self, memory: Callable[[int], torch.Tensor]) -> None:
        self._memory = memory
        self._free: LifoQueue[Scratch] = LifoQueue()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Scratch]:
        try:
            scratch = self._free.get_nowait()
        except Empty:
            scratch = Scratch(self._memory)
        try:
            yield scratch
        finally:
            self._free.put(scratch)


@dataclass(frozen=True, slots=True)
class OpenSource:
    """What a source's δ of a tensor is made of: scale · (own values - base + ΔW of factors + values as they are).

    ``added``: float32, flat.
    """

    full: StoredTensor | None = None
    lora: Factors | None = None
    added: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def product(self) -> Factors | None:
        """The factors, where δ is nothing but a product that costs less to form than to write and read back."""
        lora = self.lora
        if lora is None or self.full is not None or self.added is not None:
            return None
        return lora if lora.magnitude is None and 1 <= lora.rank <= PRODUCT_RANK else None

    def subtracts(self, base: StoredTensor) -> bool:
        """Whether δ is nothing but the difference of two tensors that the kernels can read."""
        if self.full is None or self.lora is not None or self.added is not None:
            return False
        return all(dtype_of(stored.dtype, stored.name) in KERNEL_DTYPES for stored in (self.full, base))

    @property
    def takes_long(self) -> bool:
        """Whether a δ that is formed here is worth keeping for the next pass."""
        return self.full is not None or self.lora is not None


class TensorDeltas:
    """The task vectors of one tensor. Blocks may be asked for from several threads, each block by one at a time."""

    def __init__(
        self,
        tensor: TensorPlan,
        sources: Sequence[OpenSource],
        reader: Reader,
        kernels: Kernels,
        kept: torch.Tensor | None = None,
    ) -> None:
        """``kept`` (float32, flat) holds the δ that are formed here, of all blocks; None keeps nothing."""
        self.tensor = tensor
        self.blocks = cut(tensor.shape)
        self._sources, self._reader, self._kernels = sources, reader, kernels
        self._products = [None if own.product is None else own.product.placed(kernels.place) for own in sources]
        self._kept = kept
        self._dense = dense_sources(tensor, sources)
        self._formed = [False] * len(self.blocks)

    def forget(self) -> None:
        """Let go of the memory of what was formed: asked again, it is formed anew."""
        self._kept = None

    def operands(
        self,
        block: Block,
        scratch: Scratch,
        wanted: Sequence[int] | None = None,
        base: torch.Tensor | None = None,
    ) -> list[Delta]:
        """δ of the ``wanted`` contributions (None: of all) over the block, as the kernels take it.

        ``base``: what ``stored_base`` gave for the block, where the caller has it. Valid until ``scratch`` is used
        again.
        """
        chosen = range(len(self._sources)) if wanted is None else wanted
        dense = self._dense_rows(block, scratch, chosen)
        deltas: list[Delta] = []
        for index in chosen:
            own, product = self._sources[index], self._products[index]
            if index in dense:
                deltas.append(dense[index])
            elif product is not None:
                rectangle = product.rectangle(block.start, block.stop)
                if rectangle is None:
                    deltas.append(self._pieces(index, block, scratch.floats(f"pieces {index}", block.size)))
                else:
                    deltas.append(Product(*rectangle, product.scale * own.scale))
            else:
                assert own.full is not None  # it subtracts
                base = self.stored_base(block, scratch) if base is None else base
                raw = scratch.bytes(f"own {index}", block.size * 8)
                deltas.append(Difference(self._reader.native(own.full, block.start, block.stop, raw), base, own.scale))
        return deltas

    def of(self, block: Block, scratch: Scratch) -> torch.Tensor:
        """δ of every contribution over the block, float32 (N, n); valid until ``scratch`` is used again."""
        formed = scratch.floats("formed", len(self._sources) * block.size).view(len(self._sources), block.size)
        for delta, row in zip(self.operands(block, scratch), formed, strict=True):
            self._kernels.form(delta, row)
        return formed

    def stored_base(self, block: Block, scratch: Scratch) -> torch.Tensor:
        """The base over the block (n,) as the kernels take it: as it is stored, or in float32."""
        stored = self.tensor.base
        raw = scratch.bytes("base", block.size * 8)
        if dtype_of(stored.dtype, stored.name) in KERNEL_DTYPES:
            return self._reader.native(stored, block.start, block.stop, raw)
        values = scratch.floats("base values", block.size)
        self._reader.float32(stored, block.start, block.stop, values, raw)
        return values

    def sample(self, index: int, columns: int, scratch: Scratch) -> torch.Tensor:
        """Some values of one contribution's δ, float32 (groups, m), each group spread over the tensor.

        Their last bits need not be those that a block has. Of a plain product each group is a grid of rows and
        ``columns`` columns of its own, else a few whole rows.
        """
        own = self._sources[index]
        if own.lora is not None and own.full is None and own.added is None and own.lora.spans(self.tensor.shape):
            return own.lora.sample(SAMPLE_GROUPS, columns) * own.scale
        width = row_width(self.tensor.shape)
        rows = math.prod(self.tensor.shape) // width
        taken = min(-(-_SAMPLE_VALUES // width), -(-rows // SAMPLE_GROUPS))
        values = torch.empty(SAMPLE_GROUPS, taken * width)
        for group in range(SAMPLE_GROUPS):
            start = group * (rows - taken) // (SAMPLE_GROUPS - 1) * width
            self._form(index, Block(0, start, start + taken * width), values[group], scratch)
        return values

    def _dense_rows(self, block: Block, scratch: Scratch, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """The δ that are formed here, of those wanted: where they are kept all of them are, once."""
        kept = self._kept
        if kept is None:
            found = {index: scratch.floats(f"dense {index}", block.size) for index in self._dense if index in wanted}
        else:
            # all blocks but the last have the size of the first
            place = block.index * kept_values(self.blocks[:1], len(self._dense))
            rows = kept[place : place + len(self._dense) * block.size].view(len(self._dense), block.size)
            found = dict(zip(self._dense, rows, strict=True))
        if kept is None or not self._formed[block.index]:
            for index, values in found.items():
                self._form(index, block, values, scratch)
            self._formed[block.index] = kept is not None
        return found

    def _form(self, index: int, block: Block, delta: torch.Tensor, scratch: Scratch) -> None:
        own = self._sources[index]
        if own.product is not None:
            self._pieces(index, block, delta)
            return
        if own.lora is not None and own.lora.magnitude is not None:
            self._rescaled(own.lora, own.full or self.tensor.base, block, delta, scratch)
        elif own.full is not None:
            self._read(own.full, block, delta, scratch)
            self._subtract_base(block, delta, scratch)
            if own.lora is not None:
                own.lora.add_product(block.start, block.stop, delta, keep=True)
        elif own.lora is not None:
            own.lora.add_product(block.start, block.stop, delta, keep=False)
        else:
            delta.zero_()
        if own.added is not None:
            delta.add_(own.added[block.start : block.stop])
        if own.scale != 1.0:
            delta.mul_(own.scale)

    def _pieces(self, index: int, block: Block, delta: torch.Tensor) -> torch.Tensor:
        """A product over a block that holds parts of several of its matrices, or values beyond them."""
        product = self._products[index]
        assert product is not None
        delta.zero_()  # rows of a vocabulary that grew after the adapter was trained
        scale = product.scale * self._sources[index].scale
        for left, right, place in product.rectangles(block.start, block.stop):
            self._kernels.form(Product(left, right, scale), delta[place])
        return delta

    def _rescaled(
        self, factors: Factors, weights: StoredTensor, block: Block, delta: torch.Tensor, scratch: Scratch
    ) -> None:
        """DoRA: what the weights become, minus the base."""
        self._read(weights, block, delta, scratch)
        factors.add_product(block.start, block.stop, delta, keep=True)
        factors.rescale(block.start, block.stop, delta, self.tensor.name)
        self._subtract_base(block, delta, scratch)

    def _subtract_base(self, block: Block, delta: torch.Tensor, scratch: Scratch) -> None:
        base = scratch.floats("subtracted", block.size)
        self._read(self.tensor.base, block, base, scratch)
        delta.sub_(base)

    def _read(self, stored: StoredTensor, block: Block, values: torch.Tensor, scratch: Scratch) -> None:
        self._reader.float32(stored, block.start, block.stop, values, scratch.bytes("raw", block.size * 8))


class _Buffer:
    """Memory for the Δ of one tensor after the other; grows and stays."""

    def __init__(self) -> None:
        self._values = torch.empty(0, dtype=torch.float32)

    def of(self, values: int) -> torch.Tensor:
        """float32, at least ``values`` of them, uninitialised."""
        if len(self._values) < values:
            self._values = torch.empty(0, dtype=torch.float32)  # the smaller one goes first
            self._values = torch.empty(values, dtype=torch.float32)
        return self._values


class Deltas:
    """Opens the task vectors of one tensor after the other, keeping those of the last two in memory where they fit."""

    def __init__(
        self, plan_sources: Sequence[str], reader: Reader, kernels: Kernels, budget: int = DELTA_BYTES
    ) -> None:
        """``plan_sources``: the references, for messages.

        ``budget``: bytes of Δ kept between passes, half of it for each of two tensors; where it is more, or cheap to
        form, it is formed anew in each.
        """
        self._references, self._reader, self._kernels, self._budget = plan_sources, reader, kernels, budget
        self._factors = FactorReader(reader)
        self._norms: dict[tuple[str, int], torch.Tensor] = {}  # of every pass over the model; a value for each output
        # the last two, the one asked for last behind: one is opened while the other's blocks are merged
        self._opened: list[tuple[TensorDeltas, _Buffer]] = []

    def open(self, tensor: TensorPlan, prescale: Sequence[float]) -> TensorDeltas:
        """The tensor's task vectors; one of the last two opened again is the same value. Factors are read here, whole.

        Raises ``source_not_finite`` where a factor holds NaN or infinity.
        """
        place = next((place for place, (opened, _) in enumerate(self._opened) if opened.tensor is tensor), None)
        if place is not None:
            self._opened.append(self._opened.pop(place))
            return self._opened[-1][0]
        buffer = _Buffer()
        while len(self._opened) > 1:
            forgotten, buffer = self._opened.pop(0)
            forgotten.forget()  # the caller may hold it until it has the next
        sources = [
            self._open(tensor, contribution, scale)
            for contribution, scale in zip(tensor.contributions, prescale, strict=True)
        ]
        kept = self._kept_values(tensor, sources)
        memory = None if kept is None else buffer.of(kept)
        self._opened.append((TensorDeltas(tensor, sources, self._reader, self._kernels, memory), buffer))
        return self._opened[-1][0]

    def _kept_values(self, tensor: TensorPlan, sources: Sequence[OpenSource]) -> int | None:
        """How many values of Δ are kept between passes; None: it is formed anew in each."""
        dense = dense_sources(tensor, sources)
        if not any(sources[index].takes_long for index in dense):
            return None
        values = kept_values(cut(tensor.shape), len(dense))
        return values if values * 4 <= self._budget // 2 else None

    def _open(self, tensor: TensorPlan, contribution: Contribution, scale: float) -> OpenSource:
        def refuse(spec: TensorSpec) -> MergeyardError:
            return not_finite(self._references[contribution.source], spec.name)

        added = None if contribution.added is None else self._factors.added(contribution.added, refuse)
        if contribution.lora is None:
            return OpenSource(contribution.full, None, added, scale)
        factors = self._factors.open(contribution.lora, tensor.shape, refuse)
        if norms_span_blocks(contribution.lora, tensor.shape):
            key = (tensor.name, contribution.source)
            if key not in self._norms:
                self._norms[key] = self._norms_of(tensor, contribution, factors)
            factors = replace(factors, norms=self._norms[key])
        return OpenSource(contribution.full, factors, added, scale)

    def _norms_of(self, tensor: TensorPlan, contribution: Contribution, factors: Factors) -> torch.Tensor:
        """DoRA's norms of W + ΔW, float64, summed up block after block."""
        scratch, weights = Scratch(self._kernels.memory), contribution.full or tensor.base
        squares = torch.zeros(1, dtype=torch.float64)
        for block in cut(tensor.shape):
            values = scratch.floats("deltas", block.size)
            self._reader.float32(weights, block.start, block.stop, values, scratch.bytes("raw", block.size * 8))
            factors.add_product(block.start, block.stop, values, keep=True)
            squares = squares + factors.squares(block.start, block.stop, values)
        return squares.sqrt_()


def dense_sources(tensor: TensorPlan, sources: Sequence[OpenSource]) -> list[int]:
    """The places of those whose δ is formed before the kernels are given it."""
    return [index for index, own in enumerate(sources) if own.product is None and not own.subtracts(tensor.base)]


def kept_values(blocks: Sequence[Block], sources: int) -> int:
    """float32 values that the Δ of ``blocks`` take together, each block from a 64-byte boundary on."""
    return sum(-(-sources * block.size // _ALIGNED) * _ALIGNED for block in blocks)


def not_finite(reference: str, tensor: str) -> MergeyardError:
    return MergeyardError(
        "source_not_finite",
        f"{reference} holds NaN, infinity or a value beyond float32 in tensor {tensor}; repair or leave it out.",
    )
