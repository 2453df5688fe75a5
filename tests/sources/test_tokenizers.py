"""Vocabularies are read as data; what no loader could make sense of is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import MergeyardError
from app.sources.models import companions_of
from app.sources.tokenizers import TokenizerSource, read_tokenizer
from tests.files import listing
from tests.words import KINDS, TOOL, USER, tokenizer


def read(folder: Path) -> TokenizerSource | None:
    return read_tokenizer(companions_of(listing(folder)), "m")


def document(**changes: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": [], **changes}


def code_of(folder: Path, text: str | bytes, name: str = "tokenizer.json") -> str:
    (folder / "tokenizer.json").write_text(json.dumps(document()))
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(MergeyardError) as caught:
        read(folder)
    return caught.value.code


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_the_one_that_transformers_loads(tmp_path: Path, kind: str) -> None:
    words = tokenizer(kind, [USER, TOOL])
    words.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert found is not None
    assert found.ids == words.get_vocab()
    assert found.next_id == len(words)
    assert found.added.keys() == {token.content for token in words.added_tokens_decoder.values()}


def test_tokens_that_only_the_older_files_name_count(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"2": {"content": "<x>"}}}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 2, "<y>": 3}))
    found = read(tmp_path)
    assert found is not None and found.ids == {"a": 0, "b": 1, "<x>": 2, "<y>": 3}


def test_no_tokenizer_is_no_problem_and_a_slow_one_is(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x09")
    with pytest.raises(MergeyardError) as caught:
        read(tmp_path)
    assert caught.value.code == "tokenizer_unsupported"


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document()))
    pinned = companions_of(listing(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps(document(version="2")))
    with pytest.raises(MergeyardError) as caught:
        read_tokenizer(pinned, "m")
    assert caught.value.code == "source_changed"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        b"\xff\xfe",
        b'{"model": {"vocab": {"\xed\xa0\x80": 0}}}',
        '{"model": {"vocab": {"\\ud800": 0}}}',
        "[" * 100_000,
        '{"model":' * 20_000 + "1" + "}" * 20_000,
        json.dumps({}),
        json.dumps(document(model=[])),
        json.dumps(document(model={"vocab": "abc"})),
        json.dumps(document(model={"vocab": {"a": "0"}})),
        json.dumps(document(model={"vocab": {"a": True}})),
        json.dumps(document(model={"vocab": {"a": -1}})),
        json.dumps(document(model={"vocab": {"a": 10**12}})),
        json.dumps(document(model={"vocab": {"a": 1.0}})),
        '{"model": {"vocab": {"a": ' + "9" * 5000 + "}}}",
        json.dumps(document(model={"vocab": {"a": 0, "b": 0}})),
        '{"model": {"vocab": {"a": 0, "a": 1}}}',
        json.dumps(document(model={"vocab": [["a", 0.0], ["a", 0.0]]})),
        json.dumps(document(model={"vocab": [[1, 0.0]]})),
        json.dumps(document(model={"vocab": ["a"]})),
        json.dumps(document(added_tokens={"a": 1})),
        json.dumps(document(added_tokens=["a"])),
        json.dumps(document(added_tokens=[{"id": 2}])),
        json.dumps(document(added_tokens=[{"id": 2, "content": ""}])),
        json.dumps(document(added_tokens=[{"id": None, "content": "x"}])),
        json.dumps(document(added_tokens=[{"id": 2, "content": "x", "special": "yes"}])),
        json.dumps(document(added_tokens=[{"id": 1, "content": "a"}])),
        json.dumps(document(added_tokens=[{"id": 1, "content": "x"}])),
        json.dumps(document(added_tokens=[{"id": 9, "content": "x"}])),
    ],
    ids=range(31),
)
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, text: str | bytes) -> None:
    assert code_of(tmp_path, text) == "tokenizer_invalid"


def test_more_tokens_than_any_model_has_are_refused(tmp_path: Path) -> None:
    vocabulary = ",".join(f'"{index:x}":{index}' for index in range(2_000_001))
    assert code_of(tmp_path, f'{{"model": {{"vocab": {{{vocabulary}}}}}}}') == "tokenizer_invalid"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("added_tokens.json", {"x": 1}),
        ("added_tokens.json", {"x": "2"}),
        ("added_tokens.json", []),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": "y"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "y"}}}),
    ],
)
def test_files_beside_it_may_not_contradict_it(tmp_path: Path, name: str, value: Any) -> None:
    assert code_of(tmp_path, json.dumps(value), name) == "tokenizer_invalid"
