"""Figures and names as pages show them."""

from __future__ import annotations

from datetime import UTC, datetime

from markupsafe import Markup, escape


def size(count: float) -> str:
    """``135000000`` → ``135.0 MB``, decimal as disks and networks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def norm(value: float) -> str:
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """``3725`` → ``1 h 2 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(at: datetime) -> Markup:
    """A time that machines can read, too."""
    utc = at.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(escape(utc.isoformat()), f"{utc:%Y-%m-%d %H:%M:%S}")


def shortened(name: str, most: int = 27) -> str:
    """The end of a long name, which tells most of it."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def address(job_id: str) -> str:
    """The page of a job: its id says what it is."""
    kinds = {"swp": "sweeps", "evl": "evaluations"}
    return f"/ui/{kinds.get(job_id.partition('-')[0], 'merges')}/{job_id}"


def ago(at: datetime, now: datetime) -> Markup:
    """``3 min 5 s ago``, with the time itself for machines and pointers."""
    utc = at.astimezone(UTC)
    passed = duration(max(0.0, (now - at).total_seconds()))
    return Markup('<time datetime="{}" title="{} UTC">{} ago</time>').format(
        utc.isoformat(), f"{utc:%Y-%m-%d %H:%M:%S}", passed
    )
