"""The machinery of `benchmarks.listeners` on a tiny case. No test looks at a time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.listeners import measure, quantile


def test_both_arms_submit_while_the_load_listens_and_polls(tmp_path: Path) -> None:
    found = measure(tmp_path, listeners=4, polls=20, merges=2, rounds=1, seconds=2, rate=2, database="")
    assert (len(found.without), len(found.with_load), found.failed) == (4, 4, 0)
    assert found.load.messages >= 12, "what there was, to each, and progress after that"
    assert (found.load.cut, found.load.failed_polls) == (0, 0) and found.load.polls > 0


def test_a_quantile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [51.0, 100.0, 100.0]
