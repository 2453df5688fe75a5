"""The clients' environments: one for each huggingface_hub, made by venv and pip once and kept in .cache."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "hub-clients"
REQUIREMENTS = {
    "0.36": ("huggingface_hub==0.36.2", "transformers==4.57.6"),  # the oldest transformers that README names
    "1.33": ("huggingface_hub==1.33.0",),
    "2.4": ("huggingface_hub==2.4.0",),
}


def python_of(version: str) -> Path:
    """The interpreter of the environment with this huggingface_hub, made now if it is not there yet.

    torch is large: the environments see ours, behind their own packages, where something imports it.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    requirements = REQUIREMENTS[version]
    folder = CACHE / version
    stamp, wanted = folder / "installed", "\n".join((sys.version, sys.prefix, *requirements))
    with (CACHE / f"{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the same run want it too
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *requirements], check=True)
            own = next((folder / "lib").glob("python3*")) / "site-packages"
            ours = Path(sys.prefix) / own.relative_to(folder)
            (own / "torch_is_ours.pth").write_text(f"{ours}\n")
            stamp.write_text(wanted)
    return folder / "bin" / "python"
