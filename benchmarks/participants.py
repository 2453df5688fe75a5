"""Who takes part: what each is called, where it runs, and how a job is put to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.job import Job

Role = Literal["floor", "ours", "peer"]


@dataclass(frozen=True, kw_only=True)
class Participant:
    """``module`` is run with ``arguments`` and the job's file; None: ``cp -r``. ``environment``: a peer's own."""

    name: str
    title: str
    role: Role
    module: str | None = None
    arguments: tuple[str, ...] = ()
    environment: str | None = None

    def command(self, job: Job, path: Path, environments: Path) -> list[str]:
        """``path``: where the job is written; ``environments``: the folder of the peers' environments."""
        if self.module is None:
            return ["cp", "-r", job.base, job.out]
        return [self.python(environments), "-m", self.module, *self.arguments, str(path)]

    def python(self, environments: Path) -> str:
        """Not resolved: an environment's interpreter is a link, and is known by its name."""
        if self.environment is None:
            return sys.executable
        return str(environments.absolute() / self.environment / "bin" / "python")


def _named(*participants: Participant) -> Mapping[str, Participant]:
    return {participant.name: participant for participant in participants}


PARTICIPANTS: Mapping[str, Participant] = _named(
    Participant(name="cp", title="`cp -r` of the base", role="floor"),
    Participant(
        name="products",
        title="bare products, `torch.mm(B, A)`",
        role="floor",
        module="benchmarks.products",
        arguments=("fresh",),
    ),
    Participant(
        name="products-reused",
        title="bare products into one buffer, `torch.mm(B, A, out=…)`",
        role="floor",
        module="benchmarks.products",
        arguments=("reused",),
    ),
    Participant(name="ours", title="**Mergeyard**", role="ours", module="benchmarks.own", arguments=("merge",)),
    Participant(
        name="ours-known",
        title="Mergeyard, the sources' digests known",
        role="ours",
        module="benchmarks.own",
        arguments=("known",),
    ),
    Participant(
        name="ours-unhashed",
        title="Mergeyard, outputs not hashed",
        role="ours",
        module="benchmarks.own",
        arguments=("unhashed",),
    ),
    Participant(
        name="mergekit",
        title="mergekit 0.1.5",
        role="peer",
        module="benchmarks.peers.mergekit_merge",
        environment="mergekit",
    ),
    Participant(
        name="peft-ties",
        title="PEFT 0.21.2 `ties` on the factors, `merge_and_unload`, save",
        role="peer",
        module="benchmarks.peers.peft_merge",
        arguments=("ties",),
        environment="peft",
    ),
    Participant(
        name="peft-ties-svd",
        title="PEFT 0.21.2 `ties_svd` (reduced SVD), `merge_and_unload`, save",
        role="peer",
        module="benchmarks.peers.peft_merge",
        arguments=("ties_svd",),
        environment="peft",
    ),
    Participant(
        name="article",
        title="the article's script, written from its description",
        role="peer",
        module="benchmarks.peers.article",
        environment="peft",
    ),
)
