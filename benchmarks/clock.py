"""The clock of everything that is measured: peers run it in environments of their own, so only the standard library."""

from __future__ import annotations

import json
import resource
import sys
import time


class Clock:
    """Seconds by the clock and of processor time since it was made: this process's and its ended children's.

    Made after a participant's imports, so that nobody's start-up is in its time.
    """

    def __init__(self) -> None:
        self._began, self._used = time.perf_counter(), _processor()

    def report(self, **further: str) -> None:
        """Print what was measured as the last line of standard output, where ``watch`` looks for it."""
        found = {"seconds": time.perf_counter() - self._began, "processor": _processor() - self._used}
        sys.stdout.flush()
        print(json.dumps({**found, **further}), flush=True)


def _processor() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
