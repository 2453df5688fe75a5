"""What every command does alike: settings, JSON for machines, failures as sentences with an exit code."""

# Each command imports what it alone needs:
# ruff: noqa: PLC0415

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from app.settings import Settings

FAILED, WRONG = 1, 2

P = ParamSpec("P")

LOCAL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="MERGEYARD_URL", help="The service.")]
ApiKey = Annotated[str, typer.Option("--api-key", envvar="MERGEYARD_API_KEY", help="Its key, where it wants one.")]
Submit = Annotated[bool, typer.Option("--submit", help="On the service's workers; references are the service's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, for machines.")]


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn every failure into a sentence and an exit code; never a trace, unless MERGEYARD_DEBUG is set."""

    @functools.wraps(command)
    def guard(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if os.environ.get("MERGEYARD_DEBUG"):
                raise
            fail(error, as_json=bool(kwargs.get("as_json")))

    return guard


def read_settings(**given: object) -> Settings:
    """The MERGEYARD_* variables, and above them the options that were given."""
    from pydantic import ValidationError

    from app.settings import Settings

    try:
        # Through the environment, so that the processes `up` starts see the same.
        for name, value in given.items():
            if value is not None:
                os.environ[f"MERGEYARD_{name.upper()}"] = str(value)
        return Settings()
    except ValidationError as error:
        found = error.errors()[0]
        raise typer.BadParameter(f"MERGEYARD_{str(found['loc'][0]).upper()}: {found['msg']}") from None


def print_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fail(error: Exception, *, as_json: bool, code: int | None = None) -> NoReturn:
    """Say what went wrong and leave with ``code``, or with what the kind of failure means."""
    from mergeyard import failures

    if isinstance(error, typer.BadParameter):
        raise error
    failure = failures.describe(error)
    if as_json:
        print_json({"error": failure.as_json()})
    else:
        failures.show(failure)
    raise typer.Exit(code if code is not None else WRONG if failure.fault == "user" else FAILED)
