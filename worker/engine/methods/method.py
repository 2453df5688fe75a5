"""What a merge method is: pure functions of one tensor's plan. A method sees neither a file nor a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from app.planning.plan import Contribution, TensorPlan
from worker.engine.kernels.signature import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the engine must reduce before a tensor can be merged.

    ``trim``: find the exact k-th magnitude of every source over one ``tensor`` or over the whole ``model``
    (a source whose k is all of its values, or none, needs no search).
    ``rescale``: scale what survives to the L1 norm before the trim, over the same scope.
    ``majority``: the sign of the sum of all elected signs of the model, passed to ``rule`` as ``zero_sign``.
    ``prescale``: the weight multiplies δ when it is formed, before anything else; ``weights`` then says 1.
    """

    trim: Literal["none", "tensor", "model"] = "none"
    rescale: bool = False
    majority: bool = False
    prescale: bool = False


class RuleOf(Protocol):
    """Makes the kernels' rule for one tensor.

    ``zero_sign`` is what a zero sum elects; ``sources`` the number of sources of the whole recipe, those that
    do not touch the tensor included.
    """

    def __call__(self, tensor: TensorPlan, zero_sign: Literal[1, -1] = 1, *, sources: int) -> Rule: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One merge method.

    ``weights``: one factor for each contribution of the tensor, in order.
    ``keep_count``: k, how many of a contribution's ``numel`` values the trim keeps, 0 to ``numel``; over the
    whole model ``numel`` is the size of the source's whole task vector.
    """

    name: str
    needs: Callable[[TensorPlan], Needs]
    weights: Callable[[TensorPlan], list[float]]
    keep_count: Callable[[TensorPlan, Contribution, int], int]
    rule: RuleOf


def own_weights(tensor: TensorPlan) -> list[float]:
    """Each contribution's parameter ``weight``, in the order of the sources."""
    return [contribution.parameters["weight"] for contribution in tensor.contributions]
