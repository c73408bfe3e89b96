"""Proves the settings: precedence, what is refused and with which words, and that the reference
page is true."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from emotrain.cli import main
from emotrain.config import (
    Config,
    config_from_dict,
    config_to_dict,
    flatten,
    load_config,
    save_config,
    setting_types,
    warnings_of,
)
from emotrain.errors import UserError
from emotrain.settings import field_docs, settings_reference, settings_text

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def refusal(settings: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        config_from_dict(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


# ---- types, choices, bounds


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.num_layers", 2.5),
        ("model.num_layers", "2"),
        ("model.num_layers", True),
        ("model.num_layers", float("inf")),
        ("model.num_layers", float("nan")),
        ("training.seed", 2**63),
        ("training.seed", 10**400),
        ("optimizer.lr", "fast"),
        ("optimizer.lr", None),
        ("optimizer.lr", 10**400),
        ("training.compile", 1),
        ("training.compile", "yes"),
        ("data.path", 3),
        ("data.path", None),
        ("model.experts.routed_per_layer", 3),
        ("model.experts.routed_per_layer", [1, 2.0]),
        ("model.experts.routed_per_layer", [True]),
    ],
)
def test_wrong_types_are_refused(key: str, value: Any) -> None:
    assert refusal(nested(key, value)).startswith(f"{key}={value!r} must be ")


TYPES = setting_types()
CHOICES = {
    key: typing.get_args(kind)
    for key, kind in TYPES.items()
    if typing.get_origin(kind) is typing.Literal
}


@pytest.mark.parametrize("key", CHOICES)
def test_choices_are_listed(key: str) -> None:
    message = refusal(nested(key, "other"))
    assert message.startswith(f"{key}=other is not known") and all(
        choice in message for choice in CHOICES[key]
    )
    assert dict(flatten(Config()))[key] in CHOICES[key]


NUMBERS = [
    key
    for key, value in flatten(Config())
    if isinstance(value, (int, float)) and not isinstance(value, bool)
]


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_are_bounded_below(key: str) -> None:
    assert refusal(nested(key, -1)).startswith(f"{key}=-1") and refusal(nested(key, -1)).endswith(
        ("must be at least 0", "must be positive")
    )
    if "at least 0" not in typing.get_args(TYPES[key]):
        assert refusal(nested(key, 0)).endswith("must be positive")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_are_finite(value: float) -> None:
    assert "not finite" in refusal(nested("optimizer.lr", value))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model.d_model": 100, "model.num_heads": 3}, "not a multiple of model.num_heads=3"),
        ({"model.d_model": 48}, "3 wide"),
        ({"model.num_kv_heads": 5}, "not a multiple of model.num_kv_heads=5"),
        ({"model.experts.routed_per_layer": [8, 9]}, "2 entries for 16 layers"),
        ({"model.experts.routed": 4}, "top_k=7 is more than model.experts.routed=4"),
        ({"model.experts.top_k": 0}, "layer 0 has 127 routed experts and model.experts.top_k=0"),
        ({"model.experts.routed": 0}, "layer 0 has 0 routed experts and model.experts.top_k=7"),
        (
            {"model.experts.routed": 0, "model.experts.shared": 0, "model.experts.top_k": 0},
            "leave no experts",
        ),
        ({"model.router.pool.min": 9, "model.router.pool.max": 8}, "min=9 is above"),
        ({"data.sequence_length": 1}, "leaves nothing to predict"),
        ({"data.repetition_filter.min_period": 14}, "min_period=14 is above"),
        ({"optimizer.beta2": 1.0}, "must be below 1"),
        (
            {"model.router.normalize_weights": "true", "model.experts.top_k": 1},
            "makes the one weight of a token always 1, and the router learns nothing",
        ),
        (
            {"training.micro_batch": 3},
            "global_batch=1024 is not a multiple of training.micro_batch=3",
        ),
        (
            {"anneal.checkpoint": "runs/a", "anneal.tokens": 5},
            "less than one step of 4194304 tokens",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_config(
            write(tmp_path / "a.yaml", ""), [f"{key}={value}" for key, value in settings.items()]
        )


def test_a_warm_up_that_never_ends_is_one_warning() -> None:
    def warned(warmup: int, steps: int, **settings: Any) -> list[str]:
        return warnings_of(
            config_from_dict(
                {"optimizer": {"warmup_steps": warmup}, "training": {"steps": steps}, **settings}
            )
        )

    assert not warned(5, 6) and not warned(0, 6) and not warned(2000, 0)
    assert not warned(9, 6, anneal={"checkpoint": "a", "tokens": 10**8}), "an anneal has no warm-up"
    for warmup, steps in ((6, 6), (2000, 60)):
        (line,) = warned(warmup, steps)
        assert f"optimizer.warmup_steps={warmup} is not less than the {steps} steps" in line


# ---- document pools and the experts that there are


def of_pool(routed: int = 31, **pool: Any) -> dict[str, Any]:
    return {"model": {"experts": {"routed": routed, "top_k": 3}, "router": {"pool": pool}}}


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"max": 500}, "model.router.pool.max=500 is more than the 31 routed experts of layer 0"),
        ({"max": 32}, r"lower it \(0 means all\), or set model.router.pool.allow_larger=true"),
        ({"min": 32}, "model.router.pool.min=32 is more than the 31"),
        ({"kind": "fixed", "size": 999}, "model.router.pool.size=999 is more than the 31"),
        ({"min": 31}, "min=31 makes every pool all 31 routed experts, which is a standard MoE"),
        ({"min": 31, "max": 31}, "or set model.router.pool.kind=none"),
        ({"kind": "fixed", "size": 31}, "size=31 makes every pool all 31 routed experts"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_unless_asked_for(
    pool: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config_from_dict(of_pool(**pool))
    assert "\n" not in str(caught.value)
    config_from_dict(of_pool(**{"max": 40, **pool}, allow_larger=True))


def test_a_pool_may_be_as_large_as_the_smallest_layer() -> None:
    settings = of_pool(max=5)
    settings["model"] |= {"num_layers": 3}
    settings["model"]["experts"]["routed_per_layer"] = [9, 4, 7]
    with pytest.raises(ValueError, match="min=8 is above"):
        config_from_dict(settings)
    settings["model"]["router"]["pool"]["min"] = 2
    with pytest.raises(ValueError, match="max=5 is more than the 4 routed experts of layer 1"):
        config_from_dict(settings)
    settings["model"]["router"]["pool"]["max"] = 0
    assert config_from_dict(settings).model.pool.max == 9


def test_the_default_pool_goes_up_to_all_routed_experts() -> None:
    for routed in (12, 31, 127):
        model = config_from_dict(of_pool(routed)).model
        assert (model.router.pool.max, model.pool.max, model.pool.min) == (0, routed, 8)


def test_a_larger_pool_has_a_largest_size() -> None:
    """Sizes are drawn between the two: 0 for the largest cannot stand below the smallest."""
    with pytest.raises(ValueError, match="min=40 needs a model.router.pool.max of at least that"):
        config_from_dict(of_pool(min=40, allow_larger=True))


@pytest.mark.parametrize("kind", ["none", "uniform", "fixed"])
def test_models_without_a_pool_are_not_asked_about_its_size(kind: str) -> None:
    config_from_dict(of_pool(kind="none", size=999, max=999))
    dense = {"experts": {"routed": 0, "top_k": 0}, "router": {"pool": {"kind": kind}}}
    config_from_dict({"model": dense})


# ---- names that settings had before


def test_old_names_of_expert_counts_are_translated_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(
        tmp_path / "old.yaml",
        "model: {num_layers: 2, experts: {count: 32, shared: 1, per_token: 4},\n"
        "        router: {pool: {max: 128}}}\n",
    )
    experts = load_config(file, ["model.experts.count_per_layer=[32,9]"]).model.experts
    assert (experts.routed, experts.shared, experts.top_k) == (31, 1, 3)
    assert experts.routed_per_layer == (31, 8)
    (line,) = caplog.messages
    assert line == (
        f"{file}: model.experts counts routed experts alone now; write model.experts.routed=31, "
        "model.experts.top_k=3, model.experts.routed_per_layer=[31,8], "
        "model.router.pool.allow_larger=true instead of the old names"
    )


def test_the_new_names_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(file)
    assert not caplog.messages


def test_old_names_mean_what_they_meant_wherever_the_shared_experts_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write(tmp_path / "base.yaml", "model: {experts: {shared: 2}}\n")
    top = write(tmp_path / "top.yaml", "base: base.yaml\nmodel: {experts: {count: 20}}\n")
    assert base.is_file()
    experts = load_config(top).model.experts
    assert (experts.routed, experts.shared, experts.top_k) == (18, 2, 6)
    assert "write model.experts.routed=18, model.experts.top_k=6 instead" in caplog.text
    experts = load_config(
        top, ["model.experts.shared=0", "model.experts.per_token=3"]
    ).model.experts
    assert (experts.routed, experts.shared, experts.top_k) == (20, 0, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.experts.routed=31"], "write model.experts.routed, which leaves out the shared"),
        (["model.experts.top_k=3"], "model.experts.count .an old name. and model.experts.top_k"),
        (["model.experts.shared=40"], "count=32 .an old name. counts model.experts.shared=40 too"),
        (["model.experts.count=many"], "model.experts.routed='many' must be a whole number"),
        (["model.experts=3"], "model.experts=3 is a group of settings"),
    ],
)
def test_old_names_that_cannot_be_translated_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    file = write(tmp_path / "old.yaml", "model: {experts: {count: 32}}\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)


def test_a_run_from_before_goes_on_with_the_pools_that_it_drew(tmp_path: Path) -> None:
    """Its saved configuration holds pools of 8 to 128 of 31 routed experts: no mistake now."""
    old = write(
        tmp_path / "config.yaml",
        "model:\n  experts: {count: 32, shared: 1, per_token: 4, count_per_layer: []}\n"
        "  router: {pool: {kind: uniform, min: 8, max: 128, size: 32, per: layer}}\n",
    )
    config = load_config(old)
    assert config.model.pool.allow_larger and (config.model.pool.min, config.model.pool.max) == (
        8,
        128,
    )
    save_config(config, tmp_path / "new.yaml")
    assert load_config(tmp_path / "new.yaml") == config
    within = old.read_text().replace("128", "31")
    assert not load_config(write(tmp_path / "within.yaml", within)).model.pool.allow_larger


def test_steps() -> None:
    """Pretraining rounds the steps up, an anneal rounds them down (spec 5)."""

    def steps(**overrides: dict[str, Any]) -> int:
        return config_from_dict(
            {"training": {"global_batch": 10, "micro_batch": 1}, "data": {"sequence_length": 10}}
            | overrides
        ).num_steps

    assert steps(training={"global_batch": 10, "micro_batch": 1, "tokens": 1001}) == 11
    assert steps(training={"global_batch": 10, "micro_batch": 1, "tokens": 1001, "steps": 5}) == 5
    assert steps(anneal={"checkpoint": "a", "tokens": 1099}) == 10


# ---- the reference page


def test_every_setting_is_documented() -> None:
    def classes(cls: type) -> list[type]:
        inner = [type(getattr(cls(), item.name)) for item in dataclasses.fields(cls)]
        return [
            cls,
            *(found for kind in inner if dataclasses.is_dataclass(kind) for found in classes(kind)),
        ]

    for cls in classes(Config):
        assert field_docs(cls).keys() == {item.name for item in dataclasses.fields(cls)}


def test_the_settings_page_is_the_generated_one() -> None:
    page = settings_reference()
    assert all(f"| `{key}` |" in page for key, _ in flatten(Config()))
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == page, (
        "run: emotrain settings --markdown > docs/settings.md"
    )


def test_the_page_has_no_empty_part() -> None:
    for part in settings_reference().split("\n## ")[1:]:
        assert part.count("\n| `") >= 1, part


def test_a_terminal_gets_the_same_in_100_columns() -> None:
    text = settings_text()
    assert max(map(len, text.splitlines())) <= 100 and "|" not in text
    for key, default in flatten(Config()):
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        assert f"  {key}={'[]' if default == () else shown}\n" in text


def test_settings_can_be_searched(capsys: pytest.CaptureFixture[str]) -> None:
    def keys(*words: str) -> list[str]:
        assert main(["settings", "--json", *words]) == 0
        return list(json.loads(capsys.readouterr().out))

    assert keys() == [key for key, _ in flatten(Config())]
    assert keys("router.pool.") == [
        f"model.router.pool.{name}"
        for name in ("kind", "min", "max", "size", "per", "allow_larger")
    ]
    assert "optimizer.warmup_steps" in keys("Warm-Up")
    assert main(["settings", "zzz"]) == 2
    assert "no setting has 'zzz' in its name or meaning" in capsys.readouterr().err
    assert main(["settings", "pool", "--markdown"]) == 2
    assert main(["settings", "--markdown"]) == 0
    capsys.readouterr()
