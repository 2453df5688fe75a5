"""Latencies and their percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Latencies:
    """Seconds, in the order of the requests."""

    seconds: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def summary(self) -> dict[str, float]:
        """``median``, ``p99`` and ``worst``, in seconds, and their ``count``."""
        return {
            "count": len(self.seconds),
            "median": percentile(self.seconds, 0.5),
            "p99": percentile(self.seconds, 0.99),
            "worst": max(self.seconds),
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least ``share`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
