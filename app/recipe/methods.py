"""The merge methods' parameters, declared once: names, kinds, bounds, defaults, and what a dialect stands for.

A new method is one row in ``METHODS`` here and one file in ``worker/engine/methods``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["number", "flag", "choice"]
Setting = float | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter: where it may stand, what it may be.

    ``per_source`` parameters may also be given for all sources at once, in the recipe's own ``parameters``. A
    ``choice`` is one value for the whole merge; numbers and flags may vary by tensor. ``default`` None: the dialect
    decides. ``ignored``: mergekit's grammar has it here, and it changes nothing.
    """

    kind: Kind
    default: Setting | None
    per_source: bool = False
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    ignored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A method: its ``parameters``, and its ``paper``.

    ``needs_base``: it merges task vectors. ``sign_elected``: a source that does not touch a tensor takes no part there;
    in the others it counts, with δ = 0. ``counts_base``: the base listed among ``models`` is a source like the others.
    ``symmetric``: the order of the sources means nothing, so they are merged in a canonical one.
    """

    parameters: Mapping[str, Parameter]
    needs_base: bool
    sign_elected: bool
    counts_base: bool
    symmetric: bool
    paper: str


WEIGHT = Parameter(kind="number", default=1.0, per_source=True)
DENSITY = Parameter(kind="number", default=1.0, per_source=True, low=0.0, high=1.0)
LAMBDA = Parameter(kind="number", default=1.0)
INT8_MASK = Parameter(kind="flag", default=False, ignored=True)  # mergekit's way to save memory

METHODS: Mapping[str, MethodSpec] = {
    "linear": MethodSpec(
        parameters={
            "weight": WEIGHT,
            "normalize": Parameter(kind="flag", default=True),
            "int8_mask": INT8_MASK,
        },
        needs_base=False,
        sign_elected=False,
        counts_base=True,
        symmetric=True,
        paper="Wortsman et al. 2022, Model soups",
    ),
    "task_arithmetic": MethodSpec(
        parameters={
            "weight": WEIGHT,
            "lambda": LAMBDA,
            "normalize": Parameter(kind="flag", default=False),
            "density": Parameter(kind="number", default=1.0, per_source=True, low=0.0, high=1.0, ignored=True),
            "rescale": Parameter(kind="flag", default=False, ignored=True),
            "int8_mask": INT8_MASK,
        },
        needs_base=True,
        sign_elected=False,
        counts_base=False,
        symmetric=True,
        paper="Ilharco et al. 2023, Editing models with task arithmetic",
    ),
    "ties": MethodSpec(
        parameters={
            "weight": WEIGHT,
            "density": DENSITY,
            "lambda": LAMBDA,
            "normalize": Parameter(kind="flag", default=True),
            "rescale": Parameter(kind="flag", default=False),
            "dialect": Parameter(kind="choice", default="mergekit", choices=("mergekit", "paper", "peft", "article")),
            "trim_scope": Parameter(kind="choice", default=None, choices=("tensor", "model")),
            "elect": Parameter(kind="choice", default=None, choices=("mass", "count", "unanimous", "quorum")),
            "quorum": Parameter(kind="number", default=0.5, low=0.0, high=1.0),
            "int8_mask": INT8_MASK,
        },
        needs_base=True,
        sign_elected=True,
        counts_base=False,
        symmetric=True,
        paper="Yadav et al. 2023, TIES-Merging: resolving interference when merging models",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The choices a TIES dialect stands for (merging-maths, "TIES: four dialects"); see TensorPlan for the words."""

    trim_scope: str
    min_keep: int
    elect: str
    weights: str
    divisor: str
    zero_sum: str


DIALECTS: Mapping[str, Dialect] = {
    "mergekit": Dialect(
        trim_scope="tensor",
        min_keep=1,
        elect="mass",
        weights="vote",
        divisor="agreeing_weights",
        zero_sum="plus",
    ),
    "paper": Dialect(
        trim_scope="model", min_keep=0, elect="mass", weights="scale", divisor="agreeing", zero_sum="majority"
    ),
    "peft": Dialect(
        trim_scope="tensor", min_keep=0, elect="mass", weights="merge", divisor="agreeing", zero_sum="plus"
    ),
    "article": Dialect(
        trim_scope="tensor",
        min_keep=0,
        elect="unanimous",
        weights="scale",
        divisor="sources",
        zero_sum="plus",
    ),
}
