"""Clients that send too slowly, take too slowly or are too many, over raw sockets: the server
leaves them, and answers others meanwhile."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

EXTRA = "needs the serve extra: pip install -e '.[serve,test]'"
httpx, uvicorn, _ = (
    pytest.importorskip(package, reason=EXTRA) for package in ("httpx", "uvicorn", "fastapi")
)

from emotrain.serving import connection, gate  # noqa: E402
from emotrain.serving.metrics import ServerMetrics  # noqa: E402

LARGE = 16_000_000


async def app(scope, receive, send):
    """Answers `/echo` once it has the body, `/large` with many bytes, anything else at once."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    body = b"ok"
    if scope["path"] == "/echo":
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
    elif scope["path"] == "/large":
        body = b"x" * LARGE
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(most: int = 8):
    """The application behind the server's gate and connections; its address and its connections."""
    guarded = gate.Gate(app, ServerMetrics(None), ["/echo"], [], 1_000_000)
    server = uvicorn.Server(connection.server_config(guarded, "127.0.0.1", 0, most, 5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname(), server.server_state.connections
    finally:
        server.should_exit = True
        thread.join()


def dribble(client: socket.socket, piece: bytes) -> bytes:
    """Send a piece again and again until the server has closed; what it said."""
    client.settimeout(0.02)
    said = b""
    for _ in range(3000):
        try:
            client.sendall(piece)
        except OSError:
            return said
        try:
            found = client.recv(1000)
        except TimeoutError:
            continue
        except OSError:
            return said
        if not found:
            return said
        said += found
    raise AssertionError("the server still listens")


def get(address: tuple[str, int], path: str = "/"):
    return httpx.get(f"http://{address[0]}:{address[1]}{path}", timeout=60)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET / HTTP/1.1\r\nx: ",
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\nx: ",
    ],
    ids=["nothing", "headers", "headers of the second request"],
)
def test_headers_that_do_not_end_are_given_up(head, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_S", 0.3)
    with serving() as (address, connections), socket.create_connection(address) as client:
        client.sendall(head)
        assert get(address).text == "ok"
        if head:
            said = dribble(client, b"a")
        else:
            client.settimeout(60)
            said = client.recv(1000)
        assert said.count(b"HTTP/1.1 408") == 1
        assert said.count(b"HTTP/1.1 200") == head.count(b"host")
        assert get(address).text == "ok"


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(gate, "BODY_S", 0.3)
    with serving() as (address, _), socket.create_connection(address) as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 999999\r\n\r\n")
        assert b"HTTP/1.1 200" not in dribble(client, b"a")
        assert get(address).text == "ok"


def test_a_body_that_nobody_reads_holds_no_connection(monkeypatch):
    """The answer was given before it had come."""
    monkeypatch.setattr(connection, "HEADER_S", 0.3)
    with serving() as (address, _), socket.create_connection(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 999999\r\n\r\n")
        said = dribble(client, b"a")
        assert b"HTTP/1.1 200" in said and b"HTTP/1.1 408" in said


def test_a_whole_request_has_its_time(monkeypatch):
    """What is read of it in time is no dribble, however long its answer takes."""
    monkeypatch.setattr(connection, "HEADER_S", 0.2)
    with serving() as (address, _), socket.create_connection(address, timeout=60) as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n")
        time.sleep(0.5)
        client.sendall(b"ab")
        said = client.recv(1000)
        assert said.startswith(b"HTTP/1.1 200")


def test_headers_without_end_are_no_memory():
    with serving() as (address, _), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        said = dribble(client, b"x: " + b"a" * 9000 + b"\r\n")
        assert not said or b"400" in said
        assert get(address).text == "ok"


def test_more_connections_than_there_may_be_are_told_so():
    with serving(most=3) as (address, connections):
        held = [socket.create_connection(address) for _ in range(3)]
        while len(connections) < 3:
            time.sleep(0.01)
        for _ in range(3):
            with socket.create_connection(address, timeout=60) as client:
                said = client.recv(1000)
            assert said.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in said
        for one in held:
            one.close()
        for _ in range(3000):
            if not connections:
                break
            time.sleep(0.01)
        assert get(address).text == "ok"


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs TCP_USER_TIMEOUT, which Linux has"
)
def test_a_client_that_takes_nothing_is_left(monkeypatch):
    """Its answer was made long ago, and would wait in memory."""
    monkeypatch.setattr(connection, "SILENCE_S", 0.3)
    with serving() as (address, connections), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        for _ in range(3000):
            if not connections:
                break
            time.sleep(0.01)
        assert not connections
        assert len(get(address, "/large").content) == LARGE
