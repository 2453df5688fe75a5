"""The parts of a checkpoint: stacks of layers, and the modules that a recipe's ``modules`` may name.

mergekit knows the modules of an architecture from a table, and infers those of all others; here both follow from the
tensors' names, under every name that mergekit has for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from app.recipe.values import layer_name

DEFAULT = "default"  # the module of a checkpoint that has one stack of layers, and of what belongs to no stack
HEADS = frozenset({"lm_head", "proj_out", "embed_out"})
TOKEN_EMBEDDINGS = ("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
# mergekit's names for the parts of vision-language models, whatever the checkpoint calls them.
MERGEKIT_NAMES = {
    "language_model": "text_decoder",
    "text_model": "text_decoder",
    "model": "text_decoder",
    "visual": "vision_tower",
    "vision_model": "vision_tower",
    "connector": "multi_modal_projector",
}
PROJECTOR = re.compile(r"(?:^|\.)visual\.merger(?:\.|_)")
# What comes before the first layer: embeddings, and the convolutions and norms that make them. The rest comes after.
BEFORE = re.compile(r"(?:^|\.)(?:\w*emb\w*|wte|wpe|conv\d|patch_conv|ln_pre|layernorm_pre|pre_layrnorm)(?:\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """One way to divide a checkpoint: the modules' ``names``, and which of them a tensor belongs to."""

    names: tuple[str, ...]
    of: Callable[[str], str]


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """The stacks of layers among these tensors, with the number of layers of each: ``{"model.layers": 32}``."""
    found: dict[str, int] = {}
    for name in names:
        place = layer_name(name)
        if place is not None:
            found[place.stack] = max(found.get(place.stack, 0), place.layer + 1)
    return found


def comes_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers feeds the first of them. Output heads called embeddings do not."""
    return bool(BEFORE.search(name)) and not any(part in HEADS for part in name.split("."))


def modules_of(names: Sequence[str]) -> list[Modules]:
    """Every way to divide a checkpoint with these tensors into modules, the one whose names it uses itself first."""
    stacks = list(stacks_of(names))
    if len(stacks) < 2:
        return [Modules(names=(DEFAULT,), of=lambda _name: DEFAULT)]
    own = _Own(stacks, names)
    return [
        Modules(names=tuple(dict.fromkeys(map(divide, names))), of=divide)
        for divide in (own, lambda name: _mergekit_name(own, name), lambda name: _inferred(stacks, name))
    ]


class _Own:
    """Modules as the checkpoint calls them: the part of a name where its stacks' names part.

    An output head outside them belongs to the module of the token embeddings, which it is often tied to.
    """

    def __init__(self, stacks: Sequence[str], names: Sequence[str]) -> None:
        columns = zip(*(stack.split(".")[:-1] for stack in stacks), strict=False)
        self._shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        embeddings = (name for part in TOKEN_EMBEDDINGS for name in names if part in name.split("."))
        found = next(embeddings, None)
        self._of_heads = None if found is None else self._part(found)

    def __call__(self, name: str) -> str:
        part = self._part(name)
        return self._of_heads if part in HEADS and self._of_heads is not None else part

    def _part(self, name: str) -> str:
        parts, depth = name.split("."), len(self._shared)
        return parts[depth] if len(parts) > depth and parts[:depth] == self._shared else parts[0]


def _mergekit_name(own: Callable[[str], str], name: str) -> str:
    if PROJECTOR.search(name):
        return "multi_modal_projector"
    part = own(name)
    return MERGEKIT_NAMES.get(part, part)


def _inferred(stacks: Sequence[str], name: str) -> str:
    """As mergekit infers them for an architecture it does not know: each stack of layers, and all the rest."""
    place = layer_name(name)
    return place.stack if place is not None and place.stack in stacks else DEFAULT
