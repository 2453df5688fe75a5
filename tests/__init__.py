"""The tests.

Without a GPU, its kernels are carried out by Triton's interpreter. Triton looks for the wish when it is imported, which
torch may do by itself: so it stands here, before any test imports anything. (Asking torch for a GPU would take every
run of a few quick tests another two seconds.)
"""

import os
from importlib.metadata import version
from pathlib import Path

if "+cpu" in version("torch") or not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
