"""The log: every process's lines on stderr in one form, as text for people or as JSON for machines.

Beside its words a line has fields that say what it is about: ``request``, ``merge``, ``attempt``, ``owner``. They come
with the record (``extra``, a LoggerAdapter), or from the request that is being answered (``about``).
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal

from app.records.job import Job

LogFormat = Literal["auto", "text", "json"]
FIELDS = ("request", "merge", "attempt", "owner")
TALKING = ("mergeyard", "uvicorn")  # whose INFO is told; of other libraries, warnings

# Keys, and passwords in URLs. Nothing logs them on purpose, but libraries put what they met into their errors.
_SECRET = re.compile(r"(mrg_[0-9a-z]{12}_)[0-9a-z]+|(whsec_)[\w+/=]+|(://[^\s:/@]*:)[^\s/@]+(?=@)")

_about: ContextVar[Mapping[str, object]] = ContextVar("about", default=MappingProxyType({}))


def set_up(log_format: LogFormat) -> None:
    """Send this process's log to stderr. ``auto`` is text on a terminal, else JSON. For whoever owns the process."""
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in TALKING:
        logging.getLogger(name).setLevel(logging.INFO)


def about(**fields: object) -> None:
    """Add fields to every line of the request that is being answered, from here on."""
    _about.set({**_about.get(), **fields})


def of_job(log: logging.Logger, job: Job) -> logging.LoggerAdapter[logging.Logger]:
    """``log`` with the fields of an attempt."""
    return logging.LoggerAdapter(log, {"merge": job.id, "attempt": job.attempt, "owner": job.owner})


class JsonLines(logging.Formatter):
    """An object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, ``process``, the fields, ``trace``."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _clean(record.getMessage()),
            "process": record.process,
            **_fields(record),
        }
        if record.exc_info:
            document["trace"] = _clean(self.formatException(record.exc_info))
        return json.dumps(document, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """``2026-01-31 12:00:00,000 INFO 4711 mergeyard.job merge=mrg-… attempt=1 claimed``, and the trace below it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = (
            f"{self.formatTime(record)} {record.levelname} {record.process} {record.name}{fields} {record.getMessage()}"
        )
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return _clean(line + trace)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    known = {**_about.get(), **{name: value for name, value in vars(record).items() if name in FIELDS}}
    return {name: known[name] for name in FIELDS if known.get(name) is not None}


def _clean(text: str) -> str:
    return _SECRET.sub(lambda found: (found[1] or found[2] or found[3]) + "***", text)
