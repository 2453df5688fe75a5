"""What a figure was measured on. Only the standard library, so that it can be asked anywhere."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """As /proc/cpuinfo has it, else the architecture."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
