"""Two hosts share a database, a broker and the store; one of them loses its network in the middle of a merge.

The hosts are network namespaces, the servers and the workers the real ones. Once the store is a shared folder that the
lost host still reaches, as where storage has a network of its own: what it still writes there must show nowhere. Once
it is a bucket on the network that is cut, and the hosts share no folder but that of the models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy.engine import URL, make_url

from app.records.job import Job
from app.records.workers import Workers
from tests.deployment.hosts import Host, two_hosts
from tests.faults.proxy import Address, Proxy, proxied
from tests.objects.s3 import new_bucket
from tests.worker.yard import SHARDED, Yard, open_yard, worker

NO_FAULTS = {"none": 1.0}


@dataclass(frozen=True)
class Site:
    """The yard, and each host with its worker. ``pids``: of the pool children, by host."""

    yard: Yard
    hosts: tuple[Host, Host]
    workers: dict[str, psutil.Popen]

    def holder(self, job: Job) -> Host:
        """Whose worker made the job's last claim."""
        claims = [event.data["worker"] for event in self.yard.jobs.events(job.id) if event.type == "claimed"]
        return next(host for host in self.hosts if str(claims[-1]).startswith(host.name))

    def other(self, host: Host) -> Host:
        return self.hosts[1] if host == self.hosts[0] else self.hosts[0]


@pytest.fixture(params=["folder", "bucket"])
def site(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_models: Path,
    broker_url: str,
    queue: str,
    postgres_database: str,
) -> Iterator[Site]:
    with ExitStack() as stack:
        store: dict[str, Any] = {}
        if request.param == "bucket":
            store = new_bucket(request.getfixturevalue("s3_endpoint")).settings()
        hosts = stack.enter_context(two_hosts())
        gateway = hosts[0].gateway
        database = make_url(postgres_database)
        seen_database = database.set(host=gateway, port=stack.enter_context(relay(gateway, database_address(database))))
        seen_database = seen_database.set(query={})
        seen_broker = f"redis://{gateway}:{stack.enter_context(relay(gateway, broker_address(broker_url)))}"
        yard = stack.enter_context(
            open_yard(
                tmp_path, tiny_models, broker_url, queue, database_url=postgres_database, database_seconds=2.0, **store
            )
        )
        seen = {
            "database_url": seen_database.render_as_string(hide_password=False),
            "broker_url": seen_broker + (f"/{broker_url.rpartition('/')[2]}" if "redis://" in broker_url else ""),
        }
        if store:
            endpoint = make_url(store["s3_endpoint"])
            port = stack.enter_context(relay(gateway, (endpoint.host or "", endpoint.port or 80)))
            seen["s3_endpoint"] = f"http://{gateway}:{port}"
        log = stack.enter_context((tmp_path / "workers.log").open("w"))
        workers = {}
        for host in hosts:
            own = {"data_dir": tmp_path / host.name} if store else {}
            workers[host.name] = stack.enter_context(worker(yard, stderr=log, on=host.command, **seen, **own))
        rows = Workers(yard.jobs.database)
        yard.until(lambda: len([row for row in rows.list() if row.device is not None]) == 2, 120)
        yield Site(yard, hosts, workers)


def test_a_host_that_is_cut_off_mid_merge_loses_nothing_and_shows_nothing(site: Site) -> None:
    yard = site.yard
    undisturbed = yard.finish(yard.submit(**SHARDED))
    assert undisturbed.artifact is not None
    names = {row.host for row in Workers(yard.jobs.database).list()}
    assert names == {host.name for host in site.hosts}

    job = yard.submit(**SHARDED, parameters={"lambda": 0.5})
    yard.until_shards(job, 2)
    lost = site.holder(job)
    lost.cut_off()
    stored = {shard.file.sha256: shard.file.key for shard in yard.jobs.shards(job.id)}
    first_token = next(iter(stored.values())).split("/")[1]

    done = yard.finish(job)
    assert str(done.status) == "succeeded" and done.attempt == 2
    assert site.holder(job) == site.other(lost)
    assert done.artifact is not None
    kept = {file["sha256"]: file["key"] for file in done.artifact["files"]}
    adopted = {digest for digest, key in kept.items() if f"/{first_token}/" in key}
    assert adopted == set(stored), "the shards that the lost host had stored are the result's"
    assert yard.kinds(job) == ["submitted", "claimed", "worker_lost", "claimed", "succeeded"]

    # It comes back: what it has in hand is nobody's, and it takes the next merge.
    lost.connect()
    staying = site.workers[site.other(lost).name]
    staying.terminate()
    staying.wait(60)
    following = yard.finish(yard.submit(**SHARDED, parameters={"lambda": 0.25}), seconds=90)
    assert str(following.status) == "succeeded" and site.holder(following) == lost
    assert site.workers[lost.name].is_running()

    after = yard.jobs.get(job.id)
    assert (after.attempt, after.artifact, after.finished_at) == (done.attempt, done.artifact, done.finished_at)
    assert [event.type for event in yard.jobs.events(job.id)].count("succeeded") == 1
    yard.until(lambda: set(yard.files(job)) == set(kept.values()), 30)  # what else it wrote is swept
    for file in done.artifact["files"]:
        assert yard.store.sha256(file["key"], lambda: None) == file["sha256"], file["name"]


@contextmanager
def relay(gateway: str, target: Address) -> Iterator[int]:
    """The port on the bridge that leads to a server of this machine."""
    with proxied(Proxy((gateway, 0), target, random.Random(0), NO_FAULTS)) as proxy:
        yield proxy.port


def database_address(url: URL) -> Address:
    """Of PostgreSQL, which may listen on a Unix socket in a folder."""
    host = url.host or str(url.query.get("host", ""))
    return Path(host, f".s.PGSQL.{url.port or 5432}") if host.startswith("/") else (host, url.port or 5432)


def broker_address(url: str) -> Address:
    if url.startswith("redis+socket://"):
        return Path(url.removeprefix("redis+socket://"))
    found = make_url(url)
    return (found.host or "127.0.0.1", found.port or 6379)
