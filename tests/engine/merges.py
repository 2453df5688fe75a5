"""Whole merges of tiny models: files in, files out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from app.artifacts.manifest import Manifest
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.engine.rooms import room as kernels_of
from worker.engine.digests import DigestCache
from worker.engine.kernels import Room
from worker.engine.run import build_manifest, run_merge, write_manifest
from worker.engine.sinks import FolderSink


@dataclass
class Watch:
    """A Control that notes what it is told, and raises ``stop`` at the ``stop_at``-th check."""

    stop: BaseException | None = None
    stop_at: int = 1
    stages: list[str] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    checks: int = 0

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def progress(self, bytes_done: int, bytes_total: int) -> None:
        self.steps.append((bytes_done, bytes_total))

    def check(self) -> None:
        self.checks += 1
        if self.stop is not None and self.checks >= self.stop_at:
            raise self.stop


def plan_of(root: Path, recipe: Mapping[str, Any]) -> Plan:
    """``root`` is the only model root, so that a folder's name is its reference."""
    return make_plan(parse_recipe(recipe), Resolver(roots=[root]))


def merge(
    plan: Plan,
    out: Path,
    *,
    room: Room = "cpu",
    threads: int = 2,
    delta_budget: int = 1 << 20,
    control: Watch | None = None,
    cache: Path | None = None,
) -> Manifest:
    """As ``merge_to_folder``, with the choice of the kernels' room and a Control."""
    with FolderSink(out) as sink:
        output = run_merge(
            plan,
            sink,
            kernels=kernels_of(room),
            threads=threads,
            control=control or Watch(),
            digests=DigestCache(cache),
            delta_budget=delta_budget,
        )
        manifest = build_manifest(plan, output)
        write_manifest(manifest, sink)
        sink.publish()
    return manifest


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all weight files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
