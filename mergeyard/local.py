"""``mergeyard plan``, ``merge`` and ``extract``: a recipe on this machine, with no service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from app.artifacts.manifest import Manifest
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.settings import Settings
from app.sources.resolver import Resolver


def plan_recipe(text: str, folder: Path, settings: Settings) -> Plan:
    """Plan a recipe whose references may also be plain paths, absolute or relative to ``folder``.

    Raises MergeyardError with every problem.
    """
    uploads = settings.uploads if settings.uploads.is_dir() else None
    resolver = Resolver(roots=settings.roots, uploads=uploads, local=folder)
    return make_plan(parse_recipe(text), resolver)


def extraction(base: str, finetuned: str, *, rank: int | None, min_retained_energy: float | None, other: str) -> str:
    """The recipe of an adapter that makes ``finetuned`` of ``base``: its task vector, and nothing else."""
    wanted = {"kind": "adapter", "rank": rank, "min_retained_energy": min_retained_energy, "other": other}
    recipe = {
        "base_model": base,
        "merge_method": "task_arithmetic",
        "models": [{"model": finetuned}],
        "output": {name: value for name, value in wanted.items() if value is not None},
    }
    return json.dumps(recipe)


def merge_plan(
    plan: Plan,
    out: Path,
    settings: Settings,
    *,
    device: Literal["auto", "cpu", "cuda"],
    threads: int,
    on_progress: Callable[[int, int], None],
) -> Manifest:
    """Run a plan into the folder ``out``. Raises MergeyardError.

    Where there is a data folder, sources that were hashed before are not hashed again, as by a worker.
    """
    from worker.engine.digests import DigestCache  # noqa: PLC0415 (as below)
    from worker.engine.run import merge_to_folder  # noqa: PLC0415 (torch: seconds, and no part of planning)

    digests = DigestCache(settings.digests if settings.root.is_dir() else None)
    return merge_to_folder(plan, out, device=device, threads=threads, on_progress=on_progress, digests=digests)
