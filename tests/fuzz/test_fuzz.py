"""The short fuzz run; the long one is ``make fuzz``."""

from __future__ import annotations

import subprocess
import sys


def test_damaged_files_are_read_or_refused() -> None:
    """In a process of its own, whose memory is limited."""
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "4000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4000 inputs of seed 1: 0 failed" in done.stdout
    accepted = [int(line.split()[-1]) for line in done.stdout.splitlines() if " accepted " in line]
    assert len(accepted) == 3 and min(accepted) > 20  # not all of it is damaged beyond reading
