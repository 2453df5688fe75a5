"""The recipe as a frozen value. Its structure is checked here, its parameters against the method's own in ``parse``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from app.recipe.tokenizer import Tokenizer

SIZE = re.compile(r"^\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)
MAX_SOURCES = 256
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

    model: str | None = Field(None, description="A fine-tuned model, or base+adapter as in mergekit")
    adapter: str | None = Field(None, description="A PEFT adapter trained on the base model")
    parameters: dict[str, Any] = Field(default_factory=dict, description="This source's own parameters")


class Output(_Strict):
    """What is written: a checkpoint in shards of at most ``max_shard_size``."""

    kind: Literal["checkpoint", "adapter"] = "checkpoint"
    max_shard_size: int | str = Field("5GB", description="Bytes, or a number with KB, MB, GB")

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: int | str) -> int | str:
        if shard_bytes(value) < 1:
            raise ValueError("must be at least one byte")
        return value


class Recipe(_Strict):
    """A whole recipe. Unknown keys are refused; what a later version will do is refused by name."""

    base_model: str | None = Field(None, description="The model the sources were fine-tuned from")
    merge_method: str = Field(description="How to merge; docs/recipes.md lists the methods")
    models: tuple[SourceEntry, ...] = Field((), max_length=MAX_SOURCES, description="What to merge, in order")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of the whole merge")
    dtype: OutDtype | None = Field(None, description="mergekit's name for out_dtype; arithmetic is float32 always")
    out_dtype: OutDtype | None = Field(None, description="Type of the files; default: each tensor's own")
    output: Output = Output()
    tokenizer: Tokenizer | None = Field(None, description="The vocabulary of the result; default: the base's, unread")
    tokenizer_source: str | None = Field(None, description="Short for `tokenizer: {source: …}`")
    chat_template: str | None = Field(None, description="auto, a known name, or a Jinja template")
    name: str | None = Field(None, description="A name for people")

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
