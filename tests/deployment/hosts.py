"""Hosts as network namespaces of this machine: each has an address on a bridge, and a cable that can be pulled.

They share the file system, as hosts with a shared folder do, and reach the servers of the tests through relays on the
bridge's own address alone. Addresses are of a network for documentation (RFC 5737) that this machine does not use.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

NETWORKS = ("198.51.100", "203.0.113")
SEEN = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


@dataclass(frozen=True)
class Host:
    """``cable`` is the bridge's end of its link; ``gateway`` the address of the bridge."""

    name: str
    cable: str
    gateway: str

    @property
    def command(self) -> Sequence[str]:
        """Runs what follows on this host, under its name."""
        named = 'hostname "$0" && exec "$@"'
        return [_ip(), "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, self.name]

    def cut_off(self) -> None:
        _run("link", "set", self.cable, "down")

    def connect(self) -> None:
        _run("link", "set", self.cable, "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Skips the test where this machine lets nobody make namespaces."""
    if shutil.which("ip", path=SEEN) is None:
        pytest.skip("ip is not installed (Debian: iproute2); .ci/run installs it")
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    used = subprocess.run([_ip(), "address"], check=True, capture_output=True, text=True, timeout=30).stdout
    network = next((free for free in NETWORKS if f" {free}." not in used), None)
    if network is None:
        pytest.skip("this machine uses every network that the test could take")
    mark = secrets.token_hex(3)
    bridge = f"mb{mark}"
    with ExitStack() as stack:
        try:
            _run("link", "add", bridge, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network devices: {error.stderr.strip()}")
        stack.callback(_run, "link", "delete", bridge)
        _run("address", "add", f"{network}.1/24", "dev", bridge)
        _run("link", "set", bridge, "up")
        hosts = []
        for number in range(2):
            host = Host(f"host-{'ab'[number]}-{mark}", f"mc{mark}{number}", f"{network}.1")
            try:
                _run("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
            stack.callback(_run, "netns", "delete", host.name)
            _run("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _run("link", "set", host.cable, "master", bridge)
            _run("link", "set", host.cable, "up")
            _run("-n", host.name, "address", "add", f"{network}.{11 + number}/24", "dev", "eth0")
            _run("-n", host.name, "link", "set", "eth0", "up")
            _run("-n", host.name, "link", "set", "lo", "up")
            hosts.append(host)
        yield hosts[0], hosts[1]


def _ip() -> str:
    found = shutil.which("ip", path=SEEN)
    assert found is not None
    return found


def _run(*words: str) -> None:
    subprocess.run([_ip(), *words], check=True, capture_output=True, text=True, timeout=30)
