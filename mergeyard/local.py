"""``mergeyard plan``, ``merge`` and ``extract``: a recipe on this machine, with no service."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from app.artifacts.manifest import Manifest
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.settings import Settings
from app.sources.buckets import Buckets
from app.sources.hub.hub import Hub, HubSettings
from app.sources.resolver import Resolver
from app.sources.source import RemoteFile


@dataclass(frozen=True, kw_only=True)
class Here:
    """This machine: its settings, the ``folder`` that plain paths are relative to, the hub and buckets, all of them."""

    settings: Settings
    folder: Path
    hub: Hub
    buckets: Buckets

    def resolver(self) -> Resolver:
        uploads = self.settings.uploads if self.settings.uploads.is_dir() else None
        return Resolver(
            roots=self.settings.roots, uploads=uploads, local=self.folder, hub=self.hub, buckets=self.buckets
        )


def here(folder: Path, settings: Settings) -> Here:
    """Whoever runs a local command may fetch what they like, with the token that they have.

    Without a data folder it is kept in the user's cache.
    """
    given = HubSettings.of(settings)
    kept = settings.hub_cache is not None or settings.root.is_dir()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = replace(
        given,
        repositories=given.repositories or ("*",),
        token=given.token or _own_token(settings),
        cache=given.cache if kept else caches / "mergeyard" / "hub",
    )
    own = settings.model_copy(update={"hub_cache": hub.cache})
    return Here(settings=settings, folder=folder, hub=Hub(hub), buckets=Buckets(own, None))


def plan_recipe(text: str, here: Here) -> Plan:
    """Plan a recipe whose references may also be plain paths. Raises MergeyardError with every problem."""
    return make_plan(parse_recipe(text), here.resolver())


def fetch_remote(plan: Plan, here: Here, on_progress: Callable[[int, int], None]) -> Plan:
    """The same plan with everything on this machine. Raises MergeyardError as ``Transfer.run`` does."""
    while plan.remote:
        fetch(plan.remote, here, on_progress)
        plan = make_plan(parse_recipe(plan.recipe), here.resolver())  # its revisions are commits
    return plan


def fetch(remote: Sequence[RemoteFile], here: Here, on_progress: Callable[[int, int], None]) -> None:
    """Bring those here that are where the first one is. Raises MergeyardError as ``Transfer.run`` does."""
    first = remote[0]
    wanted = [file for file in remote if (file.origin, file.repository) == (first.origin, first.repository)]
    (here.hub if first.origin == "hub" else here.buckets).transfer(wanted).run(on_progress)


def _own_token(settings: Settings) -> str:
    """What the hub's own tools use (HF_TOKEN, `hf auth login`); it is for nobody but their hub."""
    if settings.hub_endpoint != Settings.model_fields["hub_endpoint"].default:
        return ""
    from huggingface_hub import get_token  # noqa: PLC0415

    return get_token() or ""


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
    from worker.evaluation.evaluate import evaluator  # noqa: PLC0415 (as below)

    digests = DigestCache(settings.digests if settings.root.is_dir() else None)
    return merge_to_folder(
        plan,
        out,
        device=device,
        threads=threads,
        on_progress=on_progress,
        digests=digests,
        evaluate=partial(evaluator, plan) if plan.tasks else None,
    )
