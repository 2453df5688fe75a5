"""The command line. Heavy things are imported inside the command that needs them: ``--help`` takes no time.

Exit codes: 0 done, 1 the merge failed (or the service did), 2 the request was wrong.
"""

# Each command imports what it alone needs, and Typer passes options by name:
# ruff: noqa: PLC0415

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeyard.command import FAILED, LOCAL, WRONG, ApiKey, AsJson, Url, fail, guarded, print_json, read_settings
from mergeyard.evaluate import evaluate
from mergeyard.keys import keys
from mergeyard.sweep import sweep

if TYPE_CHECKING:
    from mergeyard.answers import Merge
    from mergeyard.client import Client

cli = typer.Typer(
    name="mergeyard",
    help="Turns a library of LoRA adapters and fine-tuned checkpoints into one deployable model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cli.add_typer(keys)
cli.command()(evaluate)
cli.command()(sweep)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Other(StrEnum):
    refuse = "refuse"
    save = "save"
    drop = "drop"


Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, YAML or JSON; - reads standard input.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist yet.")]
OnDevice = Annotated[Device, typer.Option("--device", help="Where to calculate; auto: on a GPU where there is one.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="0: every core.")]
MergeId = Annotated[str, typer.Argument(metavar="ID", help="The merge's id.")]

STDIN = "-"


def main() -> None:
    """The program ``mergeyard``."""
    cli()


# ── on this machine ─────────────────────────────────────────────────────────────────────────────


@cli.command()
@guarded
def merge(
    recipe: Recipe,
    out: Out,
    device: OnDevice = Device.auto,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Merge on this machine, without a service. References may be plain paths."""
    _merge(_read(recipe), _folder(recipe), out, device, threads, as_json=as_json)


@cli.command()
@guarded
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before: a folder or a reference.")],
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="What became of it.")],
    out: Out,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the adapter. vLLM takes 1, 8, 16, 32, 64, 128, 256. [default: 64]")
    ] = None,
    min_retained_energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail where a tensor keeps a smaller share of its change.")
    ] = None,
    other: Annotated[
        Other, typer.Option(help="Changed norms, biases and embeddings: refuse, save whole (no vLLM), or drop.")
    ] = Other.refuse,
    device: OnDevice = Device.auto,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Write what a full fine-tune changed as a LoRA adapter for its base."""
    from mergeyard import local

    recipe = local.extraction(base, finetuned, rank=rank, min_retained_energy=min_retained_energy, other=other.value)
    _merge(recipe, Path.cwd(), out, device, threads, as_json=as_json)


@cli.command()
@guarded
def plan(recipe: Recipe, as_json: AsJson = False) -> None:
    """Say what a merge would do, or everything that is wrong with the recipe. Reads headers, no weights."""
    from app.api.schemas import MergePlan
    from mergeyard import display, local

    here = local.here(_folder(recipe), read_settings())
    document = MergePlan.of(local.plan_recipe(_read(recipe), here)).model_dump(mode="json")
    if as_json:
        print_json(document)
    else:
        display.show_plan(document)


@cli.command()
@guarded
def up(
    host: Annotated[
        str | None, typer.Option(help="Other than loopback needs keys. [default: 127.0.0.1]", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 takes a free one. [default: 8000]", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Everything is kept here. [default: mergeyard-data]", show_default=False)
    ] = None,
) -> None:
    """Run the whole service on this machine: SQLite, an embedded Valkey, a worker (or one for each GPU), the API."""
    from mergeyard.up import run_up

    raise typer.Exit(run_up(read_settings(host=host, port=port, data_dir=data_dir)))


@cli.command()
@guarded
def api(
    fd: Annotated[int | None, typer.Option(hidden=True, help="An open socket to serve on; used by `up`.")] = None,
) -> None:
    """Run the HTTP service alone. Settings are MERGEYARD_* variables."""
    from mergeyard.serve import serve

    serve(read_settings(), fd)


@cli.command()
@guarded
def worker() -> None:
    """Run one worker. Settings are MERGEYARD_* variables."""
    from worker.celery import run_worker

    run_worker(read_settings())


@cli.command()
@guarded
def migrate() -> None:
    """Bring the database to this version's schema. Safe to run at any time, by any number of processes."""
    from app.records.database import Database

    database = Database(read_settings().database)
    database.migrate()
    database.close()


# ── through the service ─────────────────────────────────────────────────────────────────────────


@cli.command()
@guarded
def submit(
    recipe: Recipe,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has finished.")] = False,
    download: Annotated[
        Path | None, typer.Option("--download", metavar="DIR", help="Wait, then fetch and verify the files.")
    ] = None,
    queue: Annotated[str, typer.Option(help="Which workers may take it.")] = "default",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Above 0 goes first, below 0 last.")] = 0,
    label: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="May be given several times.")] = None,
    expires_in: Annotated[
        int | None, typer.Option(metavar="SECONDS", min=1, help="Delete it that long after its success.")
    ] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep it until somebody deletes it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Merge again even where there is an equal result.")] = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
) -> None:
    """Submit a recipe to the service."""
    from mergeyard import display

    labels = dict(_label(text) for text in label or [])
    with _client(url, api_key, patient=wait or download is not None) as client:
        merge = client.submit(
            _read(recipe),
            queue=queue,
            priority=priority,
            labels=labels,
            expires_in=expires_in,
            pinned=pinned,
            force=force,
        )
        display.show_submitted(merge)
        if wait or download is not None:
            merge = _wait(client, merge)
        if download is not None and merge["status"] == "succeeded":
            _download(client, merge["id"], download)
    if as_json:
        print_json(merge)
    elif not wait and download is None:
        display.say(merge["id"])
    if merge["status"] in ("failed", "cancelled"):
        if not as_json:
            display.show_failure(merge)
        raise typer.Exit(FAILED)
    if not as_json and merge["status"] == "succeeded" and (wait or download is not None):
        display.show_succeeded(merge, download)


@cli.command("list")
@guarded
def list_merges(
    status: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    method: Annotated[str | None, typer.Option(help="Only merges of this method.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    cursor: Annotated[str | None, typer.Option(help="The `next_cursor` of the page before.")] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
) -> None:
    """List merges, newest first."""
    from mergeyard import display

    with _client(url, api_key) as client:
        page = client.page(status=status, method=method, limit=limit, cursor=cursor)
    if as_json:
        print_json(page)
    else:
        display.show_page(page)


@cli.command()
@guarded
def status(id: MergeId, as_json: AsJson = False, url: Url = LOCAL, api_key: ApiKey = "") -> None:
    """Show one merge."""
    from mergeyard import display

    with _client(url, api_key) as client:
        merge = client.get(id)
    if as_json:
        print_json(merge)
    else:
        display.show_merge(merge)


@cli.command()
@guarded
def events(
    id: MergeId,
    after: Annotated[int, typer.Option(min=0, help="Only events with a greater id.")] = 0,
    follow: Annotated[bool, typer.Option(help="Go on until the merge has finished.")] = True,
    as_json: AsJson = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
) -> None:
    """Show what happened to a merge, and follow it until it has finished. --json shows what there is, and ends."""
    from mergeyard import display

    with _client(url, api_key, patient=follow and not as_json) as client:
        if as_json:
            print_json(client.event_page(id, after=after, limit=1000))
            return
        try:
            page = None if follow else client.event_page(id, after=after, limit=1000)
            found = client.events(id, after=after) if page is None else page["items"]
            for event in found:
                display.show_event(event)
        except KeyboardInterrupt:
            display.note(f"The merge goes on; `mergeyard events {id}` shows the rest.")
            raise typer.Exit(130) from None


@cli.command()
@guarded
def cancel(id: MergeId, as_json: AsJson = False, url: Url = LOCAL, api_key: ApiKey = "") -> None:
    """Ask a merge to stop. A running one stops within a tile's time."""
    from mergeyard import display

    with _client(url, api_key) as client:
        merge = client.cancel(id)
    if as_json:
        print_json(merge)
    else:
        display.say(f"{merge['id']} is {merge['status']}")


@cli.command()
@guarded
def download(
    id: MergeId,
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="[default: ./ID]", show_default=False)] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    api_key: ApiKey = "",
) -> None:
    """Fetch a merge's files and verify each. Run it again after an interruption: it goes on where it stopped."""
    from mergeyard import display

    target = directory or Path(id)
    with _client(url, api_key, patient=True) as client:
        files = client.files(id)
        _download(client, id, target)
    if as_json:
        print_json({"directory": str(target), **files})
    else:
        display.say(f"{len(files['items'])} files, all verified, in {target}")


# ── what commands share ─────────────────────────────────────────────────────────────────────────


def _merge(recipe: str, folder: Path, out: Path, device: Device, threads: int, *, as_json: bool) -> None:
    """Merge here and say what was written; plain paths are relative to ``folder``."""
    from mergeyard import display, local

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the sink cleans up
    settings = read_settings()
    here = local.here(folder, settings)
    plan = local.plan_recipe(recipe, here)
    display.show_warnings([warning.as_json() for warning in plan.warnings])
    try:
        if plan.remote:
            with display.downloading() as on_bytes:
                plan = local.fetch_remote(plan, here, lambda done, total: on_bytes(done, total, "sources"))
        with display.merging(plan.method) as on_progress:
            manifest = local.merge_plan(
                plan, out, settings, device=device.value, threads=threads, on_progress=on_progress
            )
    except Exception as error:
        # What the recipe could have said is caught above: from here on it is the merge that failed.
        fail(error, as_json=as_json, code=WRONG if _code_of(error) in ("output_exists", "not_supported") else FAILED)
    if as_json:
        print_json({"out": str(out), **manifest.as_json()})
    else:
        display.show_merged(out, manifest)


def _read(recipe: str) -> str:
    return sys.stdin.read() if recipe == STDIN else Path(recipe).read_text(encoding="utf-8")


def _folder(recipe: str) -> Path:
    """What relative paths in the recipe are relative to."""
    return Path.cwd() if recipe == STDIN else Path(recipe).absolute().parent


def _client(url: str, api_key: str, *, patient: bool = False) -> Client:
    """``patient`` for what runs for long and should outlive a restart of the service; else somebody is looking."""
    from mergeyard.client import Client

    return Client(url, api_key, retries=6 if patient else 1)


def _wait(client: Client, merge: Merge) -> Merge:
    from mergeyard import display

    try:
        with display.watching(merge) as on_update:
            return client.wait(merge["id"], on_update)
    except KeyboardInterrupt:
        display.note(f"The merge goes on; `mergeyard status {merge['id']}` shows it, `mergeyard cancel` stops it.")
        raise typer.Exit(130) from None


def _download(client: Client, merge_id: str, directory: Path) -> None:
    from mergeyard import display

    try:
        with display.downloading() as on_progress:
            client.download(merge_id, directory, on_progress)
    except KeyboardInterrupt:
        display.note(f"What has arrived is kept; `mergeyard download {merge_id} {directory}` fetches the rest.")
        raise typer.Exit(130) from None


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--label")
    return name, value


def _code_of(error: Exception) -> str:
    return str(getattr(error, "code", ""))


if __name__ == "__main__":
    main()
