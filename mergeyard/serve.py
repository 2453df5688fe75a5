"""``mergeyard api``: the HTTP service in this process."""

from __future__ import annotations

import ipaddress
import logging
import socket

import uvicorn

from app.main import create_app
from app.records.database import Database
from app.settings import Settings
from mergeyard.processes import StartError

KEEP_ALIVE_SECONDS = 30
GRACE_SECONDS = 10  # for requests in flight when told to stop


def serve(settings: Settings, descriptor: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, on ``settings.host`` and ``port`` or on an open socket.

    Raises:
        StartError: where the host is not loopback.
        MergeyardError: `not_ready` where the database needs `mergeyard migrate`, `database_unavailable`.
    """
    check_loopback(settings.host)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("mergeyard").setLevel(logging.INFO)
    database = Database(settings.database)
    database.check()
    database.close()
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    sockets = None if descriptor is None else [socket.socket(fileno=descriptor)]
    uvicorn.Server(config).run(sockets=sockets)


def check_loopback(host: str) -> None:
    """Without keys everybody who reaches the port may do everything, so only this machine may reach it."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        message = (
            f"there are no API keys yet, so the service binds loopback only and not {host}; put a gateway before it."
        )
        raise StartError(message)
