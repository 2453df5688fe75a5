"""One run of Schemathesis against a service, as one caller, and what it counted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.commands import environment
from tests.contract.holdings import Retry
from tests.contract.service import Service
from tests.worker.yard import REPOSITORY

CONFIG = Path(__file__).with_name("schemathesis.toml")
ONE_BY_ONE = ("examples", "coverage", "fuzzing")
FOLLOWING_LINKS = ("stateful",)
RUN_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """Who sends what, and how much of it."""

    name: str
    seed: int
    examples: int  # cases an operation in fuzzing; sequences of requests in all where links are followed
    phases: Sequence[str] = ONE_BY_ONE
    auth: Mapping[str, str] = field(default_factory=dict)  # scheme → credential
    headers: Mapping[str, str] = field(default_factory=dict)
    exclude_checks: Collection[str] = ()
    exclude_operations: Collection[str] = ()
    owner: str = ""  # the only one whose merges a list may show; empty: everybody's
    ids: Sequence[str] = ()  # that requests name
    aliases: Sequence[str] = ()
    recipes: Sequence[Mapping[str, Any]] = ()
    retries: Sequence[Retry] = ()
    upload: Sequence[tuple[str, Path]] = ()
    theirs: Sequence[str] = ()
    marks: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """``counts`` by (phase, operation, positive or negative, status)."""

    campaign: Campaign
    passed: bool
    seconds: float
    counts: Counter[tuple[str, str, str, str]]
    output: str

    @property
    def cases(self) -> int:
        return self.counts.total()

    @property
    def successes(self) -> Counter[str]:
        """2xx answers by operation."""
        found: Counter[str] = Counter()
        for (_, operation, _, status), count in self.counts.items():
            if status.startswith("2"):
                found[operation] += count
        return found

    def by(self, position: int) -> Counter[str]:
        found: Counter[str] = Counter()
        for key, count in self.counts.items():
            found[key[position]] += count
        return found


def carry_out(campaign: Campaign, service: Service, folder: Path) -> Outcome:
    """Run it to its end. Failures are in the outcome, with requests that repeat them."""
    folder.mkdir(parents=True)
    (folder / "ids.txt").write_text("".join(f"{json.dumps(one)}\n" for one in campaign.ids))
    (folder / "names.txt").write_text("".join(f"{json.dumps(one)}\n" for one in (*campaign.ids, *campaign.aliases)))
    (folder / "schemathesis.toml").write_text(_config(campaign))
    told, counted = folder / "run.json", folder / "counts.json"
    told.write_text(
        json.dumps(
            {
                "owner": campaign.owner,
                "ids": list(campaign.ids),
                "recipes": list(campaign.recipes),
                "retries": [asdict(retry) for retry in campaign.retries],
                "upload": [[name, str(path)] for name, path in campaign.upload],
                "theirs": list(campaign.theirs),
                "marks": list(campaign.marks),
                "counts": str(counted),
            }
        )
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml"), "run"]
    command += [f"{service.url}/openapi.json", "--no-color", "--checks", "all"]
    command += ["--seed", str(campaign.seed), "--max-examples", str(campaign.examples)]
    command += ["--phases", ",".join(campaign.phases)]
    if campaign.exclude_checks:
        command += ["--exclude-checks", ",".join(campaign.exclude_checks)]
    for operation in campaign.exclude_operations:
        command += ["--exclude-name", operation]
    for name, value in campaign.headers.items():
        command += ["--header", f"{name}: {value}"]
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,  # whatever it leaves stays here
        env={**environment(CONTRACT_RUN=str(told)), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    rows = json.loads(counted.read_text()) if counted.exists() else []
    if not rows:
        raise RuntimeError(f"{campaign.name}: nothing was sent\n{done.stdout}{done.stderr}")
    counts = Counter({(phase, operation, mode, status): count for phase, operation, mode, status, count in rows})
    return Outcome(campaign, done.returncode == 0, time.monotonic() - began, counts, done.stdout + done.stderr)


def _config(campaign: Campaign) -> str:
    text = CONFIG.read_text()
    for scheme, credential in campaign.auth.items():
        kind = "bearer" if scheme == "key" else "api_key"
        text += f"\n[auth.openapi.{scheme}]\n{kind} = {json.dumps(credential)}\n"
    return text
