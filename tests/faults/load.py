"""Traffic on a service that is being broken: submissions, looks at what is visible, a check of every finished merge."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.artifacts.manifest import MANIFEST_NAME
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests import tiny
from tests.worker.yard import SHARDED
from worker.engine.run import merge_to_folder

IN_FLIGHT = 8  # merges that are not finished, at any time
PATIENCE = 60.0  # seconds a request is repeated for; the API is back in two
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "ties": SHARDED,
    "dare_ties": {"merge_method": "dare_ties", **SHARDED},
    "breadcrumbs": {"merge_method": "breadcrumbs", "parameters": {"lambda": 0.5}, **SHARDED},
    "one file": {},
}
CANCELLED = 0.05  # the share that is cancelled some time after it was submitted
DELETED = 0.05  # the share of finished merges that is deleted


@dataclass
class Load:
    """Three threads between ``start`` and ``drain``. What must not be is kept in ``wrong``."""

    url: str
    expected: Mapping[str, Mapping[str, str]]  # per recipe: every file's digest but the manifest's
    rng: random.Random
    in_flight: int = IN_FLIGHT
    accepted: dict[str, str] = field(default_factory=dict)  # Idempotency-Key → merge
    recipes: dict[str, str] = field(default_factory=dict)  # merge → recipe
    open: set[str] = field(default_factory=set)
    ends: Counter[str] = field(default_factory=Counter)
    deleted: set[str] = field(default_factory=set)
    looks: int = 0
    slowest_post: float = 0.0
    wrong: list[str] = field(default_factory=list)
    unavailable: int = 0  # answers of 503: allowed only where the database is cut off, too
    _draining: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for work in (self._submit, self._follow, self._peek):
            thread = threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def drain(self, seconds: float) -> None:
        """Submit nothing more, and wait until everything that was accepted has finished."""
        self._draining.set()
        deadline = time.monotonic() + seconds
        while self.open and time.monotonic() < deadline and not self.wrong:
            time.sleep(0.1)
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _guarded(self, work: Callable[[httpx.Client], None]) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=20) as http:
                work(http)
        except Exception as error:
            self.wrong.append(f"{work.__name__}: {error!r}")

    def _submit(self, http: httpx.Client) -> None:
        number = 0
        while not self._draining.is_set():
            if len(self.open) >= self.in_flight:
                time.sleep(0.02)
                continue
            number += 1
            name, key = self.rng.choice(list(RECIPES)), f"load-{number}"
            # each is to be merged, whatever was merged before it
            body = {"recipe": tiny.recipe(**RECIPES[name]), "labels": {"number": str(number)}, "force": True}
            answer = self._request(http, "POST", "/merges", json=body, headers={"Idempotency-Key": key})
            if answer.status_code != 202:
                self.wrong.append(f"POST answered {answer.status_code}: {answer.text}")
                return
            merge_id = answer.json()["id"]
            self.accepted[key] = merge_id
            self.recipes[merge_id] = name
            self.open.add(merge_id)
            if self.rng.random() < CANCELLED:
                time.sleep(self.rng.random() * 0.5)
                self._request(http, "POST", f"/merges/{merge_id}/cancel")

    def _follow(self, http: httpx.Client) -> None:
        while not self._ended.wait(0.2):
            for merge_id in list(self.open):
                merge = self._request(http, "GET", f"/merges/{merge_id}").json()
                if merge["status"] in ("succeeded", "failed", "cancelled"):
                    self._check(http, merge)
                    self.ends[self._end(merge)] += 1
                    self.open.discard(merge_id)

    def _peek(self, http: httpx.Client) -> None:
        """What is visible of a merge that is not finished: nothing at all, until it is everything."""
        rng = random.Random(0)
        while not self._ended.wait(0.05):
            if not (unfinished := list(self.open)):
                continue
            merge_id = rng.choice(unfinished)
            listing = self._request(http, "GET", f"/merges/{merge_id}/files")
            self.looks += 1
            if listing.status_code == 200:
                self._check_files(http, merge_id, listing.json())
            elif listing.status_code not in (404, 409):
                self.wrong.append(f"{merge_id}: its files are answered with {listing.status_code}: {listing.text}")

    def _check(self, http: httpx.Client, merge: Mapping[str, Any]) -> None:
        merge_id = merge["id"]
        listing = self._request(http, "GET", f"/merges/{merge_id}/files")
        if merge["status"] == "succeeded":
            self._check_files(http, merge_id, listing.json())
            if self.rng.random() < DELETED:
                self.deleted.add(merge_id)  # first, for whoever looks at its files meanwhile
                self._request(http, "DELETE", f"/merges/{merge_id}")
        elif listing.status_code != 409:
            self.wrong.append(f"{merge_id} {merge['status']} and shows files: {listing.text}")

    def _check_files(self, http: httpx.Client, merge_id: str, listing: Mapping[str, Any]) -> None:
        """Every file comes down whole, and holds the digest that the same merge has when nothing is broken."""
        if merge_id in self.deleted or "items" not in listing:
            return
        found = {}
        for file in listing["items"]:
            answer = self._request(http, "GET", file["url"])
            if answer.status_code == 404 and merge_id in self.deleted:
                return
            digest = hashlib.sha256(answer.content).hexdigest()
            if (digest, len(answer.content)) != (file["sha256"], file["size"]):
                self.wrong.append(f"{merge_id}: {file['name']} is partly visible ({answer.status_code})")
            if file["name"] != MANIFEST_NAME:
                found[file["name"]] = digest
        if found != self.expected[self.recipes[merge_id]]:
            self.wrong.append(f"{merge_id}: other files than an unbroken merge has")

    def _end(self, merge: Mapping[str, Any]) -> str:
        if merge["status"] != "failed":
            return str(merge["status"])
        if merge["error"]["code"] != "worker_lost" or merge["attempt"] < merge["max_attempts"]:
            self.wrong.append(f"{merge['id']} failed: {merge['error']}")
        return f"failed, {merge['error']['code']} after {merge['attempt']} attempts"

    def _request(self, http: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
        """An API that is being started again is asked again, as every client does; so is one without its database."""
        deadline = time.monotonic() + PATIENCE
        while True:
            began = time.monotonic()
            try:
                answer = http.request(method, path, **options)
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
                continue
            if answer.status_code == 202 and path == "/merges":
                self.slowest_post = max(self.slowest_post, time.monotonic() - began)
            if answer.status_code != 503 or time.monotonic() > deadline:
                if answer.status_code >= 500:
                    self.wrong.append(f"{method} {path}: {answer.status_code} {answer.text}")
                return answer
            self.unavailable += 1
            time.sleep(0.05)


def unbroken(models: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Per recipe, the digest of every file but the manifest, merged in this process."""
    digests = {}
    for number, (name, changes) in enumerate(RECIPES.items()):
        plan = make_plan(parse_recipe(tiny.recipe(**changes)), Resolver(roots=(models,), uploads=folder / "uploads"))
        manifest = merge_to_folder(plan, folder / str(number), device="cpu", threads=1)
        digests[name] = {file.name: file.sha256 for file in manifest.files}
    return digests
