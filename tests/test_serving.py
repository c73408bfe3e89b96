"""The server as its clients meet it: over a socket, with the client that they use. What it answers
is what an engine generates alone; and nothing that comes over the network makes it fall over."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.commands import serve as command
from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.generation.engine import Engine, EngineLimits
from emotrain.generation.loading import encode, load_subset, load_weights, open_generator
from emotrain.generation.request import GenerationRequest, read_pool
from emotrain.generation.sampling import Sampling
from emotrain.model.router import RoutingRequest
from emotrain.serving.connection import server_config
from emotrain.serving.metrics import MOST_MODELS, ServerMetrics
from emotrain.serving.worker import EngineEndedError, Worker
from emotrain.training import run as run_module
from tests.conftest import ROOT, tiny_settings
from tests.test_serving_connections import dribble

EXTRA = "needs the serve extra: pip install -e '.[serve,test]'"
httpx, openai, uvicorn, _ = (
    pytest.importorskip(package, reason=EXTRA)
    for package in ("httpx", "openai", "uvicorn", "fastapi")
)

PROMPT = "the oven and the"


@pytest.fixture(scope="module")
def run_folder(tiny_data, tmp_path_factory) -> Path:
    """A trained model, and two subsets beside it."""
    folder = tmp_path_factory.mktemp("served")
    settings = tiny_settings(tiny_data, folder / "run")
    run_module.train(config_from_dict(settings), Ranks())
    for domain in ("kitchen", "harbour"):
        options = ["--calibration", str(tiny_data), "--domain", domain, "--keep", "0.5"]
        out = str(folder / f"{domain}.json")
        if main(["select", str(folder / "run"), *options, "--out", out]):
            raise AssertionError(domain)
    return folder


@contextmanager
def serving(*words: str):
    """`emotrain serve` in a thread; gives its address and its application."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([*words, "--port", "0"])
    keys = []
    if args.api_key_file:
        from emotrain.serving.gate import read_keys

        keys = read_keys(args.api_key_file)
    gate, _ = command._application(args, keys)
    server = uvicorn.Server(server_config(gate, "127.0.0.1", 0, args.connections, 5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", gate
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(run_folder):
    subsets = [f"--subset={name}={run_folder / name}.json" for name in ("kitchen", "harbour")]
    folder = ["--subset-folder", str(run_folder), "--context", "128", "--waiting", "12"]
    with serving(str(run_folder / "run"), *subsets, *folder) as (address, gate):
        yield address, gate


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(run_folder):
    """Text that an engine of its own generates with one sequence in it."""
    folder, config, tokenizer = open_generator(run_folder / "run")
    model = load_weights(folder, "cpu")

    def generate(prompt: str, name: str = "run", **options):
        subset = pool = None
        if name.startswith("auto:"):
            pool = read_pool(name, "", config.model)
        elif name != "run":
            subset = load_subset(run_folder / f"{name}.json", folder, config)
        engine = Engine(model, EngineLimits(1, 128, 128), tokenizer)
        options = {"max_tokens": 8, **options}
        request = GenerationRequest(encode(tokenizer, prompt), Sampling(**options), subset, pool)
        found = engine.submit(request)
        while engine.busy:
            engine.step()
        return found

    generate.model, generate.tokenizer = model, tokenizer
    return generate


def complete(client, model: str = "run", prompt=PROMPT, **options):
    options = {"max_tokens": 8, "temperature": 0, **options}
    return client.completions.create(model=model, prompt=prompt, **options)


# ---- answers


def test_models_are_the_whole_one_its_subsets_and_the_prompts_own_choice(client):
    assert [model.id for model in client.models.list()] == [
        "run",
        "kitchen",
        "harbour",
        "auto:0.25",
    ]
    assert client.models.retrieve("harbour").id == "harbour"


@pytest.mark.parametrize("model", ["run", "kitchen", "harbour", "auto:0.5"])
def test_a_completion_is_what_the_engine_generates_alone(client, alone, model):
    found = complete(client, model)
    expected = alone(PROMPT, model)
    assert found.choices[0].text == expected.text
    assert found.usage.prompt_tokens == len(expected.request.tokens)
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.choices[0].finish_reason == expected.finish_reason


def test_subsets_in_one_batch_do_not_change_each_other(client, alone):
    names = ["run", "kitchen", "harbour", "auto:0.5"] * 2
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        found[index] = complete(client, names[index], max_tokens=24).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, name in enumerate(names):
        assert found[index] == alone(PROMPT, name, max_tokens=24).text, name


def test_prompts_may_be_several_and_token_ids(client, alone):
    texts = [PROMPT, "a court"]
    ids = [encode(alone.tokenizer, text) for text in texts]
    expected = [alone(text).text for text in texts]
    for prompt in (texts, ids):
        assert [choice.text for choice in complete(client, prompt=prompt).choices] == expected
    assert complete(client, prompt=ids[0]).choices[0].text == expected[0]


def test_choices_are_drawn_by_their_own_seeds(client, alone):
    found = complete(client, n=3, temperature=1.0, seed=5).choices
    assert [choice.index for choice in found] == [0, 1, 2]
    for index, choice in enumerate(found):
        assert choice.text == alone(PROMPT, temperature=1.0, seed=5 + index).text


def test_a_stop_text_ends_the_text(client, alone):
    whole = alone(PROMPT).text
    found = complete(client, stop=[whole[3:5]]).choices[0]
    assert found.text == whole[: whole.index(whole[3:5])] and found.finish_reason == "stop"


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"echo": True, "logprobs": 2}, {"n": 2}])
def test_a_stream_is_the_answer_in_pieces(client, options):
    whole = complete(client, seed=1, **options)
    pieces = list(
        complete(client, seed=1, stream=True, stream_options={"include_usage": True}, **options)
    )
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices
    for choice in whole.choices:
        own = [p.choices[0] for p in pieces[:-1] if p.choices[0].index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.finish_reason for piece in own if piece.finish_reason] == [
            choice.finish_reason
        ]
        if "logprobs" in options:
            for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                joined = [entry for p in own for entry in getattr(p.logprobs, key)]
                assert joined == getattr(choice.logprobs, key), key


def test_an_echo_scores_the_prompt_as_evaluation_harnesses_ask_for_it(client, alone):
    """`lm-eval --model local-completions` sends ids, asks for an echo and one token, and calls a
    token greedy where its float equals the best one's."""
    ids = [encode(alone.tokenizer, text) for text in (PROMPT, "a court may")]
    found = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1, seed=1234)
    for tokens, choice in zip(ids, found.choices, strict=True):
        with torch.inference_mode():
            batch = PackedBatch.from_rows(torch.tensor([tokens]))
            output = alone.model(batch, RoutingRequest())
            logprobs = torch.log_softmax(alone.model.logits(output), dim=1)
        own, top = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert len(own) == len(top) == len(tokens) + 1 and own[0] is None
        for i, token in enumerate(tokens[1:], start=1):
            assert own[i] == pytest.approx(float(logprobs[i - 1, token]), abs=1e-4)
            greedy = int(logprobs[i - 1].argmax()) == token
            assert (own[i] == max(top[i].values())) == greedy
        assert choice.text.startswith(alone.tokenizer.decode(tokens))


def test_tokens_there_and_back(server, alone):
    address, _ = server
    tokens = httpx.post(f"{address}/tokenize", json={"prompt": PROMPT}).json()
    assert tokens["tokens"] == encode(alone.tokenizer, PROMPT)
    back = httpx.post(f"{address}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": PROMPT}


def test_a_harness_learns_what_it_needs_of_the_tokenizer(server, alone):
    """`lm-eval` asks for the id of the end of a document by its text, which inside of a text is
    ordinary characters."""
    address, _ = server
    end = httpx.get(f"{address}/tokenizer_info").json()["eos_token"]
    body = {"prompt": end, "add_special_tokens": False}
    found = httpx.post(f"{address}/tokenize", json=body).json()
    assert found["tokens"] == [alone.tokenizer.eos_id]
    found = httpx.post(f"{address}/tokenize", json={"prompt": f"{end} "}).json()
    assert alone.tokenizer.eos_id not in found["tokens"]
    for path, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [1]})):
        found = httpx.post(f"{address}/{path}", json={**body, "model": "gpt-4"})
        assert found.status_code == 404


def test_subsets_come_and_go(server, client, run_folder):
    address, _ = server
    body = {"subset_name": "more", "subset_path": "harbour.json"}
    assert httpx.post(f"{address}/v1/load_subset", json=body).status_code == 200
    assert complete(client, "more").choices[0].text == complete(client, "harbour").choices[0].text
    name = {"subset_name": "more"}
    assert httpx.post(f"{address}/v1/unload_subset", json=name).status_code == 200
    assert httpx.post(f"{address}/v1/unload_subset", json=name).status_code == 404
    with pytest.raises(openai.NotFoundError, match="'more' is not served; there are run, kitchen"):
        complete(client, "more")
    for path, status in (
        ("../" * 9 + "etc/passwd", 403),
        ("/etc/passwd", 403),
        ("no.json", 400),
        ("\0", 400),
        ("a" * 5000, 400),
        (".", 400),
    ):
        found = httpx.post(f"{address}/v1/load_subset", json={**body, "subset_path": path})
        assert found.status_code == status, found.text


def test_what_happened_is_told_to_prometheus(server, client):
    address, _ = server
    complete(client, "harbour")
    text = httpx.get(f"{address}/metrics").text
    assert 'emotrain_generated_tokens_total{model="harbour"}' in text
    assert 'emotrain_time_to_first_token_seconds_count{model="harbour"}' in text
    assert 'emotrain_requests_total{code="200",path="/v1/completions"}' in text
    assert httpx.get(f"{address}/health").status_code == 200
    assert httpx.get(f"{address}/version").json().keys() == {"version"}


def test_names_that_clients_make_up_do_not_make_metrics_grow(server, client):
    address, gate = server
    for share in ("0.5", "0.50", "0.500"):
        complete(client, f"auto:{share}", max_tokens=1)
    text = httpx.get(f"{address}/metrics").text
    assert 'emotrain_prompt_tokens_total{model="auto:K"}' in text and "auto:0.5" not in text
    metrics = ServerMetrics(None)
    for number in range(MOST_MODELS + 9):
        metrics.read(f"model{number}", 1)
    series = metrics.text().decode().count("emotrain_prompt_tokens_total{")
    assert series == MOST_MODELS + 1


# ---- what cannot be

BODY = {"model": "run", "prompt": PROMPT, "max_tokens": 4}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gpt-4"}, 404, "there are run, kitchen, harbour and auto:K"),
        ({"model": "auto:99"}, 400, "99"),
        ({"prompt": "word " * 200}, 400, "together more than the 128 of a sequence"),
        ({"prompt": ""}, 400, "no tokens"),
        ({"prompt": [1, 99999]}, 400, "token ids 1 to 99999"),
        ({"prompt": []}, 400, "prompt"),
        ({"n": 1000}, 400, "n: Input should be less than or equal to 16"),
        ({"n": 16}, 400, "16 sequences at once are above the limit of 12"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"logprobs": 101}, 400, "logprobs"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": []}, 400, "tools: Extra inputs are not permitted"),
        ({"best_of": 3}, 400, "best_of"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_is_refused_in_one_line(server, change, status, says):
    found = httpx.post(f"{server[0]}/v1/completions", json={**BODY, **change})
    error = found.json()["error"]
    assert found.status_code == status and says in error["message"], error
    assert "\n" not in error["message"] and error["code"] == str(status)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model":' + b"[" * 3000, b"NaN"]
)
def test_bad_json_is_no_defect(server, content):
    headers = {"Content-Type": "application/json"}
    found = httpx.post(f"{server[0]}/v1/completions", content=content, headers=headers)
    assert found.status_code == 400 and found.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_refused_by_its_type(server, kind):
    content, headers = json.dumps(BODY).encode(), {"Content-Type": kind} if kind else {}
    found = httpx.post(f"{server[0]}/v1/completions", content=content, headers=headers)
    error = found.json()["error"]
    assert found.status_code == 415 and error["param"] == "content-type", error
    assert error["message"] == f"content-type: {kind or 'none'} is not read; send application/json"


def test_a_body_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr("emotrain.serving.gate.BODY_S", 0.3)
    host, port = server[0].removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9999\r\n"
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
        assert b"HTTP/1.1 408" in dribble(slow, b" ")


def test_a_body_above_the_limit_is_not_read(server):
    def pieces():
        for _ in range(9):
            yield b" " * 1_000_000

    for content in (b" " * 5_000_000, pieces()):
        try:
            found = httpx.post(f"{server[0]}/v1/completions", content=content)
        except httpx.WriteError:  # the server has closed the connection
            continue
        assert found.status_code == 413


def test_a_conversation_needs_a_template(client):
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.UnprocessableEntityError, match="no chat template"):
        client.chat.completions.create(model="run", messages=messages)


def eventually(condition) -> None:
    """The server's work goes on in threads: true within a minute, on any machine."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


def hold(gate, monkeypatch) -> tuple[Engine, threading.Event]:
    """After its first token nothing of a request goes on until the event is set."""
    engine = gate.app.state.service.worker.engine
    step, released = engine.step, threading.Event()

    def held():
        running = [one.generation for one in engine._running]
        if not released.is_set() and any(generation.tokens for generation in running):
            time.sleep(0.005)
            return []
        return step()

    monkeypatch.setattr(engine, "step", held)
    return engine, released


@pytest.mark.parametrize("stream", [True, False])
def test_work_for_a_client_that_left_stops(server, monkeypatch, stream):
    address, gate = server
    engine, _ = hold(gate, monkeypatch)
    body = {**BODY, "max_tokens": 50, "stream": stream, "ignore_eos": True}
    with httpx.Client() as client:
        try:
            with client.stream("POST", f"{address}/v1/completions", json=body, timeout=0.5) as got:
                lines = got.iter_lines()  # kept: without it the connection is closed at once
                next(lines)
                assert engine.num_running == 1
        except httpx.TimeoutException:
            assert not stream
    eventually(lambda: not engine.busy)
    assert engine.cache.pages_in_use == 0
    reasons = gate.app.state.service.metrics.text().decode()
    assert 'emotrain_sequences_total{model="run",reason="cancelled"}' in reasons


def test_more_than_may_wait_are_asked_to_come_again(server, monkeypatch):
    address, gate = server
    engine, released = hold(gate, monkeypatch)
    body = {**BODY, "n": 12, "max_tokens": 40, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as got:
        lines = got.iter_lines()
        next(lines)
        found = httpx.post(f"{address}/v1/completions", json=BODY)
        assert found.status_code == 429 and int(found.headers["Retry-After"]) >= 1
        released.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 200


def test_a_defect_ends_its_requests_and_not_the_server(server, monkeypatch, caplog):
    address, gate = server
    engine = gate.app.state.service.worker.engine

    def broken():
        raise ZeroDivisionError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", broken)
        assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 500
    assert "not today" in caplog.text
    assert not engine.busy and engine.cache.pages_in_use == 0
    assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 200


def test_a_defect_is_told_to_who_reads_a_stream(server, monkeypatch):
    address, gate = server
    engine, released = hold(gate, monkeypatch)
    body = {**BODY, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as got:
        lines = got.iter_lines()
        next(lines)

        def broken():
            raise ZeroDivisionError

        monkeypatch.setattr(engine, "step", broken)
        events = [line for line in lines if line]
    assert json.loads(events[-1][6:])["error"]["code"] == "500"


def test_a_reader_that_is_too_slow_is_left():
    """Its sequences have ended long before; the rest of its text waits for it no longer."""
    from emotrain.serving.app import EventStream

    left = []

    async def stuck() -> None:
        async def events():
            try:
                while True:
                    yield b"data: {}\n\n"
            finally:
                left.append("events")

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async def receive():
            await asyncio.Event().wait()

        response = EventStream(events(), time.monotonic() + 0.05, lambda: left.append("work"))
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        left.append("response")

    asyncio.run(asyncio.wait_for(stuck(), 60))
    assert left == ["events", "work", "response"]


def test_a_client_that_has_gone_before_its_stream_begins_leaves_no_work():
    """Nothing was ever read of its events, so nothing in them can end its sequences."""
    from emotrain.serving.app import EventStream

    left = []

    async def gone() -> None:
        async def events():
            yield b"data: {}\n\n"

        async def send(message) -> None:
            await asyncio.Event().wait()

        async def receive():
            return {"type": "http.disconnect"}

        response = EventStream(events(), time.monotonic() + 60, lambda: left.append("work"))
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)

    asyncio.run(asyncio.wait_for(gone(), 60))
    assert left == ["work"]


def test_time_is_up_for_an_answer_that_takes_too_long(server, monkeypatch):
    address, gate = server
    engine, _ = hold(gate, monkeypatch)
    service = gate.app.state.service
    object.__setattr__(service, "seconds", 0.1)
    try:
        found = httpx.post(f"{address}/v1/completions", json=BODY)
        assert found.status_code == 503 and "more than 0.1 s" in found.json()["error"]["message"]
        with httpx.stream(
            "POST", f"{address}/v1/completions", json={**BODY, "stream": True}
        ) as got:
            events = [line for line in got.iter_lines() if line]
        assert json.loads(events[-1][6:])["error"]["code"] == "503"
    finally:
        object.__setattr__(service, "seconds", 300.0)
    eventually(lambda: not engine.busy)


def worker_of(run_folder) -> Worker:
    folder, _, tokenizer = open_generator(run_folder / "run")
    model = load_weights(folder, "cpu")
    worker = Worker(Engine(model, EngineLimits(2, 128, 64), tokenizer), ServerMetrics(None), 8)
    worker.start()
    return worker


def test_without_its_engine_the_server_answers_503(run_folder, monkeypatch):
    """No request waits for a thread that has ended, whatever ended it."""
    worker = worker_of(run_folder)

    async def ask() -> None:
        sampling = Sampling(max_tokens=40, ignore_end=True)
        ticket = await worker.submit("run", [GenerationRequest([5], sampling)])

        def broken(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(worker.metrics, "queue", broken)
        delta = None
        while delta is None or delta.finish_reason is None:
            *_, (_, delta) = await asyncio.wait_for(ticket.read(), 60)
        assert delta.finish_reason == "cancelled"
        with pytest.raises(EngineEndedError, match="has ended"):
            await worker.submit("run", [GenerationRequest([5])])
        worker.cancel(ticket)

    asyncio.run(ask())
    assert not worker.alive and not worker.engine.busy


def test_who_leaves_while_the_request_goes_in_leaves_nothing_behind(run_folder):
    worker = worker_of(run_folder)
    engine = worker.engine
    blocked, free = threading.Event(), threading.Event()

    async def ask() -> None:
        worker._post(lambda: (blocked.set(), free.wait(60)))
        blocked.wait(60)
        request = GenerationRequest([5], Sampling(max_tokens=40, ignore_end=True))
        task = asyncio.create_task(worker.submit("run", [request]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        free.set()
        ticket = await worker.submit("run", [GenerationRequest([5], Sampling(max_tokens=1))])
        ((_, delta),) = await asyncio.wait_for(ticket.read(), 60)
        assert delta.finish_reason == "length"

    asyncio.run(ask())
    eventually(lambda: not engine.busy)
    assert worker.alive
    worker.stop()
    assert not worker._tickets


def test_a_file_that_was_cut_short_is_503_and_the_server_goes_on(run_folder, tmp_path):
    shutil.copytree(run_folder / "run", tmp_path / "run")
    with serving(str(tmp_path / "run"), "--memory", "100MB") as (address, _):
        for file in (tmp_path / "run").rglob("*.safetensors"):
            os.truncate(file, 100)
        for _ in range(2):
            found = httpx.post(f"{address}/v1/completions", json=BODY)
            assert found.status_code == 503, found.text
            assert "cut short" in found.json()["error"]["message"]
        assert httpx.get(f"{address}/health").status_code == 200
        assert "emotrain_expert_misses" in httpx.get(f"{address}/metrics").text


@pytest.mark.parametrize("remove", [False, True], ids=["cut short", "removed"])
def test_others_go_on_where_experts_cannot_be_read_any_more(run_folder, tmp_path, remove):
    """A subset whose experts are in memory is answered, whole and in the same words, beside
    requests that need an expert from a file that is damaged or gone."""
    shutil.copytree(run_folder / "run", tmp_path / "run")
    words = [str(tmp_path / "run"), "--memory", "100MB"]
    words.append(f"--subset=harbour={run_folder / 'harbour.json'}")
    few, all_experts = (
        {**BODY, "model": model, "max_tokens": 16, "temperature": 0} for model in ("harbour", "run")
    )
    with serving(*words) as (address, _):

        def post(body):
            return httpx.post(f"{address}/v1/completions", json=body, timeout=60)

        asked = post(few)
        assert asked.status_code == 200, asked.text
        before = asked.json()["choices"]
        for file in (tmp_path / "run").rglob("*.safetensors"):
            if remove:
                file.unlink()
            else:
                os.truncate(file, 100)
        with ThreadPoolExecutor(4) as clients:
            answers = [clients.submit(post, body) for body in [few, all_experts] * 4]
        for answer, of_few in zip(answers, [True, False] * 4, strict=True):
            found = answer.result()
            if of_few:
                assert found.status_code == 200 and found.json()["choices"] == before
            else:
                # What is mapped already can be read after its name is gone.
                assert found.status_code == 503 or (remove and found.status_code == 200)
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_key_is_needed_where_there_is_one(run_folder, tmp_path):
    (tmp_path / "keys").write_text("open-sesame\nanother-key\n")
    words = ["--api-key-file", str(tmp_path / "keys")]
    with serving(str(run_folder / "run"), *words) as (address, _):
        for key, status in (("", 401), ("open-sesam", 401), ("open-sesame", 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            found = httpx.get(f"{address}/v1/models", headers=headers)
            assert found.status_code == status
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.get(f"{address}/docs").status_code == 401


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "others can reach it; give --api-key-file"),
        (["--subset", "rust.json"], "give a name and a file"),
        (["--subset", "a=x.json", "--subset", "a=y.json"], "given twice"),
        (["--subset", "a/b=harbour.json"], "give letters, digits"),
        (["--subset", "run=harbour.json"], "name of the full model"),
        (["--subset", "a=no.json"], "no such subset"),
        (["--api-key-file", "no.txt"], "No such file"),
        (["--waiting", "0"], "--waiting 0: give 1 or more"),
    ],
    ids=str,
)
def test_a_server_that_cannot_be_says_so(run_folder, words, says, capsys, monkeypatch):
    monkeypatch.chdir(run_folder)
    assert main(["serve", "run", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_signal_lets_what_runs_end(run_folder):
    """The program itself: it says where it is, and leaves with 0 when it has drained."""
    words = ["serve", str(run_folder / "run"), "--port", "0", "--context", "256", "--json"]
    server = subprocess.Popen(
        [sys.executable, "-m", "emotrain.cli", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        said = json.loads(server.stdout.readline())
        address = said["address"]
        assert said["models"] == ["run"]
        body = {**BODY, "max_tokens": 100, "stream": True, "ignore_eos": True}
        with (
            ExitStack() as stack,
            httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as got,
        ):
            lines = got.iter_lines()
            next(lines)
            # A connection that is kept open for further requests keeps nobody waiting.
            stack.enter_context(httpx.Client()).get(f"{address}/health")
            server.send_signal(signal.SIGTERM)
            events = [line[6:] for line in lines if line]
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
            assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
