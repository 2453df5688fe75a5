"""What one run is asked to do, as a file that every participant reads, in whatever environment it lives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Job:
    """TIES at ``density`` with weights 1. All paths are absolute.

    ``adapters``, ``finetunes``: folders of the sources; a case has either. ``recipe``: the same as a mergekit YAML.
    ``out``: the folder to write, which is not there yet; ``scratch``: one for temporary files, empty.
    """

    base: str
    adapters: tuple[str, ...]
    finetunes: tuple[str, ...]
    density: float
    recipe: str
    out: str
    scratch: str

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2))


def read_job(path: str) -> Job:
    read = json.loads(Path(path).read_text())
    return Job(**read | {name: tuple(read[name]) for name in ("adapters", "finetunes")})
