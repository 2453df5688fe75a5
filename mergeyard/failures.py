"""Whatever went wrong, in one form: what the commands print, and whose fault it is."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from mergeyard.errors import ApiError
from mergeyard.processes import StartError


@dataclass(frozen=True, kw_only=True)
class Failure:
    """``fault`` is ``user`` where another request would help; it decides the exit code."""

    code: str
    detail: str
    fault: str
    problems: Sequence[Mapping[str, object]] = ()
    request_id: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(error: Exception) -> Failure:
    """Any exception as a Failure. What is not known becomes ``internal``, with its type and text but no trace."""
    if isinstance(error, ApiError):
        return Failure(
            code=error.code,
            detail=error.detail,
            fault=error.fault,
            problems=error.problems,
            request_id=error.request_id,
        )
    # Only what has loaded the service's code can raise its errors; the client alone must not import it.
    errors = sys.modules.get("app.errors")
    if errors is not None and isinstance(error, errors.MergeyardError):
        problems = [problem.as_json() for problem in error.problems]
        return Failure(code=error.code, detail=error.message, fault=error.fault, problems=problems)
    return _of_this_machine(error)


def _of_this_machine(error: Exception) -> Failure:
    code, detail, fault = "internal", f"{type(error).__name__}: {error}. MERGEYARD_DEBUG=1 shows where.", "system"
    if isinstance(error, StartError):
        code, detail, fault = "cannot_start", str(error), "user"
    elif isinstance(error, UnicodeDecodeError):
        code, detail, fault = "file_unusable", "The recipe is not UTF-8 text.", "user"
    elif isinstance(error, ModuleNotFoundError):
        detail = f"This command needs more than the client: pip install 'mergeyard[worker]' ({error})."
        code, fault = "not_installed", "user"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        code, detail = "disk_full", "There is not enough disk space; free some and try again."
    elif isinstance(error, OSError) and error.filename:
        code, detail, fault = "file_unusable", f"{error.filename}: {error.strerror}", "user"
    return Failure(code=code, detail=detail, fault=fault)


def show(failure: Failure) -> None:
    """Print every problem with its place to standard error."""
    console = Console(stderr=True, soft_wrap=True, no_color=bool(os.environ.get("NO_COLOR")))
    problems = failure.problems or [{"code": failure.code, "message": failure.detail, "where": ""}]
    if len(problems) > 1:
        console.print(Text(f"{len(problems)} problems:", style="bold"))
    for problem in problems:
        line = Text()
        line.append(f"{problem['code']}", style="bold red")
        if problem["where"]:
            line.append(f" at {problem['where']}", style="bold")
        line.append(f": {problem['message']}")
        console.print(line)
    if failure.fault == "system" and failure.request_id:
        console.print(Text(f"request {failure.request_id}", style="dim"))
