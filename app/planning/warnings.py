"""What a plan warns of: choices that are carried out as asked and that people regret."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import Problem
from app.planning.matching import AdapterMatch
from app.planning.plan import TensorPlan
from app.recipe import Recipe
from app.recipe.methods import METHODS
from app.sources.source import ModelSource


def warnings_of(
    recipe: Recipe,
    tensors: Sequence[TensorPlan],
    base: ModelSource,
    adapters: Sequence[tuple[str, AdapterMatch | None]],
) -> tuple[Problem, ...]:
    """Warnings, most consequential first. ``adapters`` stand beside their place in the recipe."""
    found = []
    normalised = any(tensor.parameters.get("normalize") is True for tensor in tensors if tensor.contributions)
    negative = any(item.parameters.get("weight", 1.0) < 0 for tensor in tensors for item in tensor.contributions)
    if normalised and negative and recipe.parameters.get("dialect", "mergekit") == "mergekit":
        message = (
            "A negative weight with `normalize: true` does not subtract a skill: dividing by the negative sum turns it "
            "back. Set `normalize: false`."
        )
        found.append(Problem(code="parameter_invalid", message=message, where="parameters.normalize"))
    if not any(tensor.contributions or tensor.base != base.tensors.get(tensor.name) for tensor in tensors):
        message = "No source changes any tensor; the result is the base."
        found.append(Problem(code="no_sources", message=message, where="models"))
    if any(tensor.base.dtype == "F64" and tensor.contributions for tensor in tensors):
        message = "The base holds float64, and arithmetic is float32: values lose digits beyond that."
        found.append(Problem(code="not_supported", message=message, where="base_model"))
    for name, parameter in METHODS[recipe.merge_method].parameters.items():
        given = any(name in level for level in recipe.all_parameters())
        if parameter.ignored and given and name != "int8_mask":
            message = f"`{name}` changes nothing in {recipe.merge_method}."
            found.append(Problem(code="parameter_invalid", message=message, where=f"parameters.{name}"))
    if recipe.parameters.get("inner", "ties") != "ties":
        found.extend(_of_ties_alone(recipe))
    base_name = str(base.config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
    for where, adapter in adapters:
        trained_on = str(adapter.source.config.get("base_model_name_or_path") or "") if adapter else ""
        named = trained_on.rstrip("/").rpartition("/")[2]
        if named and base_name and named.lower() != base_name.lower():
            message = (
                f"The adapter was trained on {named}, the base calls itself {base_name}. The shapes fit; is it right?"
            )
            found.append(Problem(code="adapter_mismatch", message=message, where=where))
    return tuple(found)


def _of_ties_alone(recipe: Recipe) -> list[Problem]:
    """Parameters of the TIES that ``core_space`` would wrap, given where it wraps something else."""
    names = ("density", "rescale", "dialect", "elect", "quorum")
    given = [name for name in names if any(name in level for level in recipe.all_parameters())]
    return [
        Problem(
            code="parameter_invalid",
            message=f"`{name}` changes nothing with `inner: {recipe.parameters['inner']}`.",
            where=f"parameters.{name}",
        )
        for name in given
    ]
