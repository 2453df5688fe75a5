"""core_space, tsv, iso_c and knots: whole merges against dense computations in NumPy that share nothing with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.errors import MergeyardError
from tests.engine.merges import bytes_of, merge, plan_of, tensors_of
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model
from worker.engine import blocks

Array = np.ndarray[Any, np.dtype[np.float64]]
Pair = tuple[Array, Array]  # B with its scale, A

METHODS = ("core_space", "tsv", "iso_c", "knots")
RANKS = {"sql": 2, "json": 3, "style": 1}
SCALE = 2.0  # write_adapter's alpha 4 over r 2, and kept so for the other ranks
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "base")
    for seed, (name, rank) in enumerate(RANKS.items(), start=1):
        write_adapter(tmp_path / name, lora_tensors(seed=seed, rank=rank), r=rank, lora_alpha=SCALE * rank)
    return tmp_path


def recipe(method: str, names: Sequence[str] = tuple(RANKS), own: Any = None, **parameters: Any) -> dict[str, Any]:
    models = [{"adapter": name, "parameters": dict((own or {}).get(name, {}))} for name in names]
    return {"base_model": "base", "merge_method": method, "models": models, "parameters": parameters}


def merged(root: Path, wanted: Mapping[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    out = root / f"out-{len(list(root.glob('out-*')))}"
    merge(plan_of(root, wanted), out, **options)
    return tensors_of(out)


def delta(found: Mapping[str, torch.Tensor], module: str) -> Array:
    """What a merge changed of a module, float64."""
    return np.asarray((found[f"{module}.weight"].double() - llama_tensors()[f"{module}.weight"].double()).numpy())


def factors(root: Path, name: str, module: str) -> Pair:
    stored = tensors_of(root / name)
    A, B = (stored[f"base_model.model.{module}.lora_{side}.weight"].double().numpy() for side in "AB")
    return SCALE * B, A


# ── the same by dense matrices ──────────────────────────────────────────────────────────────────


def ties(matrices: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    trimmed = []
    for matrix in matrices:
        keep = np.zeros(matrix.size, dtype=bool)
        keep[np.argsort(-np.abs(matrix).ravel(), kind="stable")[: int(density * matrix.size)]] = True
        trimmed.append(np.where(keep.reshape(matrix.shape), matrix, 0.0))
    votes = [weight * matrix for weight, matrix in zip(weights, trimmed, strict=True)]
    sign = np.where(sum(votes) >= 0, 1.0, -1.0)
    agreeing = [vote * sign > 0 for vote in votes]
    total = sum(np.where(agrees, vote, 0.0) for agrees, vote in zip(agreeing, votes, strict=True))
    divisor = sum(np.where(agrees, weight, 0.0) for agrees, weight in zip(agreeing, weights, strict=True))
    return np.asarray(total / np.where(divisor == 0, 1.0, divisor))


def dense_core_space(pairs: Sequence[Pair], weights: Sequence[float]) -> Array:
    rank = sum(A.shape[0] for _, A in pairs)
    U = np.linalg.svd(np.hstack([B for B, _ in pairs]))[0][:, :rank]
    V = np.linalg.svd(np.vstack([A for _, A in pairs]))[2][:rank].T
    return np.asarray(U @ ties([U.T @ (B @ A) @ V for B, A in pairs], weights, 0.5) @ V.T)


def dense_knots(pairs: Sequence[Pair], weights: Sequence[float]) -> Array:
    rank = sum(A.shape[0] for _, A in pairs)
    U, S, Vh = np.linalg.svd(np.hstack([B @ A for B, A in pairs]), full_matrices=False)
    rank = min(rank, len(U))
    aligned = np.split((S[:, None] * Vh)[:rank], len(pairs), axis=1)
    return np.asarray(U[:, :rank] @ ties(aligned, weights, 0.5))


def dense_tsv(pairs: Sequence[Pair], weights: Sequence[float]) -> Array:
    found = []
    for (B, A), weight in zip(pairs, weights, strict=True):
        U, S, Vh = np.linalg.svd(weight * (B @ A))
        found.append((U[:, : len(A)], S[: len(A)], Vh[: len(A)]))
    left, right = np.hstack([U for U, _, _ in found]), np.vstack([Vh for _, _, Vh in found])
    polar = [P @ Qh for P, _, Qh in (np.linalg.svd(stack, full_matrices=False) for stack in (left, right))]
    return np.asarray(polar[0] @ np.diag(np.concatenate([S for _, S, _ in found])) @ polar[1])


def dense_iso_c(pairs: Sequence[Pair], weights: Sequence[float]) -> Array:
    rank = sum(A.shape[0] for _, A in pairs)
    U, S, Vh = np.linalg.svd(sum(weight * (B @ A) for (B, A), weight in zip(pairs, weights, strict=True)))
    return np.asarray(S[:rank].mean() * U[:, :rank] @ Vh[:rank])


DENSE: Mapping[str, Callable[[Sequence[Pair], Sequence[float]], Array]] = {
    "core_space": dense_core_space,
    "knots": dense_knots,
    "tsv": dense_tsv,
    "iso_c": dense_iso_c,
}


@pytest.mark.parametrize("room", ["reference", "cpu"])
@pytest.mark.parametrize("module", [Q, UP])
@pytest.mark.parametrize("method", METHODS)
def test_is_what_dense_matrices_give(root: Path, method: str, module: str, room: Any) -> None:
    weights = {"sql": 1.0, "json": 0.7, "style": 1.3}
    own = {name: {"weight": weight} for name, weight in weights.items()}
    parameters = {"density": 0.5} if method in ("core_space", "knots") else {}
    found = delta(merged(root, recipe(method, own=own, **parameters), room=room), module)
    expected = DENSE[method]([factors(root, name, module) for name in RANKS], list(weights.values()))
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
def test_lambda_scales_the_change(root: Path, method: str) -> None:
    whole, half = (delta(merged(root, recipe(method, **{"lambda": scale})), UP) for scale in (1.0, 0.5))
    np.testing.assert_allclose(half, whole / 2, atol=1e-6 * np.abs(whole).max())


# ── what must hold of them ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("inner", "normalize", "same"),
    [("task_arithmetic", False, False), ("task_arithmetic", True, True), ("linear", None, True)],
)
def test_weighted_sums_in_core_space_are_task_arithmetic(root: Path, inner: str, normalize: Any, same: bool) -> None:
    own = {"sql": {"weight": 0.6}, "json": {"weight": -0.4}, "style": {"weight": 1.1}}
    given = {} if normalize is None else {"normalize": normalize}
    found = merged(root, recipe("core_space", own=own, inner=inner, **given))
    expected = merged(root, recipe("task_arithmetic", own=own, normalize=same))
    for module in (Q, UP):
        np.testing.assert_allclose(delta(found, module), delta(expected, module), atol=2e-6)


@pytest.mark.parametrize(
    ("method", "returns"), [("core_space", True), ("tsv", True), ("knots", True), ("iso_c", False)]
)
def test_one_source_returns_itself_but_for_iso_c(root: Path, method: str, returns: bool) -> None:
    found, alone = (merged(root, recipe(name, ["json"])) for name in (method, "task_arithmetic"))
    difference = np.abs(delta(found, UP) - delta(alone, UP)).max() / np.abs(delta(alone, UP)).max()
    assert bool(difference < 1e-6) == returns


def test_iso_c_gives_every_direction_the_same_weight(root: Path) -> None:
    values = np.linalg.svd(delta(merged(root, recipe("iso_c", ["sql", "json"])), UP), compute_uv=False)
    np.testing.assert_allclose(values[:5], values[0], rtol=1e-5)
    np.testing.assert_allclose(values[5:], 0, atol=1e-5 * values[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_sources_changes_no_byte(root: Path, method: str) -> None:
    names = list(RANKS)
    for index, order in enumerate((names, names[::-1], [names[1], names[2], names[0]])):
        merge(plan_of(root, recipe(method, order)), root / f"out-{index}")
    assert bytes_of(root / "out-0") == bytes_of(root / "out-1") == bytes_of(root / "out-2")


@pytest.mark.parametrize("method", METHODS)
def test_threads_memory_and_blocks_change_no_byte(root: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 24)
    plan = plan_of(root, recipe(method))
    found = []
    for index, (threads, budget) in enumerate([(1, 0), (3, 1 << 20), (7, 0)]):
        merge(plan, root / f"out-{index}", threads=threads, delta_budget=budget)
        found.append(bytes_of(root / f"out-{index}"))
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_larger_stacks_change_no_byte_with_threads(tmp_path: Path) -> None:
    """Where the libraries' own threads would set in."""
    shape, generator = (701, 1037), torch.Generator().manual_seed(0)
    write_model(tmp_path / "base", {"m.q_proj.weight": torch.randn(shape, generator=generator).bfloat16()})
    for index, rank in enumerate((5, 64, 80)):
        tensors = {
            "base_model.model.m.q_proj.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
            "base_model.model.m.q_proj.lora_B.weight": torch.randn(shape[0], rank, generator=generator),
        }
        write_adapter(tmp_path / f"a{index}", tensors, r=rank)
    names = [f"a{index}" for index in range(3)]
    for method in METHODS:
        parameters = {"density": 0.3} if method in ("core_space", "knots") else {}
        plan = plan_of(tmp_path, recipe(method, names, **parameters))
        merge(plan, tmp_path / f"{method}-1", threads=1)
        torch.set_num_threads(4)
        merge(plan, tmp_path / f"{method}-4", threads=4)
        torch.set_num_threads(1)
        assert bytes_of(tmp_path / f"{method}-1") == bytes_of(tmp_path / f"{method}-4"), method


# ── where little is left to work with ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", METHODS)
def test_a_source_twice_is_that_source(root: Path, method: str) -> None:
    """Every stack has half its rank: what is not there must not be made up."""
    own = {"json": {"weight": 0.5}} if method == "iso_c" else {}
    found = delta(merged(root, recipe(method, ["json", "json"], own=own)), UP)
    expected = delta(merged(root, recipe(method, ["json"])), UP)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beside", [[], ["json"]])
def test_an_adapter_that_was_never_trained_changes_nothing(root: Path, method: str, beside: list[str]) -> None:
    fresh = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in lora_tensors().items()}
    write_adapter(root / "fresh", fresh)
    found = delta(merged(root, recipe(method, ["fresh", *beside])), UP)
    expected = delta(merged(root, recipe(method, beside)), UP) if beside else np.zeros_like(found)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_beyond_the_matrix_are_no_trouble(root: Path, method: str) -> None:
    for seed in (7, 8):
        write_adapter(root / f"wide-{seed}", lora_tensors(seed=seed, rank=13), r=13, lora_alpha=13)
    found = delta(merged(root, recipe(method, ["wide-7", "wide-8"])), Q)
    assert np.isfinite(found).all()
    assert np.abs(found).max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_sources_that_cancel_are_finite(root: Path, method: str) -> None:
    own = {"json": {"weight": 1.0}}
    wanted = recipe(method, ["json"], own=own)
    wanted["models"].append({"adapter": "json", "parameters": {"weight": -1.0}})
    found = delta(merged(root, wanted), UP)
    assert np.isfinite(found).all()
    if method == "iso_c":
        np.testing.assert_allclose(found, 0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_source_that_leaves_a_module_alone_adds_nothing_there(root: Path, method: str) -> None:
    half = {key: value for key, value in lora_tensors(seed=9).items() if "q_proj" in key}
    write_adapter(root / "half", half)
    found = merged(root, recipe(method, ["json", "half"]))
    alone = merged(root, recipe(method, ["json"]))
    np.testing.assert_allclose(delta(found, UP), delta(alone, UP), atol=1e-6)
    assert np.abs(delta(found, Q) - delta(alone, Q)).max() > 1e-3


def test_a_mean_in_core_space_counts_a_source_that_leaves_a_module_alone(root: Path) -> None:
    write_adapter(root / "half", {key: value for key, value in lora_tensors(seed=9).items() if "q_proj" in key})
    found = merged(root, recipe("core_space", ["json", "half"], inner="linear"))
    expected = merged(root, recipe("task_arithmetic", ["json", "half"], normalize=True))
    np.testing.assert_allclose(delta(found, UP), delta(expected, UP), atol=1e-6)


# ── what is not low-rank ────────────────────────────────────────────────────────────────────────


def tuned_norms(root: Path) -> list[torch.Tensor]:
    """Two adapters that also saved the final norm; what they change there."""
    changes = []
    for seed, name in ((1, "one"), (2, "two")):
        change = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        saved = {"base_model.model.model.norm.weight": llama_tensors()["model.norm.weight"] + change}
        write_adapter(root / name, lora_tensors(seed=seed) | saved, modules_to_save=["norm"])
        changes.append(change)
    return changes


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_vectors_are_averaged_over_all_sources(root: Path, method: str) -> None:
    one, two = tuned_norms(root)
    found = (
        merged(root, recipe(method, ["one", "two", "sql"]))["model.norm.weight"] - llama_tensors()["model.norm.weight"]
    )
    torch.testing.assert_close(found, (one + two) / 3)


@pytest.mark.parametrize("method", ["core_space", "knots"])
def test_vectors_are_merged_by_the_wrapped_method(root: Path, method: str) -> None:
    tuned_norms(root)
    found = merged(root, recipe(method, ["one", "two", "sql"], density=0.5))["model.norm.weight"]
    assert torch.equal(found, merged(root, recipe("ties", ["one", "two", "sql"], density=0.5))["model.norm.weight"])


def test_core_space_merges_full_models_by_the_wrapped_method(root: Path) -> None:
    write_model(root / "tuned", llama_tensors(seed=5))
    wanted = recipe("core_space", ["sql"], density=0.5)
    wanted["models"].append({"model": "tuned"})
    expected = {**wanted, "merge_method": "ties"}
    assert all(torch.equal(value, merged(root, expected)[name]) for name, value in merged(root, wanted).items())


@pytest.mark.parametrize("method", ["tsv", "iso_c", "knots"])
def test_a_dense_matrix_is_refused_with_its_place(root: Path, method: str) -> None:
    write_model(root / "tuned", llama_tensors(seed=5))
    wanted = recipe(method, ["sql"])
    wanted["models"].append({"model": "tuned"})
    with pytest.raises(MergeyardError, match="core_space") as refused:
        plan_of(root, wanted)
    assert [(problem.code, problem.where) for problem in refused.value.problems] == [("not_supported", "models[1]")]


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_base_gets_the_transposed_change(tmp_path: Path, method: str) -> None:
    """GPT-2 stores (in, out): the same adapter on the same numbers gives the same change, the other way round."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 8, generator=generator)
    for place, config, stored in (
        (tmp_path / "linear", {}, weight),
        (tmp_path / "conv1d", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, weight.T.contiguous()),
    ):
        write_model(place / "base", {"h.0.attn.c_attn.weight": stored}, **config)
        for seed in (1, 2):
            own = torch.Generator().manual_seed(seed)
            tensors = {
                "base_model.model.h.0.attn.c_attn.lora_A.weight": torch.randn(2, 8, generator=own),
                "base_model.model.h.0.attn.c_attn.lora_B.weight": torch.randn(12, 2, generator=own),
            }
            write_adapter(place / f"a{seed}", tensors, fan_in_fan_out=bool(config))
    wanted = recipe(method, ["a1", "a2"], **({"density": 0.5} if method in ("core_space", "knots") else {}))
    linear, conv1d = (merged(tmp_path / place, wanted)["h.0.attn.c_attn.weight"] for place in ("linear", "conv1d"))
    torch.testing.assert_close(conv1d.T, linear)


# ── recipes and statistics ──────────────────────────────────────────────────────────────────────


def test_the_wrapped_methods_own_defaults_hold(root: Path) -> None:
    def normalize(inner: str) -> Any:
        plan = plan_of(root, recipe("core_space", inner=inner))
        return next(tensor for tensor in plan.tensors if tensor.contributions).parameters["normalize"]

    assert (normalize("ties"), normalize("linear"), normalize("task_arithmetic")) == (True, True, False)


def test_a_dialect_that_spans_the_model_is_refused(root: Path) -> None:
    for method in ("core_space", "knots"):
        with pytest.raises(MergeyardError, match="mergekit, peft, article") as refused:
            plan_of(root, recipe(method, dialect="paper"))
        assert refused.value.where == "parameters.dialect"


def test_parameters_that_the_wrapped_method_does_not_know_are_warned_of(root: Path) -> None:
    plan = plan_of(root, recipe("core_space", inner="linear", density=0.5))
    assert [warning.where for warning in plan.warnings] == ["parameters.density"]


def test_statistics_are_those_of_the_sources(root: Path) -> None:
    manifest = merge(plan_of(root, recipe("core_space", density=0.5)), root / "out")
    found = manifest.statistics[f"{UP}.weight"]
    pairs = [factors(root, name, UP) for name in sorted(RANKS)]
    np.testing.assert_allclose(found.source_norms, [np.linalg.norm(B @ A) for B, A in pairs], rtol=1e-6)
    np.testing.assert_allclose(found.merged_norm, np.linalg.norm(delta(tensors_of(root / "out"), UP)), rtol=1e-6)
    assert found.trimmed == (0.5, 0.5, 0.5)
    assert found.sign_conflict is not None
    assert 0 < found.sign_conflict < 1


def test_where_no_signs_are_compared_none_are_reported(root: Path) -> None:
    manifest = merge(plan_of(root, recipe("tsv")), root / "out")
    assert manifest.statistics[f"{UP}.weight"].sign_conflict is None
    assert (
        json.loads((root / "out" / "mergeyard.json").read_text())["statistics"][f"{UP}.weight"]["sign_conflict"] is None
    )
    assert "disagreed" not in (root / "out" / "README.md").read_text()


def test_a_factor_with_nan_is_refused(root: Path) -> None:
    tensors = lora_tensors(seed=4)
    next(iter(tensors.values()))[0, 0] = float("nan")
    write_adapter(root / "nan", tensors)
    with pytest.raises(MergeyardError, match="nan holds NaN") as refused:
        merge(plan_of(root, recipe("tsv", ["nan", "sql"])), root / "out")
    assert refused.value.code == "source_not_finite"


def test_a_change_beyond_float32_is_refused(root: Path) -> None:
    with pytest.raises(MergeyardError) as refused:
        merge(plan_of(root, recipe("tsv", **{"lambda": 1e30}, own={"sql": {"weight": 1e30}})), root / "out")
    assert refused.value.code == "result_not_finite"
