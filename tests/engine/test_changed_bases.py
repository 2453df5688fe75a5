"""Adapters whose start changed their base: PiSSA, OLoRA, CorDA and LoRA-GA, made and converted by PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from tests.engine import peft_zoo
from tests.engine.test_against_peft import LINEAR, assert_equal, merged_here


def corda(method: str) -> tuple[dict[str, Any], Callable[[Any], None]]:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def see_inputs(model: Any) -> None:
        def run() -> None:
            generator = torch.Generator().manual_seed(5)
            for _ in range(8):
                model(torch.randint(0, peft_zoo.VOCABULARY, (1, 16), generator=generator))

        preprocess_corda(model, lora_config(options), run_model=run)

    options = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=method)}
    return options, see_inputs


def lora_ga() -> tuple[dict[str, Any], Callable[[Any], None]]:
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    def see_gradients(model: Any) -> None:
        def run() -> None:
            tokens = torch.randint(0, peft_zoo.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))
            model(tokens, labels=tokens).loss.backward()

        preprocess_loraga(model, lora_config(options), run)

    options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    return options, see_gradients


# Starts that change the base: what the config says, and what they need to see of the base.
CHANGED_BASES: dict[str, Callable[[], tuple[dict[str, Any], Callable[[Any], None] | None]]] = {
    "pissa": lambda: ({"init_lora_weights": "pissa"}, None),
    "pissa, rslora": lambda: ({"init_lora_weights": "pissa", "use_rslora": True}, None),
    "olora": lambda: ({"init_lora_weights": "olora"}, None),
    "corda, instruction-previewed": lambda: corda("ipm"),
    "corda, knowledge-preserved": lambda: corda("kpm"),
    "lora-ga": lora_ga,
}


def lora_config(options: Mapping[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", target_modules=LINEAR, **options)


@pytest.mark.parametrize("init", CHANGED_BASES)
def test_a_changed_base_needs_its_conversion(init: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    """These take their first factors out of the base: raw they are refused, converted they are plain LoRA."""
    (tmp_path / "base").symlink_to(bases["llama"])
    options, prepare = CHANGED_BASES[init]()
    trained = []

    def save_initial(model: Any) -> None:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "initial"))
        model.peft_config["default"].init_lora_weights = options["init_lora_weights"]
        trained.append(model)

    def train(folder: str, **save_options: Any) -> None:
        peft_zoo.train(
            *("llama", tmp_path / "base", tmp_path / folder, lora_config(options)),
            prepare=prepare,
            before=save_initial,
            save_options=save_options,
        )

    train("raw")
    with pytest.raises(MergeyardError, match="path_initial_model_for_weight_conversion") as caught:
        merged_here(tmp_path, "llama", sources=[{"adapter": "raw"}])
    assert caught.value.code == "adapter_raw_init"

    train("adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = peft_zoo.merged_by_peft("llama", tmp_path / "base", tmp_path / "adapter")
    found = merged_here(tmp_path, "llama")
    assert_equal(found, expected)
    for name, value in trained[-1].merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
