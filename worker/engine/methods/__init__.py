"""The merge methods, one file a family, and the table that finds them by mergekit's name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from app.errors import MergeyardError
from worker.engine.methods.consensus import TIES
from worker.engine.methods.core_space import CORE_SPACE, ISO_C, KNOTS, TSV
from worker.engine.methods.linear import LINEAR, TASK_ARITHMETIC
from worker.engine.methods.method import Blend, Blended, BlendMethod, FactorMethod, Mask, Method, Needs, VoteMethod
from worker.engine.methods.model_stock import MODEL_STOCK
from worker.engine.methods.pairs import ARCEE_FUSION, NEARSWAP, PASSTHROUGH
from worker.engine.methods.ram import RAM, RAMPLUS_TL
from worker.engine.methods.sce import SCE
from worker.engine.methods.slerp import NUSLERP, SLERP
from worker.engine.methods.sparsified import SPARSIFIED
from worker.engine.methods.sphere import KARCHER, MULTISLERP

__all__ = [
    "METHODS",
    "Blend",
    "BlendMethod",
    "Blended",
    "FactorMethod",
    "Mask",
    "Method",
    "Needs",
    "VoteMethod",
    "method_of",
]

_ALL: tuple[Method, ...] = (
    *(LINEAR, TASK_ARITHMETIC, TIES),
    *SPARSIFIED,
    *(SLERP, NUSLERP, MULTISLERP, KARCHER),
    *(MODEL_STOCK, SCE, RAM, RAMPLUS_TL),
    *(NEARSWAP, ARCEE_FUSION, PASSTHROUGH),
    *(CORE_SPACE, TSV, ISO_C, KNOTS),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})


def method_of(name: str) -> Method:
    """The method called ``name``. Raises ``unknown_method`` where there is none."""
    try:
        return METHODS[name]
    except KeyError:
        known = ", ".join(METHODS)
        raise MergeyardError("unknown_method", f"There is no method {name!r}; choose one of {known}.") from None
