"""What a checkpoint's tensors are called once transformers has loaded them, and so by an adapter trained on them.

An adapter names the modules of the loaded model. A checkpoint may have other names: without the outer module
(``encoder…`` for ``bert.encoder…``), with those of an earlier transformers, or with every expert by itself where the
loaded model has them in one parameter. Whatever is mapped here is mapped one to one.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.errors import MergeyardError
from app.sources.source import ModelSource, TensorSpec

SHOWN = 5

# What transformers renames on load, by family; only a family that makes every name of an adapter match is taken.
Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


RENAMED_ON_LOAD: Mapping[str, Rules] = {
    "as stored": (),
    "Mixtral": _rules((r"\.block_sparse_moe\.", ".mlp.")),
    "Phi-MoE": _rules((r"\.block_sparse_moe\.gate\.", ".mlp.router."), (r"\.block_sparse_moe\.", ".mlp.")),
    "LLaVA": _rules(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector|image_newline)(?=\.|$)", r"model.\1"),
    ),
    "Qwen2-VL": _rules(
        (r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model.")
    ),
    "ViT": _rules(
        (r"encoder\.layer\.", "layers."),
        (r"attention\.attention\.(query|key|value)\.", r"attention.\1."),
        (r"attention\.query\.", "attention.q_proj."),
        (r"attention\.key\.", "attention.k_proj."),
        (r"attention\.value\.", "attention.v_proj."),
        (r"attention\.output\.dense\.", "attention.o_proj."),
        (r"intermediate\.dense\.", "mlp.fc1."),
        (r"output\.dense\.", "mlp.fc2."),
    ),
    "BERT of TensorFlow": _rules((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
}
# One expert's weights as checkpoints have them, and the parameter of all experts that holds them one after the other.
EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<name>\w+)\.weight$")
FUSED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows ``first_row`` on of one expert's matrix, as the checkpoint's tensor ``name``."""

    name: str
    expert: int
    first_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A tensor of the loaded model: one of the checkpoint's, or put together from ``parts``, those of its experts."""

    name: str  # in the checkpoint; of the loaded model, where it has parts
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """One reading of an adapter's names: ``removed`` taken from their front, ``added`` put there, then looked up."""

    loaded: Mapping[str, Whole]
    removed: str = ""
    added: str = ""

    def find(self, name: str) -> Whole | None:
        """What the base holds under an adapter's ``name``."""
        if not name.startswith(self.removed):
            return None
        return self.loaded.get(self.added + name.removeprefix(self.removed))


def name_in(base: ModelSource, wanted: Sequence[tuple[str, ...]], who: str) -> Naming:
    """How the names of an adapter are read so that the base has all of them.

    Args:
        wanted: of each thing the adapter changes, the names it may have, of which one must be found
            (``target_parameters`` do not say which of a module's parameters was meant).
        who: the adapter's reference, for messages.

    Raises:
        MergeyardError: `adapter_mismatch` with both lists, where a name matches nothing; `adapter_ambiguous` where
            there are two ways and they differ.
    """
    as_stored = Naming(loaded=as_loaded(base.tensors, ()))
    unmatched = _unmatched(as_stored, wanted)
    if not unmatched:
        return as_stored
    found: dict[tuple[object, ...], Naming] = {}
    for rules in RENAMED_ON_LOAD.values():
        renames = any(_renamed(name, rules) != name for name in base.tensors)
        if renames or not rules:
            for naming in _with_prefixes(as_loaded(base.tensors, rules), wanted):
                missing = _unmatched(naming, wanted)
                if not missing:
                    found.setdefault(_reading(naming, wanted), naming)
                elif len(missing) < len(unmatched):
                    unmatched = missing
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        first, second = list(found.values())[:2]
        name = next(names[0] for names in wanted if _reading(first, [names]) != _reading(second, [names]))
        message = f"{who} fits the base in more than one way ({name} does); name its keys as the base's are."
        raise MergeyardError("adapter_ambiguous", message)
    message = (
        f"{who} changes {some(unmatched)}, which the base does not have; "
        f"the base has {some([name for name in base.tensors if name.endswith('weight')])}. "
        "Is it an adapter for another model?"
    )
    raise MergeyardError("adapter_mismatch", message)


def _unmatched(naming: Naming, wanted: Sequence[tuple[str, ...]]) -> list[str]:
    return [names[0] for names in wanted if all(naming.find(name) is None for name in names)]


def _reading(naming: Naming, wanted: Sequence[tuple[str, ...]]) -> tuple[object, ...]:
    """The checkpoint's tensors that are meant: two ways that mean the same are one."""
    found = (naming.find(name) for names in wanted for name in names)
    return tuple(None if whole is None else whole.parts or whole.name for whole in found)


def _with_prefixes(loaded: Mapping[str, Whole], wanted: Sequence[tuple[str, ...]]) -> Iterator[Naming]:
    """As they are, and by modules added before, or taken from the front of, all of an adapter's names.

    GPT-2 as published says ``h.0``, an adapter ``transformer.h.0``.
    """
    yield Naming(loaded=loaded)
    if not wanted:
        return
    paths = [name.split(".")[:-1] for names in wanted for name in names]
    shared = list(itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False)))
    for depth in range(1, len(shared) + 1):
        yield Naming(loaded=loaded, removed=".".join(paths[0][:depth]) + ".")
    first = wanted[0]
    outer = {name.removesuffix(ending) for name in loaded for ending in first if name.endswith(f".{ending}")}
    for prefix in sorted(outer):
        yield Naming(loaded=loaded, added=prefix)


def as_loaded(tensors: Mapping[str, TensorSpec], rules: Rules) -> dict[str, Whole]:
    """Every tensor under its loaded name, and experts both one by one and as the parameter that holds all of them.

    A rule that would give two tensors one name gives none of them that name.
    """
    names: dict[str, Whole] = {}
    twice = set()
    renamed = {name: _renamed(name, rules) for name in tensors}
    for name, spec in tensors.items():
        loaded = renamed[name]
        if loaded in names:
            twice.add(loaded)
        names[loaded] = Whole(name=name, shape=spec.shape)
    for loaded in twice:
        del names[loaded]
    for whole in _fused(tensors, renamed):
        names.setdefault(whole.name, whole)
    return names


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _fused(tensors: Mapping[str, TensorSpec], renamed: Mapping[str, str]) -> Iterable[Whole]:
    """What transformers stacks on load: (experts, rows of the parts one after the other, columns)."""
    experts: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, loaded in renamed.items():
        if match := EXPERT.match(loaded):
            experts[match["experts"]][int(match["number"])][match["name"]] = name
    for module, by_number in experts.items():
        count = len(by_number)
        if set(by_number) != set(range(count)):
            continue
        for parameter, choices in FUSED.items():
            for pieces in choices:
                if not all(piece in by_number[number] for number in range(count) for piece in pieces):
                    continue
                shapes = [tensors[by_number[0][piece]].shape for piece in pieces]
                same = all(
                    tensors[by_number[number][piece]].shape == shape
                    for number in range(count)
                    for piece, shape in zip(pieces, shapes, strict=True)
                )
                if same and all(len(shape) == 2 and shape[1] == shapes[0][1] for shape in shapes):
                    yield _stack(f"{module}.{parameter}", by_number, pieces, shapes)


def _stack(
    name: str, by_number: Mapping[int, Mapping[str, str]], pieces: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> Whole:
    parts = []
    for number in range(len(by_number)):
        row = 0
        for piece, shape in zip(pieces, shapes, strict=True):
            parts.append(Part(name=by_number[number][piece], expert=number, first_row=row))
            row += shape[0]
    rows = sum(shape[0] for shape in shapes)
    return Whole(name=name, shape=(len(by_number), rows, shapes[0][1]), parts=tuple(parts))


def some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
