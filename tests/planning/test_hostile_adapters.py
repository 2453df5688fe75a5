"""Whatever an adapter says of itself, the answer is a plan, or problems with a code: never another exception."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from app.errors import CODES, MergeyardError
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.adapter_kinds import KNOWN_FIELDS, REFUSED_FIELDS
from app.sources.resolver import Resolver
from tests.files import llama_tensors, write_model

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "model.embed_tokens",
    "lm_head",
    "model.layers.0.mlp.experts",
    "model.layers.0.mlp.experts.base_layer",
    "model.conv",
    "layers.0.self_attn.q_proj",
    "",
    "x..y",
]
PARTS = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_A.default.weight",
    "lora_A",
    "lora_B",
    "lora_E",
    "ranknum",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta",
    "weight",
    "bias",
    "modules_to_save.weight",
    "original_module.weight",
    "lora_unheard_of",
]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(
        ["all", "lora_only", "pissa", "loftq", "gate_up_proj", "experts.down_proj", "norm", "(", "lm_head"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.sampled_from(MODULES), inner),
    max_leaves=6,
)
fields = st.sampled_from(sorted(KNOWN_FIELDS | set(REFUSED_FIELDS) | {"unheard_of"}))
plausible = st.fixed_dictionaries(
    {},
    optional={
        "peft_type": st.sampled_from(["LORA", "ADALORA", "lora"]),
        "use_dora": st.booleans(),
        "lora_bias": st.booleans(),
        "use_rslora": st.booleans(),
        "bias": st.sampled_from(["none", "all"]),
        "modules_to_save": st.lists(st.sampled_from(["embed_tokens", "lm_head", "norm"])),
        "trainable_token_indices": st.lists(st.integers(0, 20), max_size=3),
        "target_parameters": st.lists(
            st.sampled_from(["gate_up_proj", "experts.down_proj", "weight", "q_proj.weight"])
        ),
        "ensure_weight_tying": st.booleans(),
        "r": st.integers(0, 3),
        "init_r": st.integers(0, 3),
    },
)
configs = st.builds(
    lambda likely, wild: {**likely, **wild}, plausible, st.dictionaries(fields, json_values, max_size=2)
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16]), max_size=4).map(tuple)
keys = st.builds(
    lambda prefix, module, part: f"{prefix}{module}.{part}",
    st.sampled_from(["base_model.model.", "", "module."]),
    st.sampled_from(MODULES),
    st.sampled_from(PARTS),
)
tensors = st.dictionaries(keys, shapes, min_size=1, max_size=6)
fitting = st.sampled_from(
    [
        {},
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (8, 2),
        },
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": (2, 16),
            "base_model.model.model.embed_tokens.lora_embedding_B": (8, 2),
        },
        {
            "base_model.model.model.layers.0.mlp.experts.lora_A.weight": (4, 8),
            "base_model.model.model.layers.0.mlp.experts.lora_B.weight": (6, 4),
        },
        {
            "base_model.model.model.conv.lora_A.weight": (2, 4, 3),
            "base_model.model.model.conv.lora_B.weight": (8, 2, 1),
        },
    ]
)


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    stored = llama_tensors()
    for number in range(2):
        for name, shape in (("gate_proj", (3, 8)), ("up_proj", (3, 8)), ("down_proj", (8, 3))):
            stored[f"model.layers.0.mlp.experts.{number}.{name}.weight"] = torch.zeros(shape)
    stored["model.conv.weight"] = torch.zeros(8, 4, 3)
    write_model(folder / "base", stored)
    yield folder
    shutil.rmtree(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs, own=tensors, known=fitting)
def test_an_adapter_is_planned_or_refused(
    root: Path, config: dict[str, Any], own: dict[str, Any], known: dict[str, Any]
) -> None:
    (root / "lora").mkdir(exist_ok=True)
    save_file(
        {name: torch.zeros(shape) for name, shape in {**own, **known}.items()},
        root / "lora" / "adapter_model.safetensors",
    )
    (root / "lora" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, **config}))
    recipe = parse_recipe({"base_model": "base", "merge_method": "ties", "models": [{"adapter": "lora"}]})
    try:
        plan = make_plan(recipe, Resolver(local=root))
    except MergeyardError as error:
        assert error.code in CODES
        assert all(problem.message for problem in error.problems)
    else:
        assert all(item.changes for tensor in plan.tensors for item in tensor.contributions)
