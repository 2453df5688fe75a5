"""Every adapter that cannot be merged is refused by a code of its own, with a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import CODES, MergeyardError
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.files import llama_tensors, lora_tensors, write_adapter, write_model

KEY = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
Shapes = Mapping[str, tuple[int, ...]]


def config(**changes: Any) -> Callable[[Path], None]:
    """A LoRA whose config says something more."""
    return lambda root: _write(root, **changes)


def holding(extra: Shapes, *, only: bool = False, tied: bool = False, **changes: Any) -> Callable[[Path], None]:
    """A LoRA with these tensors too, or with them alone. The base ties its embedding, or it has a head of its own."""
    return lambda root: _write(root, extra, only=only, tied=tied, **changes)


def _write(root: Path, extra: Shapes | None = None, *, only: bool = False, tied: bool = False, **changes: Any) -> None:
    stored = llama_tensors() | {"model.conv.weight": torch.zeros(8, 4, 3)}
    for number in range(2):
        for name, shape in (("w1", (4, 8)), ("w3", (4, 8)), ("w2", (8, 4))):
            stored[f"model.layers.0.mlp.experts.{number}.{name}.weight"] = torch.zeros(shape)
    if not tied:
        stored["lm_head.weight"] = torch.zeros(16, 8)
    write_model(root / "base", stored, tie_word_embeddings=tied)
    own = {} if only else lora_tensors()
    write_adapter(root / "lora", own | {key: torch.zeros(shape) for key, shape in (extra or {}).items()}, **changes)


def pickled(ending: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        _write(root)
        (root / "lora" / "adapter_model.safetensors").rename(root / "lora" / f"adapter_model.{ending}")

    return write


def onto_packed(root: Path) -> None:
    _write(root)
    write_model(root / "base", quantization_config={"load_in_4bit": True})


def onto_eight_bits(root: Path) -> None:
    _write(root)
    tensors = llama_tensors()
    name = "model.layers.0.self_attn.q_proj.weight"
    write_model(root / "base", tensors | {name: tensors[name].to(torch.int8)})


def grown_twice(rows: int) -> Callable[[Path], None]:
    """To 18 rows, and to ``rows``."""

    def write(root: Path) -> None:
        modules = ["embed_tokens", "lm_head"]
        _write(root, {f"{EMBEDDING}.weight": (18, 8), f"{HEAD}.weight": (18, 8)}, modules_to_save=modules)
        own = {f"{module}.weight": torch.ones(rows, 8) for module in (EMBEDDING, HEAD)}
        write_adapter(root / "other", lora_tensors() | own, modules_to_save=modules)

    return write


# By what it is: how it is written, the code, and part of what the sentence says to do.
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "aLoRA": (config(alora_invocation_tokens=[1]), "adapter_alora", "serve it beside the model"),
    "X-LoRA": (config(peft_type="XLORA"), "adapter_xlora", "merge the adapters it was made of"),
    "Arrow": (config(arrow_config={"top_k": 1}), "adapter_arrow", "merge the adapters it routes to"),
    "KaSA": (config(kasa_config={"beta": 1}), "adapter_kasa", "let PEFT merge it"),
    "QA-LoRA": (config(use_qalora=True), "adapter_qalora", "train a plain LoRA"),
    "MonteCLoRA": (config(monteclora_config={"num_samples": 1}), "adapter_monteclora", "let PEFT merge it"),
    "BD-LoRA": (config(use_bdlora={"nblocks": 2}), "adapter_bdlora", "let PEFT merge it"),
    "replicated layers": (config(layer_replication=[[0, 1]]), "adapter_layer_replication", "save the replicated model"),
    "raw PiSSA": (config(init_lora_weights="pissa_niter_4"), "adapter_raw_init", "path_initial_model_for_weight"),
    "raw OLoRA": (config(init_lora_weights="olora"), "adapter_raw_init", "path_initial_model_for_weight"),
    "raw CorDA": (config(init_lora_weights="corda"), "adapter_raw_init", "path_initial_model_for_weight"),
    "LoftQ": (config(init_lora_weights="loftq"), "adapter_loftq", "merge it into that base with PEFT"),
    "another start": (config(init_lora_weights="tomorrow"), "adapter_unsupported", "let PEFT merge"),
    "a field nobody knows": (config(from_the_future=3), "adapter_unsupported", "set it to null"),
    **{
        kind: (config(peft_type=kind), "adapter_peft_type", "merge_and_unload")
        for kind in ("IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "PROMPT_TUNING", "LN_TUNING", "TRAINABLE_TOKENS")
    },
    "a pickle": (pickled("bin"), "pickle_refused", "save it again with safetensors"),
    "a pickle of torch": (pickled("pt"), "pickle_refused", "save it again with safetensors"),
    "a base of 4 bits": (onto_packed, "model_quantized", "merge into the unquantised weights"),
    "a base of 8 bits": (onto_eight_bits, "model_quantized", "16 bits or more"),
    "modules the base lacks": (
        holding({f"{KEY}x.lora_A.weight": (2, 8), f"{KEY}x.lora_B.weight": (8, 2)}),
        "adapter_mismatch",
        "the base has lm_head.weight",
    ),
    "a module saved that the base lacks": (
        holding({"base_model.model.score.weight": (2, 8)}, modules_to_save=["score"]),
        "adapter_mismatch",
        "Is it an adapter for another model?",
    ),
    "a missing factor": (
        holding({f"{KEY}.lora_A.weight": (2, 8)}, only=True),
        "adapter_incomplete",
        "save or fetch it again",
    ),
    "missing magnitudes": (config(use_dora=True), "adapter_incomplete", "save or fetch it again"),
    "a missing saved module": (config(modules_to_save=["lm_head"]), "adapter_incomplete", "save it again"),
    "missing trained tokens": (config(trainable_token_indices=[1]), "adapter_incomplete", "save it again"),
    "a key left over": (
        holding({"base_model.model.model.norm.weight": (8,)}),
        "adapter_leftover",
        "list it there, or leave it out",
    ),
    "a factor unheard of": (holding({f"{KEY}.lora_C.weight": (2, 8)}), "adapter_leftover", "save the adapter again"),
    "factors that do not fit each other": (
        holding({f"{KEY}.lora_A.weight": (2, 8), f"{KEY}.lora_B.weight": (8, 3)}, only=True),
        "adapter_invalid",
        "do not fit each other",
    ),
    "another rank than its config's": (config(r=3), "adapter_invalid", "its config says 3"),
    "magnitudes for other outputs": (
        holding(
            {f"{KEY}.lora_A.weight": (2, 8), f"{KEY}.lora_B.weight": (8, 2), f"{KEY}.lora_magnitude_vector": (7,)},
            only=True,
            use_dora=True,
        ),
        "adapter_invalid",
        "7 magnitudes for 8 outputs",
    ),
    "factors of another shape": (
        holding({f"{KEY}.lora_A.weight": (2, 9), f"{KEY}.lora_B.weight": (8, 2)}, only=True),
        "adapter_shape",
        "an adapter for another base",
    ),
    "a saved module of another shape": (
        holding({"base_model.model.model.norm.weight": (9,)}, modules_to_save=["norm"]),
        "adapter_shape",
        "merge onto the base it was trained with",
    ),
    "a convolution with groups": (
        holding(
            {
                "base_model.model.model.conv.lora_A.weight": (2, 4, 3),
                "base_model.model.model.conv.lora_B.weight": (8, 1, 1),
            }
        ),
        "adapter_grouped_conv",
        "merge it with the library that trained it",
    ),
    "square experts": (
        holding(
            {
                "base_model.model.model.layers.0.mlp.experts.lora_A.weight": (4, 8),
                "base_model.model.model.layers.0.mlp.experts.lora_B.weight": (8, 4),
            },
            target_parameters=["experts.gate_up_proj"],
        ),
        "adapter_ambiguous",
        "let PEFT merge the adapter",
    ),
    "a tied head alone": (
        holding({f"{HEAD}.lora_A.weight": (2, 8), f"{HEAD}.lora_B.weight": (16, 2)}, tied=True),
        "adapter_tied_head",
        "untie the base first",
    ),
    "both halves of a tie, apart": (
        holding({f"{HEAD}.weight": (16, 8), f"{EMBEDDING}.weight": (16, 8)}, tied=True),
        "adapter_tied_head",
        "ensure_weight_tying",
    ),
    "a smaller vocabulary": (
        holding({f"{EMBEDDING}.weight": (12, 8)}, modules_to_save=["embed_tokens"]),
        "adapter_vocabulary",
        "merge onto the base that it was trained with",
    ),
    "a vocabulary that grew by half": (
        holding({f"{EMBEDDING}.weight": (18, 8)}, modules_to_save=["embed_tokens"]),
        "adapter_vocabulary",
        "save both with the adapter",
    ),
    "two vocabularies that grew": (grown_twice(18), "adapter_vocabulary", "tokenizer_source: union"),
    "two that grew to two sizes": (grown_twice(19), "adapter_vocabulary", "to different sizes; merge one of them"),
    "a token beyond the vocabulary": (
        holding({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 8)}, trainable_token_indices=[16]),
        "adapter_vocabulary",
        "save the base with its embedding resized",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    write, code, advice = REFUSED[kind]
    write(tmp_path)
    models = [{"adapter": path.name} for path in sorted(tmp_path.iterdir(), reverse=True) if path.name != "base"]
    recipe = parse_recipe({"base_model": "base", "merge_method": "ties", "models": models})
    with pytest.raises(MergeyardError) as caught:
        make_plan(recipe, Resolver(local=tmp_path))
    assert caught.value.code == code
    assert advice in caught.value.message
    assert caught.value.where.startswith(("models", "base_model"))


def test_every_code_of_adapters_has_its_refusal() -> None:
    assert {code for code in CODES if code.startswith("adapter_")} == {
        code for _, code, _ in REFUSED.values() if code.startswith("adapter_")
    }
