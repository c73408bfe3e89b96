"""What the JSON file of DeepSpeed's options may hold: everything else is one line, before DeepSpeed
sees it, and what is let through DeepSpeed takes."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.config import Config, config_from_dict, config_to_dict, load_config
from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError
from emotrain.training.deepspeed import DeepSpeedEngine
from emotrain.training.deepspeed_options import asks_for_reports, check_memory, read_options
from tests import test_layout as layout
from tests.conftest import ROOT

os.environ["DS_ACCELERATOR"] = "cpu"

SHIPPED = sorted((ROOT / "configs/deepspeed").glob("*.json"))


def config(ep: int = 1, micro_batch: int = layout.ROWS, **parallel: Any) -> Config:
    values = config_to_dict(layout.config({"ep": ep, **parallel}))
    values["training"]["micro_batch"] = micro_batch
    return config_from_dict(values)


def options(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, **others}}


def refusal(file: Path, run: Config | None = None, world_size: int = 2) -> str:
    """The line that refuses a file."""
    with pytest.raises(UserError) as error:
        read_options(file, run or config(), world_size)
    line = str(error.value)
    assert "\n" not in line and len(line) < 700
    return line


def written(folder: Path, content: Any) -> Path:
    file = folder / "options.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.name)
def test_the_files_that_come_with_the_project_are_valid(file):
    read = read_options(file, config(), 2)
    assert read["zero_optimization"]["stage"] == int(file.stem[-1])
    assert read["train_batch_size"] == layout.ROWS and read["gradient_clipping"] == 0.5
    assert ("gradient_allreduce_op" in read) == (file.stem != "zero3")
    assert not asks_for_reports(read)


def test_options_may_repeat_the_configuration(tmp_path):
    repeated = {
        **options(2, allgather_bucket_size=5e8),
        "train_batch_size": layout.ROWS,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 7,
    }
    read = read_options(written(tmp_path, repeated), config(micro_batch=2), 2)
    assert read["gradient_accumulation_steps"] == 2 and read["steps_per_print"] == 7
    assert repr(read["zero_optimization"]["allgather_bucket_size"]) == "500000000"
    assert "fp16" not in read and asks_for_reports(read)


@pytest.mark.parametrize(
    ("changes", "ep", "message"),
    [
        (
            {"train_batch_size": 64},
            1,
            "train_batch_size=64 contradicts training.global_batch=8, which decides; remove "
            "train_batch_size",
        ),
        ({"train_batch_size": "8"}, 1, "train_batch_size='8' contradicts training.global_batch=8,"),
        ({"train_batch_size": None}, 1, "train_batch_size=None contradicts"),
        ({"gradient_accumulation_steps": True}, 1, "gradient_accumulation_steps=True contradicts"),
        (
            {"gradient_clipping": 1.0},
            1,
            "gradient_clipping=1.0 contradicts optimizer.clip_norm=0.5",
        ),
        ({"gradient_clipping": [0.5]}, 1, "gradient_clipping=[0.5] contradicts"),
        ({"bf16": {"enabled": True}}, 1, "bf16 is decided by training.precision; remove it"),
        ({"bf16": None}, 1, "bf16 is decided by training.precision; remove it"),
        ({"optimizer": {"type": "Adam"}}, 1, "optimizer is decided by optimizer.*; remove it"),
        (
            {"gradient_predivide_factor": 2.0},
            1,
            "gradient_predivide_factor is decided by the losses, which need sums; remove it",
        ),
        (
            {"zero_optimisation": {}},
            1,
            "zero_optimisation is not passed on to DeepSpeed; remove it",
        ),
        ({"wall_clock_breakdown": True}, 1, "wall_clock_breakdown is decided by profile.*; rem"),
        ({"memory_breakdown": "no"}, 1, "memory_breakdown is decided by profile.*; remove it"),
        ({"a\nb": 1}, 1, r"'a\nb' is not passed on to DeepSpeed; remove it"),
        (options(0), 1, "zero_optimization.stage=0 must be a whole number from 1 to 3; without"),
        (options("2"), 1, "zero_optimization.stage='2' must be a whole number from 1 to 3"),
        (options(True), 1, "zero_optimization.stage=True must be a whole number from 1 to 3"),
        ({"zero_optimization": {}}, 1, "zero_optimization.stage is not there; write the number 1,"),
        (
            options(2, offload_optimizer={"device": "cpu"}),
            1,
            "zero_optimization.offload_optimizer is not known to leave training the same",
        ),
        (
            options(3),
            2,
            "zero_optimization.stage=3 cuts every parameter over all processes, which "
            "parallel.ep=2 does not; use stage 2 or parallel.ep=1",
        ),
        (
            options(1, reduce_scatter=False),
            2,
            "zero_optimization.reduce_scatter=false sums experts over the wrong ranks with "
            "parallel.ep=2",
        ),
        ({"zero_optimization": 2}, 1, "it needs a section zero_optimization"),
        ({"zero_optimization": None}, 1, "it needs a section zero_optimization"),
        ({"zero_optimization": [{"stage": 2}]}, 1, "it needs a section zero_optimization"),
        ({"comms_logger": {"enable": True}}, 1, "comms_logger.enable is not known"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_that_cannot_be_is_refused_in_one_line(changes, ep, message, tmp_path):
    line = refusal(written(tmp_path, {**options(2), **changes}), config(ep))
    assert message in line and line.startswith(f"{tmp_path}/options.json: ")


WRONG: dict[str, list[Any]] = {
    "a whole number from 1 to 9223372036854775807": [
        ("steps_per_print",),
        ("zero_optimization", "sub_group_size"),
    ],
    "a whole number from 0 to 9223372036854775807": [
        ("zero_optimization", f"stage3_{name}")
        for name in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
        )
    ],
    "a whole number from 1 to 2147483647": [("zero_optimization", "reduce_bucket_size")],
    "a whole number from 2 to 9223372036854775807 and a multiple of 2": [
        ("zero_optimization", "allgather_bucket_size"),
    ],
    "true or false": [
        ("comms_logger", "enabled"),
        *(
            ("zero_optimization", name)
            for name in (
                "reduce_scatter",
                "overlap_comm",
                "contiguous_gradients",
                "use_multi_rank_bucket_allreduce",
                "round_robin_gradients",
            )
        ),
    ],
    "a list of texts": [("comms_logger", "prof_ops")],
    "a section {...}": [("comms_logger",)],
}
"""Every option by the rule for its value."""


def with_leaf(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    content = options(2)
    section = content
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("rule", "path"), [(rule, path) for rule, paths in WRONG.items() for path in paths], ids=str
)
def test_a_value_of_another_kind_is_refused_with_its_rule(rule, path, tmp_path):
    """Wrong types, negative numbers, fractions, numbers beyond any range, `null`, "auto"."""
    for value in ("yes", "auto", "", None, -1, 1.5, -(10**30), 10**30, 1e300, [1], {"a": 1}):
        line = refusal(written(tmp_path, with_leaf(path, value)))
        assert f": {'.'.join(path)}" in line and ("must be " + rule in line or ".a is not" in line)
    if "from 1" in rule or "from 2" in rule:
        assert f"=0 must be {rule}; remove it or" in refusal(written(tmp_path, with_leaf(path, 0)))


def test_an_odd_size_of_gathers_is_refused(tmp_path):
    line = refusal(written(tmp_path, options(2, allgather_bucket_size=7)))
    assert "allgather_bucket_size=7 must be a whole number from 2 to" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "it needs a section zero_optimization"),
        (b"3", "it needs a section zero_optimization"),
        (b"null", "it needs a section zero_optimization"),
        (b"{}", "it needs a section zero_optimization"),
        (b"\xff\xfe{\x00}\x00", "codec can't decode"),
        (b"zero_optimization:\n  stage: 2\n", "Expecting value"),
        (b'{"zero_optimization": {"stage": 2} /* no */}', "Expecting ',' delimiter"),
        (
            b'{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}',
            "zero_optimization stands in it twice",
        ),
        (b'{"zero_optimization": {"stage": NaN}}', "NaN is no number of JSON"),
        (b'{"zero_optimization": {"stage": -Infinity}}', "-Infinity is no number of JSON"),
        (b'{"zero_optimization": {"stage": ' + b"9" * 5000 + b"}}", "Exceeds the limit"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' * 100_000, "recursion"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_a_file_of_options_is_said(content, message, tmp_path):
    line = refusal(written(tmp_path, content))
    assert message in line and line.startswith(f"{tmp_path}/options.json: not a DeepSpeed config")
    assert line.endswith("; see configs/deepspeed/zero2.json")


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; `ls configs/deepspeed` shows"):
        read_options(tmp_path / "none.json", config(), 1)
    assert "is not a file; `ls configs/deepspeed`" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"replicate": 2},
            "parallel.replicate=2, parallel.shard=0: ZeRO spreads one copy over all 2 processes",
        ),
        ({"shard": 1}, "parallel.replicate=1, parallel.shard=1: ZeRO spreads one copy"),
        ({"reshard_after_forward": False}, "parallel.reshard_after_forward=false does nothing"),
        ({"reduce_dtype": "bf16"}, "parallel.reduce_dtype=bf16: under DeepSpeed gradients are"),
    ],
)
def test_settings_that_zero_has_no_use_for_are_refused(parallel, message):
    assert message in refusal(SHIPPED[0], config(**parallel))


# ---- memory


H100 = int(79.1 * 2**30)


@pytest.mark.parametrize(
    ("stage", "ep", "gpu_bytes", "needed"),
    [
        # What docs/deepspeed.md says to start.
        (2, 8, H100, None),
        (3, 1, H100, None),
        (2, 1, H100, "101.1 GiB of parameters and their gradients in fp32 at ZeRO stage 2"),
        (1, 1, H100, "101.1 GiB of parameters and their gradients in fp32 at ZeRO stage 1"),
        (2, 2, H100 // 2, "53.8 GiB of parameters and their gradients in fp32 at ZeRO stage 2"),
        (3, 1, H100 // 2, "50.5 GiB of all parameters in fp32 at ZeRO stage 3"),
    ],
)
def test_a_model_that_a_gpu_cannot_hold_is_refused_before_it_is_built(stage, ep, gpu_bytes, needed):
    run = load_config(ROOT / "configs/emo_1b14b_130b.yaml", [f"parallel.ep={ep}"])
    if needed is None:
        check_memory(run, stage, gpu_bytes)
        return
    with pytest.raises(UserError, match=f"^{re.escape(needed)}, parallel.ep={ep}: ") as error:
        check_memory(run, stage, gpu_bytes)
    line = str(error.value)
    assert "\n" not in line and ("raise parallel.ep" in line) == (stage < 3)


def test_the_engine_asks_the_gpu_before_deepspeed_is_there(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000)
    )
    ranks = Ranks(0, 2, torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"a GPU has 0\.0 GiB in all"):
        DeepSpeedEngine(SHIPPED[0], config(micro_batch=4), ranks, fresh=True)


# ---- any file


GOOD: dict[str, Any] = {
    **options(2, overlap_comm=True, reduce_scatter=True, sub_group_size=1000),
    "train_batch_size": layout.ROWS,
    "gradient_clipping": "auto",
    "fp16": {"enabled": False},
    "steps_per_print": 10,
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
}


def leaves(content: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where values and sections of a file are."""
    found = [path] if path else []
    for name in content if isinstance(content, dict) else ():
        found += leaves(content[name], (*path, name))
    return found


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, layout.ROWS, "auto", 5e8, 2**31, 2**63, math.inf, -math.inf])
    | st.floats(allow_nan=True)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["stage", "enabled"]), inner)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.sampled_from(leaves(GOOD)), VALUES), max_size=3),
    added=st.dictionaries(st.text(max_size=8), VALUES, max_size=1),
    ep=st.sampled_from([1, 2]),
)
def test_any_file_is_taken_or_refused_in_one_line(changes, added, ep, tmp_path_factory):
    """What is taken DeepSpeed takes too."""
    deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
    content = copy.deepcopy({**added, **GOOD})
    for path, value in changes:
        section = content
        for name in path[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[path[-1]] = value
    file = written(tmp_path_factory.getbasetemp(), content)
    try:
        read = read_options(file, config(ep), 1)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return
    deepspeed_config.DeepSpeedConfig(read)
