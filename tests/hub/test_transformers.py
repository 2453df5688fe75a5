"""The oldest and the newest transformers that README names load a merge by its name, and compute the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.planning.renamed_keys import with_old_names
from app.records.aliases import Aliases
from app.records.job import Job
from app.records.key import Caller, Scope
from app.records.keys import Keys
from mergeyard import Client as Mergeyard
from tests import tiny
from tests.api.serving import ServedApi, serving
from tests.hub.clients import python_of
from tests.hub.conftest import Client
from tests.worker.attempts import lonely_yard, place_in
from worker.job import Ending, work
from worker.lease import StopRequest

SCRIPT = Path(__file__).with_name("loading.py")
IDS = list(range(3, 40))
TEXTS = ["abc", "<s>bad<extra>cab", "ü"]
DEFAULT = {"rope_type": "default", "rope_theta": 123_456.0}
YARN = {"rope_type": "yarn", "rope_theta": 123_456.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What transformers 5 saves in one place and 4 reads in several.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "stablelm": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "gpt_neox": {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 123_456.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
        },
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "olmo3": {
        "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT},
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "modernbert-decoder": {
        "rope_parameters": {
            "full_attention": DEFAULT,
            "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
        },
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3_moe": {
        "rope_parameters": DEFAULT,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Served:
    api: ServedApi
    job: Job
    key: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A merge of alice's, of a base that transformers 5 has saved, made by a worker, and an alias that points to it."""
    folder = tmp_path_factory.mktemp("transformers")
    write_base(folder / "written" / "base")
    for seed, name in enumerate(tiny.ADAPTERS, start=1):
        tiny.write_lora(folder / "written" / "base", folder / "written" / name, seed=seed)
    with lonely_yard(folder, folder / "written") as yard:
        job = yard.submit({**tiny.recipe(), "base_model": "models:base"}, owner="alice", ring=False)
        assert work(place_in(yard), job.id, StopRequest()) is Ending.PUBLISHED
        alice = Caller(owner="alice")
        Aliases(yard.jobs.database).point("production", job.id, by=alice)
        made = Keys(yard.jobs.database).create(owner="alice", scopes=[Scope.READ], by=Caller(owner="cli:tests"))
        with serving(yard.settings) as api:
            yield Served(api, yard.jobs.get(job.id), made.text)


def write_base(folder: Path) -> None:
    """A Llama whose rotary embedding is not the default one, and a tokenizer with a token of no role."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(["<s>", "<extra>", *"abcdefghijk"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="k"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", extra_special_tokens=["<extra>"]
    )
    fast.chat_template = "{% for message in messages %}{{ message.content }}<s>{% endfor %}"
    fast.save_pretrained(folder)


@pytest.fixture(params=["4.57", "5"])
def client(request: pytest.FixtureRequest, served: Served, tmp_path: Path) -> Client:
    """The oldest transformers with its huggingface_hub, and ours, which is the newest."""
    python = python_of("0.36") if request.param == "4.57" else Path(sys.executable)
    return Client(python, request.param, tmp_path / "hf", served.api.url, served.key)


def load(client: Client, *names: tuple[str, Mapping[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    done = client.process([SCRIPT], json.dumps({"models": names, "ids": IDS, "texts": texts}))
    answer = json.loads(done.stdout)
    assert answer["transformers"].startswith(client.version)
    return list(answer["found"])


def test_a_merge_loads_by_its_name_and_by_its_aliases(served: Served, client: Client, tmp_path: Path) -> None:
    downloaded = tmp_path / "downloaded"
    with Mergeyard(served.api.url, api_key=served.key) as mergeyard:
        mergeyard.download(served.job.id, downloaded)
    assert served.job.artifact is not None
    commit = served.job.artifact["manifest_sha256"][:40]
    by_name, by_alias, pinned, by_path = load(
        client,
        (f"merges/{served.job.id}", {}),
        ("aliases/production", {}),
        ("aliases/production", {"revision": commit}),
        (str(downloaded), {}),
        texts=TEXTS,
    )
    assert by_name == by_alias == pinned == by_path
    expected = AutoModelForCausalLM.from_pretrained(downloaded, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = expected(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(torch.tensor(by_name["logits"]), logits, rtol=1e-5, atol=1e-5)
    assert by_name["tokens"][:2] == [[2, 3, 4], [0, 3, 2, 5, 1, 4, 2, 3]]
    assert (by_name["special"], by_name["chat"]) == (["<extra>", "<s>"], "hi<s>")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, torch.Tensor]:
    """A model of each family, and what it computes."""
    root = tmp_path_factory.mktemp("families")
    return {root / family: write_family(root / family, family) for family in FAMILIES}


def test_the_oldest_computes_what_the_newest_has_saved(families: dict[Path, torch.Tensor], client: Client) -> None:
    found = load(client, *((str(folder), {}) for folder in families), texts=[])
    for (folder, logits), loaded in zip(families.items(), found, strict=True):
        family = folder.name
        torch.testing.assert_close(
            torch.tensor(loaded["logits"]), logits, rtol=1e-4, atol=1e-5, msg=lambda text, family=family: family + text
        )


def write_family(folder: Path, family: str) -> torch.Tensor:
    """A model of the family as transformers 5 saves it, with the config as an artifact has it. Its logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(with_old_names(path.name, json.loads(path.read_text()))))
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return logits
