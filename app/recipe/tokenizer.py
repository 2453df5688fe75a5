"""The tokenizer of the result, as a recipe asks for it: mergekit's ``tokenizer`` section, and ``missing``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_PADDING = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenSource(_Strict):
    """Where a token's embedding comes from: the same token of ``model``, another token of it, or zeros.

    Written as a reference alone, it means ``{kind: model, model: REFERENCE}``.
    """

    kind: Literal["model", "model_token", "zero"]
    model: str | None = Field(None, description="A model that the recipe merges, or its base")
    token: str | None = Field(None, description="model_token: the token, by its text")
    token_id: int | None = Field(None, ge=0, strict=True, description="model_token: the token, by its id")

    @model_validator(mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        return {"kind": "model", "model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _complete(self) -> TokenSource:
        if (self.model is None) != (self.kind == "zero"):
            raise ValueError("`kind: zero` names no `model`, every other kind does")
        if (self.kind == "model_token") != ((self.token is None) != (self.token_id is None)):
            raise ValueError("`kind: model_token` names one of `token` and `token_id`, other kinds neither")
        return self


class TokenSetting(_Strict):
    """What models that lack a token take as its embedding; with ``force``, what all of them take."""

    source: TokenSource | None = None
    force: bool = Field(False, strict=True)

    @model_validator(mode="after")
    def _complete(self) -> TokenSetting:
        if self.force and self.source is None:
            raise ValueError("`force` needs a `source`")
        return self


class Tokenizer(_Strict):
    """The vocabulary of the result: ``base``, the ``union`` of all vocabularies, or that of a model.

    ``missing`` is what a model takes for a token that it lacks and several others have: the ``base`` model's embedding
    (if it has one), or the ``mean`` of all. The default is mergekit's: ``base`` if the recipe names a base model.
    """

    source: str = Field("union", min_length=1, description="base, union, or a model's reference")
    tokens: dict[str, TokenSetting] = Field(default_factory=dict, description="Single tokens' embeddings")
    pad_to_multiple_of: int | None = Field(None, ge=1, le=MAX_PADDING, strict=True)
    missing: Literal["base", "mean"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("tokens", ...) is None:
            return {**value, "tokens": {}}
        return value
