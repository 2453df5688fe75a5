"""Scores → what they say: of each point the share that it keeps of what every source had gained, and the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.sweeps.planning import BASE, alone
from app.tasks.task import LOWER_IS_BETTER, TaskScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Something that was scored, in the order of the tasks. ``settings`` None: what points are held against."""

    name: str
    settings: Mapping[str, Any] | None
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A point with its scores by task, and of tasks whose source is known the share of that source's gain it keeps.

    ``losses``: the tasks of which less is better.
    """

    name: str
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    kept: Mapping[str, float | None]
    losses: frozenset[str]

    @property
    def measures(self) -> Mapping[str, float]:
        """By task, more is better: the share that is kept, or the score (of a loss its negative)."""
        signed = {name: -score if name in self.losses else score for name, score in self.scores.items()}
        return {name: score if (share := self.kept.get(name)) is None else share for name, score in signed.items()}

    @property
    def worth(self) -> float:
        """What points are ordered by: the mean share kept; where no task has a source, the mean measure."""
        return sum(self.measures.values()) / len(self.measures) if self.mean is None else self.mean

    @property
    def mean(self) -> float | None:
        shares = [share for share in self.kept.values() if share is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def minimum(self) -> float | None:
        return min((share for share in self.kept.values() if share is not None), default=None)


def rows_of(scored: Sequence[Scored], sources: Sequence[int | None]) -> list[Row]:
    """The points among what was scored, in order. ``sources``: of each task, the model it belongs to."""
    by_name = {one.name: one.scores for one in scored}
    return [_row(one, one.settings, by_name, sources) for one in scored if one.settings is not None]


def best_of(rows: Sequence[Row]) -> int | None:
    """The index of the first of the best; None of none."""
    return max(range(len(rows)), key=lambda index: (rows[index].worth, -index), default=None)


def kept(found: TaskScore, base: TaskScore, own: TaskScore) -> float | None:
    """The share of a source's gain over the base that is kept; None where it gained nothing."""
    gain = own.score - base.score
    if (gain >= 0) == (found.metric in LOWER_IS_BETTER) or gain == 0:
        return None
    return (found.score - base.score) / gain


def _row(
    one: Scored,
    settings: Mapping[str, Any],
    by_name: Mapping[str, Sequence[TaskScore]],
    sources: Sequence[int | None],
) -> Row:
    shares = {
        score.name: kept(score, by_name[BASE][place], by_name[alone(source)][place])
        for place, (score, source) in enumerate(zip(one.scores, sources, strict=True))
        if source is not None
    }
    return Row(
        name=one.name,
        settings=settings,
        scores={score.name: score.score for score in one.scores},
        kept=shares,
        losses=frozenset(score.name for score in one.scores if score.metric in LOWER_IS_BETTER),
    )
