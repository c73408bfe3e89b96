"""What every request passes before anything of it is read: its key, its size, and the count of
answers."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from emotrain.errors import UserError
from emotrain.files import json_text
from emotrain.serving.metrics import ServerMetrics

OPEN = ("/health",)
"""Paths that need no key."""
BODY_S = 60.0
"""In which all of a body must have come."""


def read_keys(file: str | Path) -> list[bytes]:
    """Keys, one a line.

    Raises:
        UserError: no such file, no key in it, or one that is too short to be secret.
    """
    path = Path(file)
    try:
        keys = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror or error}") from None
    if not keys:
        raise UserError(f"--api-key-file {path}: has no key; write one a line")
    if short := [key for key in keys if len(key) < 8]:
        raise UserError(
            f"--api-key-file {path}: a key has {len(short[0])} characters; give at least 8"
        )
    return keys


class Gate:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: Any,
        metrics: ServerMetrics,
        paths: Sequence[str],
        keys: Sequence[bytes],
        most_bytes: int,
    ):
        """
        Args:
            paths: that the metrics know by name.
            keys: one of them is needed; none lets everybody in.
            most_bytes: of a body.
        """
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)
        self.keys, self.most_bytes = keys, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(path, message["status"])
            await send(message)

        headers = dict(scope["headers"])
        if self.keys and scope["path"] not in OPEN and not self._knows(headers):
            await refuse(
                counted,
                401,
                "the key is missing or wrong; send it as Authorization: Bearer KEY",
                [(b"www-authenticate", b"Bearer")],
            )
            return
        too_large = f"the body has more than {self.most_bytes} bytes; send less at once"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most_bytes:
            await refuse(counted, 413, too_large, [(b"connection", b"close")])
            return
        read, whole = 0, False
        until = asyncio.get_running_loop().time() + BODY_S

        async def limited() -> Any:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"the body did not come within {BODY_S:g} s",
                    {"connection": "close"},
                ) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self.most_bytes:
                # More came than was announced.
                raise HTTPException(413, too_large, {"connection": "close"})
            return message

        await self.app(scope, limited, counted)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"authorization", b"")
        key = given[7:].strip() if given[:7].lower() == b"bearer " else b""
        # Every key is compared, and each in constant time.
        return any([hmac.compare_digest(key, known) for known in self.keys])


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error in the words of OpenAI's interface."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": str(status)}}


async def refuse(
    send: Any, status: int, message: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with an error."""
    body = json_text(error_body(message, status)).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})
