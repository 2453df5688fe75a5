"""The conformance cases and their figures on disk.

A case is a recipe in ``recipes/both``, or in a folder of one architecture's own, and belongs to each architecture it is
tried on; below ``recipes/differing`` are those whose numbers are not ours, on purpose. Its figures, every tensor of
mergekit's result, lie end to end in float32 under the case's name in ``figures/ARCHITECTURE.safetensors``; names and
shapes, and the tokens where the case merges tokenizers, in the JSON file beside it. A merged vocabulary is kept in the
order of its tokens' names, since mergekit's ids of new tokens follow the order of a hash table and differ from run to
run. Needs numpy alone: mergekit's environment writes what the tests read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.conformance.models import ARCHITECTURES, Architecture, Tensors, drawn, write_tensors

HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
FIGURES = HERE / "figures"
VOCABULARY_MODULES = ("embed_tokens", "wte", "lm_head")


@dataclass(frozen=True, slots=True)
class Case:
    """One recipe on one architecture. ``differs``: our result is another, on purpose."""

    name: str
    architecture: Architecture
    path: Path
    differs: bool = False

    def __str__(self) -> str:
        return f"{self.architecture}-{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A merge's ``tensors`` by name, and its ``tokens`` where it merged tokenizers (see ``by_token``)."""

    tensors: Tensors
    tokens: tuple[str, ...] | None = None


def cases() -> list[Case]:
    """Every case, by architecture."""
    return [
        Case(path.stem, architecture, path, differs)
        for architecture in ARCHITECTURES
        for folder, differs in ((RECIPES, False), (RECIPES / "differing", True))
        for path in sorted([*(folder / "both").glob("*.yaml"), *(folder / architecture).glob("*.yaml")])
    ]


def by_token(tensors: Tensors, vocabulary: Mapping[str, int]) -> Figures:
    """The figures of a merged vocabulary (token → id): embedding rows by the tokens' names, padding after them."""
    tokens = tuple(sorted(vocabulary))
    padded = {len(tensors[name]) for name in tensors if name.rpartition(".")[0].endswith(VOCABULARY_MODULES)}
    (size,) = padded
    order = [*(vocabulary[token] for token in tokens), *range(len(tokens), size)]
    return Figures(
        tensors={
            name: values[order] if name.rpartition(".")[0].endswith(VOCABULARY_MODULES) else values
            for name, values in tensors.items()
        },
        tokens=tokens,
    )


def uniform(tensor: str, source: str, count: int) -> npt.NDArray[np.float64]:
    """What decides which values a random method keeps, on both sides: those below the probability of being kept."""
    return (drawn(f"mask/{tensor}/{source}", count) >> 11) * 2.0**-53


def write_figures(architecture: Architecture, made: Mapping[str, Figures], folder: Path = FIGURES) -> None:
    """Both files of one architecture. Shapes that several cases share are written once."""
    layouts: dict[str, str] = {}
    entries: dict[str, Any] = {}
    flat: Tensors = {}
    for case, figures in sorted(made.items()):
        flat[case] = np.concatenate([values.reshape(-1) for _, values in sorted(figures.tensors.items())])
        shapes = json.dumps({name: list(values.shape) for name, values in sorted(figures.tensors.items())})
        entries[case] = {"layout": layouts.setdefault(shapes, f"{len(layouts)}")}
        if figures.tokens is not None:
            entries[case]["tokens"] = figures.tokens
    write_tensors(folder / f"{architecture}.safetensors", flat)
    by_key = ",\n".join(f'  "{key}": {shapes}' for shapes, key in layouts.items())
    by_case = ",\n".join(f"  {json.dumps(case)}: {json.dumps(entry)}" for case, entry in entries.items())
    text = f'{{\n "layouts": {{\n{by_key}\n }},\n "cases": {{\n{by_case}\n }}\n}}\n'
    (folder / f"{architecture}.json").write_text(text)


def read_figures(architecture: Architecture, folder: Path = FIGURES) -> dict[str, Figures]:
    """Every case's figures, by its name."""
    index = json.loads((folder / f"{architecture}.json").read_text())
    raw = (folder / f"{architecture}.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    return {
        case: Figures(
            tensors=_unfold(
                np.frombuffer(data[slice(*header[case]["data_offsets"])], "<f4"), index["layouts"][entry["layout"]]
            ),
            tokens=tuple(entry["tokens"]) if "tokens" in entry else None,
        )
        for case, entry in index["cases"].items()
    }


def _unfold(flat: npt.NDArray[np.float32], shapes: Mapping[str, list[int]]) -> Tensors:
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(flat, ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
