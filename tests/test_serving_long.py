"""The server under what others send it: cases made of its published schema, an evaluation harness
as its package comes, and ten thousand requests of which a tenth is given up."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from emotrain.batch import PackedBatch
from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.generation.loading import encode, load_subset, load_weights, open_generator
from emotrain.model.router import RoutingRequest
from emotrain.training import run as run_module
from tests.conftest import ROOT, WORDS, tiny_settings

httpx = pytest.importorskip("httpx", reason="needs the test extra: pip install -e '.[test]'")
pytest.importorskip("fastapi", reason="needs the serve extra: pip install -e '.[serve,test]'")

pytestmark = pytest.mark.long

MODELS = ("run", "kitchen", "harbour", "auto:0.5")
REQUESTS, CLIENTS = 10_000, 16


@pytest.fixture(scope="module")
def run_folder(tiny_data, tmp_path_factory) -> Path:
    """A trained model, and two subsets beside it."""
    folder = tmp_path_factory.mktemp("served")
    run_module.train(config_from_dict(tiny_settings(tiny_data, folder / "run")), Ranks())
    for domain in ("kitchen", "harbour"):
        options = ["--calibration", str(tiny_data), "--domain", domain, "--keep", "0.5"]
        assert not main(["select", str(folder / "run"), *options, "--out", f"{folder / domain}"])
    return folder


@contextmanager
def serving(folder: Path, *words: str):
    """The program in a process of its own: its address and its number."""
    subsets = [f"--subset={name}={folder / name}" for name in ("kitchen", "harbour")]
    command = ["serve", str(folder / "run"), *subsets, "--port", "0", "--json", *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "emotrain.cli", *command],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
        )
    try:
        yield json.loads(process.stdout.readline())["address"], process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (folder / "log").read_text()
        assert "Traceback" not in (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


def tool(name: str, package: str) -> str:
    """A program that a package brings, from any environment on the path."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} on the path: pip install {package}, best in a venv of its own")
    return found


# ---- cases of the schema


HOOKS = """\
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 2:
        body["model"] = ("run", "kitchen", "auto:0.5")[len(body["model"]) % 3]
    return body
"""
"""Made-up names of models would end every case with a 404: every other one becomes a real one."""


@pytest.mark.timeout(3600)
def test_no_case_of_the_published_schema_makes_it_fail(run_folder):
    """Answers have documented codes and types, whatever is sent, and the server stays there. What
    the schema cannot say may be refused: a token that this model does not have, for example."""
    program = tool("schemathesis", "schemathesis")
    (run_folder / "hooks.py").write_text(HOOKS)
    options = ["--max-examples", "100", "--seed", "1", "--no-color"]
    options += ["--exclude-checks", "positive_data_acceptance"]
    with serving(run_folder, "--subset-folder", str(run_folder), "--context", "64") as (address, _):
        done = subprocess.run(
            [program, "run", f"{address}/openapi.json", *options],
            capture_output=True,
            text=True,
            timeout=1500,
            cwd=run_folder,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(run_folder)},
            check=False,
        )
        assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
        assert httpx.get(f"{address}/health").status_code == 200


# ---- an evaluation harness

TASK = """\
task: domains
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path) -> Path:
    rng, rows = random.Random(0), []
    for _ in range(20):
        text = " ".join(rng.choice(WORDS["kitchen"]) for _ in range(4))
        choices = [" ".join(rng.choice(WORDS[d]) for _ in range(2)) for d in WORDS]
        rows.append({"text": text, "choices": choices, "label": 0})
    (folder / "tasks").mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "domains.yaml").write_text(TASK.format(data=data))
    return folder / "tasks"


def harness(program: str, address: str, model: str, tasks: Path, out: Path) -> list[dict]:
    """What the harness logs of each document."""
    args = f"model={model},base_url={address}/v1/completions,num_concurrent=4"
    done = subprocess.run(
        [program, "--model", "local-completions", "--model_args", args]
        + ["--tasks", "domains", "--include_path", str(tasks), "--batch_size", "4"]
        + ["--log_samples", "--output_path", str(out)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=tasks,
        env={
            "PATH": str(Path(program).parent),
            "HOME": str(tasks),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "no_proxy": "127.0.0.1",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (file,) = out.rglob("samples*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.timeout(3600)
def test_an_unmodified_harness_reads_the_log_probabilities_of_a_subset(run_folder, tmp_path):
    """They are those of the model with the subset's experts, and so is what is greedy."""
    program = tool("lm_eval", "'lm-eval[api]'")
    tasks = write_task(tmp_path)
    folder, config, tokenizer = open_generator(run_folder / "run")
    model = load_weights(folder, "cpu")
    with serving(run_folder) as (address, _):
        for name in ("run", "kitchen"):
            subset = None
            if name != "run":
                masks = load_subset(run_folder / name, folder, config)
                subset = [mask_N.nonzero()[:, 0] for mask_N in masks]
            samples = harness(program, address, name, tasks, tmp_path / name)
            assert len(samples) == 20
            for sample in samples:
                text, choices = sample["doc"]["text"], sample["doc"]["choices"]
                for choice, found in zip(choices, sample["filtered_resps"], strict=True):
                    before = len(encode(tokenizer, text))
                    tokens = torch.tensor(encode(tokenizer, f"{text} {choice}"))
                    with torch.inference_mode():
                        output = model(
                            PackedBatch.from_rows(tokens[None]), RoutingRequest(subset=subset)
                        )
                        logprobs_TV = torch.log_softmax(model.logits(output), dim=1)
                    rows_TV, chosen_T = logprobs_TV[before - 1 : -1], tokens[before:]
                    own_T = rows_TV.gather(1, chosen_T[:, None])[:, 0]
                    greedy = bool((rows_TV.argmax(1) == chosen_T).all())
                    assert float(found[0]) == pytest.approx(float(own_T.sum()), abs=1e-3)
                    assert str(found[1]) == str(greedy)


# ---- a soak


class Soak:
    """Requests of clients that come again and again; some leave before their answer."""

    def __init__(self, address: str, pid: int):
        self.address, self.pid = address, pid
        self.left, self.done = REQUESTS, 0
        self.ended: Counter[str] = Counter()
        self.early_kb = 0

    def resident_kb(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=2 * CLIENTS)
        async with httpx.AsyncClient(base_url=self.address, limits=limits, timeout=60) as client:
            await asyncio.gather(*(self.one(client, random.Random(i)) for i in range(CLIENTS)))

    async def one(self, client, rng: random.Random) -> None:
        while self.left:
            self.left -= 1
            leaves, stream = rng.random() < 0.1, rng.random() < 0.5
            body = {
                "model": rng.choice(MODELS),
                "prompt": " ".join(rng.choice(WORDS["kitchen"]) for _ in range(rng.randint(1, 8))),
                "max_tokens": 100 if leaves else rng.randint(1, 8),
                "n": rng.randint(1, 2),
                "seed": rng.randrange(1 << 30),
                "ignore_eos": leaves,
                "stream": stream,
            }
            if leaves:
                await self.leave(client, body)
            else:
                answer = await client.post("/v1/completions", json=body)
                whole = not stream or answer.text.endswith("data: [DONE]\n\n")
                self.ended[str(answer.status_code) if whole else "cut short"] += 1
            self.done += 1
            if self.done == REQUESTS // 10:
                self.early_kb = self.resident_kb()

    async def leave(self, client, body: dict) -> None:
        if body["stream"]:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                await anext(answer.aiter_lines())
        else:
            with suppress(httpx.TimeoutException):
                await client.post("/v1/completions", json=body, timeout=0.01)
        self.ended["left"] += 1


def gauge(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


@pytest.mark.timeout(3600)
def test_ten_thousand_requests_of_which_a_tenth_is_given_up_leave_nothing_behind(run_folder):
    if not Path("/proc/self/status").exists():
        pytest.skip("reads resident memory from /proc")
    # Experts come and go all the while: the smallest memory that the model can be served in.
    words = ["--context", "160", "--memory", "70KB"]
    with serving(run_folder, *words) as (address, pid):
        soak = Soak(address, pid)
        asyncio.run(soak.run())
        names = ("running_sequences", "waiting_sequences", "cache_pages")
        for _ in range(600):
            text = httpx.get(f"{address}/metrics").text
            if not any(gauge(text, f"emotrain_{name}") for name in names):
                break
            time.sleep(0.1)
        assert not any(gauge(text, f"emotrain_{name}") for name in names), text
        late_kb = soak.resident_kb()
        print(dict(soak.ended), soak.early_kb, late_kb)
    assert set(soak.ended) == {"200", "left"}, soak.ended
    assert soak.ended.total() == REQUESTS and soak.ended["left"] > REQUESTS / 20
    assert abs(late_kb - soak.early_kb) <= 0.05 * soak.early_kb, (soak.early_kb, late_kb)
