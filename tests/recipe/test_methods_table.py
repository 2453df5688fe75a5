"""Every method has mergekit's name, parameters and defaults: the table of merging-maths.md, written down once more."""

from __future__ import annotations

from typing import Any

import pytest

from app.recipe.methods import METHODS

WEIGHT, DENSITY = {"weight": 1.0}, {"density": 1.0}
SUM: dict[str, Any] = {"lambda": 1.0, "normalize": False}
RESCALED = {**SUM, "rescale": True}
REQUIRED = None

# By method: the parameters of a source, and those of the merge, each with its default.
TABLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (WEIGHT, {"normalize": True}),
    "task_arithmetic": (WEIGHT, SUM),
    "ties": (WEIGHT | DENSITY, {"lambda": 1.0, "normalize": True}),
    "dare_linear": (WEIGHT | DENSITY, RESCALED),
    "dare_ties": (WEIGHT | DENSITY, RESCALED),
    "breadcrumbs": (WEIGHT | DENSITY | {"gamma": 0.01}, SUM),
    "breadcrumbs_ties": (WEIGHT | DENSITY | {"gamma": 0.01}, SUM),
    "della": (WEIGHT | DENSITY | {"epsilon": 0.15}, {**RESCALED, "normalize": True}),
    "della_linear": (WEIGHT | DENSITY | {"epsilon": 0.15}, RESCALED),
    "slerp": ({}, {"t": REQUIRED}),
    "nuslerp": (WEIGHT, {"nuslerp_flatten": True, "nuslerp_row_wise": False}),
    "multislerp": (WEIGHT, {"normalize_weights": True, "eps": 1e-8}),
    "karcher": ({}, {"max_iter": 10, "tol": 1e-5}),
    "model_stock": ({}, {"filter_wise": False}),
    "sce": ({}, {"select_topk": 1.0}),
    "nearswap": ({}, {"t": REQUIRED}),
    "ram": ({}, {"epsilon": 1e-5}),
    "ramplus_tl": ({}, {"r": 0.1, "alpha": 0.2}),
    "arcee_fusion": ({}, {}),
    "passthrough": ({"scale": 1.0}, {}),
}
# What stands there beside the table: choices that mergekit does not have, or makes without a name.
BESIDE = {
    "ties": {"rescale", "dialect", "trim_scope", "elect", "quorum"},
    **{key: {"rescale_by", "seed"} for key in ("dare_linear", "dare_ties", "della", "della_linear")},
    **{key: {"rescale"} for key in ("breadcrumbs", "breadcrumbs_ties")},
    "ramplus_tl": {"epsilon"},
}


@pytest.mark.parametrize("method", TABLE)
def test_parameters_and_defaults_are_the_table_s(method: str) -> None:
    of_source, of_merge = TABLE[method]
    known = {name: item for name, item in METHODS[method].parameters.items() if not item.ignored}
    own = {name: item for name, item in known.items() if name not in BESIDE.get(method, set())}
    assert {name: item.default for name, item in own.items() if item.per_source} == of_source
    assert {name: item.default for name, item in own.items() if not item.per_source} == of_merge
    assert {name for name, item in own.items() if item.required} == {
        name for name, default in of_merge.items() if default is REQUIRED
    }
    assert set(known) - set(own) == BESIDE.get(method, set())


def test_what_is_not_in_the_table_merges_factors() -> None:
    assert set(METHODS) - set(TABLE) == {"core_space", "tsv", "iso_c", "knots"}
