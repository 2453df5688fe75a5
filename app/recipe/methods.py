"""The merge methods' parameters, declared once: names, kinds, bounds, defaults, and what a dialect stands for.

A new method is one row in ``METHODS`` here and one file in ``worker/engine/methods``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["number", "whole", "flag", "choice"]
Setting = float | bool | str
Settings = Mapping[str, Setting]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter: where it may stand, what it may be.

    ``per_source`` parameters may also be given for all sources at once, in the recipe's own ``parameters``. A
    ``choice`` and a ``whole`` number are one value for the whole merge; numbers and flags may vary by tensor.
    ``default`` None: the dialect or the wrapped method decides, or, where it is ``required``, the recipe must.
    ``ignored``: mergekit's grammar has it here, and it changes nothing.
    """

    kind: Kind
    default: Setting | None
    per_source: bool = False
    required: bool = False
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    ignored: bool = False


def _never(_merge: Settings, _sources: Sequence[Settings]) -> bool:
    return False


def _nothing_wrong(_source: Settings) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A method: its ``parameters``, and its ``paper``.

    ``base``: ``required``, it merges task vectors, and the base listed among ``models`` is no source; ``optional``, as
    required where the recipe names one, else it merges the models themselves; ``ignored``, it merges the models, and
    the base may be one of them.
    ``least`` and ``most``: how many sources it takes. ``sign_elected``: a source that does not touch a tensor takes no
    part there; in the others it counts, with δ = 0.
    ``symmetric``: the order of the sources means nothing, so they are merged in a canonical one.
    ``divides_by_weights``: the flag with which weights must not sum to zero.
    ``moves_base``: whether a tensor changes where no source changes anything, by its settings and those of each source.
    ``problem_of``: a sentence, where the settings of one source do not go together.
    """

    parameters: Mapping[str, Parameter]
    base: Literal["required", "optional", "ignored"]
    paper: str
    least: int = 1
    most: int | None = None
    sign_elected: bool = False
    symmetric: bool = True
    divides_by_weights: str = ""
    moves_base: Callable[[Settings, Sequence[Settings]], bool] = _never
    problem_of: Callable[[Settings], str | None] = _nothing_wrong

    def counts_base(self, *, named: bool) -> bool:
        """Whether the base listed among ``models`` is a source; ``named``: the recipe has a ``base_model``."""
        return self.base == "ignored" or (self.base == "optional" and not named)

    def used(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Without what changes nothing."""
        return {name: value for name, value in parameters.items() if not self.parameters[name].ignored}


def _not_normalized(flag: str) -> Callable[[Settings, Sequence[Settings]], bool]:
    return lambda merge, _sources: not merge[flag] and not merge.get("task_vectors", False)


def _scaled(_merge: Settings, sources: Sequence[Settings]) -> bool:
    return any(source["scale"] != 1 for source in sources)


def _della_range(source: Settings) -> str | None:
    density, epsilon = float(source["density"]), float(source["epsilon"])
    if not 0 < density < 1 or 0 < density - epsilon <= density + epsilon < 1:
        return None
    return f"density ± epsilon must lie between 0 and 1; they are {density:g} and {epsilon:g}. Lower epsilon."


WEIGHT = Parameter(kind="number", default=1.0, per_source=True)
DENSITY = Parameter(kind="number", default=1.0, per_source=True, low=0.0, high=1.0)
LAMBDA = Parameter(kind="number", default=1.0)
ELECT = Parameter(kind="choice", default=None, choices=("mass", "count", "unanimous", "quorum"))
QUORUM = Parameter(kind="number", default=0.5, low=0.0, high=1.0)
# Of TIES where each tensor has a basis of its own: no threshold and no majority can span the model, as in `paper`.
DIALECT_BY_TENSOR = Parameter(kind="choice", default="mergekit", choices=("mergekit", "peft", "article"))
INT8_MASK = Parameter(kind="flag", default=False, ignored=True)  # mergekit's way to save memory

NORMALIZE = Parameter(kind="flag", default=True)
NO_NORMALIZE = Parameter(kind="flag", default=False)
T = Parameter(kind="number", default=None, required=True)
EPSILON = Parameter(kind="number", default=1e-5, low=0.0)

SUMMED = {"weight": WEIGHT, "lambda": LAMBDA, "normalize": NO_NORMALIZE, "int8_mask": INT8_MASK}
RANDOM = {
    "density": DENSITY,
    "rescale": Parameter(kind="flag", default=True),
    "rescale_by": Parameter(kind="choice", default="l1", choices=("l1", "probability")),
    "seed": Parameter(kind="whole", default=0, low=0, high=2**63 - 1),
}
DELLA_EPSILON = Parameter(kind="number", default=0.15, per_source=True, low=0.0, high=1.0)
CRUMBS = {
    "density": DENSITY,
    "gamma": Parameter(kind="number", default=0.01, per_source=True, low=0.0, high=1.0),
    "rescale": Parameter(kind="flag", default=False),
}
DARE_PAPER = "Yu et al. 2024, Language models are super Mario (DARE)"
DELLA_PAPER = "Deep et al. 2024, DELLA-Merging"
CRUMBS_PAPER = "Davari and Belilovsky 2024, Model Breadcrumbs"
RAM_PAPER = "arXiv 2601.13572, Reinforced Agent Merging"

METHODS: Mapping[str, MethodSpec] = {
    "linear": MethodSpec(
        parameters={"weight": WEIGHT, "normalize": NORMALIZE, "int8_mask": INT8_MASK},
        base="ignored",
        divides_by_weights="normalize",
        moves_base=_not_normalized("normalize"),
        paper="Wortsman et al. 2022, Model soups",
    ),
    "task_arithmetic": MethodSpec(
        parameters={
            **SUMMED,
            "density": Parameter(kind="number", default=1.0, per_source=True, low=0.0, high=1.0, ignored=True),
            "rescale": Parameter(kind="flag", default=False, ignored=True),
        },
        base="required",
        paper="Ilharco et al. 2023, Editing models with task arithmetic",
    ),
    "ties": MethodSpec(
        parameters={
            "weight": WEIGHT,
            "density": DENSITY,
            "lambda": LAMBDA,
            "normalize": NORMALIZE,
            "rescale": Parameter(kind="flag", default=False),
            "dialect": Parameter(kind="choice", default="mergekit", choices=("mergekit", "paper", "peft", "article")),
            "trim_scope": Parameter(kind="choice", default=None, choices=("tensor", "model")),
            "elect": ELECT,
            "quorum": QUORUM,
            "int8_mask": INT8_MASK,
        },
        base="required",
        sign_elected=True,
        paper="Yadav et al. 2023, TIES-Merging: resolving interference when merging models",
    ),
    "dare_linear": MethodSpec(parameters={**SUMMED, **RANDOM}, base="required", paper=DARE_PAPER),
    "dare_ties": MethodSpec(parameters={**SUMMED, **RANDOM}, base="required", sign_elected=True, paper=DARE_PAPER),
    "breadcrumbs": MethodSpec(parameters={**SUMMED, **CRUMBS}, base="required", paper=CRUMBS_PAPER),
    "breadcrumbs_ties": MethodSpec(
        parameters={**SUMMED, **CRUMBS}, base="required", sign_elected=True, paper=CRUMBS_PAPER
    ),
    "della": MethodSpec(
        parameters={**SUMMED, **RANDOM, "normalize": NORMALIZE, "epsilon": DELLA_EPSILON},
        base="required",
        sign_elected=True,
        problem_of=_della_range,
        paper=DELLA_PAPER,
    ),
    "della_linear": MethodSpec(
        parameters={**SUMMED, **RANDOM, "epsilon": DELLA_EPSILON},
        base="required",
        problem_of=_della_range,
        paper=DELLA_PAPER,
    ),
    "slerp": MethodSpec(
        parameters={"t": T},
        base="required",
        most=1,
        symmetric=False,
        paper="Shoemake 1985, Animating rotation with quaternion curves",
    ),
    "nuslerp": MethodSpec(
        parameters={
            "weight": WEIGHT,
            "nuslerp_flatten": Parameter(kind="flag", default=True),
            "nuslerp_row_wise": Parameter(kind="flag", default=False),
        },
        base="optional",
        least=2,
        most=2,
        symmetric=False,
        paper="Shoemake 1985, Animating rotation with quaternion curves",
    ),
    "multislerp": MethodSpec(
        parameters={
            "weight": WEIGHT,
            "normalize_weights": NORMALIZE,
            "eps": Parameter(kind="number", default=1e-8, low=0.0),
        },
        base="optional",
        divides_by_weights="normalize_weights",
        moves_base=_not_normalized("normalize_weights"),
        paper="Goddard 2024, Multi-SLERP",
    ),
    "karcher": MethodSpec(
        parameters={
            "max_iter": Parameter(kind="whole", default=10, low=0, high=100_000),
            "tol": Parameter(kind="number", default=1e-5, low=0.0),
        },
        base="ignored",
        paper="Karcher 1977, Riemannian center of mass; arXiv 2603.04972",
    ),
    "model_stock": MethodSpec(
        parameters={"filter_wise": Parameter(kind="flag", default=False)},
        base="required",
        least=2,
        paper="Jang et al. 2024, Model Stock",
    ),
    "sce": MethodSpec(
        parameters={"select_topk": Parameter(kind="number", default=1.0, low=0.0, high=1.0), "int8_mask": INT8_MASK},
        base="required",
        paper="Wan et al. 2024, FuseChat",
    ),
    "nearswap": MethodSpec(parameters={"t": T}, base="required", most=1, paper="alchemonaut 2024, QuartetAnemoi-70B"),
    "ram": MethodSpec(parameters={"epsilon": EPSILON}, base="required", paper=RAM_PAPER),
    "ramplus_tl": MethodSpec(
        parameters={
            "r": Parameter(kind="number", default=0.1),
            "alpha": Parameter(kind="number", default=0.2, low=0.0),
            "epsilon": EPSILON,
        },
        base="required",
        paper=RAM_PAPER,
    ),
    "arcee_fusion": MethodSpec(parameters={}, base="required", most=1, paper="Arcee, in mergekit"),
    "passthrough": MethodSpec(
        parameters={"scale": Parameter(kind="number", default=1.0, per_source=True)},
        base="ignored",
        most=1,
        symmetric=False,
        moves_base=_scaled,
        paper="mergekit",
    ),
    "core_space": MethodSpec(
        parameters={
            "inner": Parameter(kind="choice", default="ties", choices=("ties", "task_arithmetic", "linear")),
            "weight": WEIGHT,
            "density": DENSITY,
            "lambda": LAMBDA,
            "normalize": Parameter(kind="flag", default=None),
            "rescale": Parameter(kind="flag", default=False),
            "dialect": DIALECT_BY_TENSOR,
            "elect": ELECT,
            "quorum": QUORUM,
        },
        base="required",
        sign_elected=True,
        paper="Panariello et al. 2025, Accurate and efficient low-rank model merging in core space",
    ),
    "tsv": MethodSpec(
        parameters={"weight": WEIGHT, "lambda": LAMBDA},
        base="required",
        paper="Gargiulo et al. 2025, Task singular vectors: reducing task interference in model merging",
    ),
    "iso_c": MethodSpec(
        parameters={"weight": WEIGHT, "lambda": LAMBDA},
        base="required",
        paper="Marczak et al. 2025, No task left behind: isotropic model merging",
    ),
    "knots": MethodSpec(
        parameters={
            "weight": WEIGHT,
            "density": DENSITY,
            "lambda": LAMBDA,
            "normalize": NORMALIZE,
            "rescale": Parameter(kind="flag", default=False),
            "dialect": DIALECT_BY_TENSOR,
            "elect": ELECT,
            "quorum": QUORUM,
        },
        base="required",
        sign_elected=True,
        paper="Stoica et al. 2024, Model merging with SVD to tie the knots",
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
