"""``mergeyard`` as a user runs it: another process, its exit code, what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MERGEYARD = [sys.executable, "-m", "mergeyard.cli"]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def environment(**variables: str) -> dict[str, str]:
    """Ours without MERGEYARD_* and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MERGEYARD_")}
    return {**kept, "NO_COLOR": "1", "COLUMNS": "80", **variables}


def mergeyard(*arguments: str | Path, stdin: str = "", cwd: Path | None = None, **variables: str) -> Ran:
    done = subprocess.run(
        [*MERGEYARD, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**environment(**variables), "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)
