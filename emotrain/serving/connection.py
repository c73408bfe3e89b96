"""Connections of the server: how many there may be, and how long one may keep it waiting."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_HEADER_BYTES = 1 << 16
HEADER_S = 10.0
"""In which a request's headers must have come, from the first byte of the connection or, on one
that is used again, of the request. A body that nobody reads any more has the same time."""
SILENCE_S = 60.0
"""After which a client that takes nothing of what is sent to it is gone (TCP_USER_TIMEOUT)."""
CLOSE = b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n%b\r\n"


def server_config(app: Any, host: str, port: int, most: int, drain_s: float) -> uvicorn.Config:
    """How uvicorn serves an application.

    Args:
        most: connections at once; further ones get 503.
        drain_s: how long running requests may take to end after a signal.
    """

    class Limited(Connection):
        most_connections = most

    return uvicorn.Config(
        app,
        host=host,
        port=port,
        # Not uvloop where it is installed: its sockets take no options.
        loop="asyncio",
        http=Limited,
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(drain_s) + 1,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
    )


class Connection(H11Protocol):
    """uvicorn's, which by itself waits without end for a request that never becomes whole."""

    most_connections = 512
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self._refuse(b"503 Service Unavailable", b"retry-after: 1\r\n")
            return
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            own = transport.get_extra_info("socket")
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE_S))
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            # The gate has an eye on its body.
            self._wait_no_longer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_longer()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._late is None:
            refuse = (b"408 Request Timeout", b"")
            self._late = self.loop.call_later(HEADER_S, self._refuse, *refuse)

    def _wait_no_longer(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: bytes, header: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(CLOSE % (status, header))
            self.transport.close()
