"""Several adapters of mixed rank, targets and kinds in one merge.

Of a linear one the merged checkpoint, loaded by transformers, gives the logits of the model that the adapters are
composed on: nothing on the other side is this project's code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.engine import peft_zoo
from tests.engine.merges import bytes_of, merge
from worker.engine import blocks

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# By architecture: the adapters' weights and configs; ``adalora`` marks that kind.
TOGETHER: dict[str, list[tuple[float, dict[str, Any]]]] = {
    "llama": [
        (0.7, {"r": 3, "target_modules": ATTENTION + MLP, "use_dora": True}),
        (-0.4, {"r": 8, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
        (1.3, {"r": 2, "target_modules": ["v_proj"], "lora_bias": True, "modules_to_save": ["lm_head", "norm"]}),
        (0.5, {"r": 5, "target_modules": MLP, "bias": "all", "trainable_token_indices": [1, 5, 90]}),
        (0.9, {"adalora": True, "target_modules": ATTENTION}),
    ],
    "gpt2": [
        (0.7, {"r": 3, "target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
        (0.6, {"r": 6, "target_modules": ["c_fc", "wpe"], "rank_pattern": {"wpe": 2}, "fan_in_fan_out": True}),
        (-0.3, {"adalora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    "mixtral": [
        (0.8, {"r": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        (0.5, {"r": 2, "target_modules": ATTENTION, "use_dora": True}),
        (-0.6, {"r": 1, "target_modules": [], "target_parameters": ["down_proj", "gate.weight"]}),
        (0.3, {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["experts"]}),
    ],
    "bert": [
        (0.7, {"r": 3, "target_modules": ["query", "dense"], "use_dora": True}),
        (0.4, {"r": 6, "target_modules": ["value", "word_embeddings"]}),
    ],
    "resnet": [
        (0.7, {"r": 3, "target_modules": ["convolution"], "use_dora": True}),
        (0.4, {"r": 2, "target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
        (0.4, {"adalora": True, "target_modules": ["convolution"]}),
    ],
}


@pytest.fixture(scope="module", params=TOGETHER)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture, and a folder with its ``base`` and the adapters ``0``, ``1``, …"""
    from peft import AdaLoraConfig, LoraConfig

    name = request.param
    root = tmp_path_factory.mktemp("together")
    peft_zoo.write_base(name, root / "base")
    for index, (_, given) in enumerate(TOGETHER[name]):
        options = {key: value for key, value in given.items() if key != "adalora"}
        own: Any = LoraConfig
        if "adalora" in given:
            own, options = AdaLoraConfig, options | {"init_r": 5, "target_r": 2, "total_step": 10}
        config = own(lora_alpha=7, task_type=peft_zoo.ARCHITECTURES[name].task, **options)
        peft_zoo.train(name, root / "base", root / str(index), config, seed=index + 1)
    return name, root


def recipe_of(name: str, **changes: Any) -> dict[str, Any]:
    models = [
        {"adapter": str(index), "parameters": {"weight": weight}} for index, (weight, _) in enumerate(TOGETHER[name])
    ]
    return {"base_model": "base", "merge_method": "task_arithmetic", "models": models, **changes}


def logits(name: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**peft_zoo.ARCHITECTURES[name].inputs(torch.Generator().manual_seed(9))).logits
    return found


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_logits_are_those_of_the_composed_adapters(trained: tuple[str, Path], method: str, tmp_path: Path) -> None:
    """Composed: W + Σ w (Wᵢ - W), over Σ w for ``linear``, where Wᵢ is what PEFT makes of each adapter alone."""
    name, root = trained
    plan = make_plan(parse_recipe(recipe_of(name, merge_method=method)), Resolver(local=root))
    merge(plan, tmp_path / "out")

    composed = peft_zoo.load(name, root / "base")
    base = {key: value.clone() for key, value in composed.state_dict().items()}
    total = sum(weight for weight, _ in TOGETHER[name]) if method == "linear" else 1.0
    result = {key: value.clone() for key, value in base.items()}
    for index, (weight, _) in enumerate(TOGETHER[name]):
        for key, value in peft_zoo.merged_by_peft(name, root / "base", root / str(index)).items():
            if value.is_floating_point():
                result[key] += weight / total * (value - base[key])
    composed.load_state_dict(result)

    found = logits(name, peft_zoo.load(name, tmp_path / "out"))
    torch.testing.assert_close(found, logits(name, composed), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(name, peft_zoo.load(name, root / "base")), atol=1e-2)


def test_logits_are_those_of_adapters_active_at_once(tmp_path: Path) -> None:
    """PEFT computes every adapter beside the layer it adapts: no ΔW is formed on that side at all."""
    from peft import LoraConfig, PeftModel

    root = tmp_path / "root"
    peft_zoo.write_base("llama", root / "base")
    options: list[dict[str, Any]] = [
        {"r": 3, "target_modules": ATTENTION + MLP, "use_dora": True},
        {"r": 8, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
        {"r": 2, "target_modules": ["v_proj", "down_proj"], "alpha_pattern": {"v_proj": 3}},
    ]
    for index, own in enumerate(options):
        config = LoraConfig(lora_alpha=7, task_type="CAUSAL_LM", **own)
        peft_zoo.train("llama", root / "base", root / str(index), config, seed=index + 1)
    recipe = recipe_of("llama", models=[{"adapter": str(index)} for index in range(3)])
    merge(make_plan(parse_recipe(recipe), Resolver(local=root)), tmp_path / "out")

    model: Any = PeftModel.from_pretrained(peft_zoo.load("llama", root / "base"), root / "0", adapter_name="0")
    for index in (1, 2):
        model.load_adapter(str(root / str(index)), adapter_name=str(index))
    model.base_model.set_adapter(["0", "1", "2"])
    found = logits("llama", peft_zoo.load("llama", tmp_path / "out"))
    torch.testing.assert_close(found, logits("llama", model.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_threads_memory_and_time_change_no_byte(
    trained: tuple[str, Path], dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every kind of adapter, with blocks so small that they end inside rows."""
    name, root = trained
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 250)
    parameters = {"density": 0.6, "normalize": False, "rescale": True, "dialect": dialect}
    recipe = recipe_of(name, merge_method="ties", parameters=parameters)
    found = []
    for threads, budget in ((1, 1 << 20), (3, 0)):
        plan = make_plan(parse_recipe(recipe), Resolver(local=root))
        merge(plan, tmp_path / f"out-{threads}", threads=threads, delta_budget=budget)
        found.append(bytes_of(tmp_path / f"out-{threads}"))
    assert found[0] == found[1]
