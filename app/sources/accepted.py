"""Which files come in from outside: safetensors, JSON, tokenizers and a few texts. Never code, never pickles."""

from __future__ import annotations

import re

from app.sources.adapters import CONFIG as ADAPTER_CONFIG
from app.sources.models import COMPANIONS, INDEX

SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,120}", re.ASCII)
TASK = ".jsonl"
SMALL_FILES = frozenset({"config.json", ADAPTER_CONFIG, INDEX, *COMPANIONS})


def is_accepted(name: str) -> bool:
    """Whether a file of a model or an adapter is taken, by its plain name."""
    return bool(SAFE_NAME.fullmatch(name)) and (name in SMALL_FILES or name.endswith(".safetensors"))


def is_task_file(name: str) -> bool:
    """Whether a file may be a task's, by its plain name."""
    return bool(SAFE_NAME.fullmatch(name)) and name.endswith(TASK)
