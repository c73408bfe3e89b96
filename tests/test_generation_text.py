"""The text of generated tokens: draws that follow the probabilities, whole characters alone, no
stop text; and the command."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter

import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.cli import main
from emotrain.config import config_from_dict
from emotrain.data.tokenizer import load_tokenizer
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.generation.request import read_pool
from emotrain.generation.sampling import Sampling, choose_tokens, draw
from emotrain.generation.text import Detokenizer, StopScanner
from emotrain.training import run as run_module
from tests.conftest import ROOT, tiny_settings

# ---- draws

LOGITS_V = torch.tensor([2.0, 1.0, 1.0, 0.0, -1.0, 3.0])


def allowed_by_hand(sampling):
    """Tokens that may be drawn, and their probabilities, a token at a time."""
    p = torch.softmax(LOGITS_V.double() / sampling.temperature, 0).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    order = order[: sampling.top_k or len(p)]
    mass, kept, total = 0.0, [], sum(p[token] for token in order)
    for token in order:
        if mass / total >= sampling.top_p:
            break
        kept.append(token)
        mass += p[token]
    return {token: p[token] / mass for token in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.5, 0, 1), (2, 2, 1), (1, 0, 0.7), (1, 5, 0.8), (1, 0, 1e-9), (1, 1, 1)],
)
def test_draws_follow_the_probabilities(temperature, top_k, top_p):
    number = 4000
    sampling = [Sampling(1, temperature, top_k, top_p, seed) for seed in range(number)]
    chosen = choose_tokens(LOGITS_V.expand(number, -1), sampling, [3] * number)
    expected = allowed_by_hand(sampling[0])
    counts = Counter(chosen)
    assert set(counts) == set(expected)
    for token, p in expected.items():
        # 5 standard deviations of a binomial.
        assert abs(counts[token] / number - p) <= 5 * (p * (1 - p) / number) ** 0.5 + 1e-12


def test_a_draw_depends_on_its_own_row_alone():
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(12, 50, generator=generator)
    sampling = [
        Sampling(1, (row % 3) / 2, (0, 7, 0, 3)[row % 4], (1, 0.9)[row % 2], row)
        for row in range(12)
    ]
    together = choose_tokens(logits_BV, sampling, list(range(12)))
    alone = [
        choose_tokens(logits_BV[row : row + 1], [sampling[row]], [row])[0] for row in range(12)
    ]
    assert together == alone
    assert together[0] == int(logits_BV[0].argmax())


def test_uniform_numbers_are_uniform_and_fixed():
    numbers = [draw(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(numbers)) == 3600 and min(numbers) >= 0 and max(numbers) < 1
    assert abs(sum(numbers) / 3600 - 0.5) < 5 * (1 / 12 / 3600) ** 0.5
    assert draw(-1, 0) != draw(1, 0)


@pytest.mark.parametrize(
    ("settings_", "line"),
    [
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"stop": ("",)}, "none of them empty"),
        ({"logprobs": 101}, "logprobs=101 cannot be; give 0 to 100"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings_, line):
    with pytest.raises(UserError, match=line):
        Sampling(**settings_)


# ---- pools by name


@pytest.mark.parametrize(
    ("experts", "pool", "sizes", "renew_every"),
    [
        ("auto:4", "", (3, 3), 0),
        ("auto:0.5", "sticky:16", (3, 3), 16),
        ("", "sticky:8", (5, 5), 8),  # between 3 and 8
    ],
)
def test_experts_and_pools_by_name(experts, pool, sizes, renew_every):
    found = read_pool(experts, pool, tiny_config().model)
    assert (found.sizes, found.renew_every) == (sizes, renew_every)
    assert read_pool("", "", tiny_config().model) is None


@pytest.mark.parametrize(
    ("experts", "pool", "line"),
    [
        ("32", "", "give auto and how many"),
        ("auto:total:9", "", "give auto and how many"),
        ("auto:99", "", "--experts auto:99: the largest layer has 9 experts"),
        ("", "sticky:0", "give sticky and after how many tokens"),
        ("", "sticky", "give sticky and after how many tokens"),
    ],
)
def test_other_names_are_one_line(experts, pool, line):
    with pytest.raises(UserError, match=line):
        read_pool(experts, pool, tiny_config().model)


def test_a_model_without_a_pool_or_experts_says_what_to_give():
    no_pool = tiny_config(model__router__pool__kind="none").model
    with pytest.raises(UserError, match="trained without a pool"):
        read_pool("", "sticky:8", no_pool)
    dense = {"model__experts__routed": 0, "model__experts__top_k": 0}
    with pytest.raises(UserError, match="the model is dense"):
        read_pool("auto:1", "", tiny_config(**dense, model__router__pool__kind="none").model)


# ---- characters


@pytest.fixture(scope="module")
def tokenizer(tiny_data):
    return load_tokenizer(tiny_data / "tokenizer.json")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_pieces_make_the_whole_text_and_hold_whole_characters(tokenizer, data):
    """Any tokens: also bytes that are no character."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    text = data.draw(st.text(max_size=8))
    ids += tokenizer.encode_batch([text])[0][:-1].tolist()
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.end() == tokenizer.decode(ids)


def test_a_character_comes_when_its_last_byte_does(tokenizer):
    ids = tokenizer.encode_batch(["né🦀x"])[0][:-1].tolist()
    assert len(ids) == 8, "a token a byte"
    detokenizer = Detokenizer(tokenizer.decode)
    assert [detokenizer.add(token) for token in ids] == ["n", "", "é", "", "", "", "🦀", "x"]


def test_a_prompt_that_ends_inside_of_a_character_is_completed(tokenizer):
    ids = tokenizer.encode_batch(["aé"])[0][:-1].tolist()
    detokenizer = Detokenizer(tokenizer.decode, ids[:-1])
    assert detokenizer.add(ids[-1]) == "é"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_text_is_given_out(pieces, stops):
    scanner, given_out = StopScanner(stops), ""
    whole, seen = "".join(pieces), ""
    for piece in pieces:
        seen += piece
        given_out += scanner.add(piece)
        ends = [seen.find(stop) for stop in stops if stop in seen]
        assert scanner.stopped == bool(ends)
        if ends:
            assert given_out == seen[: min(ends)]
            return
        assert seen.startswith(given_out)
        assert len(seen) - len(given_out) < max(map(len, stops))
    assert given_out + scanner.end() == whole


# ---- the command


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    run_module.train(
        config_from_dict(tiny_settings(tiny_data, folder / "runs/quickstart", steps=40)), Ranks()
    )
    (folder / "data").mkdir()
    (folder / "data/sample").symlink_to(tiny_data)
    return folder


def run(capsys, *words):
    code = main(["generate", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_text_goes_to_stdout_and_json_says_the_same(trained, capsys):
    run_dir = str(trained / "runs/quickstart")
    options = ["--max-tokens", "12", "--temperature", "1", "--seed", "5"]
    code, out, err = run(capsys, run_dir, "bread salt", *options)
    assert code == 0 and "12 generated" in err
    code, line, _ = run(capsys, run_dir, "bread salt", *options, "--json")
    (generation,) = json.loads(line)["generations"]
    assert code == 0 and generation["text"] + "\n" == out
    assert generation["generated_tokens"] == len(generation["tokens"]) == 12
    assert generation["experts_kept_per_layer"] is generation["switch_rate"] is None


def test_several_prompts_are_each_what_they_are_alone(trained, capsys, monkeypatch):
    run_dir = str(trained / "runs/quickstart")
    options = ["--max-tokens", "9", "--experts", "auto:3", "--pool", "sticky:4", "--json"]
    monkeypatch.setattr("sys.stdin", io.StringIO("anchor tide"))
    together = json.loads(run(capsys, run_dir, "bread", "-", *options)[1])["generations"]
    for prompt, found in zip(("bread", "anchor tide"), together, strict=True):
        (alone,) = json.loads(run(capsys, run_dir, prompt, *options)[1])["generations"]
        assert found == alone
        assert found["pool_renewals"] == 2 and 0 <= found["switch_rate"] <= 1
        assert [len(kept) for kept in found["experts_kept_per_layer"]] == [2, 2]


def test_a_stop_text_ends_the_text_before_it(trained, capsys):
    run_dir = str(trained / "runs/quickstart")
    _, out, _ = run(capsys, run_dir, "bread salt", "--max-tokens", "12")
    stop = out[4:7]
    _, cut, err = run(capsys, run_dir, "bread salt", "--max-tokens", "12", "--stop", stop)
    assert cut == out[: out.find(stop)] + "\n" and "ended by stop" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["x" * 300], "tokens, which leaves none of 32 to generate"),
        (["x", "--max-tokens", "40"], "together more than the 32 of a sequence"),
        (["x", "--subset", "none.json"], "no such subset"),
        ([""], "the prompt has no tokens"),
        (["x", "--experts", "auto:99"], "the largest layer has 8 experts"),
    ],
)
def test_a_mistake_is_one_line(trained, capsys, words, line):
    code, out, err = run(capsys, str(trained / "runs/quickstart"), *words)
    assert (code, out) == (2, "") and line in err.splitlines()[-1]


def test_a_subset_of_another_model_is_refused(trained, tiny_data, tmp_path, capsys):
    main(
        ["select", str(trained / "runs/quickstart"), "--prompt", "bread", "--keep", "3"]
        + ["--out", str(tmp_path / "bread.json")]
    )
    file = tmp_path / "bread.json"
    subset = json.loads(file.read_text())
    file.write_text(json.dumps({**subset, "checkpoint_fingerprint": "0" * 64}))
    capsys.readouterr()
    code, _, err = run(capsys, str(trained / "runs/quickstart"), "bread", "--subset", str(file))
    assert code == 2 and "has other weights than the checkpoint" in err


def test_every_command_of_the_page_runs(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    section = page.split("\n## ")[1]
    assert section.startswith("Generate")
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) >= 5
    for line in commands:
        name, *words = shlex.split(line)
        # The small data set has no Rust.
        words = ["kitchen" if word == "rust" else word for word in words]
        assert name == "emotrain" and main(words) == 0, f"{line}\n{capsys.readouterr().err}"
