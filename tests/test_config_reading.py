"""Proves how files and the command line become settings: precedence, merging, text as typed,
interpolation, and which words say what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import nested, refusal, write

from emotrain.config import (
    Config,
    config_from_dict,
    config_to_dict,
    flatten,
    load_config,
    save_config,
)
from emotrain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


# ---- precedence


def test_defaults_then_bases_then_file_then_command_line(tmp_path: Path) -> None:
    write(
        tmp_path / "shared/root.yaml", "optimizer: {lr: 1, beta1: 0.1, warmup_steps: 1, eps: 0.5}\n"
    )
    write(
        tmp_path / "shared/middle.yaml",
        "base: root.yaml\noptimizer: {lr: 2, beta1: 0.2, warmup_steps: 2}\n",
    )
    top = write(tmp_path / "top.yaml", "base: shared/middle.yaml\noptimizer: {lr: 3, beta1: 0.3}\n")
    optimizer = load_config(top, ["optimizer.lr=4", "optimizer.clip_norm=0"]).optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.warmup_steps, optimizer.eps) == (
        4,
        0.3,
        2,
        0.5,
    )
    assert (optimizer.clip_norm, optimizer.weight_decay) == (0, Config().optimizer.weight_decay)


@pytest.mark.parametrize(
    "text, expected", [("1e-3", 1e-3), ("4e-3", 4e-3), ("1", 1.0), (".5", 0.5)]
)
def test_numbers_on_the_command_line_and_in_a_file_read_alike(
    tmp_path: Path, text: str, expected: float
) -> None:
    file = write(tmp_path / "a.yaml", f"optimizer:\n  lr: {text}\n")
    assert (
        load_config(file).optimizer.lr
        == load_config(write(tmp_path / "b.yaml", ""), [f"optimizer.lr={text}"]).optimizer.lr
        == expected
    )


def test_whole_floats_are_counts(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path / "a.yaml", "training: {tokens: 130e9}\n"), ["anneal.tokens=1e6"]
    )
    assert config.training.tokens == 130_000_000_000 and type(config.training.tokens) is int
    assert type(config.anneal.tokens) is int


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr", "=1", "lr 3", "", "[=1", "optimizer..lr=1", ".lr=1", "a b=1", "a[0]=1"],
)
def test_an_override_is_key_equals_value(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match="write key=value"):
        load_config(write(tmp_path / "a.yaml", ""), [override])


@pytest.mark.parametrize(
    "typed",
    ["runs/exp #2", "a: b", "a=b", "@%*`!", " spaced ", "[1, 2]", "{a: 1}", "1e-3", "null", "- x"],
)
@pytest.mark.parametrize("key", ["training.run_dir", "data.path", "training.resume"])
def test_text_on_the_command_line_is_taken_as_typed(tmp_path: Path, key: str, typed: str) -> None:
    config = load_config(write(tmp_path / "a.yaml", ""), [f"{key}={typed}"])
    assert dict(flatten(config))[key] == typed
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_quotes_that_a_file_would_need_are_no_part_of_the_text(tmp_path: Path) -> None:
    for typed in ("'runs/exp #2'", '"runs/exp #2"'):
        config = load_config(write(tmp_path / "a.yaml", ""), [f"training.run_dir={typed}"])
        assert config.training.run_dir == "runs/exp #2"


@pytest.mark.parametrize("where", ["file", "command line"])
def test_interpolation_is_the_same_in_files_and_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("SCRATCH_FOR_TEST", "/scratch #1")
    monkeypatch.delenv("NOT_SET_FOR_TEST", raising=False)

    def load(value: str) -> Config:
        if where == "file":
            return load_config(write(tmp_path / "a.yaml", f"training: {{run_dir: '{value}'}}\n"))
        return load_config(write(tmp_path / "a.yaml", ""), [f"training.run_dir={value}"])

    config = load("${oc.env:SCRATCH_FOR_TEST}/r")
    assert config.training.run_dir == "/scratch #1/r"
    save_config(config, tmp_path / "saved.yaml")
    monkeypatch.delenv("SCRATCH_FOR_TEST")
    assert load_config(tmp_path / "saved.yaml") == config, "resolved before it is saved"
    for value, message in {
        "${oc.env:NOT_SET_FOR_TEST}/r": "training.run_dir: .*NOT_SET_FOR_TEST. not found",
        "${nothing}": "training.run_dir: Interpolation key 'nothing' not found",
        "${": "training.run_dir",
        "???": "training.run_dir: Missing mandatory value",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            load(value)
        assert "\n" not in str(caught.value)
    literal = load("\\${oc.env:X}")
    assert literal.training.run_dir == "${oc.env:X}"
    save_config(literal, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == literal


def test_a_number_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED_FOR_TEST", "7")
    file = write(tmp_path / "a.yaml", "")
    decoded = load_config(file, ["training.seed=${oc.decode:${oc.env:SEED_FOR_TEST}}"])
    assert decoded.training.seed == 7
    with pytest.raises(UserError, match=r"'7' must be a whole number.*leave out the quotes.*oc.de"):
        load_config(file, ["training.seed=${oc.env:SEED_FOR_TEST}"])


def test_the_home_folder_is_expanded_in_paths_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ("training.run_dir", "data.path", "training.resume", "anneal.checkpoint")
    file = write(tmp_path / "a.yaml", "data: {path: ~/d}\nanneal: {tokens: 1e9}\n")
    overrides = [f"{key}=~/d" for key in paths if key != "data.path"]
    config = dict(flatten(load_config(file, overrides)))
    assert [config[key] for key in paths] == ["/home/me/d"] * 4


def test_groups_on_the_command_line_merge_as_in_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "model: {experts: {routed: 31, top_k: 3, hidden: 128}}\n")
    experts = load_config(file, ["model.experts={top_k: 4}", "model={d_model: 64}"]).model.experts
    assert (experts.routed, experts.top_k, experts.hidden) == (31, 4, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.d_model: 64\n", "nest it: `model: {d_model: 64}`"),
        ("model: {experts.top_k: 3}\n", "nest it: `experts: {top_k: 3}`"),
        ("model.dmodel: 64\n", "did you mean model.d_model?"),
        ("3: 4\n", "3 is not a setting"),
    ],
)
def test_a_dotted_name_in_a_file_is_shown_nested(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(write(tmp_path / "a.yaml", text))


def test_a_file_that_cannot_be_read_is_no_mistake_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.yaml", "")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr("omegaconf.OmegaConf.load", fails)
    with pytest.raises(OSError, match="Input/output error") as caught:
        load_config(file)
    assert not isinstance(caught.value, ValueError)


def test_a_list_and_a_text_with_an_equals_sign_on_the_command_line(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path / "a.yaml", ""),
        ["model.num_layers=2", "model.experts.routed_per_layer=[9,12]", "data.path=a=b"],
    )
    assert config.model.experts.routed_per_layer == (9, 12) and config.data.path == "a=b"


# ---- files


def test_base_files_that_lead_in_a_circle_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "base: second.yaml\n")
    write(tmp_path / "second.yaml", "base: sub/../first.yaml\n")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="lead back to it; break the circle"):
        load_config(first)
    with pytest.raises(ValueError, match="break the circle"):
        load_config(write(tmp_path / "self.yaml", "base: self.yaml\n"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1\n", "not readable as YAML"),
        ("- 1\n- 2\n", "not a list"),
        ("base: [a.yaml]\n", "name of one file"),
        ("optimizer: {lr: 1, lr: 2}\n", "not readable as YAML"),
        ("model: 3\n", "model=3 is a group of settings"),
        ("model:\n", "model=None is a group of settings"),
        ("\x00", "not readable as YAML"),
        ("a: 1\n---\nb: 2\n", "not readable as YAML"),
        ("model:\n\td_model: 64\n", "not readable as YAML"),
        ("x", "x is not a setting"),
        ("base: ${oc.env:NOT_SET_FOR_TEST}\n", "NOT_SET_FOR_TEST. not found"),
        ("training: {seed: '${training.seed}'}\n", "training.seed"),
        ('data: {path: "a\\0b"}\n', "characters that no text has"),
        ('data: {path: "a\\nb"}\n', "characters that no text has"),
    ],
)
def test_files_that_are_no_settings_are_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path / "a.yaml", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfmodel: {d_model: 64}\n", b"model:\r\n  d_model: 64\r\n", b"# nothing\n", b""],
)
def test_files_of_other_editors_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ü a.yaml").write_bytes(content)
    width = load_config(tmp_path / "ü a.yaml").model.d_model
    assert width == (64 if b"64" in content else Config().model.d_model)


def test_letters_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"data: {path: caf\xe9}\n")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load_config(tmp_path / "a.yaml")
    file = write(tmp_path / "b.yaml", "")
    for override in ("data.path=a\udce9", "optimizer.lr=\udce9", "zzz=\udce9"):
        with pytest.raises(UserError):
            load_config(file, [override])


def test_a_missing_file_or_base_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", write(tmp_path / "a.yaml", "base: none.yaml\n")):
        with pytest.raises(FileNotFoundError, match="none.yaml: no such configuration file"):
            load_config(path)


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    for source in sorted((ROOT / "configs").glob("*.yaml")):
        config = load_config(
            source, ["training.run_dir='a: #b'", "model.experts.routed_per_layer=[]"]
        )
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
        assert config_from_dict(config_to_dict(config)) == config
    per_layer = load_config(
        ROOT / "configs/emo_1b14b_1t.yaml",
        ["model.num_layers=2", "model.experts.routed_per_layer=[9,128]"],
    )
    save_config(per_layer, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == per_layer


# ---- unknown settings


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("optimizer.betas", "optimizer.beta1"),
        ("training.batch_size", "training.global_batch"),
        ("model.layers", "model.num_layers"),
        ("model.experts.ruoted", "model.experts.routed"),
        ("seed", "training.seed"),
        ("data.seq_len", "data.sequence_length"),
        ("training.max_steps", "training.steps"),
        ("modle", "model"),
        ("model.expert", "model.experts"),
        ("model.pool", "model.router.pool"),
    ],
)
def test_an_unknown_setting_names_the_nearest(key: str, nearest: str) -> None:
    assert refusal(nested(key, 1)) == f"{key} is not a setting; did you mean {nearest}?"
    assert refusal(nested(f"{key}.inner", 1)) == f"{key} is not a setting; did you mean {nearest}?"


def test_a_setting_like_no_other_points_to_the_list() -> None:
    assert refusal({"zzz": 1}) == "zzz is not a setting; `emotrain settings` lists them all"


def test_a_setting_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lr is a value, not a group"):
        load_config(write(tmp_path / "a.yaml", "optimizer: {lr: 1}\n"), ["optimizer.lr.peak=3"])
