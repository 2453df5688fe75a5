"""``make test-api``: Schemathesis against the whole service, with keys and without, on both databases.

Prints its counts; exits 1 where an answer is not what the OpenAPI document says, where an operation was never done, or
where one owner came to see or change what is another's.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from tests import servers
from tests.api.serving import write_sources
from tests.contract.crossing import Asked, ask_for, audited, changes, state_of
from tests.contract.holdings import ADAPTER_FILES, Holdings, client, hold, signed_in
from tests.contract.runs import FOLLOWING_LINKS, Campaign, Outcome, carry_out
from tests.contract.service import Service, running

AT_LEAST = 5_000  # cases in all; fewer prove less than is claimed
STEPS = 450  # cases that follow links, for each of those who may do most
SEQUENCES = 100  # of such cases, at most, in one round
ROUNDS = 15
CHANCES = 0.5  # of the examples that owners get, those of a key that may do little
# Whatever a link leads to must have been done to a merge that exists while following links.
LINKED = frozenset(
    {
        "GET /merges/{id}",
        "DELETE /merges/{id}",
        "GET /merges/{id}/events",
        "GET /merges/{id}/webhooks",
        "POST /merges/{id}/cancel",
        "GET /merges/{id}/files",
        "GET /merges/{id}/files/{path}",
        "HEAD /merges/{id}/files/{path}",
        "GET /merges/{id}/archive.tar",
        "HEAD /merges/{id}/archive.tar",
        "GET /sweeps/{id}",
        "DELETE /sweeps/{id}",
        "GET /sweeps/{id}/events",
        "GET /sweeps/{id}/webhooks",
        "POST /sweeps/{id}/cancel",
        "POST /sweeps/{id}/merges",
        "GET /evaluations/{id}",
        "DELETE /evaluations/{id}",
        "GET /evaluations/{id}/events",
        "GET /evaluations/{id}/webhooks",
        "POST /evaluations/{id}/cancel",
    }
)
# A session is made from a key, and what these tell is not an owner's to know.
# The models here have no folders.
FOLDERS = "GET /api/models/{namespace}/{name}/tree/{revision}/{path}"
NEVER = {"nobody": {"POST /session", FOLDERS}, "alice": {"GET /audit", "GET /metrics", FOLDERS}}
# While there are no keys nothing needs one, whatever the document says of the scopes.
WITHOUT_KEYS = ("ignored_auth",)


class Verdict:
    """What was wrong, and what was counted over all."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.cases: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    def of(self, outcome: Outcome) -> None:
        self.cases += outcome.by(0)
        self.operations += outcome.by(1)
        self.statuses += outcome.by(3)
        name = outcome.campaign.name
        _tell_run(outcome)
        if not outcome.passed:
            self.blame(f"{name}: Schemathesis found failures", outcome.output)

    def blame(self, what: str, detail: str = "") -> None:
        self.wrong.append(what)
        print(f"  WRONG: {what}", detail, sep="\n" if detail else "", flush=True)


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by the way that ends every process that was started
    print(f"seed {options.seed}; repeat with --seed {options.seed}", servers.described()[1], sep="\n", flush=True)
    verdict, began = Verdict(), time.monotonic()
    with servers.short_folder() as folder:
        models = write_sources(folder / "models")
        for name in options.databases:
            with _database(name, folder / f"{name}-open.sqlite3") as url:
                _without_keys(name, folder / f"{name}-open", models, url, options, verdict)
            with _database(name, folder / f"{name}-keys.sqlite3") as url:
                _with_keys(name, folder / f"{name}-keys", models, url, options, verdict)
    cases = verdict.cases.total()
    print(f"\n== {cases} cases in {time.monotonic() - began:.0f} s")
    print("phases:", _counts(verdict.cases))
    print("statuses:", _counts(verdict.statuses))
    print("operations:", *(f"  {count} {name}" for name, count in sorted(verdict.operations.items())), sep="\n")
    if cases < options.at_least:
        verdict.blame(f"{cases} cases are fewer than {options.at_least}")
    print("NOT AS DOCUMENTED: see above" if verdict.wrong else "every answer is as documented, and every owner's alone")
    return 1 if verdict.wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="repeats a run's choices")
    parser.add_argument("--examples", type=int, default=25, help="an operation, in fuzzing, for whoever may do most")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--at-least", type=int, default=AT_LEAST, help="cases, or the run proves nothing")
    return parser.parse_args()


@contextmanager
def _database(kind: str, path: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{path}"
        return
    with servers.postgresql() as server, servers.temporary_database(server) as url:
        yield url


def _without_keys(
    name: str, folder: Path, models: Path, url: str, options: argparse.Namespace, verdict: Verdict
) -> None:
    with running(folder / "data", models, url, with_keys=False) as service:
        mine = hold(service, "alice", folder / "upload", succeeded=20, waiting=4, seed=1)
        campaign = Campaign(
            name=f"{name}, no keys",
            seed=options.seed,
            examples=options.examples,
            exclude_checks=WITHOUT_KEYS,
            ids=mine.everything,
            aliases=[mine.alias],
            recipes=mine.recipes,
            retries=mine.retries,
            upload=[(part, folder / "upload" / part) for part in ADAPTER_FILES],
        )
        _everything(campaign, service, folder, NEVER["nobody"], verdict)
        _nothing_broke(service, verdict)


def _with_keys(name: str, folder: Path, models: Path, url: str, options: argparse.Namespace, verdict: Verdict) -> None:
    with running(folder / "data", models, url, with_keys=True) as service:
        alice = hold(service, "alice", folder / "upload", succeeded=20, waiting=4, seed=1)
        bob = hold(service, "bob", folder / "bobs", succeeded=2, waiting=1, seed=2)
        before = state_of(service, bob)
        kinds = Counter(name.partition(":")[0] for name in before)
        print(f"\nwhat bob has: {_counts(kinds)}")
        first, *others = _campaigns(name, service, alice, bob, folder, options)
        _everything(first, service, folder, NEVER["alice"], verdict)
        for number, campaign in enumerate(others):
            verdict.of(carry_out(campaign, service, folder / f"others-{number}"))
        for who, http in {
            "alice": client(service, "alice"),
            "alice's session": signed_in(service, "alice"),
            "a reader": client(service, "reader"),
            "a scraper": client(service, "scraper"),
        }.items():
            with http:
                _tell_asked(who, ask_for(http, bob), verdict)
        for what in changes(before, state_of(service, bob)):
            verdict.blame(f"bob's {what} is not as it was")
        for entry in audited(service, bob):
            verdict.blame(f"the audit has: {entry}")
        with client(service, "admin") as http:
            _admin_sees(http, bob, service, before, verdict)
        _nothing_broke(service, verdict)


def _campaigns(
    name: str, service: Service, alice: Holdings, bob: Holdings, folder: Path, options: argparse.Namespace
) -> Iterator[Campaign]:
    """Everybody who must not see bob's, and a few requests as somebody who may."""
    fewer = max(5, int(options.examples * CHANCES))
    common: dict[str, Any] = {
        "ids": [*alice.everything, *bob.everything],
        "aliases": [alice.alias, bob.alias],
        "recipes": [*alice.recipes, {**alice.recipes[0], "base_model": f"merge:{bob.ids[0]}"}],
        "retries": alice.retries,
        "upload": [(part, folder / "upload" / part) for part in ADAPTER_FILES],
        "theirs": bob.everything,
        "marks": bob.marks,
    }
    yield Campaign(
        name=f"{name}, alice's key",
        seed=options.seed,
        examples=options.examples,
        auth={"key": service.keys["alice"]},
        owner="alice",
        **common,
    )
    with signed_in(service, "alice") as http:
        cookie, token = http.cookies["mergeyard"], http.headers["X-CSRF-Token"]
    yield Campaign(
        name=f"{name}, alice's session",
        seed=options.seed + 1,
        examples=fewer,
        auth={"session": cookie},
        headers={"X-CSRF-Token": token},
        exclude_operations=["DELETE /session"],  # it would end the session that the others are sent with
        owner="alice",
        **common,
    )
    for number, holder in enumerate(("reader", "scraper"), start=2):
        yield Campaign(
            name=f"{name}, the {holder}'s key",
            seed=options.seed + number,
            examples=fewer,
            auth={"key": service.keys[holder]},
            phases=("fuzzing",),
            owner="alice" if holder == "reader" else "",
            **common,
        )


def _admin_sees(
    http: httpx.Client, bob: Holdings, service: Service, before: Mapping[str, str], verdict: Verdict
) -> None:
    """That the questions above find what there is to find: an admin's key may do all of it."""
    for path in ("/metrics", "/audit"):
        if http.get(path).status_code != 200:
            verdict.blame(f"an admin is not shown {path}")
    found = ask_for(http, bob)
    ended = changes(before, state_of(service, bob))
    print(f"an admin's same questions: {len(found.crossings)} answers about bob's, {len(ended)} of his rows changed")
    if len(found.crossings) < len(bob.ids) or len(ended) < len(bob.ids) or not audited(service, bob):
        verdict.blame("the questions do not even find what an admin may do, so they prove nothing")


def _everything(campaign: Campaign, service: Service, folder: Path, never: set[str], verdict: Verdict) -> None:
    """One by one, then by following links: every operation succeeds, and what links lead to does by following them."""
    outcome = carry_out(campaign, service, folder / "one-by-one")
    verdict.of(outcome)
    done, linked = outcome.successes, _follow_links(campaign, service, folder, verdict)
    document = httpx.get(f"{service.url}/openapi.json").json()
    every = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    print("  2xx one by one:", _counts({name: done[name] for name in every}))
    print("  2xx by following links:", _counts({name: linked[name] for name in LINKED}), flush=True)
    for name in sorted(every - never - {name for name, count in done.items() if count}):
        verdict.blame(f"{campaign.name}: {name} never succeeded")
    for name in sorted(LINKED - {name for name, count in linked.items() if count}):
        verdict.blame(f"{campaign.name}: {name} never succeeded by following links")


def _follow_links(campaign: Campaign, service: Service, folder: Path, verdict: Verdict) -> Counter[str]:
    """2xx answers by operation, over as many rounds as it takes.

    A merge that finishes between two requests changes which links there are to follow. Hypothesis takes that for data
    that it cannot make again and ends the round, now after ten sequences and now after a hundred.
    """
    done: Counter[str] = Counter()
    cases = 0
    for number in range(1, ROUNDS + 1):
        following = replace(
            campaign,
            name=f"{campaign.name}, following links, round {number}",
            seed=campaign.seed + 100 * number,
            examples=SEQUENCES,
            phases=FOLLOWING_LINKS,
        )
        outcome = carry_out(following, service, folder / f"links-{number}")
        verdict.of(outcome)
        done += outcome.successes
        cases += outcome.cases
        if cases >= STEPS and all(done[name] for name in LINKED):
            return done
    verdict.blame(f"{campaign.name}: {cases} cases in {ROUNDS} rounds that follow links, and not everything was done")
    return done


def _nothing_broke(service: Service, verdict: Verdict) -> None:
    for line in service.faults:
        verdict.blame(f"in a log: {line}")


def _tell_run(outcome: Outcome) -> None:
    name, seed = outcome.campaign.name, outcome.campaign.seed
    print(f"\n== {name}: {outcome.cases} cases in {outcome.seconds:.0f} s (seed {seed})")
    print("  phases:", _counts(outcome.by(0)), "| data:", _counts(outcome.by(2)))
    print("  statuses:", _counts(outcome.by(3)), flush=True)


def _tell_asked(who: str, asked: Asked, verdict: Verdict) -> None:
    print(f"{who} asked for bob's things in {asked.requests} requests; crossings {len(asked.crossings)}", flush=True)
    for crossing in asked.crossings:
        verdict.blame(f"{who}: {crossing}")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
