"""Models whose tokenizers differ, merged: the result loads, encodes, generates, and its rows are the merged ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.engine.merges import bytes_of, merge, plan_of, tensors_of
from tests.words import END, KINDS, START, TOOL, USER, tokenizer, write_speaker

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "hello <|user|> the fox<|tool|>"


def recipe(*models: str, **changes: Any) -> dict[str, Any]:
    """The mean of the models, all of them on the first."""
    value: dict[str, Any] = {
        "base_model": models[0],
        "merge_method": "linear",
        "models": [{"model": m} for m in models],
    }
    return {**value, **changes}


def merged(root: Path, value: Mapping[str, Any]) -> Path:
    merge(plan_of(root, value), root / "out")
    return root / "out"


def rows(folder: Path, name: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """Each token's row, by transformers' own reading of the vocabulary; without tokens beyond the matrix."""
    matrix = tensors_of(folder)[name].float()
    return {token: matrix[i] for token, i in load(folder).get_vocab().items() if i < len(matrix)}


def load(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def close(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(torch.allclose(ours, wanted, rtol=0, atol=1e-6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_extra_tokens_merged_with_a_model_without_them(tmp_path: Path, kind: str, tied: bool) -> None:
    write_speaker(tmp_path / "base", tokenizer(kind), tied=tied)
    write_speaker(tmp_path / "chat", tokenizer(kind, [USER, TOOL]), seed=1, tied=tied)
    out = merged(tmp_path, recipe("base", "chat", tokenizer_source="union"))

    words, before = load(out), load(tmp_path / "base")
    assert {token: words.get_vocab()[token] for token in before.get_vocab()} == before.get_vocab()
    ids = words(TEXT)["input_ids"]
    assert words.convert_tokens_to_ids(USER) in ids and words.convert_tokens_to_ids(TOOL) in ids
    assert [words.decode([words.convert_tokens_to_ids(token)]) for token in (USER, TOOL)] == [USER, TOOL]
    assert USER not in words.decode(ids, skip_special_tokens=True)

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(words)
    generated = model.generate(**words(TEXT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert generated.max() < len(words)

    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        one, two, ours = (rows(folder, name) for folder in (tmp_path / "base", tmp_path / "chat", out))
        assert ours.keys() == one.keys() | two.keys()
        assert all(close(ours[token], (one[token] + two[token]) / 2) for token in one)
        assert all(close(ours[token], two[token]) for token in (USER, TOOL))


def test_the_base_s_vocabulary_drops_what_only_others_have(tmp_path: Path) -> None:
    write_speaker(tmp_path / "base", tokenizer(), spare=5)
    write_speaker(tmp_path / "chat", tokenizer(extra=[USER]), seed=1)
    out = merged(tmp_path, recipe("base", "chat", tokenizer_source="base"))
    one, two, ours = (rows(tmp_path / folder) for folder in ("base", "chat", "out"))
    assert ours.keys() == one.keys()
    assert all(close(ours[token], (one[token] + two[token]) / 2) for token in one)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(ours)


def test_another_model_s_tokenizer_keeps_what_ids_mean(tmp_path: Path) -> None:
    """The other tokenizer has its tokens elsewhere; the end of a text must stay the end of a text."""
    write_speaker(tmp_path / "base", tokenizer("bpe"))
    other = tokenizer("bpe", size=270)
    moved = json.loads(other.backend_tokenizer.to_str())
    ids = moved["model"]["vocab"]
    swapped = {START: ids["a"], "a": ids[START], END: ids["b"], "b": ids[END]}
    ids.update(swapped)
    for item in moved["added_tokens"]:
        item["id"] = ids[item["content"]]
    write_speaker(tmp_path / "moved", other, seed=1)
    (tmp_path / "moved" / "tokenizer.json").write_text(json.dumps(moved))
    (tmp_path / "base" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [load(tmp_path / "base").eos_token_id], "max_length": 9})
    )
    out = merged(tmp_path, recipe("base", "moved", tokenizer_source="moved"))
    words = load(out)
    assert words.get_vocab() == load(tmp_path / "moved").get_vocab()
    assert (words.bos_token_id, words.eos_token_id) == (ids[START], ids[END])
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ids[START], ids[END])
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [ids[END]], "max_length": 9}
    one, two, ours = (rows(tmp_path / folder) for folder in ("base", "moved", "out"))
    assert all(close(ours[token], (one[token] + two[token]) / 2) for token in ours)


def test_single_tokens_take_what_the_recipe_says(tmp_path: Path) -> None:
    write_speaker(tmp_path / "base", tokenizer())
    write_speaker(tmp_path / "chat", tokenizer(extra=[USER, TOOL]), seed=1)
    tokens = {
        USER: {"source": {"kind": "model_token", "model": "base", "token": "a"}},
        TOOL: {"source": {"kind": "zero"}},
        "b": {"source": "chat", "force": True},
        "c": {"source": {"kind": "model_token", "model": "chat", "token_id": 7}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "chat", "token": "d"}},
    }
    out = merged(tmp_path, recipe("base", "chat", tokenizer={"source": "union", "tokens": tokens}))
    one, two, ours = (rows(tmp_path / folder) for folder in ("base", "chat", "out"))
    assert close(ours[USER], (one["a"] + two[USER]) / 2)
    assert close(ours[TOOL], two[TOOL] / 2)
    assert close(ours["b"], two["b"])
    assert close(ours["c"], tensors_of(tmp_path / "chat")[EMBEDDING][7])
    assert close(ours["<new>"], two["d"])
    assert close(ours["e"], (one["e"] + two["e"]) / 2)
    assert load(out)("x<new>y")["input_ids"].count(load(out).convert_tokens_to_ids("<new>")) == 1


def test_a_token_that_several_others_have_is_their_mean_where_the_base_lacks_it(tmp_path: Path) -> None:
    write_speaker(tmp_path / "base", tokenizer())
    for seed, name in enumerate(("one", "two"), start=1):
        write_speaker(tmp_path / name, tokenizer(extra=[USER]), seed=seed, dtype=torch.bfloat16)
    value = recipe("base", "one", "two", tokenizer_source="union", merge_method="task_arithmetic", out_dtype="float32")
    value["models"] = value["models"][1:]
    merged(tmp_path, value)
    base, one, two, ours = (rows(tmp_path / folder) for folder in ("base", "one", "two", "out"))
    mean = (one[USER] + two[USER]) / 2
    assert close(ours[USER], mean + (one[USER] - mean) + (two[USER] - mean))
    assert close(ours["a"], one["a"] + two["a"] - base["a"])


@pytest.mark.parametrize("missing", ["base", "mean"])
def test_what_a_model_lacks_is_the_base_s_or_without_a_base_the_mean(tmp_path: Path, missing: str) -> None:
    write_speaker(tmp_path / "a", tokenizer(extra=[USER]))
    write_speaker(tmp_path / "b", tokenizer(extra=[USER]), seed=1)
    write_speaker(tmp_path / "c", tokenizer(), seed=2)
    value = recipe("a", "b", "c", tokenizer_source="union")
    if missing == "mean":
        del value["base_model"]
    merged(tmp_path, value)
    one, two, ours = (rows(tmp_path / folder)[USER] for folder in ("a", "b", "out"))
    assert close(ours, (one + two + (one if missing == "base" else (one + two) / 2)) / 3)


def test_padding_is_the_mean_of_all_rows(tmp_path: Path) -> None:
    write_speaker(tmp_path / "base", tokenizer(), dtype=torch.bfloat16)
    write_speaker(tmp_path / "chat", tokenizer(extra=[USER]), seed=1, dtype=torch.bfloat16)
    value = recipe("base", "chat", tokenizer={"source": "union", "pad_to_multiple_of": 64}, out_dtype="float32")
    out = merged(tmp_path, value)
    matrix, words = tensors_of(out)[EMBEDDING], len(load(out))
    assert len(matrix) % 64 == 0 and len(matrix) - 64 < words < len(matrix)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(matrix)
    assert all(close(row, matrix[:words].mean(0)) for row in matrix[words:])
    AutoModelForCausalLM.from_pretrained(out)


def test_the_type_of_the_files_stays_the_base_s(tmp_path: Path) -> None:
    write_speaker(tmp_path / "base", tokenizer(), dtype=torch.bfloat16)
    write_speaker(tmp_path / "chat", tokenizer(extra=[USER]), seed=1)
    out = merged(tmp_path, recipe("base", "chat", tokenizer={"source": "union", "pad_to_multiple_of": 8}))
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}


def test_slices_of_two_vocabularies(tmp_path: Path) -> None:
    """The embedding comes from the first slice's model, the head from the last one's; each lacks nothing of its own."""
    write_speaker(tmp_path / "base", tokenizer())
    write_speaker(tmp_path / "chat", tokenizer(extra=[USER]), seed=1)
    slices = [{"sources": [{"model": model, "layer_range": [0, 1]}]} for model in ("chat", "base")]
    out = merged(tmp_path, {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"})
    one, two = (rows(tmp_path / folder) for folder in ("chat", "out"))
    assert all(torch.equal(one[token], two[token]) for token in one)
    one, two = (rows(tmp_path / folder, HEAD) for folder in ("base", "out"))
    assert all(torch.equal(one[token], two[token]) for token in one)
    assert not two[USER].any()
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_neither_threads_nor_blocks_nor_the_recipe_s_order_change_a_byte(tmp_path: Path, method: str) -> None:
    write_speaker(tmp_path / "base", tokenizer())
    write_speaker(tmp_path / "chat", tokenizer(extra=[USER]), seed=1)
    write_speaker(tmp_path / "tool", tokenizer(extra=[TOOL, USER]), seed=2)
    tokenizing = {"source": "union", "pad_to_multiple_of": 16}
    value = recipe("base", "chat", "tool", merge_method=method, tokenizer=tokenizing)
    if method == "linear":
        del value["base_model"]
    found = []
    for number, (threads, budget, models) in enumerate(
        [(1, 1 << 20, value["models"]), (3, 0, value["models"]), (2, 1 << 20, value["models"][::-1])]
    ):
        plan = plan_of(tmp_path, {**value, "models": models})
        merge(plan, tmp_path / f"out{number}", threads=threads, delta_budget=budget)
        found.append(bytes_of(tmp_path / f"out{number}"))
    assert found[0] == found[1] == found[2]


def test_old_files_beside_the_tokenizer_agree_with_it(tmp_path: Path) -> None:
    """As transformers 4 wrote them: added tokens in two more files."""
    write_speaker(tmp_path / "base", tokenizer())
    write_speaker(tmp_path / "chat", tokenizer(extra=[USER]), seed=1)
    words = load(tmp_path / "base")
    folder = tmp_path / "base"
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {"0": {"content": START, **flags}, "1": {"content": END, **flags}}
    config |= {"added_tokens_decoder": decoder, "auto_map": {"AutoTokenizer": "evil.py"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({START: 0, END: 1}))
    out = merged(tmp_path, recipe("base", "chat", tokenizer_source="union"))
    ours = json.loads((out / "tokenizer_config.json").read_text())
    assert ours["added_tokens_decoder"] == {**decoder, str(len(words)): {"content": USER, **flags}}
    assert "auto_map" not in ours
    assert json.loads((out / "added_tokens.json").read_text()) == {START: 0, END: 1, USER: len(words)}
    assert load(out).convert_tokens_to_ids(USER) == len(words)


def template_of(folder: Path) -> str:
    words = load(folder)
    return str(words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False))


@pytest.mark.parametrize("tokenizing", [{}, {"tokenizer_source": "union"}])
@pytest.mark.parametrize("place", ["file", "config", "nowhere"])
def test_a_chat_template_is_found_by_transformers(tmp_path: Path, place: str, tokenizing: dict[str, str]) -> None:
    write_speaker(tmp_path / "base", tokenizer())
    write_speaker(tmp_path / "chat", tokenizer(), seed=1)
    old = "{{ 'old' }}"
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    if place == "config":
        (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": old}))
    if place == "file":
        (tmp_path / "base" / "chat_template.jinja").write_text(old)
    out = merged(tmp_path, recipe("base", "chat", chat_template="chatml", **tokenizing))
    assert template_of(out) == "<|im_start|>user\nhi<|im_end|>\n"


def test_the_most_common_template_is_taken(tmp_path: Path) -> None:
    for seed, (name, template) in enumerate({"base": "{{ 'A' }}", "one": "{{ 'B' }}", "two": "{{ 'B' }} "}.items()):
        write_speaker(tmp_path / name, tokenizer(), seed=seed)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    assert template_of(merged(tmp_path, recipe("base", "one", "two", chat_template="auto"))) == "B"
