"""The recipe as a frozen value. Its structure is checked here, its parameters against the method's own in ``parse``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from app.recipe.evaluation import Evaluation
from app.recipe.tokenizer import Tokenizer
from app.sources.references import split_adapter

SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)
MAX_SOURCES = 256
MAX_SLICES = 1_000
MAX_LAYERS = 100_000
MAX_ADAPTERS = 8  # on one model, in one reference
DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # ours → safetensors'
OutDtype = Literal["float32", "float16", "bfloat16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("parameters", mode="before", check_fields=False)
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        return {} if value is None else value  # `parameters:` with nothing below it, as mergekit takes it


class SourceEntry(_Strict):
    """One entry of ``models``: a full ``model`` (or ``base+adapter``), or an ``adapter`` on the base."""

    model: str | None = Field(None, min_length=1, description="A fine-tuned model, or base+adapter as in mergekit")
    adapter: str | None = Field(None, min_length=1, description="A PEFT adapter trained on the base model")
    parameters: dict[str, Any] = Field(default_factory=dict, description="This source's own parameters")

    @field_validator("model", "adapter", mode="before")
    @classmethod
    def _spelt_out(cls, value: Any) -> Any:
        return reference_text(value)


class LayersEntry(SourceEntry):
    """One entry of a slice's ``sources``: some layers of a source."""

    layer_range: tuple[int, int] = Field(description="The first layer taken, and the first one after them")

    @field_validator("layer_range", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        ends = list(value) if isinstance(value, list | tuple) else []
        if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
            raise ValueError("must be two whole numbers, [first, one after the last]")
        if not 0 <= ends[0] < ends[1] <= MAX_LAYERS:
            raise ValueError("must be [first, one after the last], counted from 0, with at least one layer between")
        return value


class Slice(_Strict):
    """One entry of ``slices``: layers that follow those of the slice before, merged from as many of each source."""

    sources: tuple[LayersEntry, ...] = Field(min_length=1, max_length=MAX_SOURCES, description="Layers of sources")
    base_model: str | None = Field(None, min_length=1, description="The base of these layers, instead of the recipe's")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of these layers")

    @field_validator("base_model", mode="before")
    @classmethod
    def _spelt_out(cls, value: Any) -> Any:
        return reference_text(value)


class ModuleEntry(_Strict):
    """What one part of a checkpoint (``text_decoder``, ``encoder``…) is merged from: ``models`` or ``slices``."""

    models: tuple[SourceEntry, ...] = Field((), max_length=MAX_SOURCES, description="What to merge, in order")
    slices: tuple[Slice, ...] = Field((), max_length=MAX_SLICES, description="Layers from here and there")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of this module")


class Output(_Strict):
    """What is written: a checkpoint in shards of at most ``max_shard_size``, or a LoRA adapter."""

    kind: Literal["checkpoint", "adapter"] = "checkpoint"
    max_shard_size: int | str = Field("5GB", description="Bytes, or a number with KB, MB, GB")
    rank: int | None = Field(None, ge=1, le=100_000, strict=True, description="Of an adapter; default: exact, or 64")
    min_retained_energy: float | None = Field(
        None, ge=0, le=1, description="The least share of each tensor's change that an adapter must hold"
    )
    other: Literal["refuse", "save", "drop"] = Field(
        "refuse", description="What an adapter does with changes that a LoRA cannot hold"
    )

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: int | str) -> int | str:
        if shard_bytes(value) < 1:
            raise ValueError("must be at least one byte")
        return value

    def settled(self, rank: int | None) -> dict[str, Any]:
        """The choices that matter for the kind, with the rank that was taken."""
        if self.kind == "checkpoint":
            return {"kind": self.kind, "max_shard_size": self.max_shard_size}
        found = {"kind": self.kind, "rank": rank, "min_retained_energy": self.min_retained_energy, "other": self.other}
        return {name: value for name, value in found.items() if value is not None}


class Document(_Strict):
    """One merge as it is written. Unknown keys are refused; what a later version will do is refused by name."""

    base_model: str | None = Field(None, min_length=1, description="The model the sources were fine-tuned from")
    merge_method: str = Field(description="How to merge; docs/recipes.md lists the methods")
    models: tuple[SourceEntry, ...] = Field((), max_length=MAX_SOURCES, description="What to merge, in order")
    slices: tuple[Slice, ...] = Field((), max_length=MAX_SLICES, description="Instead of models: layers by slices")
    modules: dict[str, ModuleEntry] = Field(default_factory=dict, description="Instead of models: part by part")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of the whole merge")
    dtype: OutDtype | None = Field(None, description="mergekit's name for out_dtype; arithmetic is float32 always")
    out_dtype: OutDtype | None = Field(None, description="Type of the files; default: each tensor's own")
    output: Output = Output()
    tokenizer: Tokenizer | None = Field(None, description="The vocabulary of the result; default: the base's, unread")
    tokenizer_source: str | None = Field(None, description="Short for `tokenizer: {source: …}`")
    chat_template: str | None = Field(None, description="auto, a known name, or a Jinja template")
    name: str | None = Field(None, description="A name for people, and for later documents of the same recipe")
    evaluation: Evaluation | None = Field(None, description="Tasks that the result is scored on")

    @field_validator("base_model", mode="before")
    @classmethod
    def _spelt_out(cls, value: Any) -> Any:
        return reference_text(value)

    @field_validator("models", "slices", "modules", mode="before")
    @classmethod
    def _given(cls, value: Any, info: ValidationInfo) -> Any:
        """mergekit takes null for what is not there."""
        return cls.model_fields[str(info.field_name)].get_default(call_default_factory=True) if value is None else value

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _plain_dtype(cls, value: Any) -> Any:
        return value.removeprefix("torch.") if isinstance(value, str) else value

    @property
    def file_dtype(self) -> str | None:
        """The safetensors dtype every floating tensor is cast to, or None to keep the base's."""
        wanted = self.out_dtype or self.dtype
        return DTYPES[wanted] if wanted else None

    @property
    def vocabulary(self) -> Tokenizer | None:
        """What the recipe says of the tokenizer, in whichever of the two ways; None: nothing."""
        return self.tokenizer or (Tokenizer(source=self.tokenizer_source) if self.tokenizer_source else None)

    @property
    def parts(self) -> Mapping[str, Part]:
        """The recipe part by part, each with its place in it (``modules.encoder``; empty for a recipe without)."""
        if self.modules:
            return {f"modules.{name}": module for name, module in self.modules.items()}
        return {"": self}

    def entries(self) -> Iterator[tuple[str, SourceEntry]]:
        """Every entry that names a source, with its place: ``models[0]``, ``slices[1].sources[0]``."""
        for where, part in self.parts.items():
            inside = f"{where}." if where else ""
            for index, entry in enumerate(part.models):
                yield f"{inside}models[{index}]", entry
            for number, item in enumerate(part.slices):
                for index, layers in enumerate(item.sources):
                    yield f"{inside}slices[{number}].sources[{index}]", layers

    def bases(self) -> Iterator[tuple[str, str]]:
        """Every full model that something is merged onto, with its place.

        The ``base_model`` of the document and those of slices, and what adapters of sources (``model+adapter``) sit on.
        """
        if self.base_model:
            yield "base_model", self.base_model
        for where, part in self.parts.items():
            inside = f"{where}." if where else ""
            for number, item in enumerate(part.slices):
                if item.base_model:
                    yield f"{inside}slices[{number}].base_model", item.base_model
        for where, entry in self.entries():
            if entry.model:
                yield f"{where}.model", split_adapter(entry.model)[0]

    def references(self) -> Iterator[str]:
        """Every text that names a model or an adapter."""
        bases = (text for _, text in self.bases())
        sources = (text for _, entry in self.entries() for text in (entry.model, entry.adapter))
        tokens = self.vocabulary.tokens.values() if self.vocabulary else ()
        lent = (setting.source.model for setting in tokens if setting.source)
        lends = self.vocabulary.source if self.vocabulary else None
        yield from (text for text in (*bases, *sources, lends, *lent) if text)

    def all_parameters(self) -> Iterator[Mapping[str, Any]]:
        """The parameters of every level."""
        yield self.parameters
        yield from (module.parameters for module in self.modules.values())
        for part in self.parts.values():
            yield from (item.parameters for item in part.slices)
        for _, entry in self.entries():
            yield entry.parameters


class Recipe(Document):
    """A whole recipe: the merge whose result is written, and the ``earlier`` ones whose results it takes.

    ``earlier`` stand in the order in which they can be merged: each after those that it names. ``number`` is a
    document's place among all of them as they were sent, None where it is alone.
    """

    earlier: tuple[Recipe, ...] = ()
    number: int | None = None

    @classmethod
    def of(cls, document: Document, number: int | None) -> Recipe:
        """A document by itself. What was left out of it stays left out."""
        values = {name: getattr(document, name) for name in Document.model_fields}
        return cls.model_construct(document.model_fields_set, **values, number=number)

    def place(self, where: str) -> str:
        """A place in this document as a place in the whole recipe."""
        if self.number is None:
            return where
        inside = f"documents[{self.number}]"
        return f"{inside}.{where}" if where else inside

    def as_sent(self) -> dict[str, Any]:
        """What the author wrote, and no defaults; JSON-ready."""
        documents = sorted((*self.earlier, self), key=lambda document: document.number or 0)
        sent = [
            document.model_dump(mode="json", exclude_unset=True, exclude={"earlier", "number"})
            for document in documents
        ]
        return sent[0] if self.number is None else {"documents": sent}


class Part(Protocol):
    """What a recipe and one of its modules have in common."""

    @property
    def models(self) -> tuple[SourceEntry, ...]: ...
    @property
    def slices(self) -> tuple[Slice, ...]: ...
    @property
    def parameters(self) -> dict[str, Any]: ...


def reference_text(value: Any) -> Any:
    """mergekit's mappings for a reference, ``{model: {path, revision}, lora: …}``, as the text that means the same.

    Raises ValueError on mappings that no text can say; what is no mapping is returned as it is.
    """
    if isinstance(value, str) and value.count("+") > MAX_ADAPTERS:
        raise ValueError(f"at most {MAX_ADAPTERS} adapters can be put on one model by +")
    if not isinstance(value, Mapping):
        return value
    known = {"model", "lora", "override_architecture"}
    if "model" not in value or not known.issuperset(value):
        raise ValueError("a reference is a text, or a mapping of `model` and `lora`")
    if value.get("override_architecture") is not None:
        raise ValueError("`override_architecture` is not supported; the model's own config decides")
    model, lora = _path_text(value["model"]), value.get("lora")
    return model if lora is None else f"{model}+{_path_text(lora)}"


def _path_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not {"path", "revision"}.issuperset(value):
        raise ValueError("a path is a text, or a mapping of `path` and `revision`")
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not (revision is None or isinstance(revision, str)):
        raise ValueError("`path` and `revision` are texts")
    if "+" in path or "@" in path:
        raise ValueError("a path with + or @ in it cannot be told from an adapter or a revision; rename the folder")
    return path if revision is None else f"{path}@{revision}"


def shard_bytes(size: int | str) -> int:
    """``5GB`` → 5·10⁹ (decimal, as transformers reads it), ``1GiB`` → 2³⁰. Raises ValueError on anything else."""
    if isinstance(size, int):
        return size
    match = SIZE.match(size)
    if not match:
        raise ValueError(f"{size[:40]!r} is not a size; write bytes, or a number with KB, MB or GB")
    number, unit, binary = match.groups()
    step = 1024 if binary else 1000
    return int(float(number) * step ** " KMGT".index(unit.upper() or " "))
