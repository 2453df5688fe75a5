"""Merges written as adapters: exact where that is possible, measured where it is not, loaded by PEFT, taken by vLLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.artifacts.manifest import StoredFile
from app.errors import MergeyardError
from app.planning.adapter_output import FILENAME
from tests.engine.merges import Watch, bytes_of, merge, plan_of, tensors_of
from tests.engine.peft_zoo import train, write_base
from tests.engine.test_adoption import Store, run
from worker.engine import blocks

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's
TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and a tiny GPT-2, each with two adapters by PEFT; read only."""
    root = tmp_path_factory.mktemp("sources")
    for kind, targets in (("llama", LINEAR), ("gpt2", CONV1D)):
        write_base(kind, root / kind)
        for seed, name in enumerate(("one", "two"), start=1):
            options: dict[str, Any] = {"target_modules": targets if seed == 1 else targets[:2]}
            _adapter(kind, root, f"{kind}-{name}", **options)
            stored = root / f"{kind}-{name}" / "adapter_model.safetensors"
            _shuffle(stored, seed)
    return root


def _adapter(kind: str, base: Path, folder: str | Path, **options: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **options)
    train(kind, base / kind, base / folder, config)


def _shuffle(path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    save_file({k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in load_file(path).items()}, path)


def recipe(
    method: str, kind: str = "llama", output: Mapping[str, Any] | None = None, **parameters: Any
) -> dict[str, Any]:
    return {
        "base_model": kind,
        "merge_method": method,
        "models": [
            {"adapter": f"{kind}-one", "parameters": {"weight": 0.7}},
            {"adapter": f"{kind}-two", "parameters": {"weight": -0.4 if method == "task_arithmetic" else 0.4}},
        ],
        "parameters": parameters,
        "out_dtype": "float32",
        "output": {"kind": "adapter", **(output or {})},
    }


def as_checkpoint(wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {**wanted, "output": {}}


def logits_of_adapter(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        return torch.as_tensor(model.eval()(TOKENS).logits)


def logits_of(model: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return torch.as_tensor(AutoModelForCausalLM.from_pretrained(model).eval()(TOKENS).logits)


def product(adapter: Path, module: str) -> np.ndarray[Any, Any]:
    stored = tensors_of(adapter)
    A, B = (stored[f"base_model.model.{module}.lora_{side}.weight"].double().numpy() for side in "AB")
    return np.asarray(B @ A)


# ── exact ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"lambda": 0.8}),
        ("linear", {}),
        ("core_space", {"density": 0.5}),
        ("tsv", {}),
        ("iso_c", {}),
        ("knots", {"density": 0.5}),
    ],
)
def test_an_exact_adapter_gives_the_checkpoints_logits(
    sources: Path, tmp_path: Path, kind: str, method: str, parameters: dict[str, Any]
) -> None:
    wanted = recipe(method, kind, **parameters)
    manifest = merge(plan_of(sources, wanted), tmp_path / "adapter")
    merge(plan_of(sources, as_checkpoint(wanted)), tmp_path / "checkpoint")
    found, expected = logits_of_adapter(sources / kind, tmp_path / "adapter"), logits_of(tmp_path / "checkpoint")
    assert (expected - logits_of(sources / kind)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert {entry.retained_energy for entry in manifest.statistics.values()} == {1.0}


def test_a_sum_is_the_factors_side_by_side(sources: Path, tmp_path: Path) -> None:
    merge(plan_of(sources, recipe("task_arithmetic")), tmp_path / "out")
    A = tensors_of(tmp_path / "out")["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    own = [tensors_of(sources / f"llama-{name}")[key] for name in ("one", "two")]
    assert torch.equal(A, torch.cat(own))


# ── compressed ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_a_compressed_merge_holds_is_what_a_dense_decomposition_says(
    sources: Path, tmp_path: Path, kind: str
) -> None:
    wanted = recipe("ties", kind, {"rank": 8}, density=0.3)
    manifest = merge(plan_of(sources, wanted), tmp_path / "adapter")
    merge(plan_of(sources, as_checkpoint(wanted)), tmp_path / "checkpoint")
    base, checkpoint = tensors_of(sources / kind), tensors_of(tmp_path / "checkpoint")
    assert len(manifest.statistics) >= 6
    for name, entry in manifest.statistics.items():
        delta = (checkpoint[name].double() - base[name].double()).numpy()
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        assert entry.retained_energy is not None
        held = product(tmp_path / "adapter", name.removesuffix(".weight"))
        held = held.T if kind == "gpt2" else held
        lost = np.square(delta - held).sum() / squares.sum()
        assert entry.retained_energy == pytest.approx(1 - lost, abs=1e-6)
        assert entry.retained_energy == pytest.approx(squares[:8].sum() / squares.sum(), rel=5e-3)


@pytest.mark.parametrize(("out_dtype", "within"), [("bfloat16", 2e-7), ("float16", 2e-8)])
@pytest.mark.parametrize(
    ("method", "output"),
    [("task_arithmetic", {}), ("core_space", {}), ("task_arithmetic", {"rank": 3}), ("ties", {"rank": 32})],
)
def test_the_energy_is_what_the_file_holds(
    sources: Path, tmp_path: Path, method: str, output: dict[str, Any], out_dtype: str, within: float
) -> None:
    """In 16 bits even exact factors lose something: about 3e-6 of the energy in bfloat16, 4e-8 in float16."""
    wanted = recipe(method, output=output)
    merge(plan_of(sources, as_checkpoint(wanted)), tmp_path / "checkpoint")
    manifest = merge(plan_of(sources, {**wanted, "out_dtype": out_dtype}), tmp_path / "adapter")
    base, checkpoint = tensors_of(sources / "llama"), tensors_of(tmp_path / "checkpoint")
    for name, entry in manifest.statistics.items():
        delta = (checkpoint[name].double() - base[name].double()).numpy()
        lost = np.square(delta - product(tmp_path / "adapter", name.removesuffix(".weight"))).sum()
        assert lost > 0
        assert entry.retained_energy == pytest.approx(1 - lost / np.square(delta).sum(), abs=within)


def test_sources_that_cancel_leave_nothing_to_hold(sources: Path, tmp_path: Path) -> None:
    wanted = recipe("task_arithmetic", output={"min_retained_energy": 1.0})
    wanted["models"] = [{"adapter": "llama-one", "parameters": {"weight": weight}} for weight in (1.0, -1.0)]
    manifest = merge(plan_of(sources, {**wanted, "out_dtype": "bfloat16"}), tmp_path / "out")
    assert {entry.retained_energy for entry in manifest.statistics.values()} == {1.0}


def test_logits_stray_no_further_than_what_is_lost(sources: Path, tmp_path: Path) -> None:
    """The more energy an adapter holds, the nearer its logits: at full rank they are the checkpoint's."""
    wanted = recipe("ties", density=0.3)
    merge(plan_of(sources, as_checkpoint(wanted)), tmp_path / "checkpoint")
    expected, before = logits_of(tmp_path / "checkpoint"), logits_of(sources / "llama")
    change = (expected - before).norm()
    for rank in (8, 32, 64):
        manifest = merge(
            plan_of(sources, {**wanted, "output": {"kind": "adapter", "rank": rank}}), tmp_path / f"r{rank}"
        )
        lost = max(1 - (entry.retained_energy or 0.0) for entry in manifest.statistics.values())
        distance = (logits_of_adapter(sources / "llama", tmp_path / f"r{rank}") - expected).norm() / change
        assert distance <= 2 * lost**0.5 + 1e-3, rank


def test_factors_of_a_greater_rank_are_recompressed_to_the_best(sources: Path, tmp_path: Path) -> None:
    manifest = merge(plan_of(sources, recipe("task_arithmetic", output={"rank": 3})), tmp_path / "out")
    merge(plan_of(sources, recipe("task_arithmetic")), tmp_path / "exact")
    name = "model.layers.1.self_attn.q_proj"
    values = np.linalg.svd(product(tmp_path / "exact", name), compute_uv=False)
    found = np.linalg.svd(product(tmp_path / "out", name), compute_uv=False)
    np.testing.assert_allclose(found[:3], values[:3], rtol=1e-5)
    energy = np.square(values[:3]).sum() / np.square(values).sum()
    assert manifest.statistics[f"{name}.weight"].retained_energy == pytest.approx(energy, rel=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "model_stock", "core_space"])
def test_threads_memory_and_blocks_change_no_byte(
    sources: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 200)
    parameters = {} if method in ("task_arithmetic", "model_stock") else {"density": 0.5}
    wanted = recipe(method, output={"rank": 4}, **parameters)
    if method == "model_stock":
        wanted["models"] = [{"adapter": "llama-one"}, {"adapter": "llama-two"}]
    found = []
    for threads, budget in ((1, 0), (3, 1 << 20)):
        merge(plan_of(sources, wanted), tmp_path / f"out-{threads}", threads=threads, delta_budget=budget)
        found.append(bytes_of(tmp_path / f"out-{threads}"))
    assert found[0] == found[1]


def test_below_the_least_energy_nothing_is_written_and_the_worst_are_named(sources: Path, tmp_path: Path) -> None:
    wanted = recipe("ties", output={"rank": 2, "min_retained_energy": 0.99}, density=0.3)
    with pytest.raises(MergeyardError, match=r"model\.layers\.\d.*0\.\d{4}.*and \d+ more") as refused:
        merge(plan_of(sources, wanted), tmp_path / "out")
    assert (refused.value.code, refused.value.where) == ("energy_too_low", "output.min_retained_energy")
    assert list(tmp_path.iterdir()) == []


# ── the files ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "output"), [("task_arithmetic", {}), ("ties", {}), ("core_space", {}), ("ties", {"rank": 16})]
)
def test_vllm_would_take_it(sources: Path, tmp_path: Path, method: str, output: dict[str, Any]) -> None:
    merge(plan_of(sources, recipe(method, output=output)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["r"] in RANKS
    assert config["peft_type"] == "LORA"
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config["use_rslora"] and not config["use_dora"]
    assert config["bias"] == "none" and config["modules_to_save"] is None
    stored = tensors_of(tmp_path / "out")
    assert {value.shape[0 if "lora_A" in key else 1] for key, value in stored.items()} == {config["r"]}
    assert sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in stored}) == config["target_modules"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "mergeyard.json"),
    ]


def test_the_default_rank_is_the_least_that_loses_nothing(sources: Path) -> None:
    def rank(method: str, **parameters: Any) -> int:
        plan = plan_of(sources, recipe(method, **parameters))
        assert plan.adapter is not None
        assert plan.recipe["output"]["rank"] == plan.adapter.rank
        return plan.adapter.rank

    assert (rank("task_arithmetic"), rank("core_space"), rank("ties")) == (8, 8, 64)


def test_modules_whose_name_says_too_much_are_written_with_their_path(sources: Path, tmp_path: Path) -> None:
    _adapter("llama", sources, tmp_path / "part", target_modules=r"model\.layers\.1\.self_attn\.q_proj")
    shutil.copytree(sources / "llama", tmp_path / "llama")
    wanted = {**recipe("task_arithmetic"), "models": [{"adapter": "part"}]}
    merge(plan_of(tmp_path, wanted), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    logits_of_adapter(sources / "llama", tmp_path / "out")


def test_the_resolved_recipe_gives_the_same_plan(sources: Path) -> None:
    plan = plan_of(sources, recipe("ties", output={"min_retained_energy": 0.1}))
    assert plan_of(sources, plan.recipe).digest == plan.digest


def test_progress_reaches_its_end_and_a_cancel_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    watch = Watch()
    merge(plan_of(sources, recipe("ties")), tmp_path / "out", control=watch)
    assert watch.steps[-1][0] == watch.steps[-1][1]
    assert [done for done, _ in watch.steps] == sorted(done for done, _ in watch.steps)
    with pytest.raises(KeyboardInterrupt):
        stopping = Watch(stop=KeyboardInterrupt(), stop_at=40)
        merge(plan_of(sources, recipe("ties")), tmp_path / "stopped", control=stopping)
    assert not [path for path in tmp_path.iterdir() if "stopped" in path.name]


def test_a_retry_takes_over_the_finished_file(sources: Path, tmp_path: Path, with_norm: dict[str, Any]) -> None:
    """What was saved whole is known from the file's statistics, so the config comes out the same."""
    with_norm["output"]["other"] = "save"
    plan = plan_of(tmp_path, with_norm)
    first = Store(tmp_path / "first")
    expected = run(plan, first)
    second = Store(tmp_path / "second", remembered=first.remembered)
    second.adoptable = {file["name"]: StoredFile(key=file["name"], **file) for file in expected["files"]}
    assert run(plan, second) == expected
    assert FILENAME not in second.created


# ── what a LoRA cannot hold ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def with_norm(sources: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of an adapter that also saved the final norm; its folders are below ``tmp_path``."""
    shutil.copytree(sources / "llama", tmp_path / "llama")
    _adapter("llama", sources, tmp_path / "norm", target_modules=["q_proj"], modules_to_save=["model.norm"])
    return {**recipe("task_arithmetic"), "models": [{"adapter": "norm"}]}


def test_a_norm_is_refused_at_planning_where_the_adapter_states_it(with_norm: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MergeyardError, match=r"model\.norm\.weight") as refused:
        plan_of(tmp_path, with_norm)
    assert (refused.value.code, refused.value.where) == ("lora_cannot_hold", "output.other")


def test_a_norm_is_saved_whole_on_demand(with_norm: dict[str, Any], tmp_path: Path, sources: Path) -> None:
    with_norm["output"]["other"] = "save"
    plan = plan_of(tmp_path, with_norm)
    assert any("vLLM refuses" in warning.message for warning in plan.warnings)
    merge(plan, tmp_path / "out")
    merge(plan_of(tmp_path, as_checkpoint(with_norm)), tmp_path / "checkpoint")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]
    found = logits_of_adapter(sources / "llama", tmp_path / "out")
    torch.testing.assert_close(found, logits_of(tmp_path / "checkpoint"), rtol=0, atol=1e-4)


def test_a_norm_is_left_out_on_demand_and_nothing_of_it_is_held(with_norm: dict[str, Any], tmp_path: Path) -> None:
    with_norm["output"] |= {"other": "drop", "min_retained_energy": 0.9}
    plan = plan_of(tmp_path, with_norm)
    assert any("is not in the adapter" in warning.message for warning in plan.warnings)
    manifest = merge(plan, tmp_path / "out")
    assert manifest.statistics["model.norm.weight"].retained_energy == 0.0
    assert all("lora_" in key for key in tensors_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"output": {"rank": 8}}, "recipe_invalid", "output.rank"),
        ({"output": {"kind": "adapter", "max_shard_size": "1GB"}}, "recipe_invalid", "output.max_shard_size"),
        ({"output": {"kind": "adapter", "rank": 0}}, "recipe_invalid", "output.rank"),
        ({"output": {"kind": "adapter", "min_retained_energy": 1.5}}, "recipe_invalid", "output.min_retained_energy"),
        ({"output": {"kind": "adapter", "other": "keep"}}, "recipe_invalid", "output.other"),
        ({"merge_method": "linear", "parameters": {"normalize": False}}, "not_supported", "parameters"),
        ({"chat_template": "{{ messages }}"}, "not_supported", "output.kind"),
    ],
)
def test_what_makes_no_adapter_is_refused_with_its_place(
    sources: Path, changes: dict[str, Any], code: str, where: str
) -> None:
    with pytest.raises(MergeyardError) as refused:
        plan_of(sources, {**recipe("task_arithmetic"), **changes})
    assert (refused.value.code, refused.value.where) == (code, where)


def test_a_rank_that_vllm_does_not_take_is_written_and_warned_of(sources: Path) -> None:
    plan = plan_of(sources, recipe("ties", output={"rank": 24}))
    assert [(warning.where, "32 is the next" in warning.message) for warning in plan.warnings] == [
        ("output.rank", True)
    ]
    assert plan.adapter is not None
    assert plan.adapter.rank == 24
