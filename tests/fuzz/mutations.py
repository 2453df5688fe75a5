"""Sound files damaged at random: in their JSON's structure, in its text, and in what frames it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from app.sources.adapter_kinds import KNOWN_FIELDS, REFUSED_FIELDS
from app.sources.safetensors import DTYPE_BYTES, MAX_HEADER_BYTES
from app.strict_json import MAX_VALUES

MAX_REPAIRED_BYTES = 1 << 20
WORDS = (
    "", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "a\nb", "\u202e", "\U0001f600", "e\u0301", "x" * 600,
    "__metadata__", "F32", "BF16", "F7", "I64", "U8", "BOOL", "F8_E4M3", "LORA", "ADALORA", "XLORA", "pissa", "loftq",
    "all", "lora_only", "none", "weight", "bias", "q_proj", "lm_head", "embed_tokens", "model.safetensors", "norm",
    "shard.safetensors", "pytorch_model.bin", "experts.gate_up_proj", "default", "base_layer", "auto_map",
    ".*", "(", "[", "\\", "(a*)*b", "(a|a)*b", "(?:a|a|b)+$", "((a?){99}){99}", "((a?){99999}){99999}", "(?R)", "(?1)",
    "(?:q){e<=9}", "{", "a{,9}", r"layers\.\d{1,3}\..*", "(?<=a)(?!b)", r"\1(a)", r"\p{L}", "(" * 150, "[" * 150,
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 16, 64, -1, 0.0, -0.0, 0.5, 2.0, 1e-320, 1e9, 1e308, 255, 256, 2**31 - 1, 2**31, 2**32,
    2**47, 2**48, 2**53 + 1, 2**62, 2**63, 2**64, 10**40, 10**400, -(2**63),
)  # fmt: skip
# Texts that no serializer writes, put in as they are.
RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-", b"01", b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\u0000"', b"\xff",
    b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"//", b"/**/", b"'",
    b"9" * 5000, b"1." + b"0" * 5000, b"[" * 2000, b"[" * 60 + b"]" * 60, b'{"a":' * 2000, b'"' + b"x" * 100_000 + b'"',
)  # fmt: skip
PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_A", "lora_B", "lora_E", "ranknum", "lora_B.bias",
    "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "token_adapter.trainable_tokens_delta", "weight",
    "bias", "modules_to_save.weight", "original_module.weight", "base_layer.weight", "base_layer.lora_A.weight",
    "lora_unheard_of", "lora_velora_x",
)  # fmt: skip
FIELDS = (*sorted(KNOWN_FIELDS | set(REFUSED_FIELDS)), "dtype", "shape", "data_offsets", "weight_map")
LORA_PARTS = (b"lora_A.weight", b"lora_B.weight")
VAST = (b"[]", b"{}", b"0", b'""', b"[[]]", b'{"":0}', b"1e9", b'"%x"', b"1%x", b'["%x"]', b'{"%x":"%x"}')


@dataclass
class Pairs:
    """A JSON object that may have a key more than once."""

    items: list[tuple[str, Any]]


def parsed(text: bytes) -> Any:
    """A document that ``damaged`` takes."""
    return json.loads(text, object_pairs_hook=Pairs)


def damaged(document: Any, random: Random) -> bytes:
    """The document as text, with one to four changes to its structure and then perhaps some to the text."""
    for _ in range(random.choice((0, 1, 1, 1, 2, 4))):
        _change(document, random)
    text = serialized(document)
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        text = random.choice(TEXT_CHANGES)(text, random)
    return text


def serialized(document: Any) -> bytes:
    if isinstance(document, Pairs):
        inner = b",".join(json.dumps(key).encode() + b":" + serialized(item) for key, item in document.items)
        return b"{" + inner + b"}"
    if isinstance(document, list):
        return b"[" + b",".join(map(serialized, document)) + b"]"
    if isinstance(document, bytes):
        return document
    return json.dumps(document, ensure_ascii=bool(isinstance(document, str) and len(document) % 2)).encode(
        errors="surrogatepass"
    )


def repaired(header: Any, random: Random) -> int:
    """Give a header's entries offsets that fit their shapes, where that is possible; the bytes that it needs."""
    end = 0
    for name, entry in header.items if isinstance(header, Pairs) else ():
        if name == "__metadata__" or not isinstance(entry, Pairs):
            continue
        fields = dict(entry.items)
        size = DTYPE_BYTES.get(fields.get("dtype", ""), 0) if isinstance(fields.get("dtype"), str) else 0
        for item in fields.get("shape") if isinstance(fields.get("shape"), list) else ():  # type: ignore[union-attr]
            size *= item if isinstance(item, int) and 0 <= item < MAX_REPAIRED_BYTES else 0
        size = min(size, MAX_REPAIRED_BYTES)
        entry.items = [(key, [end, end + size] if key == "data_offsets" else item) for key, item in entry.items]
        end += size
    return end


def framed(text: bytes, data: int, random: Random) -> bytes:
    """A safetensors file: the header's length, perhaps a wrong one, the header, and ``data`` zeros, perhaps not all."""
    length = len(text)
    if random.random() < 0.08:
        wrong = (0, 1, 8, length - 1, length + 1, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1)
        length = random.choice(wrong)
    if random.random() < 0.08:
        data = random.choice((0, data - 1, data + 1, data * 2))
    whole = (length % 2**64).to_bytes(8, "little") + text + bytes(max(0, min(data, 4 * MAX_REPAIRED_BYTES)))
    return whole[: random.randrange(len(whole) + 1)] if random.random() < 0.02 else whole


def _change(document: Any, random: Random) -> None:
    holder = random.choice(_holders(document))
    items = holder.items if isinstance(holder, Pairs) else holder
    at = random.randrange(len(items) + 1)
    what = random.random()
    if what < 0.15 and at < len(items):
        del items[at]
    elif what < 0.3 and at < len(items):
        items.insert(random.randrange(len(items) + 1), items[at])  # shared on purpose: changed twice together
    elif what < 0.4:
        random.shuffle(items)
    elif isinstance(holder, Pairs):
        key, item = items[at] if at < len(items) else (_key(random), None)
        if what < 0.6 and at < len(items):
            items[at] = (_key(random, key), item)
        else:
            items[at : at + 1] = [(key, _value(random))]
    else:
        items[at : at + 1] = [_value(random)]


def _holders(document: Any) -> list[Any]:
    found, queue = [], [document]
    while queue and len(found) < 2000:
        value = queue.pop()
        if isinstance(value, Pairs):
            found.append(value)
            queue.extend(item for _, item in value.items)
        elif isinstance(value, list):
            found.append(value)
            queue.extend(value)
    return found or [[]]


def _key(random: Random, key: str = "") -> str:
    kind = random.random()
    if kind < 0.4:
        return random.choice(FIELDS)
    if kind < 0.7:
        return f"{key.rpartition('.lora')[0] or 'base_model.model.model.norm'}.{random.choice(PARTS)}"
    if kind < 0.85:
        return random.choice(WORDS)
    at = random.randrange(len(key) + 1)
    return key[:at] + random.choice(WORDS) + key[at:]


def _value(random: Random) -> Any:
    return random.choices(VALUES, (300, 200, 100, 100, 100, 100, 50, 50, 1))[0](random)


def _nested(random: Random) -> bytes:
    depth = random.choice((3, 62, 70, 400, 3000))
    return b"[" * depth + b"1" + b"]" * depth if random.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth


def _vast(random: Random) -> bytes:
    """A value of up to 25 MB: a list, an object, or a value with tensors after it as no header has them."""
    kind = random.randrange(3)
    if kind == 2:
        entry = b'{"dtype":"F32","shape":[0,0],"data_offsets":[0,0]}'
        names = (b"m%d.%s" % (at, part) for at in range(random.randrange(70_000)) for part in LORA_PARTS)
        return entry + b"".join(b',"%s":%s' % (name, entry) for name in names)
    piece = random.choice(VAST)
    count = random.randrange(1, min(MAX_VALUES, MAX_HEADER_BYTES // (len(piece) + 4)))
    pieces = (piece.replace(b"%x", b"%x" % number) if b"%x" in piece else piece for number in range(count))
    if kind == 1:
        return b"{" + b",".join(b'"%x":%s' % (number, item) for number, item in enumerate(pieces)) + b"}"
    return b"[" + b",".join(pieces) + b"]"


VALUES: Sequence[Callable[[Random], Any]] = (
    lambda random: random.choice(NUMBERS),
    lambda random: random.choice(WORDS),
    lambda random: random.choice((None, True, False)),
    lambda random: random.choice(RAW),
    lambda random: [random.choice(NUMBERS) for _ in range(random.choice((0, 1, 2, 2, 3, 9, 300)))],
    lambda random: Pairs(
        [(random.choice(WORDS), random.choice(NUMBERS)) for _ in range(random.choice((0, 1, 2, 1100)))]
    ),
    lambda random: [random.choice(WORDS) for _ in range(random.choice((1, 2, 300)))],
    _nested,
    _vast,
)


def _flip(text: bytes, random: Random) -> bytes:
    if not text:
        return text
    at = random.randrange(len(text))
    return text[:at] + bytes([text[at] ^ 1 << random.randrange(8)]) + text[at + 1 :]


def _insert(text: bytes, random: Random) -> bytes:
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(RAW) + text[at:]


def _cut(text: bytes, random: Random) -> bytes:
    first, last = sorted(random.randrange(len(text) + 1) for _ in range(2))
    return text[:first] + text[min(last, first + random.choice((1, 5, 50, 5000))) :]


def _repeat(text: bytes, random: Random) -> bytes:
    first = random.randrange(len(text) + 1)
    piece = text[first : first + random.choice((1, 10, 100))]
    return text[:first] + piece * random.choice((2, 3, 500)) + text[first:]


def _encode(text: bytes, random: Random) -> bytes:
    return text.decode(errors="replace").encode(random.choice(("utf-16", "utf-32", "utf-8-sig")))


TEXT_CHANGES: Sequence[Callable[[bytes, Random], bytes]] = (_flip, _flip, _insert, _insert, _cut, _repeat, _encode)
