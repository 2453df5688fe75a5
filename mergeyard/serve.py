"""``mergeyard api``: the HTTP service in this process."""

from __future__ import annotations

import logging
import resource
import socket

import uvicorn

from app import logs
from app.api.origins import is_loopback
from app.main import create_app
from app.records.database import Database
from app.records.keys import Keys
from app.settings import Settings
from mergeyard.processes import StartError
from mergeyard.zerocopy import ZeroCopyProtocol

KEEP_ALIVE_SECONDS = 30
MOST_OPEN_FILES = 65_536
GRACE_SECONDS = 10  # for requests in flight when told to stop

log = logging.getLogger("mergeyard.api")


def serve(settings: Settings, descriptor: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, on ``settings.host`` and ``port`` or on an open socket.

    Raises:
        StartError: where others than this machine could reach it and there are no keys.
        MergeyardError: `not_ready` where the database needs `mergeyard migrate`, `database_unavailable`.
    """
    logs.set_up(settings.log_format)
    _allow_open_files()
    database = Database(settings.database, answer_seconds=settings.database_seconds)
    database.check()
    sockets = None if descriptor is None else [socket.socket(fileno=descriptor)]
    host = settings.host if sockets is None else str(sockets[0].getsockname()[0])
    if keyless := check_exposure(host, database):
        log.warning(keyless)
    database.close()
    Server(settings).run(sockets=sockets)


class Server(uvicorn.Server):
    """The HTTP server of the service."""

    def __init__(self, settings: Settings) -> None:
        self._api = create_app(settings)
        super().__init__(
            uvicorn.Config(
                self._api,
                host=settings.host,
                port=settings.port,
                http=ZeroCopyProtocol,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
                server_header=False,
                log_config=None,  # its lines go where ours go
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Event streams end first: uvicorn would wait for them, and tells the application only after that."""
        self._api.state.service.streams.close()
        await super().shutdown(sockets)


def _allow_open_files() -> None:
    """As many as this process may have: a download of a whole artifact holds all of its files, to outlive them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, MOST_OPEN_FILES), most))


def check_exposure(host: str, database: Database) -> str:
    """Without keys everybody who reaches the port may do everything, so only this machine may reach it.

    Returns what to say where there are none, empty where there are. Raises StartError where there are none and
    ``host`` is not loopback.
    """
    if Keys(database).exist():
        return ""
    if not is_loopback(host):
        message = (
            f"there are no API keys, so the service binds loopback only and not {host}: everybody who reaches it could "
            "do everything. Make one with `mergeyard keys create --owner NAME`, then start it again."
        )
        raise StartError(message)
    return (
        "There are no API keys: the service is open to every program on this machine, and to nobody else. "
        "`mergeyard keys create` makes the first; from then on every request needs one."
    )
