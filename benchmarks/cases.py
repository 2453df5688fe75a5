"""What is merged: the cases of the speed benchmark, their files and their recipes (TIES, density 0.2, weights 1)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.job import Job
from benchmarks.synthetic import write_base, write_case

DENSITY = 0.2
FLOOR = ("cp", "products", "products-reused")
ADAPTER_PEERS = ("mergekit", "peft-ties", "peft-ties-svd", "article")


@dataclass(frozen=True)
class Model:
    """A base model: the folder below the benchmark's that holds it and its sources, and what writes it there."""

    name: str
    title: str
    write: Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """``participants`` in the order in which each round runs them."""

    name: str
    title: str
    model: Model
    adapters: int = 0
    finetunes: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    participants: tuple[str, ...]

    def prepare(self, folder: Path) -> None:
        """Write what is missing of the model and its sources below ``folder``."""
        write_case(folder / self.model.name, self.model.write, adapters=self.adapters, finetunes=self.finetunes)

    def job(self, folder: Path, run: Path) -> Job:
        """The job of one run, whose own folder is ``run``; the recipe is written there."""
        root = (folder / self.model.name).resolve()
        base = str(root / "base")
        adapters = tuple(str(root / f"adapter-{number}") for number in range(1, self.adapters + 1))
        finetunes = tuple(str(root / f"finetune-{number}") for number in range(1, self.finetunes + 1))
        sources = [f"{base}+{adapter}" for adapter in adapters] + list(finetunes)
        recipe = {
            "base_model": base,
            "merge_method": "ties",
            "models": [{"model": source, "parameters": {"weight": 1.0, "density": DENSITY}} for source in sources],
            "dtype": "bfloat16",
        }
        if self.parameters:
            recipe["parameters"] = dict(self.parameters)
        path = run / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return Job(
            base=base,
            adapters=adapters,
            finetunes=finetunes,
            density=DENSITY,
            recipe=str(path),
            out=str(run / "out"),
            scratch=str(run / "scratch"),
        )


def all_cases() -> tuple[Case, ...]:
    """In the order of the table."""
    small = Model("smollm2-135m", "SmolLM2-135M-Instruct (135 M, real), synthetic adapters", write_smollm2)
    large = Model("llama-1b", "Llama shape, 1.04 B, synthetic", write_base)
    everybody = (*FLOOR, "ours", "ours-known", *ADAPTER_PEERS)
    return (
        Case(
            name="smollm2-4",
            title="135 M real, four adapters",
            model=small,
            adapters=4,
            participants=everybody,
        ),
        *(
            Case(
                name=f"smollm2-{count}",
                title=f"135 M real, {count} adapter{'s' if count > 1 else ''}",
                model=small,
                adapters=count,
                participants=("ours",),
            )
            for count in (1, 16, 64)
        ),
        *(
            Case(
                name=f"llama-1b-{count}",
                title=f"1.04 B, {count} adapters",
                model=large,
                adapters=count,
                participants=(*FLOOR, "ours", *(("ours-known", "ours-unhashed") if count == 4 else ()), *ADAPTER_PEERS),
            )
            for count in (2, 4, 8, 16)
        ),
        Case(
            name="llama-1b-4-model",
            title="1.04 B, 4 adapters, `trim_scope: model`",
            model=large,
            adapters=4,
            parameters={"trim_scope": "model"},
            participants=("ours",),
        ),
        Case(
            name="llama-1b-full-4",
            title="1.04 B, four full fine-tunes",
            model=large,
            finetunes=4,
            participants=("cp", "ours", "ours-known", "mergekit"),
        ),
    )


def write_smollm2(folder: Path) -> None:
    """The demo's base model, which `examples` takes from the package index."""
    from rich.console import Console  # noqa: PLC0415 (only where the model is not there yet)

    from examples.base_model import base_model  # noqa: PLC0415

    shutil.copytree(base_model(Console(stderr=True)), folder, dirs_exist_ok=True)
