"""The files that tell loaders of the result's tokenizer, and the ids of tokens in its configs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from app.planning.resolving import Resolved
from app.planning.vocabulary import Vocabulary
from app.recipe.chat_templates import AUTO, template_text
from app.sources.source import ModelSource, SourceFile
from app.sources.tokenizers import (
    ADDED_TOKENS,
    SLOW_FILES,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    added_entry,
    chat_template_of,
)

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")  # where configs of several modalities keep vocab_size
ID_KEYS = ("_token_id", "_token_ids", "_token_index")
ID_LISTS = frozenset({"suppress_tokens", "begin_suppress_tokens"})
MAX_DEPTH = 4


def tokenizer_documents(vocabulary: Vocabulary) -> dict[str, Mapping[str, Any]]:
    """The tokenizer's files that change: none where it stays as it was."""
    source, dropped = vocabulary.tokenizer, vocabulary.dropped
    if not vocabulary.added and not dropped:
        return {}
    kept = [item for item in source.document.get("added_tokens") or [] if item["content"] not in dropped]
    listed = {item["content"] for item in kept}
    # those that only the other files named, too: from now on tokenizer.json has all of them
    beside = [token for token in source.added.values() if token.content not in listed | dropped]
    new = [added_entry(token, vocabulary.ids[token.content]) for token in (*beside, *vocabulary.added)]
    documents: dict[str, Mapping[str, Any]] = {
        TOKENIZER_JSON: {**source.document, "added_tokens": [*kept, *sorted(new, key=lambda item: item["id"])]}
    }
    if source.config is not None and "added_tokens_decoder" in source.config:
        decoder = {
            index: item
            for index, item in (source.config["added_tokens_decoder"] or {}).items()
            if item["content"] not in dropped
        }
        decoder.update({str(vocabulary.ids[token.content]): _flags(token) for token in vocabulary.added})
        documents[TOKENIZER_CONFIG] = {**source.config, "added_tokens_decoder": decoder}
    if source.added_file is not None or SLOW_FILES & {file.name for file in source.companions}:
        own = {content: index for content, index in (source.added_file or {}).items() if content not in dropped}
        documents[ADDED_TOKENS] = own | {token.content: vocabulary.ids[token.content] for token in vocabulary.added}
    return documents


def _flags(token: Any) -> dict[str, Any]:
    entry = added_entry(token, 0)
    del entry["id"]
    return entry


def resized_config(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """config.json with ``vocab_size`` = ``rows``, wherever it has one."""
    resized = dict(config)
    for key in TEXT_CONFIGS:
        if isinstance(resized.get(key), dict) and "vocab_size" in resized[key]:
            resized[key] = {**resized[key], "vocab_size": rows}
    if "vocab_size" in config or resized == config:
        resized["vocab_size"] = rows
    return resized


def renumbered(config: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """A config of the base whose ids of tokens (``eos_token_id``, …) mean the same tokens in the result.

    A token that the result does not have gives way to the one that the result's tokenizer has in its role
    (``eos_token``), if any.
    """
    own = vocabulary.holders[vocabulary.base].tokenizer
    if own.reference == vocabulary.tokenizer.reference:
        return dict(config)
    tokens = {index: token for token, index in own.ids.items()}

    def new_id(key: str, index: Any) -> Any:
        token = tokens.get(index) if isinstance(index, int) and not isinstance(index, bool) else None
        if token is None:
            return index  # -1 or nothing: no token was meant
        found = vocabulary.ids.get(token)
        return found if found is not None else _in_role(key, vocabulary)

    def walked(value: Mapping[str, Any], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(item, dict) and depth < MAX_DEPTH:
                made[key] = walked(item, depth + 1)
            elif not (key.endswith(ID_KEYS) or key in ID_LISTS):
                made[key] = item
            elif isinstance(item, list):
                made[key] = list(dict.fromkeys(new for index in item if (new := new_id(key, index)) is not None))
            else:
                made[key] = new_id(key, item)
        return made

    return walked(config, 0)


def _in_role(key: str, vocabulary: Vocabulary) -> int | None:
    role = (vocabulary.tokenizer.config or {}).get(key.removesuffix("s").removesuffix("_id"))
    content = role.get("content") if isinstance(role, dict) else role
    return vocabulary.ids.get(content) if isinstance(content, str) else None


def chat_template(wanted: str, resolved: Resolved) -> str | None:
    """The template a recipe asks for; ``auto`` is the most common one among the base and the sources.

    Of several as common the base's, else the first source's. None: no model has one.
    """
    if wanted != AUTO:
        return template_text(wanted)
    models: dict[str, ModelSource] = {resolved.base.reference: resolved.base}
    for source in resolved.sources:
        if source.model:
            models[source.model.reference] = source.model
    found = [template for model in models.values() if (template := chat_template_of(model.companions, model.reference))]
    counted = Counter(template.strip() for template in found)
    return counted.most_common(1)[0][0] if counted else None  # insertion order decides between equals


def template_documents(
    template: str, config: Mapping[str, Any] | None, companions: Mapping[str, SourceFile]
) -> dict[str, Mapping[str, Any] | str]:
    """Where loaders look for a chat template: the file, and tokenizer_config.json where that has one."""
    documents: dict[str, Mapping[str, Any] | str] = {}
    if config is not None and config.get("chat_template") is not None:
        documents[TOKENIZER_CONFIG] = {**config, "chat_template": template}
    if not documents or TEMPLATE_FILE in companions:
        documents[TEMPLATE_FILE] = template
    return documents
