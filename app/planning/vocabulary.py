"""The vocabulary of the result: its tokens and their ids, from the tokenizers of the base and the sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.errors import MergeyardError, Problem
from app.planning.matching import vocabulary_tensors
from app.planning.naming import some
from app.planning.plan import PlannedSource
from app.planning.resolving import Resolved, ResolvedSource, placed
from app.recipe import Recipe
from app.recipe.tokenizer import Tokenizer, TokenSource
from app.sources.references import model_of
from app.sources.resolver import Resolver
from app.sources.source import ModelSource, StoredTensor
from app.sources.tokenizers import (
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    AddedToken,
    TokenizerSource,
    plain_token,
    read_tokenizer,
)

Parts = tuple[tuple[int, int], ...]  # (which of the models, its row); several: their mean; none: zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A model as far as its embedding goes: its tokens, and how many rows it has for them."""

    tokenizer: TokenizerSource
    rows: int

    def row(self, token: str) -> int | None:
        """Where its embedding of a token is; None: it has none."""
        index = self.tokenizer.ids.get(token)
        return index if index is not None and index < self.rows else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The result's tokens by id, and where their embeddings come from.

    ``tokenizer`` is the one whose files the result takes, with ``added`` appended to it and without ``dropped`` (for
    which it had no embedding). ``size`` is the rows that tokens need, ``padding`` the rows after them. ``tensors`` are
    the base's names of the tensors with a row for each token. ``holders`` are the base and the sources, by reference.
    ``section`` is the resolved recipe's.
    """

    tokenizer: TokenizerSource
    ids: Mapping[str, int]
    added: tuple[AddedToken, ...]
    dropped: frozenset[str]
    padding: int
    tensors: frozenset[str]
    holders: Mapping[str, Holder]
    base: str
    settings: Mapping[str, tuple[TokenSource, bool]]
    missing: str
    section: Mapping[str, Any]
    read: tuple[PlannedSource, ...]
    warnings: tuple[Problem, ...]

    @property
    def size(self) -> int:
        return max(self.ids.values(), default=-1) + 1

    def forced(self, token: str) -> bool:
        """Whether every model takes what the recipe names for this token."""
        return token in self.settings and self.settings[token][1]


def plan_vocabulary(recipe: Recipe, resolved: Resolved, resolver: Resolver) -> Vocabulary | None:
    """What the recipe's ``tokenizer`` means for these files; None where it says nothing.

    Raises:
        MergeyardError: every problem with its place: `tokenizer_unsupported`, `tokenizer_invalid`, `token_not_found`,
            `recipe_invalid`, `model_mismatch`.
    """
    wanted = recipe.vocabulary
    if wanted is None:
        return None
    place = "tokenizer.source" if recipe.tokenizer else "tokenizer_source"
    tensors = vocabulary_tensors(resolved.base)
    if not tensors:
        message = f"No tensor of {resolved.base.reference} is known to hold a row for each token; leave `{place}` out."
        raise MergeyardError("tokenizer_unsupported", message, where=place)
    problems: list[Problem] = []
    warnings: list[Problem] = []
    sources = _with_a_part(resolved, tensors)
    holders = _holders(recipe, resolved.base, sources, tensors, problems, warnings)
    source, reference = _source(wanted.source, place, resolved, resolver, holders, problems)
    names = _names(resolved.base, sources)
    settings = _settings(wanted, names, holders, resolver, problems)
    if problems or source is None:
        raise MergeyardError.of(problems)
    dropped = _beyond(source, holders.get(reference), place)
    ids = {token: index for token, index in source.ids.items() if token not in dropped}
    others = [holder for key, holder in holders.items() if key != resolved.base.reference]
    added = _extend(ids, wanted, source, others if wanted.source == "union" else [], warnings)
    vocabulary = Vocabulary(
        tokenizer=source,
        ids=ids,
        added=added,
        dropped=dropped,
        padding=0,
        tensors=tensors,
        holders=holders,
        base=resolved.base.reference,
        settings=settings,
        missing=wanted.missing or ("base" if recipe.base_model else "mean"),
        section={},
        read=_planned([source, *(holder.tokenizer for holder in holders.values())]),
        warnings=tuple(warnings),
    )
    if wanted.pad_to_multiple_of:
        vocabulary = replace(vocabulary, padding=-vocabulary.size % wanted.pad_to_multiple_of)
    return replace(vocabulary, section=_section(wanted, reference, vocabulary))


def differing(resolved: Resolved) -> tuple[Problem, ...]:
    """Warnings of a merge that aligns nothing: sources whose rows mean other tokens than the base's."""
    base = resolved.base
    tensors = vocabulary_tensors(base)
    readings = _Readings([])  # what cannot be read is no problem of a merge that does not need it
    found = []
    for source in resolved.sources:
        own = source.model or base
        if not tensors or _document(own) == _document(base):
            continue
        ours, theirs = (readings.of(model, source.where) for model in (base, own))
        if ours is None or theirs is None:
            continue
        rows = min(base.tensors[name].shape[0] for name in tensors)
        taken = {index for index in ours.ids.values() if index < rows}
        moved = [token for token, index in theirs.ids.items() if index in taken and ours.ids.get(token) != index]
        if moved:
            message = (
                f"{own.reference} has other tokens than {base.reference} in {len(moved)} rows, {some(moved)}, and they "
                "are merged as they lie. Set `tokenizer_source` to put the same tokens together."
            )
            found.append(Problem(code="tokenizer_mismatch", message=message, where=source.where))
    return tuple(found)


def _document(model: ModelSource) -> str | None:
    return next((file.header_sha256 for file in model.companions if file.name == TOKENIZER_JSON), None)


def _with_a_part(resolved: Resolved, tensors: frozenset[str]) -> tuple[ResolvedSource, ...]:
    """The sources of the modules that these tensors belong to: what another module is merged from has no vocabulary."""
    modules = {None, *map(resolved.modules.of, tensors)}
    spans = [span for part in resolved.parts if part.module in modules for span in part.spans]
    taken = {use.source for span in spans for use in span.uses}
    return tuple(source for index, source in enumerate(resolved.sources) if index in taken)


def _holders(
    recipe: Recipe,
    base: ModelSource,
    sources: Iterable[ResolvedSource],
    tensors: frozenset[str],
    problems: list[Problem],
    warnings: list[Problem],
) -> dict[str, Holder]:
    """The base and every source; without the base (in no order) where its own tokenizer has a problem."""
    readings = _Readings(problems)
    where = "base_model" if recipe.base_model else "models"
    rows = _rows_of({name: base.tensors[name] for name in tensors}, base.reference, where, problems)
    tokenizer = readings.of(base, where)
    if tokenizer is None:
        return {}
    holders = {base.reference: Holder(tokenizer=tokenizer, rows=rows)}
    for source in sources:
        key = reference_of(source)
        if key == base.reference:
            continue
        own: dict[str, StoredTensor] = dict(source.model.tensors if source.model else base.tensors)
        own.update(source.adapter.saved if source.adapter else {})
        unlike = sorted(name for name in tensors if not _rows_alike(own.get(name), base.tensors[name]))
        if unlike:
            message = f"{key} has no {some(unlike)} as {base.reference} has; they are of different architectures."
            problems.append(Problem(code="model_mismatch", message=message, where=source.where))
            continue
        count = _rows_of({name: own[name] for name in tensors}, key, source.where, problems)
        found: TokenizerSource | None = tokenizer
        before = source.model.tensors if source.model else base.tensors
        if source.adapter and count > min(before[name].shape[0] for name in tensors):
            message = (
                f"{key} has {count} rows for tokens that no tokenizer names; let PEFT merge the adapter into a model "
                "of its own, and save its tokenizer with it."
            )
            problems.append(Problem(code="adapter_vocabulary", message=message, where=source.where))
        if source.model:
            found = readings.of(source.model, f"{source.where}.model", absent=tokenizer if count == rows else None)
            if found is tokenizer:
                message = f"{key} has no tokenizer files; its tokens are taken to be those of {base.reference}."
                warnings.append(Problem(code="tokenizer_mismatch", message=message, where=source.where))
        if found is not None:
            holders[key] = Holder(tokenizer=found, rows=count)
    return holders


def _rows_alike(own: StoredTensor | None, other: StoredTensor) -> bool:
    """Whether two tensors have rows of one shape, however many."""
    return own is not None and len(own.shape) == len(other.shape) and own.shape[1:] == other.shape[1:]


@dataclass(slots=True)
class _Readings:
    """Tokenizers read so far: fine-tunes share theirs, and reading one can take a second."""

    problems: list[Problem]
    _by_pins: dict[tuple[str, ...], TokenizerSource] = field(default_factory=dict)

    def of(self, model: ModelSource, where: str, absent: TokenizerSource | None = None) -> TokenizerSource | None:
        """The model's tokenizer, ``absent`` if it has none; None, and a problem, if neither can be had."""
        pins = tuple(f"{file.name}:{file.header_sha256}" for file in model.companions if file.name in TOKENIZER_FILES)
        try:
            if pins not in self._by_pins:
                found = read_tokenizer(model.companions, model.reference)
                if found is None:
                    if absent is not None:
                        return absent
                    message = f"{model.reference} has no tokenizer files; add its tokenizer.json"
                    raise MergeyardError("tokenizer_unsupported", message)
                self._by_pins[pins] = found
        except MergeyardError as error:
            self.problems.extend(placed(error, where))
            return None
        own = {file.name: file for file in model.companions}
        found = self._by_pins[pins]
        return replace(
            found,
            reference=model.reference,
            files=tuple(own[file.name] for file in found.files),
            companions=tuple(own[file.name] for file in found.companions),
        )


def _rows_of(own: Mapping[str, StoredTensor], reference: str, where: str, problems: list[Problem]) -> int:
    """How many tokens a model has rows for: as many in its head as in its embedding."""
    counts = {spec.shape[0] for spec in own.values()}
    if len(counts) > 1:
        shapes = ", ".join(f"{name} {list(spec.shape)}" for name, spec in sorted(own.items()))
        message = f"The vocabulary of {reference} has several sizes: {shapes}."
        problems.append(Problem(code="model_mismatch", message=message, where=where))
    return min(counts)


def _source(
    text: str,
    place: str,
    resolved: Resolved,
    resolver: Resolver,
    holders: Mapping[str, Holder],
    problems: list[Problem],
) -> tuple[TokenizerSource | None, str]:
    """The tokenizer whose files the result takes, and its model's reference."""
    base = resolved.base.reference
    if text in ("base", "union"):
        return (holders[base].tokenizer if base in holders else None), base
    try:
        reference = resolver.canonical(text)
        if reference not in holders:
            reference = resolver.canonical(model_of(text))
        if reference in holders:
            return holders[reference].tokenizer, reference
        companions = resolver.companions(reference)
        found = read_tokenizer(companions, reference)
        if found is None:
            raise MergeyardError("tokenizer_unsupported", f"{reference} has no tokenizer files")
    except MergeyardError as error:
        problems.extend(placed(error, place))
        return None, ""
    return found, reference


def _names(base: ModelSource, sources: Iterable[ResolvedSource]) -> dict[str, str]:
    """What a recipe may call the models it merges → their references here."""
    names = {base.reference: base.reference}
    for source in sources:
        key = reference_of(source)
        names[key] = key
        if "adapter" in source.canonical:
            names[f"{base.reference}+{key}"] = key
    return names


def _settings(
    wanted: Tokenizer,
    names: Mapping[str, str],
    holders: Mapping[str, Holder],
    resolver: Resolver,
    problems: list[Problem],
) -> dict[str, tuple[TokenSource, bool]]:
    """What the recipe says of single tokens: a source whose model is a key of ``holders``, and whether it is forced."""
    settings = {}
    for token, setting in wanted.tokens.items():
        where = f"tokenizer.tokens.{token}.source"
        source = setting.source
        if source is not None and source.model is not None:
            try:
                key = names.get(resolver.canonical(source.model))
            except MergeyardError as error:
                problems.extend(placed(error, where))
                continue
            if key is None:
                message = f"{source.model} is not merged here; name the base or one of `models`."
                problems.append(Problem(code="recipe_invalid", message=message, where=where))
                continue
            if key not in holders:
                continue  # it has a problem of its own
            if row_named(token, source, holders[key]) is None:
                sought = source.token_id if source.token_id is not None else repr((source.token or token)[:80])
                message = f"{key} has no embedding for the token {sought}; it has {holders[key].rows} rows."
                problems.append(Problem(code="token_not_found", message=message, where=where))
            source = source.model_copy(update={"model": key})
        if source is not None:
            settings[token] = (source, setting.force)
    return settings


def _beyond(source: TokenizerSource, holder: Holder | None, where: str) -> frozenset[str]:
    """Tokens of the result's tokenizer whose model has no row for them: never trained, so they are left out."""
    if holder is None:
        return frozenset()
    beyond = {token for token, index in source.ids.items() if index >= holder.rows}
    own = sorted(beyond - source.added.keys())
    if own:
        message = (
            f"{source.reference} has {holder.rows} rows and a tokenizer with more, {some(own)}; "
            "its files do not belong together."
        )
        raise MergeyardError("tokenizer_invalid", message, where=where)
    return frozenset(beyond)


def _extend(
    ids: dict[str, int], wanted: Tokenizer, source: TokenizerSource, others: Iterable[Holder], warnings: list[Problem]
) -> tuple[AddedToken, ...]:
    """Give an id to what the other models have and the result's tokenizer lacks, then to the recipe's own tokens.

    As in mergekit everything becomes an added token, found before a text is split. Ordinary tokens come first.
    """
    ordinary: dict[str, AddedToken] = {}
    added: dict[str, AddedToken] = {}
    for holder in others:
        for token in sorted(holder.tokenizer.ids, key=holder.tokenizer.ids.__getitem__):
            if token and token not in ids and holder.row(token) is not None:
                special = holder.tokenizer.added.get(token)
                (added if special else ordinary).setdefault(token, special or plain_token(token))
    if ordinary:
        message = (
            f"{len(ordinary)} ordinary tokens, {some(list(ordinary))}, are not in the tokenizer of {source.reference}; "
            "they become added tokens, which are found before a text is split, so texts may split differently."
        )
        warnings.append(Problem(code="tokenizer_mismatch", message=message, where="tokenizer"))
    tokens = {**ordinary, **added}
    for token in wanted.tokens:
        if token not in ids:
            tokens.setdefault(token, plain_token(token))
    if tokens and (source.next_id != len(ids) or max(ids.values(), default=-1) + 1 != len(ids)):
        message = f"The ids of {source.reference}'s tokens have gaps, so no token can be added to it."
        raise MergeyardError("tokenizer_unsupported", message, where="tokenizer")
    for token in tokens:
        ids[token] = len(ids)
    return tuple(added.get(token) or made for token, made in tokens.items())


def _planned(tokenizers: Iterable[TokenizerSource]) -> tuple[PlannedSource, ...]:
    """The files that were read, so that they are pinned and recorded like weights."""
    found = {item.reference: PlannedSource(reference=item.reference, role="tokenizer", files=item.files)
             for item in tokenizers}  # fmt: skip
    return tuple(found.values())


def _section(wanted: Tokenizer, reference: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """``tokenizer`` of the resolved recipe: references canonical, defaults written out."""
    tokens: dict[str, dict[str, Any]] = {}
    for token, setting in wanted.tokens.items():
        tokens[token] = {"force": setting.force}
        if token in vocabulary.settings:
            tokens[token]["source"] = vocabulary.settings[token][0].model_dump(exclude_none=True)
    section: dict[str, Any] = {
        "source": wanted.source if wanted.source in ("base", "union") else reference,
        "missing": vocabulary.missing,
        "tokens": tokens,
    }
    if wanted.pad_to_multiple_of:
        section["pad_to_multiple_of"] = wanted.pad_to_multiple_of
    return section


def row_named(token: str, source: TokenSource, holder: Holder) -> int | None:
    """Which of the model's rows ``source`` means, if it has it."""
    if source.token_id is not None:
        return source.token_id if source.token_id < holder.rows else None
    return holder.row(source.token if source.token is not None else token)


def reference_of(source: ResolvedSource) -> str:
    """How a source is called: a model's reference, or an adapter's."""
    return source.canonical.get("model") or source.canonical["adapter"]
