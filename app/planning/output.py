"""What a merge writes: shards, the JSON documents and companions beside them, and what it all takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from app.planning.budgets import (
    BLOCK_BYTES,
    BLOCK_VALUES,
    COLLECTED_BYTES,
    DELTA_BYTES,
    EXPERT_FACTOR_BYTES,
    PRODUCT_RANK,
    RESULTS_AHEAD,
    SOURCE_BYTES,
    SPARE_RESULTS,
    THREADS,
)
from app.planning.depth import restack_config
from app.planning.layout import restacked
from app.planning.named_code import imports_code, without_code
from app.planning.plan import Contribution, Document, Estimates, LoraFactors, ShardPlan, TensorPlan
from app.planning.renamed_keys import with_old_names
from app.planning.resolving import Resolved
from app.planning.tokenizer_files import (
    chat_template,
    renumbered,
    resized_config,
    template_documents,
    tokenizer_documents,
)
from app.planning.vocabulary import Vocabulary
from app.recipe import Recipe
from app.sources.models import read_document, read_value
from app.sources.safetensors import DTYPE_BYTES
from app.sources.source import SourceFile
from app.sources.tokenizers import (
    ADDED_TOKENS,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    chat_template_of,
)

PROCESS_BYTES = 450_000_000  # what a worker holds before it merges anything: torch, Numba
SCORING_BYTES = 1_200_000_000  # transformers, the activations and the logits of a batch
MODULES = "modules.json"  # of sentence-transformers
SUBTRACTED = frozenset({"F32", "F16", "BF16"})  # of what the kernels form differences on the way
OF_TOKENS = frozenset({TOKENIZER_JSON, ADDED_TOKENS})  # documents whose keys are tokens, and may be any word
LIBRARY_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def cut_shards(tensors: Sequence[TensorPlan], limit: int) -> tuple[ShardPlan, ...]:
    """Tensors in the base's order, a new file wherever the next one would pass the limit."""
    groups: list[list[TensorPlan]] = []
    size = 0
    for tensor in tensors:
        nbytes = output_bytes(tensor)
        if not groups or (groups[-1] and size + nbytes > limit):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    if len(groups) == 1:
        return (ShardPlan(filename="model.safetensors", tensors=tuple(groups[0])),)
    return tuple(
        ShardPlan(
            filename=f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tensors=tuple(group),
        )
        for number, group in enumerate(groups, start=1)
    )


def output_bytes(tensor: TensorPlan) -> int:
    """What the tensor takes in its file."""
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def estimate(tensors: Sequence[TensorPlan]) -> Estimates:
    touched = [tensor for tensor in tensors if tensor.contributions]
    largest, spanned = 0, 0
    for tensor in touched:
        values = 4 * math.prod(tensor.shape)
        # two tensors are open at once, one whose blocks are merged and one whose thresholds are looked for
        formed = sum(_is_formed(item, tensor.base.dtype) for item in tensor.contributions)
        deltas = min(2 * values * formed, DELTA_BYTES)
        factors = 2 * sum(_factor_bytes(item.lora) for item in tensor.contributions if item.lora)
        collected = values * len(tensor.contributions) // 5
        if tensor.parameters.get("trim_scope") == "model":
            spanned += collected
        largest = max(largest, deltas + factors + min(max(collected, spanned), COLLECTED_BYTES))
    return Estimates(
        output_bytes=sum(output_bytes(tensor) for tensor in tensors),
        peak_memory_bytes=PROCESS_BYTES + largest + _block_memory(tensors),
        tensors=len(tensors),
        tensors_touched=len(touched),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        parameters_touched=sum(math.prod(tensor.shape) for tensor in touched),
    )


def scoring_bytes(estimates: Estimates) -> int:
    """What scoring the result takes: all of its weights, and what one batch needs."""
    return PROCESS_BYTES + SCORING_BYTES + estimates.output_bytes


def _block_memory(tensors: Sequence[TensorPlan]) -> int:
    """Of the blocks that are worked on at once, and of the results that wait to be written."""
    scratch, result = 0, 0
    for tensor in tensors:
        values = min(math.prod(tensor.shape), max(BLOCK_VALUES, *tensor.shape[-1:], 1))  # at least a row
        scratch = max(scratch, values * (BLOCK_BYTES + SOURCE_BYTES * len(tensor.contributions)))
        result = max(result, values * DTYPE_BYTES[tensor.dtype])
    return THREADS * scratch + (RESULTS_AHEAD * THREADS + SPARE_RESULTS) * result


def _is_formed(contribution: Contribution, base: str) -> bool:
    """Whether δ is more than one product or one difference, which the kernels form on the way.

    ``base``: the dtype of the base.
    """
    lora, full = contribution.lora, contribution.full
    if lora is None and contribution.added is None:
        return full is not None and not {full.dtype, base} <= SUBTRACTED
    if lora is None:
        return True
    return full is not None or contribution.added is not None or lora.magnitude is not None or lora.rank > PRODUCT_RANK


def _factor_bytes(lora: LoraFactors) -> int:
    """In float32. Experts' are rearranged once, and those of several tensors are kept for the tensors that follow."""
    values = math.prod(lora.A.shape) + math.prod(lora.B.shape)
    if lora.experts > 1:
        kept = EXPERT_FACTOR_BYTES if lora.expert is not None else 0
        return 4 * 2 * values + kept
    if lora.magnitude is not None:
        values += 4 * math.prod(lora.magnitude.shape)  # with norms in float64
    return 4 * values


def documents_of(
    recipe: Recipe, resolved: Resolved, vocabulary: Vocabulary | None, size: int | None
) -> tuple[dict[str, Document], tuple[SourceFile, ...]]:
    """What is written anew, and what is copied: the base's files, and those of the tokenizer that the recipe chose.

    config.json has the output's dtype and ``size``, the rows of a vocabulary that is not the base's. What names code
    goes from every config, and what transformers 5 has renamed stands under the old names, too.
    """
    base = resolved.base
    config = restack_config(base, base.config, restacked(resolved))
    if recipe.file_dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(keys, LIBRARY_DTYPES[recipe.file_dtype]))
    files = {file.name: file for file in base.companions}
    documents: dict[str, Document] = {}
    if vocabulary is not None:
        config = renumbered(config, vocabulary)
        files = {name: file for name, file in files.items() if name not in TOKENIZER_FILES}
        files |= {file.name: file for file in vocabulary.tokenizer.companions}
        documents.update(tokenizer_documents(vocabulary))
    documents["config.json"] = config if size is None else resized_config(config, size)
    for file in files.values():
        if _is_config(file.name) and file.name not in documents:
            own = read_document(file, base.reference)
            moved = vocabulary is not None and file.name == "generation_config.json"
            value = renumbered(own, vocabulary) if vocabulary is not None and moved else own
            if _written(file.name, value) != own:
                documents[file.name] = value
    template = chat_template(recipe.chat_template, resolved) if recipe.chat_template else None
    if template is not None:
        written = documents.get(TOKENIZER_CONFIG)
        if written is None and TOKENIZER_CONFIG in files:
            written = read_document(files[TOKENIZER_CONFIG], base.reference)
        documents |= template_documents(template, written if isinstance(written, Mapping) else None, files)
    settled = {name: _written(name, value) for name, value in documents.items()}
    if MODULES in files and imports_code(read_value(files[MODULES], base.reference)):
        del files[MODULES]
    return settled, tuple(file for name, file in files.items() if name not in settled)


def has_chat_template(documents: Mapping[str, Document], companions: Sequence[SourceFile], reference: str) -> bool:
    """Whether the result's tokenizer will have one."""
    config = documents.get(TOKENIZER_CONFIG)
    if TEMPLATE_FILE in documents or (isinstance(config, Mapping) and config.get("chat_template")):
        return True
    return chat_template_of(companions, reference) is not None


def _written(name: str, document: Document) -> Document:
    """A document as it goes into the artifact: it names no code, and every transformers since 4.57 reads it."""
    if name in OF_TOKENS or not isinstance(document, Mapping):
        return document
    return with_old_names(name, without_code(document))


def _is_config(name: str) -> bool:
    return name.endswith("_config.json") or name == "config_sentence_transformers.json"
