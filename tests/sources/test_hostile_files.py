"""Files from strangers: what is no regular file, what leads elsewhere, what claims or takes too much."""

from __future__ import annotations

import json
import os
import resource
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import MAX_MESSAGE, MergeyardError
from app.sources import models, opening
from app.sources.adapters import load_adapter
from app.sources.catalogue import catalogue
from app.sources.models import COMPANIONS, INDEX, load_model
from app.sources.opening import open_source
from app.sources.resolver import Resolver, list_files
from app.sources.safetensors import MAX_HEADER_BYTES, read_header
from app.sources.source import FoundFiles, SourceFile
from app.sources.uploads import UploadStore
from tests.files import listing, lora_tensors, write_adapter, write_model
from worker.engine.reader import open_unmoved

SOUND = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
SECRET = '{"architectures": ["Secret"], "base_model_name_or_path": "secret"}'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_model(tmp_path / "root" / "base")
    write_model(tmp_path / "secret" / "base", architectures=["Secret"])
    write_adapter(tmp_path / "root" / "sql")
    return tmp_path / "root"


def refusal(read: Callable[[], object]) -> MergeyardError:
    with pytest.raises(MergeyardError) as caught:
        read()
    json.dumps(caught.value.problems[0].as_json(), ensure_ascii=False).encode()  # can be answered
    return caught.value


def write_raw(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


# --- what is no regular file


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", INDEX])
def test_a_fifo_in_a_folder_is_no_file_of_the_model(root: Path, name: str) -> None:
    (root / "base" / name).unlink(missing_ok=True)
    os.mkfifo(root / "base" / name)
    resolver = Resolver(roots=[root])
    if name in ("tokenizer.json", INDEX):
        assert name not in [file.name for file in resolver.model("base").companions]
    else:
        assert refusal(lambda: resolver.model("base")).code == "source_not_found"
    assert [entry.reference for entry in catalogue([root]) if entry.kind == "adapter"] == ["models:sql"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_became_a_fifo_is_not_waited_for(root: Path, name: str) -> None:
    (root / "base" / "tokenizer.json").write_text("{}")
    files = list_files(root / "base", within=root)
    (root / "base" / name).unlink()
    os.mkfifo(root / "base" / name)
    error = refusal(lambda: load_model(files, "base"))
    assert (error.code, "Not a regular file" in error.message) == ("source_not_found", True)


@pytest.mark.timeout(20)
def test_a_device_is_no_file(root: Path) -> None:
    (root / "base" / "config.json").unlink()
    (root / "base" / "config.json").symlink_to("/dev/zero")
    assert refusal(lambda: Resolver(roots=[root]).model("base")).code == "source_not_found"
    with pytest.raises(OSError, match="regular"):
        open_source(Path("/dev/zero"))


def test_a_folder_called_as_a_file_is_no_file(root: Path) -> None:
    (root / "base" / "model.safetensors").unlink()
    (root / "base" / "model.safetensors").mkdir()
    assert refusal(lambda: Resolver(roots=[root]).model("base")).code == "source_not_found"


# --- links


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_swapped_for_a_link_after_it_was_checked_is_not_followed(root: Path, tmp_path: Path, name: str) -> None:
    files = list_files(root / "base", within=root)
    (root / "base" / name).unlink()
    (root / "base" / name).symlink_to(tmp_path / "secret" / "base" / name)
    assert refusal(lambda: load_model(files, "base")).code == "source_not_found"


def test_a_folder_swapped_for_a_link_after_it_was_checked_is_not_followed(root: Path, tmp_path: Path) -> None:
    files = list_files(root / "base", within=root)
    (root / "base").rename(root / "moved")
    (root / "base").symlink_to(tmp_path / "secret" / "base")
    assert refusal(lambda: load_model(files, "base")).code == "source_not_found"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("swap", ["link", "folder", "fifo"])
def test_the_worker_does_not_follow_what_was_swapped_after_planning(root: Path, tmp_path: Path, swap: str) -> None:
    """Size, time and header are those of the planned file, so only the opening itself can tell."""
    weights = root / "base" / "model.safetensors"
    file = read_header(weights).file
    copy = tmp_path / "secret" / "model.safetensors"
    weights.rename(copy)
    if swap == "link":
        weights.symlink_to(copy)
    elif swap == "folder":
        (root / "base").rename(root / "moved")
        (root / "base").symlink_to(copy.parent)
    else:
        os.mkfifo(weights)
    error = refusal(lambda: open_unmoved(file, with_header=True))
    assert error.code == ("source_format" if swap == "fifo" else "source_changed")


def test_an_index_entry_does_not_lead_out(root: Path, tmp_path: Path) -> None:
    base = root / "base"
    (base / "model.safetensors").unlink()
    (base / "shard.safetensors").symlink_to(tmp_path / "secret" / "base" / "model.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "shard.safetensors"}}))
    assert refusal(lambda: Resolver(roots=[root]).model("base")).code == "path_outside_roots"


@pytest.mark.parametrize(
    ("shard", "code"),
    [
        ("missing.safetensors", "source_not_found"),
        ("../../secret/base/model.safetensors", "source_not_found"),
        ("/etc/passwd", "source_not_found"),
        ("model.safetensors\0", "source_not_found"),
        ("", "source_not_found"),
        (".", "source_not_found"),
        ("x" * 1_000_000, "source_not_found"),
        ("config.json", "source_format"),
        (INDEX, "source_format"),
        ("pytorch_model-00001-of-00002.bin", "pickle_refused"),
        (7, "source_format"),
        (None, "source_format"),
    ],
)
def test_an_index_names_only_the_models_own_weights(root: Path, shard: Any, code: str) -> None:
    (root / "base" / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    error = refusal(lambda: Resolver(roots=[root]).model("base"))
    assert error.code == code
    assert "Secret" not in error.message


@pytest.mark.parametrize("weight_map", [None, [], "x", {"nowhere": "model.safetensors"}])
def test_an_index_that_contradicts_the_weights_is_refused(root: Path, weight_map: Any) -> None:
    (root / "base" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(lambda: Resolver(roots=[root]).model("base")).code == "source_format"


def test_the_catalogue_reads_nothing_behind_a_link_that_leads_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret" / "x.json").write_text(SECRET)
    for folder, name in (("base", "config.json"), ("sql", "adapter_config.json")):
        (root / folder / name).unlink()
        (root / folder / name).symlink_to(tmp_path / "secret" / "x.json")
    assert catalogue([root]) == []


def test_a_published_merge_below_a_linked_folder_is_read(root: Path, tmp_path: Path) -> None:
    """The operator's own links, as to another disk, are followed once: when the merge is looked up."""
    (tmp_path / "disk").symlink_to(root)
    merged = FoundFiles(files=listing(tmp_path / "disk" / "base"))
    assert Resolver(merges={"m": merged}.__getitem__).model("merge:m").tensors


# --- names


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("models:base/../../secret/base", "path_outside_roots"),
        ("models:..", "path_outside_roots"),
        ("models://etc", "path_outside_roots"),
        ("models:base\0/../../secret/base", "reference_invalid"),
        ("models:base\n", "reference_invalid"),
        ("models:base\u202e", "reference_invalid"),
        ("models:base\udcff", "reference_invalid"),
        ("models:base.", "source_not_found"),
        ("models:base ", "source_not_found"),
        ("models:BASE", "source_not_found"),
        ("models:b\u0430se", "source_not_found"),  # a Cyrillic a
        ("models:\uff0e\uff0e/secret/base", "source_not_found"),  # full-width dots
        ("models:\u2024\u2024/secret/base", "source_not_found"),  # one-dot leaders
        ("models:base\u2215..\u2215..\u2215secret", "source_not_found"),  # division slashes
        ("models:..\\secret\\base", "source_not_found"),
        ("models:%2e%2e/secret/base", "source_not_found"),
        ("models:~root", "source_not_found"),
        ("models:" + "x" * 400, "source_not_found"),
        ("models:" + "x/" * 490, "source_not_found"),
        ("models:" + "\u00e4" * 900, "source_not_found"),
    ],
)
def test_a_trick_with_a_path_leads_nowhere(root: Path, reference: str, code: str) -> None:
    assert refusal(lambda: Resolver(roots=[root]).model(reference)).code == code


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_found_in_the_form_it_was_given(tmp_path: Path, form: Any) -> None:
    """Names are bytes to the file system: composed and decomposed ones are two folders."""
    for number, known in enumerate(("NFC", "NFD")):
        write_model(tmp_path / unicodedata.normalize(known, "modèle"), number=number)
    source = Resolver(roots=[tmp_path]).model(unicodedata.normalize(form, "models:modèle"))
    assert source.config["number"] == ("NFC", "NFD").index(form)
    assert source.reference in [entry.reference for entry in catalogue([tmp_path])]


def test_names_that_are_no_text_are_not_listed_and_not_in_the_way(root: Path) -> None:
    bad = os.fsdecode(b"\xff")
    write_model(root / f"model{bad}")
    write_model(root / "line\nbreak")
    (root / "base" / f"x{bad}.safetensors").write_bytes(b"")
    assert {entry.reference for entry in catalogue([root])} == {"models:base", "models:sql"}
    assert Resolver(roots=[root]).model("base").tensors
    (root / "base" / f"y{bad}").symlink_to("/etc/passwd")
    assert refusal(lambda: Resolver(roots=[root]).model("base")).code == "path_outside_roots"
    (root / "sql" / "adapter_model.safetensors").rename(root / "sql" / f"{bad}.bin")
    assert refusal(lambda: Resolver(roots=[root]).adapter("sql")).code == "pickle_refused"


def test_a_message_never_grows_with_what_it_quotes() -> None:
    assert len(MergeyardError("source_format", "x" * 10_000_000).message) == MAX_MESSAGE


# --- what takes too much


def as_hole(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [name for name in COMPANIONS if name != "modules.json"])
def test_a_vast_companion_is_refused_before_it_is_read(root: Path, name: str) -> None:
    as_hole(root / "base" / name, 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refusal(lambda: Resolver(roots=[root]).model("base"))
    assert (error.code, "larger than" in error.message) == ("source_format", True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(("folder", "name"), [("base", "config.json"), ("sql", "adapter_config.json"), ("base", INDEX)])
def test_a_vast_config_is_refused_before_it_is_read(root: Path, folder: str, name: str) -> None:
    as_hole(root / folder / name, 1 << 40)
    read = Resolver(roots=[root]).model if folder == "base" else Resolver(roots=[root]).adapter
    assert refusal(lambda: read(folder)).code == "source_format"


def test_weights_that_are_one_vast_hole_are_refused(tmp_path: Path) -> None:
    as_hole(tmp_path / "x.safetensors", 1 << 40)
    assert refusal(lambda: read_header(tmp_path / "x.safetensors")).code == "source_format"


@pytest.mark.parametrize(
    "text",
    [
        b"{" + b'"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"a":[' + b"[]," * 3_000_001 + b"[]]}",
        b'{"a":[' + b"{}," * 3_000_001 + b"1]}",
        b'{"a":[' + b"1," * 3_000_001 + b"1]}",
        b"{" + b'"":0,' * 3_000_001 + b'"":0}',
        b'{"a":"' + b"x" * (MAX_HEADER_BYTES - 8) + b'"}',
        b"\xef\xbb\xbf" + SOUND,
        SOUND.decode().encode("utf-16"),
        SOUND.decode().encode("utf-32"),
        SOUND.replace(b"a", b"\xff", 1),
        b" " + SOUND,
        SOUND + b"x",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}',
        b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}",
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"281474976710655," * 7 + b'281474976710655],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[0,281474976710655],"data_offsets":[0,0]},' + SOUND[1:].replace(b"a", b"b", 1),
        b'{"a":{"dtype":"F32","shape":[0,99999999],"data_offsets":[0,0]},' + SOUND[1:].replace(b"a", b"b", 1),
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"__metadata__":[],' + SOUND[1:],
        b'{"__metadata__":{"a":{}},' + SOUND[1:],
        b'{"__metadata__":null,' + SOUND[1:],
    ],
    ids=range(33),
)
def test_a_hostile_header_is_refused(tmp_path: Path, text: bytes) -> None:
    path = write_raw(tmp_path / "x.safetensors", text, bytes(4))
    assert refusal(lambda: read_header(path)).code == "source_format"


def test_scalars_and_small_empty_tensors_are_taken(tmp_path: Path) -> None:
    text = (
        b'{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"F32","shape":[0,8],"data_offsets":[4,4]}}'
    )
    assert set(read_header(write_raw(tmp_path / "x.safetensors", text, bytes(4))).tensors) == {"s", "e"}


def test_a_model_has_at_most_so_many_tensors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MAX_TENSORS", 3)
    assert "more than 3 tensors" in refusal(lambda: Resolver(roots=[root]).model("base")).message


# --- uploads


def test_a_vast_upload_of_a_small_file_is_stopped_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.sources.uploads.MAX_SMALL_BYTES", 100)
    taken = []
    draft = UploadStore(tmp_path).begin()
    error = refusal(lambda: draft.add("LICENSE", (taken.append(1) or bytes(60) for _ in range(1000))))
    assert (error.code, len(taken)) == ("source_format", 2)
    draft.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "config.json\0.safetensors",
        "..",
        "..safetensors/../x.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
        "model.safetensors.",
        "model.safetensors ",
        "model.safetensors\n",
        "x" * 300 + ".safetensors",
        "mod\u00e8le.safetensors",
        "m\u043edel.safetensors",
        "model.safetensors\u202e",
        "model\uff0esafetensors",
        "CON",
        "-rf.safetensors",
    ],
)
def test_an_uploads_name_is_plain(tmp_path: Path, name: str) -> None:
    draft = UploadStore(tmp_path).begin()
    assert refusal(lambda: draft.add(name, [b"x"])).code == "request_invalid"
    draft.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_uploads_index_names_only_what_was_sent(root: Path, tmp_path: Path) -> None:
    draft = UploadStore(tmp_path / "uploads").begin()
    for name, path in listing(root / "base").items():
        draft.add(name, [path.read_bytes()])
    outside = os.path.relpath(root / "base" / "model.safetensors", tmp_path / "uploads" / "draft")
    assert outside.startswith("..")
    draft.add(INDEX, [json.dumps({"weight_map": {"a": outside}}).encode()])
    assert refusal(draft.check).code == "source_not_found"


# --- adapters


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"((a?){99999}){99999}": 2}},
        {"rank_pattern": {"((((a?){99}){99}){99}){99}": 2}},
        {"rank_pattern": {"(?R)": 2}},
        {"rank_pattern": {"(a|(?1))*": 2}},
        {"rank_pattern": {"(?:x){e<=20}": 2}},
        {"rank_pattern": {"(?i)q_proj": 2}},
        {"rank_pattern": {r"\p{L}{1,2}": 2}},
        {"rank_pattern": {"q{": 2}},
        {"rank_pattern": {f"m{number}": 2 for number in range(1001)}},
        {"rank_pattern": [["q_proj", 2]]},
        {"alpha_pattern": {"q_proj": "2"}},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": -1}},
        {"r": 10**30},
        {"r": [2]},
        {"lora_alpha": 10**400},
        {"lora_alpha": -0.0},
        {"lora_alpha": True},
        {"modules_to_save": "norm"},
        {"modules_to_save": {"norm": 1}},
        {"modules_to_save": [1]},
        {"modules_to_save": [f"m{number}" for number in range(257)]},
        {"target_parameters": [f"m.p{number}" for number in range(257)]},
        {"target_parameters": 7},
        {"trainable_token_indices": 7},
        {"trainable_token_indices": {f"m{number}": [1] for number in range(257)}},
        {"bias": ["none"]},
        {"bias": {"a": {}}},
    ],
    ids=lambda changes: f"{next(iter(changes))}-{str(next(iter(changes.values())))[:20]}",
)
def test_a_hostile_config_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors = (
        {
            **lora_tensors(),
            "base_model.model.e.token_adapter.trainable_tokens_delta": lora_tensors()[
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
            ],
        }
        if "trainable_token_indices" in changes
        else None
    )
    folder = write_adapter(tmp_path, tensors, **changes)
    assert refusal(lambda: load_adapter(listing(folder), "x")).code == "adapter_invalid"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        '{"r": NaN}',
        '{"r": 2, "lora_alpha": Infinity}',
        '{"r": 2, "lora_alpha": -Infinity}',
        '{"r": 1e999}',
        '{"r": 2, "r": 2}',
        '{"r": 2, "rank_pattern": {"q": 2, "q": 3}}',
        '{"base_model_name_or_path": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"r": ' + "9" * 5000 + "}",
        '{"r": ' + "[" * 65 + "]" * 65 + "}",
        '{"eva_config": ' + '{"a":' * 70 + "1" + "}" * 70 + "}",
        '{"eva_config": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"a": [' + "0," * 3_000_001 + "0]}",
        b'{"r": "\xff"}',
        '{"r": 2}'.encode("utf-16"),
        b'{"r": 2}\0',
    ],
    ids=range(20),
)
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, text: str | bytes) -> None:
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    assert refusal(lambda: load_adapter(listing(folder), "x")).code == "source_format"


def test_trained_tokens_are_bounded_in_all_modules_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("app.sources.adapters.MAX_TOKENS", 5)
    tensors = {
        f"base_model.model.m{number}.token_adapter.trainable_tokens_delta": torch.zeros(2, 0) for number in range(3)
    }
    folder = write_adapter(tmp_path, tensors, trainable_token_indices={"": [1, 2]})
    assert "too long" in refusal(lambda: load_adapter(listing(folder), "x")).message


def test_parameters_that_a_config_may_mean_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.sources.adapters.MAX_SCALINGS", 7)
    folder = write_adapter(tmp_path, target_parameters=["a.b", "c.d"])
    assert "more than 7" in refusal(lambda: load_adapter(listing(folder), "x")).message


@pytest.mark.parametrize("pattern", [r"(?:q|k)_proj", r"layers\.\d{1,2}\..*q_proj", r".*(?<!lm)_proj", r"q_proj(?!x)"])
def test_patterns_in_use_are_still_taken(tmp_path: Path, pattern: str) -> None:
    folder = write_adapter(tmp_path, alpha_pattern={pattern: 16})
    assert load_adapter(listing(folder), "x").modules


def test_the_bound_on_small_files_lets_the_largest_tokenizers_in() -> None:
    assert opening.MAX_SMALL_BYTES > 35_000_000


def test_files_are_pinned_where_they_really_are(root: Path) -> None:
    files: tuple[SourceFile, ...] = Resolver(roots=[root]).model("base").files
    assert all(file.path == file.path.resolve() for file in files)
