"""Which tensors are merged by their factors: those that every source changes by a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import Problem
from app.planning.plan import Contribution, TensorPlan
from app.planning.resolving import ResolvedSource

# They merge factors alone; `core_space` wraps a method that also merges what has none.
FACTORS_ONLY = frozenset({"tsv", "iso_c", "knots"})


def is_low_rank(tensor: TensorPlan) -> bool:
    """Whether every source that changes the tensor, and at least one does, adds scale · B·A of two matrices to it."""
    changing = [item for item in tensor.contributions if item.changes]
    return len(tensor.shape) == 2 and bool(changing) and all(map(_plain, changing))


def dense_matrices(method: str, tensors: Sequence[TensorPlan], sources: Sequence[ResolvedSource]) -> list[Problem]:
    """Matrices that a method of factors alone cannot merge: a problem for each source. Vectors are no matter for it."""
    if method not in FACTORS_ONLY:
        return []
    found: dict[int, list[str]] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1 and not is_low_rank(tensor):
            for item in tensor.contributions:
                if item.changes and not (len(tensor.shape) == 2 and _plain(item)):
                    found.setdefault(item.source, []).append(tensor.name)
    return [
        Problem(
            code="not_supported",
            message=f"{method} merges the factors of LoRA adapters, and this source changes {_some(names)} by a dense "
            "matrix; use core_space, which merges such tensors by the method it wraps.",
            where=sources[index].where,
        )
        for index, names in found.items()
    ]


def _plain(item: Contribution) -> bool:
    return item.full is None and item.added is None and item.lora is not None and item.lora.plain


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
