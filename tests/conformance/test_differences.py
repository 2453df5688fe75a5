"""Where our numbers are not mergekit's, on purpose: one test for each row of the table in docs/mergekit.md.

Mergekit's side is its figure for the recipe in ``recipes/differing``; where it has none, it refuses the recipe, or
what it does differs from run to run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer

from app.errors import MergeyardError
from tests.conformance.figures import RECIPES, Figures
from tests.conformance.merging import differing, merged_here
from tests.conformance.models import ADAPTERS, ARCHITECTURES, RANK, Architecture, Tensors
from tests.engine.merges import bytes_of, merge, plan_of, tensors_of
from tests.engine.single_tensor_models import merged
from tests.files import write_model

BothArchitectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
Merged = Callable[[str, Architecture], Tensors]
AllFigures = Mapping[str, Mapping[str, Figures]]


@pytest.fixture
def ours(roots: dict[str, Path], tmp_path: Path) -> Merged:
    """Merges the recipe of that name."""

    def merge_case(name: str, architecture: Architecture) -> Tensors:
        (path,) = (RECIPES / "differing").glob(f"*/{name}.yaml")
        return merged_here(path.read_text(), roots[architecture], tmp_path / "out")

    return merge_case


@BothArchitectures
def test_arithmetic_is_float32_whatever_dtype_says(
    architecture: Architecture, ours: Merged, figures: AllFigures
) -> None:
    found = ours("arithmetic-in-bfloat16", architecture)
    assert differing(found, figures[architecture]["dtype-out"].tensors) == {}
    assert differing(found, figures[architecture]["arithmetic-in-bfloat16"].tensors) != {}


@BothArchitectures
def test_without_a_dtype_the_result_has_the_type_of_the_base(
    architecture: Architecture, ours: Merged, figures: AllFigures
) -> None:
    found = ours("type-of-the-result", architecture)
    theirs = figures[architecture]["type-of-the-result"].tensors
    assert differing(found, {name: _bfloat16(values) for name, values in theirs.items()}) == {}
    assert differing(found, theirs) != {}


@BothArchitectures
def test_an_earlier_document_is_not_rounded(architecture: Architecture, roots: dict[str, Path], tmp_path: Path) -> None:
    """mergekit-multi writes it in the type of its files, and reads it again."""
    name, weight = "left", 0.3
    merging = {"merge_method": "task_arithmetic", "parameters": {"weight": weight}}
    left = {**merging, "name": name, "base_model": "tiny/half-base", "models": [{"model": "tiny/half-one"}]}
    recipe = {"documents": [left, {**merging, "base_model": name, "models": [{"model": "tiny/half-two"}]}]}
    found = merged_here(json.dumps(recipe), roots[architecture], tmp_path / "out")
    base, one, two = (_model(roots[architecture], name) for name in ("half-base", "half-one", "half-two"))
    exact = {name: base[name] + np.float32(weight) * (one[name] - base[name]) for name in base}

    def onto(start: Tensors) -> Tensors:
        return {name: _bfloat16(start[name] + np.float32(weight) * (two[name] - start[name])) for name in base}

    assert differing(found, onto(exact)) == {}
    assert differing(found, onto({name: _bfloat16(values) for name, values in exact.items()})) != {}


def test_a_document_that_the_result_does_not_need_is_refused(roots: dict[str, Path], tmp_path: Path) -> None:
    """mergekit-multi merges it all the same, into a folder of its own."""
    recipe = (RECIPES / "both" / "documents.yaml").read_text().replace("{model: right,", "{model: tiny/one,")
    with pytest.raises(MergeyardError, match="names 'right'") as refused:
        merged_here(recipe, roots["llama"], tmp_path / "out")
    assert (refused.value.code, refused.value.where) == ("recipe_invalid", "documents[1]")


@BothArchitectures
def test_of_equal_magnitudes_the_lowest_index_stays(
    architecture: Architecture, ours: Merged, figures: AllFigures, roots: dict[str, Path]
) -> None:
    found, theirs = ours("equal-magnitudes", architecture), figures[architecture]["equal-magnitudes"].tensors
    base, source = (_model(roots[architecture], name) for name in ("half-base", "half-one"))
    expected = {name: base[name] + _trimmed(source[name] - base[name], 0.4) for name in base}
    assert differing(found, expected) == {}
    assert differing(found, theirs) != {}
    for name, start in base.items():  # mergekit keeps as many, and as large ones
        sizes, their_sizes = (np.sort(np.abs(result[name] - start), axis=None) for result in (found, theirs))
        assert np.array_equal(sizes, their_sizes)


@BothArchitectures
def test_an_adapter_s_task_vector_is_not_rounded_to_the_base_s_type(
    architecture: Architecture, ours: Merged, figures: AllFigures, roots: dict[str, Path]
) -> None:
    found = ours("adapter-in-bfloat16", architecture)
    expected = _model(roots[architecture], "half-base") | _adapted(roots[architecture], architecture)
    assert differing(found, expected) == {}
    errors = differing(figures[architecture]["adapter-in-bfloat16"].tensors, expected)
    assert errors.keys() == _adapted(roots[architecture], architecture).keys()
    assert all(float(error) > 1e-4 for error in errors.values())


@BothArchitectures
def test_the_divergence_of_arcee_fusion_is_not_rounding(
    architecture: Architecture, ours: Merged, figures: AllFigures, roots: dict[str, Path]
) -> None:
    found = ours("faint-divergence", architecture)
    base, source = (_model(roots[architecture], name) for name in ("base", "faint-one"))
    assert differing(found, {name: _fused(base[name], source[name]) for name in base}) == {}
    assert differing(figures[architecture]["faint-divergence"].tensors, found) != {}


def test_the_quartiles_of_arcee_fusion_are_exact(tmp_path: Path) -> None:
    """mergekit samples them where a tensor has more than a million values."""
    values = torch.randperm(1_200_000, generator=torch.Generator().manual_seed(1)).float()
    found, _ = merged(tmp_path, "arcee_fusion", [values**4 / 1e20])
    lower, median, upper = (float(int(quarter * 1_199_999)) ** 4 for quarter in (0.25, 0.5, 0.75))
    kept = int((found != 0).sum())
    assert kept == sum(rank**4 >= median + 1.5 * (upper - lower) for rank in range(1_200_000))


@BothArchitectures
def test_the_eps_of_multislerp_guards_norms_alone(
    architecture: Architecture, ours: Merged, figures: AllFigures
) -> None:
    found = ours("large-eps", architecture)
    theirs = figures[architecture]["large-eps"].tensors
    assert differing({name: values * np.float32(np.cos(0.1)) for name, values in found.items()}, theirs) == {}


@BothArchitectures
def test_weights_that_cancel_are_refused_where_they_divide(
    architecture: Architecture, ours: Merged, figures: AllFigures
) -> None:
    theirs = figures[architecture]["weights-that-cancel"].tensors
    assert not any(np.isfinite(values).all() for values in theirs.values())
    with pytest.raises(MergeyardError, match="weights sum to zero") as refused:
        ours("weights-that-cancel", architecture)
    assert refused.value.code == "parameter_invalid"


def test_a_source_that_is_untied_does_not_fit_a_tied_base(ours: Merged, figures: AllFigures) -> None:
    assert "lm_head.weight" in figures["llama"]["tied-and-untied"].tensors
    with pytest.raises(MergeyardError, match=r"lm_head\.weight, which the base lacks") as refused:
        ours("tied-and-untied", "llama")
    assert refused.value.code == "model_mismatch"


def test_names_are_the_base_s_and_no_buffer_is_lost(ours: Merged, figures: AllFigures) -> None:
    found = ours("names-of-the-files", "gpt2")
    theirs = figures["gpt2"]["names-of-the-files"].tensors
    buffers = {f"h.{layer}.attn.bias" for layer in range(3)}
    weights = {f"transformer.{name}": values for name, values in found.items() if name not in buffers}
    assert found.keys() > buffers
    assert differing(weights, theirs) == {}


@BothArchitectures
def test_new_tokens_have_the_ids_of_their_sources_order(
    architecture: Architecture, roots: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit's ids follow the order of a hash table, and differ from run to run."""
    recipe = (RECIPES / "both" / "tokenizer-union.yaml").read_text()
    merged_here(recipe, roots[architecture], tmp_path / "out")
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert sorted(ids, key=ids.__getitem__) == ["<s>", *"abcdefghijk", "x", "y", "<extra>"]


@BothArchitectures
def test_a_weight_that_is_not_given_is_one(
    architecture: Architecture, roots: dict[str, Path], figures: AllFigures, tmp_path: Path
) -> None:
    """mergekit refuses a source without a weight."""
    recipe = (RECIPES / "both" / "ties-defaults.yaml").read_text().replace("    parameters: {weight: 1}\n", "")
    assert "weight" not in recipe
    found = merged_here(recipe, roots[architecture], tmp_path / "out")
    assert differing(found, figures[architecture]["ties-defaults"].tensors) == {}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_without_a_base_the_config_is_not_left_to_chance(order: tuple[str, str], tmp_path: Path) -> None:
    """mergekit takes any of the models, by the order of a hash table."""
    for name in order:
        write_model(tmp_path / name, hidden_act=f"of {name}")
    recipe = {"merge_method": "karcher", "models": [{"model": name} for name in order]}
    merge(plan_of(tmp_path, recipe), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == "of a"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_do_not_depend_on_the_order_of_sources(
    method: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    """mergekit draws one mask after the other from one generator, which it does not seed by itself."""
    models = [{"model": f"tiny/{name}", "parameters": {"density": 0.5}} for name in ("one", "two")]
    for name, listed in (("as listed", models), ("turned", models[::-1])):
        recipe = {"base_model": "tiny/base", "merge_method": method, "models": listed}
        merge(plan_of(roots["llama"], recipe), tmp_path / name)
    weights = "model.safetensors"
    assert bytes_of(tmp_path / "as listed")[weights] == bytes_of(tmp_path / "turned")[weights]


def test_an_epsilon_that_della_cannot_use_is_refused_before_anything_is_merged(roots: dict[str, Path]) -> None:
    """mergekit stops at the first tensor."""
    models = [{"model": "tiny/one", "parameters": {"density": 0.9, "epsilon": 0.2}}]
    recipe = {"base_model": "tiny/base", "merge_method": "della", "models": models}
    with pytest.raises(MergeyardError, match="density ± epsilon") as refused:
        plan_of(roots["llama"], recipe)
    assert refused.value.code == "parameter_invalid"


def test_della_has_a_probability_for_a_row_of_one(tmp_path: Path) -> None:
    """mergekit's is not a number there."""
    values = torch.arange(1.0, 101).view(100, 1)
    found, _ = merged(tmp_path, "della_linear", [values], density=0.5, rescale=False)
    assert 30 < int((found != 0).sum()) < 70


def test_a_model_may_be_listed_twice(roots: dict[str, Path], tmp_path: Path) -> None:
    """mergekit refuses it."""
    listed = [{"model": "tiny/one", "parameters": {"weight": weight}} for weight in (0.25, 0.5)]
    recipe = {"base_model": "tiny/base", "merge_method": "task_arithmetic"}
    merge(plan_of(roots["llama"], {**recipe, "models": listed}), tmp_path / "twice")
    listed = [{"model": "tiny/one", "parameters": {"weight": 0.75}}]
    merge(plan_of(roots["llama"], {**recipe, "models": listed}), tmp_path / "once")
    twice, once = ({k: v.numpy() for k, v in tensors_of(tmp_path / name).items()} for name in ("twice", "once"))
    assert differing(twice, once) == {}


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """mergekit merges it."""
    with pytest.raises(MergeyardError) as refused:
        merged(tmp_path, "linear", [[1.0, float("nan")], [1.0, 2.0]])
    assert refused.value.code == "source_not_finite"


@pytest.mark.parametrize("wrong", [{"dtype": "float64"}, {"parameters": {"weight": []}}, {"merge_metod": "ties"}])
def test_what_would_be_ignored_or_lost_is_refused(wrong: dict[str, object], roots: dict[str, Path]) -> None:
    """mergekit takes a type wider than its files', an empty list for no value, and keys it does not know."""
    recipe = {"merge_method": "linear", "models": [{"model": "tiny/one"}, {"model": "tiny/two"}], **wrong}
    with pytest.raises(MergeyardError):
        plan_of(roots["llama"], recipe)


def _model(root: Path, name: str) -> Tensors:
    return {tensor: values.float().numpy() for tensor, values in tensors_of(root / "tiny" / name).items()}


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return torch.from_numpy(values.copy()).bfloat16().float().numpy()


def _trimmed(delta: npt.NDArray[np.float32], density: float) -> npt.NDArray[np.float32]:
    """The int(density·n) largest, the first of equals first."""
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")
    kept = np.zeros(delta.size, dtype=bool)
    kept[order[: max(1, int(density * delta.size))]] = True
    return np.where(kept.reshape(delta.shape), delta, np.float32(0))


def _adapted(root: Path, architecture: Architecture) -> Tensors:
    """The tensors of half-base that lora-one changes, with s·B·A on them."""
    base, factors = _model(root, "half-base"), _model(root, "lora-one")
    scale, changed = ADAPTERS["lora-one"]["lora_alpha"] / RANK, {}
    for key, B in factors.items():
        module, found, _ = key.removeprefix("base_model.model.").partition(".lora_B.")
        if found:
            delta = scale * B.astype(float) @ factors[key.replace("lora_B", "lora_A")]
            values = base[f"{module}.weight"]
            changed[f"{module}.weight"] = (values + (delta.T if architecture == "gpt2" else delta)).astype(np.float32)
    return changed


def _fused(base: npt.NDArray[np.float32], source: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """arcee_fusion in float64."""
    logits = [values.astype(float) for values in (source, base)]
    p, q = (np.exp(row) / np.exp(row).sum(-1, keepdims=True) + 1e-8 for row in logits)
    importance = np.abs(logits[0] - logits[1]) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ranked = np.sort(importance, axis=None)
    lower, median, upper = (ranked[int(quarter * (ranked.size - 1))] for quarter in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (upper - lower), source, base)
