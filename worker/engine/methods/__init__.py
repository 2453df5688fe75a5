"""The merge methods, one file a family, and the table that finds them by mergekit's name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from app.errors import MergeyardError
from worker.engine.methods.consensus import TIES
from worker.engine.methods.linear import LINEAR, TASK_ARITHMETIC
from worker.engine.methods.method import Method, Needs

__all__ = ["METHODS", "Method", "Needs", "method_of"]

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in (LINEAR, TASK_ARITHMETIC, TIES)})


def method_of(name: str) -> Method:
    """The method called ``name``. Raises ``unknown_method`` where there is none."""
    try:
        return METHODS[name]
    except KeyError:
        known = ", ".join(METHODS)
        raise MergeyardError("unknown_method", f"There is no method {name!r}; choose one of {known}.") from None
