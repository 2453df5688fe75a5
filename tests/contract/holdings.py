"""What an owner has: merges in several states, an upload. And what of it nobody else may ever be shown."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.api.examples import EVALUATION, RECIPE, SWEEP
from tests import files
from tests.contract.service import KEYS, Service

UNSERVED = "nobody-serves-this"  # a queue whose merges wait, so that they can be cancelled
FINISH_SECONDS = 120.0
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Retry:
    """A request that was sent before: with its Idempotency-Key it gives the merge that it gave then."""

    idempotency_key: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Holdings:
    """``marks`` stand in nothing but this owner's answers. ``merges`` by the status they are in."""

    owner: str
    merges: Mapping[str, Sequence[str]]
    uploaded: str
    alias: str
    recipes: Sequence[Mapping[str, Any]]  # that this owner can merge
    retries: Sequence[Retry]
    marks: Sequence[str]
    scorings: Mapping[str, str]  # ids of a sweep and of an evaluation, by their paths

    @property
    def everything(self) -> list[str]:
        """The ids of all jobs."""
        return [*self.ids, *self.scorings.values()]

    @property
    def ids(self) -> list[str]:
        return [merge for merges in self.merges.values() for merge in merges]


def client(service: Service, holder: str) -> httpx.Client:
    """HTTP with a holder's key; without any where the service has none."""
    key = service.keys.get(holder)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=service.url, headers=headers, timeout=30)


def signed_in(service: Service, holder: str) -> httpx.Client:
    """HTTP with the cookie of a session that was made from a holder's key, as a page sends it."""
    with client(service, holder) as http:
        opened = http.post("/session").raise_for_status()
    headers = {"X-CSRF-Token": opened.json()["csrf_token"]}
    return httpx.Client(base_url=service.url, headers=headers, cookies=opened.cookies, timeout=30)


def hold(service: Service, holder: str, folder: Path, *, succeeded: int, waiting: int, seed: int) -> Holdings:
    """Make things for a holder through the API: merges that succeeded, wait and are cancelled, and an upload.

    Weights differ by ``seed`` (below 9) and number, and with them every fingerprint and every digest.
    """
    token = f"{holder}-{secrets.token_hex(8)}"
    label = f"mark-{token}"
    bodies = [
        {"recipe": _recipe(seed + number / 100), "labels": {"note": label}, "queue": "default" if served else UNSERVED}
        for number, served in enumerate([True] * succeeded + [False] * (waiting + 1))
    ]
    retries = [Retry(f"nightly-{token}-{number}", body) for number, body in enumerate(bodies)]
    with client(service, holder) as http:
        upload = http.post("/uploads", files=adapter_parts(folder, seed)).raise_for_status().json()
        merges = [_submit(http, retry) for retry in retries]
        merged, waits, cancelled = merges[:succeeded], merges[succeeded:-1], merges[-1]
        http.post(f"/merges/{cancelled['id']}/cancel").raise_for_status()
        listings = [_finished(http, merge["id"]) for merge in merged]
        scorings = [
            http.post(path, json={**body, "queue": UNSERVED, "labels": {"note": label}}).raise_for_status().json()
            for path, body in (("/sweeps", SWEEP), ("/evaluations", EVALUATION))
        ]
        alias = f"{holder}s-own"
        pointed = http.put(f"/aliases/{alias}", json={"merge": merged[-1]["id"]}).raise_for_status().json()
    digests = [file["sha256"] for file in upload["files"] if file["name"] in WEIGHTS]
    for listing in listings:
        digests.append(listing["manifest_sha256"])
        digests += [file["sha256"] for file in listing["items"] if file["name"] in WEIGHTS]
    return Holdings(
        owner=KEYS[holder][0] if service.keys else "local",
        merges={
            "succeeded": [merge["id"] for merge in merged],
            "queued": [merge["id"] for merge in waits],
            "cancelled": [cancelled["id"]],
        },
        uploaded=upload["reference"],
        alias=alias,
        recipes=[
            RECIPE,
            {**RECIPE, "merge_method": "linear"},
            {**RECIPE, "output": {"kind": "adapter", "rank": 4}},
            {**RECIPE, "models": [{"adapter": upload["reference"]}]},
            {"merge_method": "linear", "models": [{"model": f"merge:{merged[0]['id']}"}], "parameters": {"weight": 1}},
        ],
        retries=retries[:succeeded],
        # Everybody's sweep of the same files has the same fingerprint.
        marks=[label, pointed["commit"], *digests, *(merge["fingerprint"] for merge in merges)],
        scorings={f"/{job['kind']}s": job["id"] for job in scorings},
    )


def adapter_parts(folder: Path, seed: int) -> list[tuple[str, tuple[str, bytes]]]:
    """A multipart body of an adapter that only this seed has; the files stay in ``folder``."""
    files.write_adapter(folder, files.lora_tensors(seed=1000 + seed))
    return [("files", (name, (folder / name).read_bytes())) for name in ADAPTER_FILES]


def _recipe(weight: float) -> dict[str, Any]:
    return {**RECIPE, "models": [{"adapter": "models:adapters/sql", "parameters": {"weight": weight}}]}


def _submit(http: httpx.Client, retry: Retry) -> dict[str, Any]:
    answer = http.post("/merges", json=retry.body, headers={"Idempotency-Key": retry.idempotency_key})
    assert answer.status_code == 202, answer.text
    merge: dict[str, Any] = answer.json()
    return merge


def _finished(http: httpx.Client, merge: str) -> dict[str, Any]:
    """The files of a merge, once it has succeeded."""
    deadline = time.monotonic() + FINISH_SECONDS
    while (found := http.get(f"/merges/{merge}").json())["status"] != "succeeded":
        assert found["status"] in ("queued", "running") and time.monotonic() < deadline, found
        time.sleep(0.05)
    listing: dict[str, Any] = http.get(f"/merges/{merge}/files").raise_for_status().json()
    return listing
