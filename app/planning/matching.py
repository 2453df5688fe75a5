"""Fitting a source to the base: every tensor it changes finds its place there, or a problem names both sides."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from app.errors import MergeyardError, Problem
from app.planning.fitting import Target, fit_parameters, names_of_module
from app.planning.naming import SHOWN, Naming, Part, name_in, some
from app.planning.plan import LoraFactors, ScaledTensor
from app.sources.safetensors import DTYPE_BYTES, FLOATS
from app.sources.source import AdapterSource, LoraModule, ModelSource, StoredTensor, TensorSpec, TokenRows, gathered

HEADS = frozenset({"lm_head", "embed_out"})
EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"})
INPUTS = EMBEDDINGS | {"shared"}
# The other modules with a row, or in a bias a value, for each token; `decoder` and `predictions` are BERT's.
OTHER_VOCABULARY = ("shared", "lm_head.decoder", "predictions.decoder", "predictions")
WITH_HEADS = ("ForCausalLM", "LMHead", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "DoubleHeads")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMatch:
    """What an adapter changes, under the base's names: ΔW of factors, tensors it replaces, and what it adds.

    ``saved`` has the base's shape but for a grown vocabulary, which has more rows.
    """

    source: AdapterSource
    factors: Mapping[str, LoraFactors]
    saved: Mapping[str, StoredTensor]
    added: Mapping[str, ScaledTensor]


def check_model(model: ModelSource, base: ModelSource, *, aligned: bool = False) -> None:
    """Raises MergeyardError `model_mismatch` with every tensor that is missing, left over, or of another shape.

    ``aligned``: the recipe says what becomes of the vocabulary, so it may have another size.
    """
    problems = []
    vocabulary = vocabulary_tensors(base)
    missing = [name for name in base.tensors if name not in model.tensors]
    extra = [name for name in model.tensors if name not in base.tensors]
    if model.config.get("tie_word_embeddings"):
        extra = [name for name in extra if name != "lm_head.weight"]  # a tied head saved twice
    if missing:
        message = f"{model.reference} lacks {some(missing)}, which the base has."
        problems.append(Problem(code="model_mismatch", message=message))
    if extra:
        message = f"{model.reference} has {some(extra)}, which the base lacks."
        problems.append(Problem(code="model_mismatch", message=message))
    for name, spec in base.tensors.items():
        own = model.tensors.get(name)
        resized = own is not None and name in vocabulary and own.shape[1:] == spec.shape[1:]
        if own is not None and own.shape != spec.shape and resized and not aligned:
            message = (
                f"{name} has {own.shape[0]} rows in {model.reference} and {spec.shape[0]} in the base: their "
                "vocabularies differ. Say with `tokenizer_source` (base, union or a model) which one the result has."
            )
            problems.append(Problem(code="model_mismatch", message=message))
        elif own is not None and own.shape != spec.shape and not resized:
            message = (
                f"{name} is {list(own.shape)} in {model.reference} and {list(spec.shape)} in the base; "
                "they are not fine-tunes of one model."
            )
            problems.append(Problem(code="model_mismatch", message=message))
        elif own is not None and (own.dtype in FLOATS) != (spec.dtype in FLOATS):
            message = f"{name} is {own.dtype} in {model.reference} and {spec.dtype} in the base."
            problems.append(Problem(code="model_mismatch", message=message))
    if problems:
        raise MergeyardError.of(problems[:SHOWN])


def match_adapter(adapter: AdapterSource, base: ModelSource, on: Mapping[str, TensorSpec]) -> AdapterMatch:
    """Fit an adapter to the base's names; ``on`` are the tensors of the model that it sits on, by those names.

    Raises:
        MergeyardError: what `name_in` and `fit_parameters` raise, `adapter_shape`, `adapter_vocabulary`,
            `adapter_tied_head` (half of a tie), up to five at once.
    """
    _refuse_half_of_a_tie(adapter, base)
    modules, saved = list(adapter.modules), dict(adapter.saved)
    if is_tied(base) and "lm_head.weight" not in base.tensors:
        # trained as one: the embedding again, which the adapter holds too
        modules = [module for module in modules if module.module != "lm_head"]
        saved.pop("lm_head.weight", None)
    biased = [module for module in modules if module.bias is not None]
    wanted = [
        *(names_of_module(module) for module in modules),
        *((f"{module.module}.bias",) for module in biased),
        *((name,) for name in saved),
        *((f"{rows.module}.weight",) for rows in adapter.tokens),
    ]
    naming = name_in(base, wanted, adapter.reference)

    problems: list[Problem] = []
    factors: dict[str, LoraFactors] = {}
    replaced: dict[str, StoredTensor] = {}
    added: dict[str, ScaledTensor] = {}
    for same_module in _by_name(modules):
        with _collecting(problems):
            targets = [target for name in names_of_module(same_module[0]) if (target := _target(naming, name))]
            factors |= fit_parameters(same_module, targets, adapter, base)
    for module in biased:
        with _collecting(problems):
            name, tensor = _added_bias(module, naming, base, adapter)
            added[name] = tensor
    for name, spec in saved.items():
        with _collecting(problems):
            replaced |= _replaced(name, spec, naming, base, adapter)
    for rows in adapter.tokens:
        with _collecting(problems):
            name, tensor_of_rows = _with_rows(rows, naming, on, adapter)
            if name in factors or name in replaced:
                message = f"{adapter.reference} trained tokens of {name}, and changes all of it by other means too."
                raise MergeyardError("adapter_invalid", message)
            replaced[name] = tensor_of_rows
    if problems:
        raise MergeyardError.of(problems[:SHOWN])
    for embedding, head in _tied_copies(base):
        if head not in factors and embedding in factors:
            factors[head] = factors[embedding]
        if head not in replaced and embedding in replaced:
            replaced[head] = replaced[embedding]
    return AdapterMatch(source=adapter, factors=factors, saved=replaced, added=added)


@contextlib.contextmanager
def _collecting(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except MergeyardError as error:
        problems.extend(error.problems)


def _by_name(modules: Sequence[LoraModule]) -> Iterable[list[LoraModule]]:
    """Factors of several parameters of one module stand together."""
    found: dict[str, list[LoraModule]] = defaultdict(list)
    for module in modules:
        found[module.module].append(module)
    return found.values()


def _target(naming: Naming, name: str) -> Target | None:
    whole = naming.find(name)
    return None if whole is None else Target(name.rpartition(".")[2], whole)


def _added_bias(
    module: LoraModule, naming: Naming, base: ModelSource, adapter: AdapterSource
) -> tuple[str, ScaledTensor]:
    whole = naming.find(f"{module.module}.bias")
    assert whole is not None and module.bias is not None  # name_in found it
    if base.tensors[whole.name].shape != module.bias.shape:
        raise _other_shape(whole.name, module.bias, base.tensors[whole.name].shape, adapter)
    return whole.name, ScaledTensor(tensor=module.bias, scale=module.scalings["weight"].scale)


def _replaced(
    name: str, spec: TensorSpec, naming: Naming, base: ModelSource, adapter: AdapterSource
) -> dict[str, StoredTensor]:
    """A saved tensor by the base's names: as it is, or cut into those of the experts that it holds together."""
    whole = naming.find(name)
    assert whole is not None  # name_in found it
    if whole.parts:
        if spec.shape != whole.shape:
            raise _other_shape(name, spec, whole.shape, adapter)
        return {part.name: _rows_of(spec, part, base.tensors[part.name].shape) for part in whole.parts}
    grown = is_vocabulary(whole.name) and len(spec.shape) == len(whole.shape) and spec.shape[1:] == whole.shape[1:]
    if spec.shape == whole.shape or (grown and spec.shape[0] > whole.shape[0]):
        return {whole.name: spec}
    if grown:
        message = (
            f"{adapter.reference} saved {name} for {spec.shape[0]} tokens and the base has {whole.shape[0]}; merge "
            "onto the base that it was trained with."
        )
        raise MergeyardError("adapter_vocabulary", message)
    raise _other_shape(name, spec, whole.shape, adapter)


def _rows_of(spec: TensorSpec, part: Part, shape: tuple[int, ...]) -> TensorSpec:
    """Some rows of one expert, where they lie in the tensor (experts, rows, columns) that holds all of them."""
    width = DTYPE_BYTES[spec.dtype]
    first = (part.expert * spec.shape[1] + part.first_row) * spec.shape[2]
    return replace(spec, shape=shape, offset=spec.offset + first * width, nbytes=math.prod(shape) * width)


def _with_rows(
    rows: TokenRows, naming: Naming, on: Mapping[str, TensorSpec], adapter: AdapterSource
) -> tuple[str, StoredTensor]:
    """The embedding that an adapter sits on, with the rows of its tokens in their places."""
    whole = naming.find(f"{rows.module}.weight")
    assert whole is not None  # name_in found it
    spec = on[whole.name]
    if len(spec.shape) != 2 or spec.shape[1] != rows.rows.shape[1]:
        raise _other_shape(whole.name, rows.rows, spec.shape, adapter)
    if max(rows.indices) >= spec.shape[0]:
        message = (
            f"{adapter.reference} trained token {max(rows.indices)} and the base has {spec.shape[0]}; save the base "
            "with its embedding resized as it was for the training."
        )
        raise MergeyardError("adapter_vocabulary", message)
    places = {token: row for row, token in enumerate(rows.indices)}
    tensor = gathered(
        spec.name,
        (((rows.rows, places[token]),) if token in places else ((spec, token),) for token in range(spec.shape[0])),
        spec.shape[1:],
    )
    return whole.name, tensor


def _other_shape(name: str, spec: TensorSpec, wanted: Sequence[int], adapter: AdapterSource) -> MergeyardError:
    message = (
        f"{name} is {list(spec.shape)} in {adapter.reference} and {list(wanted)} in the base; merge onto the base it "
        "was trained with."
    )
    return MergeyardError("adapter_shape", message)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return _last(name) in EMBEDDINGS | HEADS and name.endswith(".weight")


def vocabulary_tensors(base: ModelSource) -> frozenset[str]:
    """The tensors with a row for each token: the embedding, and heads (with their biases) as long as it is."""
    rows = {spec.shape[0] for name, spec in base.tensors.items() if _last(name) in INPUTS and len(spec.shape) == 2}
    if len(rows) != 1:
        return frozenset()
    (count,) = rows

    def listed(module: str) -> bool:
        return module.rpartition(".")[2] in EMBEDDINGS | HEADS or module.endswith(OTHER_VOCABULARY)

    return frozenset(
        name
        for name, spec in base.tensors.items()
        if spec.shape[:1] == (count,) and listed(name.removesuffix(".weight").removesuffix(".bias"))
    )


def is_tied(base: ModelSource) -> bool:
    """Whether the embedding is the output head too. Where the config is silent: a model without a head is."""
    architectures = [str(name) for name in base.config.get("architectures") or ()]
    if architectures and not any(part in name for name in architectures for part in WITH_HEADS):
        return False  # a classifier's config says that embeddings are tied, and there is nothing to tie them to
    stated = base.config.get("tie_word_embeddings")
    if stated is not None:
        return bool(stated)
    causal = any("ForCausalLM" in name for name in architectures)
    return causal and not any(_last(name) in HEADS for name in base.tensors)


def _tied_copies(base: ModelSource) -> Iterator[tuple[str, str]]:
    """Embedding and head of a tied checkpoint that stores them both."""
    if not is_tied(base):
        return
    heads = [name for name in base.tensors if _last(name) in HEADS]
    embeddings = [name for name in base.tensors if _last(name) in EMBEDDINGS]
    for head in heads:
        for embedding in embeddings:
            if base.tensors[head].shape == base.tensors[embedding].shape:
                yield embedding, head


def _refuse_half_of_a_tie(adapter: AdapterSource, base: ModelSource) -> None:
    """Embedding and head of a tied checkpoint are one; an adapter that trained one of them would change both."""
    if not is_tied(base) or adapter.config.get("ensure_weight_tying"):
        return
    names = [*(module.module for module in adapter.modules), *adapter.saved]
    halves = [name for name in names if _last(name) in EMBEDDINGS | HEADS]
    if halves:
        apart = " alone" if len(halves) == 1 else ", each by itself"
        message = (
            f"{adapter.reference} trained {' and '.join(halves)}{apart}, and the base ties embedding and output head; "
            "merging would change both. Train with ensure_weight_tying, or untie the base first: store "
            "lm_head.weight in it, and `tie_word_embeddings: false` in its config."
        )
        raise MergeyardError("adapter_tied_head", message)


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
