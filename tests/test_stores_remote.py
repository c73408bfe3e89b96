"""Proves of files in object stores and on web servers that windows are those of the same files on
this machine, that little is asked for, and that a server that is slow, short, broken or gone is
asked a bounded number of times and then named in one line."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from test_stores_mds import arrays
from test_stores_mds import simple as write_mds
from test_stores_megatron import made
from test_stores_megatron import write as write_megatron
from test_stores_plain import RAW, documents, write

from emotrain.cli import main
from emotrain.data.manifest import write_manifest
from emotrain.data.opening import open_loader, open_store
from emotrain.data.shards import write_shard
from emotrain.data.stores import remote
from emotrain.data.stores.content import SAMPLE_BYTES
from emotrain.errors import MissingFileError, RunError, UserError


def many(count: int, seed: int = 0) -> np.ndarray:
    """Random tokens, some of them EOS."""
    return np.random.default_rng(seed).integers(7, 1000, count)


class Server(ThreadingHTTPServer):
    """Files of a folder with range requests, and faults: `faults` is what the next answers do."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults = folder, []
        self.asked: list[tuple[str, str]] = []
        self.etags, self.heads = False, 0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.heads += 1
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path, asked = self.server.folder / unquote(self.path).strip("/"), self.headers["Range"]
        fault = self.server.faults.pop(0) if asked and self.server.faults else ""
        if asked:
            self.server.asked.append((self.path, asked))
        if fault == "slow":
            time.sleep(1.5)
        if fault == "500" or not path.exists():
            return self.give(500 if fault else 404, b"", body)
        if path.is_dir():
            links = "".join(f'<a href="{p.name}">{p.name}</a>' for p in sorted(path.iterdir()))
            return self.give(200, links.encode(), body, kind="text/html")
        content = path.read_bytes()
        if asked and fault != "whole":
            first, last = asked.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            if fault == "short":
                part = part[: len(part) // 2]
            if fault == "garbage":
                part = b"\xff" * len(part)
            if fault == "cut":  # announces more than it sends
                return self.give(206, part[:100], body, length=len(part), close=True)
            return self.give(206, part, body)
        return self.give(200, content, body)

    def give(self, code, content, body, length=None, close=False, kind="application/octet-stream"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Accept-Ranges", "bytes")
        if self.server.etags:
            self.send_header("ETag", f'"{zlib.crc32(self.path.encode())}"')
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(content)
        self.close_connection = close


def ours(folder: Path, documents: int = 300, length: int = 12) -> Path:
    """A prepared data set of two shards."""
    (folder / "train").mkdir(parents=True)
    shards, rng = [], np.random.default_rng(0)
    for number in range(2):
        offsets = np.concatenate(([0], np.cumsum(rng.integers(1, 2 * length, documents))))
        tokens = rng.integers(7, 1000, offsets[-1]).astype(np.uint16)
        path = folder / f"train/shard-{number:05d}.arrow"
        names = ["some/where"] * documents
        shards.append(write_shard(path, tokens, offsets, names, names))
    counts = {
        "documents": 2 * documents, "tokens": sum(info.tokens for info in shards),
    }  # fmt: skip
    train = {"shards": shards, "domains": {"some/where": counts}}
    splits = {"train": train, "valid": {"shards": [], "domains": {}}}
    write_manifest(
        folder, vocab_size=1000, eos_id=7, eos_token="", splits=splits, skipped_documents={},
        settings={},
    )  # fmt: skip
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "_SYSTEMS", {})
    started = Server(tmp_path)
    yield started
    started.shutdown()


def same_windows(here, there, length=50):
    assert there.shard_tokens == here.shard_tokens
    for shard, size in enumerate(here.shard_tokens):
        for start in range(0, size - length, max(size // 7, 1)):
            one, other = (store.window(shard, start, start + length) for store in (here, there))
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
            edges = [store.edges(shard, start, start + length).tolist() for store in (here, there)]
            assert edges[0] == edges[1]


def test_arrays_and_indexed_data_of_a_web_server(server, tmp_path):
    for name in ("a.npy", "b.npy"):
        write(tmp_path / "plain" / name, documents(300, seed=ord(name[0])))
    write_megatron(tmp_path / "indexed/a", made(200))
    write_mds(tmp_path / "mds", arrays(30))
    (tmp_path / "files.txt").write_text("plain/b.npy\nplain/a.npy\n")
    for path in (
        "plain/a.npy", "plain/", "plain/*.npy", "files.txt", "indexed/a", "indexed/a.bin", "mds/",
    ):  # fmt: skip
        there = open_store(f"{server.address}/{path}", raw=RAW)
        same_windows(open_store(f"{tmp_path}/{path}", raw=RAW), there)
    loader = open_loader(f"{server.address}/plain/", 16, seed=1, raw=RAW)
    assert loader.batch(range(8)).tokens_BS.shape == (8, 16)


def test_a_prepared_data_set(server, tmp_path, capsys):
    """The same windows, ids and fingerprint as here; of a large shard only what windows need."""
    for size in (300, 40_000):
        here = open_store(ours(tmp_path / f"data-{size}", size))
        there = open_store(f"{server.address}/data-{size}/")
        server.asked.clear()
        there.window(0, 100, 150)
        assert len(server.asked) <= 6
        same_windows(here, there)
        assert there.fingerprint == here.fingerprint
        assert there.vocab_size == 1000 and there.path == f"{server.address}/data-{size}/"
    for packing in ("concat", "best_fit"):
        one, other = (
            open_loader(path, 16, seed=1, packing=packing)
            for path in (tmp_path / "data-300", f"{server.address}/data-300/")
        )
        assert one.fingerprint == other.fingerprint
        assert (one.batch(range(8)).tokens_BS == other.batch(range(8)).tokens_BS).all()
    assert main(["inspect", f"{server.address}/data-300/", "--window", "16"]) == 0
    assert "some/where" in capsys.readouterr().out
    with pytest.raises(UserError, match="data-300/: is read by windows, .*; copy the data set"):
        open_loader(f"{server.address}/data-300/", 16, seed=1, domain="some/where")


def test_a_prepared_data_set_that_changed(server, tmp_path):
    path = ours(tmp_path / "data") / "train/shard-00001.arrow"
    whole, address = path.read_bytes(), f"{server.address}/data/"
    store = open_store(address)
    path.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    with pytest.raises(UserError, match=rf"^{address}train/shard-00001.arrow: tokens .* not those"):
        store.window(1, 0, store.shard_tokens[1])
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"^{address}train/.*1.arrow: has \d+ bytes, dataset.json"):
        open_store(address)
    path.unlink()
    with pytest.raises(MissingFileError, match=rf"^{address}train/shard-00001.arrow: is not there"):
        open_store(address)


def test_only_the_blocks_of_a_window_are_asked_for_once(server, tmp_path):
    write(tmp_path / "a.npy", many(500_000))
    store = open_store(f"{server.address}/a.npy", raw=RAW)
    server.asked.clear()
    block = remote.BLOCK_BYTES // 2  # tokens
    store.window(0, block + 5, 3 * block - 5)
    store.window(0, block + 5, 3 * block - 5)
    assert server.asked == [("/a.npy", f"bytes={2 * block}-{6 * block - 1}")]


@pytest.mark.parametrize(
    "fault, said",
    [
        ("500", "500"),
        ("short", "it gives 32768 bytes instead of 65536; does it serve ranges?"),
        ("whole", r"it gives \d+ bytes instead of 65536; does it serve ranges?"),
        ("cut", ""),
        ("slow", ""),
    ],
)
def test_faults_are_tried_again_and_then_named(fault, said, server, tmp_path, monkeypatch, caplog):
    write(tmp_path / "a.npy", many(500_000))
    here = open_store(tmp_path / "a.npy", raw=RAW)
    there = open_store(f"{server.address}/a.npy", raw=RAW)
    if fault == "slow":
        monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    caplog.set_level(logging.WARNING, logger="emotrain")
    block = remote.BLOCK_BYTES // 2
    server.faults = [fault]
    found = there.window(0, block, block + 50)
    assert np.array_equal(found.tokens, here.window(0, block, block + 50).tokens)
    assert caplog.text.count(f"/a.npy: bytes {2 * block} to {4 * block}: ") == 1
    assert caplog.text.count("attempt 2") == 1
    server.faults = [fault] * 10
    with pytest.raises(
        RunError, match=rf"/a.npy: bytes {4 * block} to .*, after 4 attempts .*{said}"
    ):
        there.window(0, 2 * block, 2 * block + 50)
    assert 10 - len(server.faults) == remote.ATTEMPTS


def test_garbage_is_no_token_of_the_vocabulary(server, tmp_path):
    """Without checksums, this is what can be seen of it."""
    write(tmp_path / "a.npy", many(500_000))
    store = open_store(f"{server.address}/a.npy", raw=RAW)
    server.faults = ["garbage"]
    with pytest.raises(UserError, match=r"/a.npy: token \d+ is 65535, the vocabulary has 1000"):
        store.window(0, remote.BLOCK_BYTES // 2, remote.BLOCK_BYTES // 2 + 50)


def test_what_is_not_there(server, tmp_path):
    write(tmp_path / "a.npy", documents(30))
    with pytest.raises(MissingFileError, match="/gone.npy: is not there, or not for you"):
        open_store(f"{server.address}/gone.npy", raw=RAW)
    with pytest.raises(UserError, match="there are no such files at this address"):
        open_store(f"{server.address}/*.idx", raw=RAW)
    with pytest.raises(UserError, match="nothing://x/a.npy: .*give s3://, gs://, https://"):
        open_store("nothing://x/a.npy", raw=RAW)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/dataset.json").write_text("{}")
    with pytest.raises(UserError, match='http://.*/ours/dataset.json: has no "format"'):
        open_store(f"{server.address}/ours/")
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1]}\n')
    with pytest.raises(UserError, match="a.jsonl: columns are read from this machine"):
        open_store(f"{server.address}/a.jsonl", raw=RAW)


def test_a_server_that_is_gone_is_one_line(server, tmp_path):
    write(tmp_path / "a.npy", documents(30))
    server.shutdown()
    server.server_close()
    with pytest.raises((RunError, MissingFileError), match="/a.npy: .*"):
        open_store(f"{server.address}/a.npy", raw=RAW)


def test_opening_a_file_takes_few_requests(server, tmp_path):
    """Its size and its start; without an ETag its middle and its end are part of what it is."""
    write(tmp_path / "a.npy", many(2_000_000))
    write_megatron(tmp_path / "b", made(2000, longest=3))
    for name, etags, most in (("a.npy", False, 3), ("a.npy", True, 1), ("b.idx", True, 1)):
        server.etags, server.heads = etags, 0
        server.asked.clear()
        open_store(f"{server.address}/{name}", raw=RAW)
        assert (server.heads, len(server.asked)) == (1 + (name == "b.idx"), most), name
    assert SAMPLE_BYTES < remote.BLOCK_BYTES


def s3(monkeypatch):
    """A server that speaks S3, started here: its scheme, file system and end."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    import s3fs

    return "s3", s3fs.S3FileSystem(), server.stop


def gs(monkeypatch):
    """The same of Google's."""
    for name, value in (
        ("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"),  # asks for credentials for each request
        ("NO_GCE_CHECK", "true"),
    ):
        monkeypatch.setenv(name, value)
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    port = server._api._httpd.server_address[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    import gcsfs

    return "gs", gcsfs.GCSFileSystem(), server.stop


@pytest.mark.long
@pytest.mark.parametrize("start", [s3, gs], ids=lambda start: start.__name__)
def test_an_object_store(start, tmp_path, monkeypatch):
    """That data there are those here; what is asked for to open them; and its end."""
    scheme, system, stop = start(monkeypatch)
    monkeypatch.setattr(remote, "_SYSTEMS", {})
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    bucket = f"{scheme}://bucket"
    try:
        for name in ("deep/a.npy", "b.npy"):
            write(tmp_path / "plain" / name, many(200_000, seed=len(name)))
        write_megatron(tmp_path / "indexed/a", made(200))
        write_mds(tmp_path / "mds", arrays(30))
        ours(tmp_path / "ours")
        system.mkdir("bucket")
        system.put(f"{tmp_path}/", "bucket/tokens/", recursive=True)
        calls, once = [], remote.RemoteFiles._once

        def counted(files, name, *args, **options):
            calls.append(name)
            return once(files, name, *args, **options)

        monkeypatch.setattr(remote.RemoteFiles, "_once", counted)
        for path, asked in (
            # A listing for all files, and the start of each; of an index all, of tokens nothing.
            ("plain/", {"find": 1, "cat_file": 2}),
            ("plain/*.npy", {"glob": 1, "cat_file": 1}),
            ("indexed/a", {"info": 2, "cat_file": 1}),
            ("indexed/", {"find": 1, "cat_file": 1}),
            ("mds/", {"find": 1, "cat_file": 4}),
            # Its manifest alone; no tokenizer lies there.
            ("ours/", {"find": 1, "cat_file": 1}),
        ):
            calls.clear()
            remote.files_of(bucket)._blocks.clear()
            there = open_store(f"{bucket}/tokens/{path}", raw=RAW)
            assert dict(Counter(calls)) == asked, path
            same_windows(open_store(f"{tmp_path}/{path}", raw=RAW), there)
            assert path != "ours/" or calls.count("cat_file") <= 3  # a block or two a shard
        first = open_store(f"{bucket}/tokens/plain/", raw=RAW).fingerprint
        write(tmp_path / "plain/b.npy", many(200_000, seed=99))
        system.put(f"{tmp_path}/plain/b.npy", "bucket/tokens/plain/b.npy")
        assert open_store(f"{bucket}/tokens/plain/", raw=RAW).fingerprint != first
        with pytest.raises(MissingFileError, match="gone.npy: is not there, or not for you"):
            open_store(f"{bucket}/gone.npy", raw=RAW)
    finally:
        stop()
    with pytest.raises(RunError, match=f"{bucket}/tokens/plain/b.npy: .* after 4 attempts"):
        open_store(f"{bucket}/tokens/plain/b.npy", raw=RAW).window(0, 100_000, 100_100)
