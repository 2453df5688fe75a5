"""The oracle: every kernel in plain torch, one step a line. The other rooms are tested against it bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.engine.kernels.signature import (
    COARSE_BINS,
    FINE_BINS,
    SMALLEST_DIVISOR,
    BlockStatistics,
    Delta,
    Difference,
    Product,
    Rule,
    Trim,
)


class ReferenceKernels:
    """The ``reference`` room; see ``signature.Kernels`` for shapes and meanings."""

    name = "reference"

    def place(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def form(self, delta: Delta, out: torch.Tensor) -> None:
        out.copy_(_formed(delta))

    def histogram(self, delta: Delta, counts: torch.Tensor, prefix: int | None) -> None:
        bits = magnitudes(_formed(delta))
        coarse = bits >> 16
        if prefix is None:
            counts += torch.bincount(coarse, minlength=COARSE_BINS)
        else:
            counts += torch.bincount(bits[coarse == prefix] & 0xFFFF, minlength=FINE_BINS)

    def collect(
        self, deltas: Sequence[Delta], brackets: Sequence[tuple[int, int]], found: torch.Tensor
    ) -> list[tuple[int, int]]:
        counts = []
        for delta, (low, high), row in zip(deltas, brackets, found, strict=True):
            bits = magnitudes(_formed(delta))
            inside = bits[(bits >= low) & (bits <= high)]
            row[: len(inside)] = inside[: len(row)]
            counts.append((int((bits > high).sum()), len(inside)))
        return counts

    def count_equal(self, delta: Delta, threshold: int) -> int:
        return int((magnitudes(_formed(delta)) == threshold).sum())

    def kept_l1(self, delta: Delta, trim: Trim) -> float:
        values = _formed(delta)
        return float(torch.where(survivors(values, trim), values.abs(), 0.0).double().sum())

    def elected_balance(
        self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float], rule: Rule
    ) -> int:
        kept = [_kept_values(_formed(delta), trim) for delta, trim in zip(deltas, trims, strict=True)]
        return int(_elected(_votes(kept, weights, rule), rule, even=0).sum(dtype=torch.int64))

    def merge(
        self,
        base: torch.Tensor,
        deltas: Sequence[Delta],
        trims: Sequence[Trim],
        weights: Sequence[float],
        rule: Rule,
        out: torch.Tensor,
    ) -> BlockStatistics:
        formed = [_formed(delta) for delta in deltas]
        kept = [_kept_values(delta, trim) for delta, trim in zip(formed, trims, strict=True)]
        weighted = [_float32(weight) * values for weight, values in zip(weights, kept, strict=True)]
        votes = _votes(kept, weights, rule)
        if rule.elect == "none":
            agreeing = [vote != 0 for vote in votes]
        else:
            elected = _elected(votes, rule, even=rule.zero_sign)
            agreeing = [vote * elected > 0 for vote in votes]

        total = torch.zeros_like(formed[0])
        for agrees, values in zip(agreeing, weighted, strict=True):
            total = total + torch.where(agrees, values, 0.0)
        merged = total / _divisor(agreeing, weights, rule)

        start = base.float()
        result = _float32(rule.base) * start + _float32(rule.scale) * merged
        out.copy_(result)

        positive = torch.stack([values > 0 for values in weighted]).any(0)
        negative = torch.stack([values < 0 for values in weighted]).any(0)
        return BlockStatistics(
            kept=tuple(int(survivors(d, trim).sum()) for d, trim in zip(formed, trims, strict=True)),
            squares=tuple(float(delta.double().square().sum()) for delta in formed),
            active=int(torch.stack([values != 0 for values in kept]).any(0).sum()),
            conflicts=int((positive & negative).sum()),
            merged_square=float((result - start).double().square().sum()),
            finite=bool(out.isfinite().all()),
        )


def magnitudes(delta: torch.Tensor) -> torch.Tensor:
    """|δ| as its 31 bits, int32: the order of the values, denormals and infinity included."""
    return delta.view(torch.int32) & 0x7FFF_FFFF


def _formed(delta: Delta) -> torch.Tensor:
    """δ, float32 (n,)."""
    match delta:
        case Product(left, right, scale):
            total = left[:, 0, None] * right[0]
            for rank in range(1, len(right)):
                total = total + left[:, rank, None] * right[rank]
            return (_float32(scale) * total).flatten()
        case Difference(own, base, scale):
            return _float32(scale) * (own.float() - base.float())
        case values:
            return values


def survivors(delta: torch.Tensor, trim: Trim) -> torch.Tensor:
    """Which values of one block a trim keeps, bool (n,)."""
    bits = magnitudes(delta)
    equal = bits == trim.threshold
    return (bits > trim.threshold) | (equal & (equal.cumsum(0) <= trim.equals))


def _kept_values(delta: torch.Tensor, trim: Trim) -> torch.Tensor:
    return torch.where(survivors(delta, trim), delta * _float32(trim.rescale), 0.0)


def _votes(kept: Sequence[torch.Tensor], weights: Sequence[float], rule: Rule) -> list[torch.Tensor]:
    if not rule.weigh_votes:
        return list(kept)
    return [_float32(weight) * values for weight, values in zip(weights, kept, strict=True)]


def _elected(votes: Sequence[torch.Tensor], rule: Rule, *, even: int) -> torch.Tensor:
    """+1, -1 or 0 for each parameter, float32; ``even`` where neither sign outweighs the other."""
    positive = torch.stack([vote > 0 for vote in votes]).sum(0)
    negative = torch.stack([vote < 0 for vote in votes]).sum(0)
    if rule.elect == "mass":
        balance = torch.zeros_like(votes[0])
        for vote in votes:
            balance = balance + vote
    else:
        balance = (positive - negative).float()
    sign = torch.where(balance > 0, 1.0, torch.where(balance < 0, -1.0, float(even)))

    if rule.elect == "unanimous":
        return torch.where(torch.maximum(positive, negative) == rule.sources, sign, 0.0)
    if rule.elect == "quorum":
        holding = torch.where(sign > 0, positive, negative)
        return torch.where(holding >= rule.required, sign, 0.0)
    return sign


def _divisor(agreeing: Sequence[torch.Tensor], weights: Sequence[float], rule: Rule) -> torch.Tensor:
    divisor = torch.zeros(agreeing[0].shape, dtype=torch.float32)
    if rule.divisor == "none":
        divisor += 1
    elif rule.divisor == "sources":
        divisor += rule.sources
    elif rule.divisor == "weights":
        divisor += _float32(sum(weights))
    else:
        for agrees, weight in zip(agreeing, weights, strict=True):
            share = _float32(weight) if rule.divisor == "agreeing_weights" else 1.0
            divisor = divisor + torch.where(agrees, share, 0.0)
    return torch.where(divisor.abs() < _float32(SMALLEST_DIVISOR), 1.0, divisor)


def _float32(value: float) -> torch.Tensor:
    """A scalar in the precision of the arithmetic, so that no product is formed in float64."""
    return torch.tensor(value, dtype=torch.float32)
