"""Whole merges of models that hold one tensor: values in, values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from app.artifacts.manifest import TensorStatistics
from tests.engine.merges import merge, plan_of, tensors_of
from tests.files import write_model
from worker.engine.kernels import Room

Values = torch.Tensor | Sequence[float] | Sequence[Sequence[float]]


def merged(
    root: Path,
    method: str,
    sources: Sequence[Values],
    *,
    base: Values | None = None,
    own: Sequence[Mapping[str, Any]] | None = None,
    named_base: bool = True,
    room: Room = "cpu",
    threads: int = 2,
    delta_budget: int = 1 << 20,
    **parameters: Any,
) -> tuple[torch.Tensor, TensorStatistics]:
    """``sources`` are full models (float32), ``base`` is zeros where none is given; ``own``: each source's parameters.

    Without ``named_base`` the recipe names no base model.
    """
    tensors = [torch.as_tensor(values, dtype=torch.float32) for values in sources]
    start = torch.zeros_like(tensors[0]) if base is None else torch.as_tensor(base, dtype=torch.float32)
    write_model(root / "base", {"w": start})
    models = []
    for index, values in enumerate(tensors):
        write_model(root / f"x{index}", {"w": values})
        models.append({"model": f"x{index}", "parameters": dict(own[index]) if own else {}})
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    if named_base:
        recipe["base_model"] = "base"
    out = root / f"out-{len(list(root.iterdir()))}"
    manifest = merge(plan_of(root, recipe), out, room=room, threads=threads, delta_budget=delta_budget)
    return tensors_of(out)["w"], manifest.statistics["w"]
