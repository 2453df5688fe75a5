"""Programs that the tests talk to, each in an environment of its own, made by venv and pip once and kept in .cache."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"


def environment(name: str, requirements: Sequence[str], *, sees_ours: bool = False) -> Path:
    """The ``bin`` folder of ``.cache/NAME`` with these requirements in it, made now if it is not there yet.

    ``sees_ours``: behind its own packages it finds ours, for what imports torch, which is large.
    """
    folder = CACHE / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp, wanted = folder / "installed", "\n".join((sys.version, sys.prefix, *requirements))
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the same run want it too
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *requirements], check=True)
            if sees_ours:
                own = next((folder / "lib").glob("python3*")) / "site-packages"
                ours = Path(sys.prefix) / own.relative_to(folder)
                (own / "torch_is_ours.pth").write_text(f"{ours}\n")
            stamp.write_text(wanted)
    return folder / "bin"
