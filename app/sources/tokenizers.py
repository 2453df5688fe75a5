"""A model's tokenizer files as data: its vocabulary, and the documents to write it from. No tokenizer is ever run.

``tokenizer.json`` is the format that is read (Hugging Face ``tokenizers``: BPE, WordPiece, WordLevel, Unigram).
``tokenizer_config.json`` and ``added_tokens.json`` may add tokens to it, as transformers does when it loads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app import strict_json
from app.errors import MergeyardError
from app.sources.opening import read_small
from app.sources.source import SourceFile

MAX_TOKENS = 2_000_000  # the largest vocabularies in use have 260 000
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
SLOW_FILES = frozenset(
    {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"}
)
TOKENIZER_FILES = SLOW_FILES | {
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    ADDED_TOKENS,
    "special_tokens_map.json",
    TEMPLATE_FILE,
    "chat_template.json",
}
FLAGS: Mapping[str, bool] = {  # of an added token about which nothing is said; `normalized` is `not special` then
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is found in a text before the tokenizer splits it, and its flags (see FLAGS)."""

    content: str
    flags: Mapping[str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """A tokenizer: ``ids`` of all tokens by their text, which of them are ``added``, and the files it was read from.

    ``companions`` are all its files, those that were not read too. ``next_id`` is what the next added token gets.
    ``document`` is ``tokenizer.json``; ``config`` and ``added_file`` are ``tokenizer_config.json`` and
    ``added_tokens.json`` where there are any.
    """

    reference: str
    files: tuple[SourceFile, ...]
    companions: tuple[SourceFile, ...]
    ids: Mapping[str, int]
    added: Mapping[str, AddedToken]
    next_id: int
    document: Mapping[str, Any]
    config: Mapping[str, Any] | None
    added_file: Mapping[str, Any] | None


def read_tokenizer(companions: Iterable[SourceFile], reference: str) -> TokenizerSource | None:
    """A model's tokenizer, or None where it has no tokenizer files at all.

    Raises:
        MergeyardError: `tokenizer_unsupported` (no tokenizer.json), `tokenizer_invalid` (damaged, contradictory, too
            large), `source_changed` (not the bytes that were pinned).
    """
    files = {file.name: file for file in companions if file.name in TOKENIZER_FILES}
    if TOKENIZER_JSON not in files:
        slow = sorted(SLOW_FILES & files.keys())
        if not slow:
            return None
        message = (
            f"{reference} has no {TOKENIZER_JSON}, only {', '.join(slow)}; its vocabulary cannot be read. Load and "
            "save it once with transformers' fast tokenizer, which writes one"
        )
        raise MergeyardError("tokenizer_unsupported", message)
    read = tuple(files[name] for name in (TOKENIZER_JSON, TOKENIZER_CONFIG, ADDED_TOKENS) if name in files)
    documents = {file.name: _read(file, reference) for file in read}
    document = documents[TOKENIZER_JSON]
    config, added_file = documents.get(TOKENIZER_CONFIG), documents.get(ADDED_TOKENS)
    ids = _model_ids(document, reference)
    taken = set(ids.values())
    added: dict[str, AddedToken] = {}
    next_id = len(ids)  # loaders number added tokens from here on in the order they are listed, whatever the file says
    listed = ((TOKENIZER_JSON, *found) for found in _listed(document, reference))
    for name, token, index in (*listed, *_added_beside(config, added_file, reference)):
        if token.content in added and name != TOKENIZER_JSON:
            continue  # what both name goes by tokenizer.json, as in every fast tokenizer
        known = ids.setdefault(token.content, next_id)
        if known != index:
            message = f"gives the token {token.content[:80]!r} the id {index}, and loading it gives {known}"
            raise _invalid(name, reference, message)
        added[token.content] = token
        next_id = max(next_id, index + 1)
        taken.add(index)
    if len(taken) < len(ids):
        raise _invalid(TOKENIZER_JSON, reference, "gives one id to two tokens")
    return TokenizerSource(
        reference=reference,
        files=read,
        companions=tuple(files.values()),
        ids=ids,
        added=added,
        next_id=next_id,
        document=document,
        config=config,
        added_file=added_file,
    )


def added_entry(token: AddedToken, index: int) -> dict[str, Any]:
    """The token as ``tokenizer.json`` lists it."""
    return {"id": index, "content": token.content, **token.flags}


def plain_token(content: str) -> AddedToken:
    """An added token about which nothing is known but its text."""
    return AddedToken(content=content, flags=FLAGS)


def chat_template_of(companions: Iterable[SourceFile], reference: str) -> str | None:
    """The chat template a model comes with: the file's, or (its default one) that of ``tokenizer_config.json``.

    Raises MergeyardError as `read_tokenizer` does.
    """
    files = {file.name: file for file in companions}
    if TEMPLATE_FILE in files:
        try:
            return _bytes(files[TEMPLATE_FILE], reference).decode()
        except UnicodeDecodeError:
            raise _invalid(TEMPLATE_FILE, reference, "is not UTF-8 text") from None
    if TOKENIZER_CONFIG not in files:
        return None
    template = _read(files[TOKENIZER_CONFIG], reference).get("chat_template")
    if isinstance(template, list):  # several, each with its name
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    elif isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _read(file: SourceFile, reference: str) -> dict[str, Any]:
    try:
        value = strict_json.loads_document(_bytes(file, reference))
    except ValueError as error:
        raise _invalid(file.name, reference, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid(file.name, reference, "is not a JSON object")
    return value


def _bytes(file: SourceFile, reference: str) -> bytes:
    """The pinned bytes and no others: what is planned from them is what the plan's digest says."""
    try:
        content = read_small(file.path)[0] if file.content is None else file.content
    except OSError as error:
        message = f"{file.name} of {reference} cannot be read: {error.strerror}"
        raise MergeyardError("source_not_found", message) from None
    except ValueError as error:
        raise _invalid(file.name, reference, f"is {error}") from None
    if hashlib.sha256(content).hexdigest() != file.header_sha256:
        raise MergeyardError("source_changed", f"{file.name} of {reference} changed while it was read; try again")
    return content


def _model_ids(document: Mapping[str, Any], reference: str) -> dict[str, int]:
    """The ids of the tokenizer's own vocabulary: a mapping, or for Unigram a list of pieces and their scores."""
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list):
        raise _invalid(TOKENIZER_JSON, reference, "has no model with a vocabulary")
    if len(vocabulary) > MAX_TOKENS:
        raise _invalid(TOKENIZER_JSON, reference, f"has more than {MAX_TOKENS} tokens")
    if isinstance(vocabulary, dict):
        for token, index in vocabulary.items():
            _check_id(index, token, TOKENIZER_JSON, reference)
        return dict(vocabulary)
    ids: dict[str, int] = {}
    for index, piece in enumerate(vocabulary):
        if not (isinstance(piece, list) and piece and isinstance(piece[0], str)):
            raise _invalid(
                TOKENIZER_JSON, reference, f"has a vocabulary whose entry {index} is not a piece and a score"
            )
        if ids.setdefault(piece[0], index) != index:
            raise _invalid(TOKENIZER_JSON, reference, f"has the piece {piece[0][:80]!r} twice")
    return ids


def _listed(document: Mapping[str, Any], reference: str) -> Iterator[tuple[AddedToken, int]]:
    """``added_tokens`` of ``tokenizer.json``."""
    listed = document.get("added_tokens") or []
    if not isinstance(listed, list) or len(listed) > MAX_TOKENS:
        raise _invalid(TOKENIZER_JSON, reference, "has added_tokens that are not a list of tokens")
    for item in listed:
        yield _added(item, item.get("id") if isinstance(item, dict) else None, TOKENIZER_JSON, reference)


def _added_beside(
    config: Mapping[str, Any] | None, added_file: Mapping[str, Any] | None, reference: str
) -> Iterator[tuple[str, AddedToken, int]]:
    """What the other two files add, by ascending id in each."""
    decoder = (config or {}).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or len(decoder) > MAX_TOKENS:
        raise _invalid(TOKENIZER_CONFIG, reference, "has an added_tokens_decoder that is not a mapping of tokens")
    found = []
    for key, item in decoder.items():
        index = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
        found.append((TOKENIZER_CONFIG, *_added(item, index, TOKENIZER_CONFIG, reference)))
    if added_file is not None:
        if len(added_file) > MAX_TOKENS:
            raise _invalid(ADDED_TOKENS, reference, f"has more than {MAX_TOKENS} tokens")
        for content, index in added_file.items():
            found.append((ADDED_TOKENS, plain_token(content), _check_id(index, content, ADDED_TOKENS, reference)))
    yield from sorted(found, key=lambda entry: (entry[0] == ADDED_TOKENS, entry[2]))


def _added(item: Any, index: Any, name: str, reference: str) -> tuple[AddedToken, int]:
    content = item.get("content") if isinstance(item, dict) else None
    if not isinstance(content, str) or not content:
        raise _invalid(name, reference, "has an added token without its text")
    flags = {}
    for flag, default in FLAGS.items():
        value = item.get(flag, default if flag != "normalized" else not item.get("special", False))
        if not isinstance(value, bool):
            raise _invalid(name, reference, f"has an added token {content[:80]!r} whose {flag} is not true or false")
        flags[flag] = value
    return AddedToken(content=content, flags=flags), _check_id(index, content, name, reference)


def _check_id(index: Any, token: str, name: str, reference: str) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < MAX_TOKENS:
        message = f"gives the token {token[:80]!r} the id {str(index)[:40]}; ids are whole numbers below {MAX_TOKENS}"
        raise _invalid(name, reference, message)
    return index


def _invalid(name: str, reference: str, what: str) -> MergeyardError:
    return MergeyardError("tokenizer_invalid", f"{name} of {reference} {what}")
