"""``mergeyard evaluate``: a model's scores on tasks, on this machine and without a service."""

# Each command imports what it alone needs:
# ruff: noqa: PLC0415

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeyard.command import LOCAL, ApiKey, AsJson, Submit, Url, guarded, print_json, read_settings

if TYPE_CHECKING:
    from app.planning.plan import PlannedTask
    from app.recipe.evaluation import TaskEntry
    from app.tasks.task import Metric, TaskScore
    from mergeyard.local import Here

DEVICES = ("auto", "cpu", "cuda")


@guarded
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder or a reference; of BASE+ADAPTER their merge.")
    ],
    tasks: Annotated[
        list[str],
        typer.Option(metavar="FILE[=METRIC]", help="A task file, and how it is judged [exact_match]; several times."),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="The first examples of each task alone.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=8192, help="The longest answer that is written.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
    submit: Submit = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
) -> None:
    """Score a model on task files (JSONL), here or on the service's workers. References may be plain paths; with
    --submit task files alone may, which are uploaded.
    """
    from mergeyard import display, local

    if device not in DEVICES:
        raise typer.BadParameter(f"{device!r} is none of {', '.join(DEVICES)}", param_hint="--device")
    given = {"limit": limit, "max_new_tokens": max_new_tokens}
    entries = [task_entry(text, default="exact_match", **given) for text in tasks]
    if submit:
        from mergeyard.client import Client
        from mergeyard.remote import evaluate_there

        sent = [entry.model_dump(exclude_none=True) for entry in entries]
        evaluate_there(Client(url, api_key, retries=6), model, sent, as_json=as_json)
        return
    place = local.here(Path.cwd(), read_settings())
    with _checkpoint(model, place, device) as folder:
        planned = _planned(entries, place, folder)
        with display.scoring() as on_progress:
            scores = [asdict(score) for score in score_folder(folder, planned, device, on_progress)]
    if as_json:
        print_json({"model": model, "scores": scores})
    else:
        display.show_scores(scores)


def score_folder(
    folder: Path, tasks: Sequence[PlannedTask], device: str, on_progress: Callable[[str, int, int], None]
) -> list[TaskScore]:
    """The scores of the checkpoint in ``folder``. ``on_progress``: the task, its prompts done, and those in all."""
    from worker.engine.kernels import load
    from worker.evaluation.loading import loaded
    from worker.evaluation.scoring import score

    room = load(device).name  # type: ignore[arg-type]  # refuses a device that is not there
    with loaded(folder, "cuda" if room == "cuda" else "cpu") as model:
        return [score(model, item.task, on_progress=partial(on_progress, item.task.name)) for item in tasks]


def task_entry(text: str, *, default: Metric, **given: Any) -> TaskEntry:
    """``FILE=METRIC``, or a file that is judged by the default.

    A file's name may have an = of its own: what follows the last one is a metric, or none.
    """
    from app.recipe.evaluation import TaskEntry
    from app.tasks.task import METRICS

    file, equals, metric = text.rpartition("=")
    if equals and metric in METRICS:
        return TaskEntry(file=file, metric=metric, **given)
    if equals and not Path(text).exists():
        raise typer.BadParameter(f"{metric!r} is no metric; there are {', '.join(METRICS)}", param_hint="--tasks")
    return TaskEntry(file=text, metric=default, **given)


def _planned(entries: Sequence[TaskEntry], place: Here, folder: Path) -> Sequence[PlannedTask]:
    from app.planning.tasks import read_tasks
    from app.sources.models import companions_of
    from app.sources.resolver import list_files
    from app.sources.tokenizers import chat_template_of

    template = chat_template_of(companions_of(list_files(folder)), "the model")
    return read_tasks(entries, place.resolver(), "--tasks", has_chat_template=template is not None)


@contextlib.contextmanager
def _checkpoint(model: str, place: Here, device: str) -> Iterator[Path]:
    """The model as a folder that transformers loads: links to its files, or the merge with what is on it."""
    from app.sources.accepted import is_accepted
    from mergeyard import display, local

    with tempfile.TemporaryDirectory(prefix="mergeyard-evaluate-") as scratch:
        folder = Path(scratch) / "model"
        base, plus, adapter = model.rpartition("+")
        if plus and base and adapter:
            _merge(base, adapter, folder, place, device)
        else:
            place.resolver().model(model)  # what is wrong with it is told by its name
            while (found := place.resolver().files(model)).remote:
                with display.downloading() as on_bytes:
                    local.fetch(
                        tuple(found.remote.values()), place, lambda done, total: on_bytes(done, total, "sources")
                    )
            folder.mkdir()
            for name, path in found.files.items():
                if is_accepted(name):
                    (folder / name).symlink_to(path)
        yield folder


def _merge(base: str, adapter: str, folder: Path, place: Here, device: str) -> None:
    from mergeyard import display, local
    from worker.engine.run import merge_to_folder

    recipe = {"base_model": base, "merge_method": "task_arithmetic", "models": [{"adapter": adapter}]}
    plan = local.plan_recipe(json.dumps(recipe), place)
    if plan.remote:
        with display.downloading() as on_bytes:
            plan = local.fetch_remote(plan, place, lambda done, total: on_bytes(done, total, "sources"))
    with display.merging("merging the adapter") as on_progress:
        merge_to_folder(plan, folder, device=device, on_progress=on_progress)  # type: ignore[arg-type]
