"""The sound files that a fuzz run damages, and the functions of the API that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.models import INDEX
from app.sources.resolver import Resolver
from app.sources.safetensors import read_header
from tests.fuzz.mutations import Pairs, damaged, framed, parsed, repaired, serialized

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
RECIPE = {"base_model": "base", "merge_method": "ties", "models": [{"adapter": "lora"}]}
HIDDEN, ROWS = 8, 16


class Yard:
    """A root with a sound base model, and beside it the folders that every input is written to anew."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._resolver = Resolver(roots=[folder])
        self._recipe = parse_recipe(RECIPE)
        self._config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
        self._base = _header(
            {
                "model.embed_tokens.weight": (ROWS, HIDDEN),
                "model.norm.weight": (HIDDEN,),
                "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
                "model.layers.0.mlp.experts.0.up_proj.weight": (HIDDEN, HIDDEN),
                "model.layers.0.mlp.experts.gate_up_proj": (2, HIDDEN, HIDDEN),
            }
        )
        self._adapters = [*_made_adapters(), *_example_adapters()]
        for name in ("base", "lora", "model"):
            (folder / name).mkdir()
        self._write("base/config.json", json.dumps(self._config).encode())
        self._write("base/model.safetensors", framed(serialized(self._base), repaired(self._base, Random(0)), _Sound()))

    def header(self, random: Random) -> Callable[[], object]:
        """A header alone."""
        _, header = random.choice(self._adapters)
        self._write("x.safetensors", _weights(random.choice((header, self._base)), random))
        return lambda: read_header(self._root / "x.safetensors")

    def adapter(self, random: Random) -> Callable[[], object]:
        """An adapter, in a recipe with the base: it is read, matched and planned, as POST /merges/plan does."""
        config, header = random.choice(self._adapters)
        which = random.random()
        self._write(
            "lora/adapter_config.json", damaged(deepcopy(config), random) if which < 0.7 else serialized(config)
        )
        own = random if which > 0.4 else _Sound()
        self._write("lora/adapter_model.safetensors", _weights(header, own, repair=0.9))
        return lambda: make_plan(self._recipe, self._resolver)

    def model(self, random: Random) -> Callable[[], object]:
        """A model's config, index and header."""
        self._write("model/config.json", damaged(parsed(json.dumps(self._config).encode()), random))
        self._write("model/model.safetensors", _weights(self._base, random))
        weight_map = dict.fromkeys(dict(self._base.items), "model.safetensors")
        if random.random() < 0.5:
            self._write(f"model/{INDEX}", damaged(parsed(json.dumps({"weight_map": weight_map}).encode()), random))
        else:
            (self._root / "model" / INDEX).unlink(missing_ok=True)
        return lambda: self._resolver.model("model")

    def _write(self, name: str, content: bytes) -> None:
        (self._root / name).write_bytes(content)


class _Sound(Random):
    """Damages nothing."""

    def random(self) -> float:
        return 1.0


def _weights(header: Pairs, random: Random, repair: float = 0.5) -> bytes:
    """A weights file whose header is damaged and then perhaps made to add up again, so that more is read of it."""
    if isinstance(random, _Sound):
        return framed(serialized(header), repaired(header, random), random)
    own = deepcopy(header)
    text = damaged(own, random)
    if random.random() < repair:
        size = repaired(own, random)
        return framed(serialized(own), size, random)
    return framed(text, repaired(deepcopy(header), random), random)


def _header(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> Any:
    header = parsed(
        json.dumps(
            {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
        ).encode()
    )
    header.items.insert(0, ("__metadata__", Pairs([("format", "pt")])))
    repaired(header, Random(0))
    return header


def _made_adapters() -> list[tuple[Any, Any]]:
    """Configs and headers of each kind that is read, for the base."""
    key, rank = "base_model.model.model", 2
    module = f"{key}.layers.0.self_attn.q_proj"
    plain = {f"{module}.lora_A.weight": (rank, HIDDEN), f"{module}.lora_B.weight": (HIDDEN, rank)}
    embedding = {
        f"{key}.embed_tokens.lora_embedding_A": (rank, ROWS),
        f"{key}.embed_tokens.lora_embedding_B": (HIDDEN, rank),
    }
    experts = {
        f"{key}.layers.0.mlp.experts.lora_A.weight": (2 * rank, HIDDEN),
        f"{key}.layers.0.mlp.experts.lora_B.weight": (HIDDEN, 2 * rank),
    }
    known: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    adalora = {**known, "peft_type": "ADALORA", "init_r": rank, "rank_pattern": {"q_proj": [True, False]}}
    return [
        (parsed(json.dumps({**known, **config}).encode()), _header(shapes))
        for config, shapes in (
            ({"rank_pattern": {"q_proj": rank}, "alpha_pattern": {r".*\.q_proj": 8}}, plain),
            ({"use_rslora": True}, {**plain, **embedding}),
            ({"use_dora": True}, {**plain, f"{module}.lora_magnitude_vector": (HIDDEN,)}),
            ({"lora_bias": True}, {**plain, f"{module}.lora_B.bias": (HIDDEN,)}),
            (adalora, {**plain, f"{module}.lora_E": (rank, 1), f"{module}.ranknum": (1,)}),
            ({"target_parameters": ["experts.gate_up_proj"]}, {**plain, **experts}),
            ({"modules_to_save": ["norm"]}, {**plain, f"{key}.norm.weight": (HIDDEN,)}),
            (
                {"trainable_token_indices": [1, 2, 3]},
                {**plain, f"{key}.embed_tokens.token_adapter.trainable_tokens_delta": (3, HIDDEN)},
            ),
        )
    ]


def _example_adapters() -> list[tuple[Any, Any]]:
    """What PEFT wrote: configs, and the first of the tensors."""
    found = []
    for folder in sorted(EXAMPLES.iterdir()):
        with (folder / "adapter_model.safetensors").open("rb") as stream:
            header = parsed(stream.read(int.from_bytes(stream.read(8), "little")))
        header.items = header.items[:9]
        repaired(header, Random(0))
        found.append((parsed((folder / "adapter_config.json").read_bytes()), header))
    return found
