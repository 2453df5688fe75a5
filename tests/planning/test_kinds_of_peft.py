"""Adapters that PEFT itself saves and that cannot be merged: each refused by the code of its kind, none passed over."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import AdaLoraConfig, LoraConfig, PeftType, get_peft_model
from peft.tuners.lora import config as variants

from app.errors import MergeyardError
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.adapter_kinds import KNOWN_FIELDS, REFUSED_FIELDS, refuse_other_kinds
from app.sources.resolver import Resolver
from tests.engine import peft_zoo
from tests.files import lora_tensors, write_adapter

TARGETS = ["q_proj", "v_proj"]
# LoRA's variants: what their config says, and the code.
LORA_VARIANTS: Mapping[str, tuple[dict[str, Any], str]] = {
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "adapter_alora"),
    "KaSA": ({"kasa_config": variants.KasaConfig()}, "adapter_kasa"),
    "QA-LoRA": ({"use_qalora": True, "qalora_group_size": 4}, "adapter_qalora"),
    "MonteCLoRA": ({"monteclora_config": variants.MontecloraConfig()}, "adapter_monteclora"),
    "BD-LoRA": (
        {
            "use_bdlora": variants.BdLoraConfig(
                target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2
            )
        },
        "adapter_bdlora",
    ),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "adapter_layer_replication"),
    "raw PiSSA": ({"init_lora_weights": "pissa"}, "adapter_raw_init"),
    "raw OLoRA": ({"init_lora_weights": "olora"}, "adapter_raw_init"),
}
OTHER_TYPES: Mapping[str, dict[str, Any]] = {
    "IA3": {"target_modules": TARGETS, "feedforward_modules": []},
    **{name: {"target_modules": TARGETS} for name in ("LoHa", "LoKr", "OFT", "BOFT", "Vera", "HRA", "Delora")},
    "LNTuning": {},
    "PrefixTuning": {"num_virtual_tokens": 2},
    "TrainableTokens": {"token_indices": [1]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    peft_zoo.write_base("llama", folder / "base")
    return folder


def saved(root: Path, config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(peft_zoo.load("llama", root / "base"), config).save_pretrained(str(root / "lora"))


def code_of(root: Path) -> str:
    recipe = parse_recipe({"base_model": "base", "merge_method": "ties", "models": [{"adapter": "lora"}]})
    with pytest.raises(MergeyardError) as caught:
        make_plan(recipe, Resolver(roots=[root]))
    assert caught.value.where == "models[0].adapter"
    return caught.value.code


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_a_variant_of_lora_is_refused_by_its_own_code(root: Path, variant: str) -> None:
    options, code = LORA_VARIANTS[variant]
    saved(root, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=TARGETS, **options))
    assert code_of(root) == code


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_another_type_is_refused_as_such(root: Path, kind: str) -> None:
    saved(root, getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **OTHER_TYPES[kind]))
    assert code_of(root) == "adapter_peft_type"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (LoraConfig(arrow_config=variants.ArrowConfig()), "adapter_arrow"),
        (LoraConfig(init_lora_weights="corda", corda_config=variants.CordaConfig()), "adapter_raw_init"),
        (LoraConfig(init_lora_weights="lora_ga", lora_ga_config=variants.LoraGAConfig()), "adapter_raw_init"),
        (peft.XLoraConfig(), "adapter_xlora"),
    ],
    ids=["Arrow", "raw CorDA", "raw LoRA-GA", "X-LoRA"],
)
def test_a_config_as_peft_writes_it_is_enough(root: Path, config: Any, code: str) -> None:
    """These need more than a tiny model to be made."""
    write_adapter(root / "lora", lora_tensors())
    config.save_pretrained(str(root / "lora"))
    assert code_of(root) == code


@pytest.mark.parametrize("kind", sorted(set(PeftType) - {PeftType.LORA, PeftType.ADALORA}))
def test_no_type_that_peft_knows_is_taken_for_lora(kind: PeftType) -> None:
    with pytest.raises(MergeyardError) as caught:
        refuse_other_kinds({"peft_type": kind.value}, "x")
    assert caught.value.code == ("adapter_xlora" if kind is PeftType.XLORA else "adapter_peft_type")


def test_every_field_of_peft_s_config_is_known_or_refused() -> None:
    """A field that a later PEFT brings may change what an adapter computes, so somebody has to look."""
    fields = {field.name for config in (LoraConfig, AdaLoraConfig) for field in dataclasses.fields(config)}
    assert fields - KNOWN_FIELDS == set(REFUSED_FIELDS)
