"""Methods whose result is a linear combination of vectors with coefficients that their Gram matrix alone decides.

One sweep takes the inner products in float64 (rows lie within a block and need none), the method turns them into
coefficients, and blocks are summed in float32. So angles, means on a sphere and ratios need no vector of their own,
whatever their number of iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch

from app.planning.plan import TensorPlan
from worker.engine.methods.method import Blend, Blended, BlendMethod
from worker.engine.reductions import Grouping, combined, gram, gram_of_rows
from worker.engine.views import BlockView, TensorPass

# sources: x_i; deltas: δ_i, and the base is added to their combination; both: the base, then x_i
Vectors = Literal["sources", "deltas", "both"]
Coefficients: TypeAlias = Callable[[TensorPlan, torch.Tensor], torch.Tensor]


def combination(
    name: str,
    coefficients: Coefficients,
    *,
    vectors: Callable[[TensorPlan], Vectors],
    grouping: Callable[[TensorPlan], Grouping] = lambda tensor: Grouping.whole(tensor.shape),
) -> BlendMethod:
    """``coefficients``: float64 Gram matrices (groups, K, K) → float64 (groups, K), one for each of the K vectors."""

    def prepare(tensor: TensorPass) -> Blend:
        kind, groups = vectors(tensor.tensor), grouping(tensor.tensor)
        spanning: torch.Tensor | None = None
        if groups.along != "rows":
            spanning = coefficients(tensor.tensor, gram(tensor, lambda view: _vectors(view, kind), groups))

        def blend(view: BlockView) -> Blended:
            own = _vectors(view, kind)
            factors = spanning
            if factors is None:
                factors = coefficients(tensor.tensor, gram_of_rows(view.block, own, groups))
            result = combined(view.block, own, factors, groups)
            return Blended(result + view.base if kind == "deltas" else result)

        return blend

    return BlendMethod(name=name, prepare=prepare)


def around_base(tensor: TensorPlan) -> Vectors:
    """Task vectors where the recipe names a base, else the models themselves."""
    return "deltas" if tensor.parameters["task_vectors"] else "sources"


def lengths(products: torch.Tensor) -> torch.Tensor:
    """‖v_k‖ from Gram matrices: (groups, K)."""
    return products.diagonal(dim1=1, dim2=2).sqrt()


def _vectors(view: BlockView, kind: Vectors) -> torch.Tensor:
    if kind == "deltas":
        return view.deltas
    return view.sources if kind == "sources" else torch.cat([view.base[None], view.sources])
