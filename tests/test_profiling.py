"""The profile of a few steps: what it writes, that its numbers are right, and that it is not there
when not asked for.

Times are those of sleeps: a part that sleeps 30 ms takes at least 30 ms, on however busy a machine.
The rules that judge times are tested on made-up ones.
"""

from __future__ import annotations

import gzip
import json
import logging
import logging.handlers
import time
from contextlib import closing, nullcontext
from types import SimpleNamespace

import pytest
import torch

from emotrain.config import ProfileConfig, config_from_dict
from emotrain.distributed.ranks import Ranks
from emotrain.training import run as run_module
from emotrain.training.profiling import (
    collective_seconds,
    part,
    profiled_steps,
    step_parts,
    summarize,
    table,
)
from tests.conftest import tiny_settings
from tests.processes import run_ranks

NAP = 0.03


def trace(folder, rank: int = 0) -> list[dict]:
    with gzip.open(folder / "profile" / f"rank-{rank}.trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def naps(
    naps_of_part: dict[str, float], ranks: Ranks, folder, settings: ProfileConfig, steps: int = 5
) -> list[int]:
    """A loop whose parts sleep, and which ends each step with a collective. Returns the steps it
    was given."""

    def batches():
        for _ in range(steps):
            time.sleep(naps_of_part.get("data wait", 0.0))
            yield torch.ones(4)

    seen = []
    with closing(profiled_steps(batches(), 1, settings, ranks, folder)) as numbered:
        for step, batch_4 in numbered:
            for name in ("forward", "backward"):
                with part(name):
                    time.sleep(naps_of_part.get(name, 0.0))
                    batch_4 = batch_4 @ torch.eye(4)
            with part("gradient communication"):
                ranks.sum(batch_4)
            seen.append(step)
    return seen


# ---- off


def test_without_the_setting_nothing_is_measured_or_written(tmp_path):
    assert isinstance(part("forward"), nullcontext) and part("forward") is part("backward")
    batches = iter("abc")
    numbered = profiled_steps(batches, 7, ProfileConfig(), Ranks(), tmp_path)
    assert next(numbered) == (7, "a")
    assert part("forward") is part("backward"), "a step that is not profiled"
    assert list(numbered) == [(8, "b"), (9, "c")]
    assert not list(tmp_path.iterdir())


# ---- one process


def test_the_trace_and_the_table_hold_the_parts(tmp_path):
    seen = naps(
        {"forward": NAP, "data wait": NAP}, Ranks(), tmp_path, ProfileConfig(start=2, steps=3)
    )
    assert seen == [1, 2, 3, 4, 5]
    events = trace(tmp_path)
    counts = {
        name: sum(
            event.get("name") == name and event.get("cat") == "user_annotation" for event in events
        )
        for name in (
            "part: data wait",
            "part: forward",
            "part: backward",
            "part: gradient communication",
            "step 1",
            "step 2",
            "step 4",
            "step 5",
        )
    }
    assert list(counts.values()) == [3, 3, 3, 3, 0, 1, 1, 0]
    assert any(event.get("name") == "aten::matmul" for event in events), "what torch did in them"

    summary = json.loads((tmp_path / "profile/summary.json").read_text())
    assert summary["steps"] == [2, 3, 4] and summary["slowest"] is None
    (rank,) = summary["ranks"]
    seconds = {name: values["seconds"] for name, values in rank["parts"].items()}
    assert set(seconds) == {"data wait", "forward", "backward", "gradient communication", "other"}
    assert seconds["forward"] >= NAP and seconds["data wait"] >= NAP
    assert sum(seconds.values()) == pytest.approx(rank["seconds"]) and rank[
        "own_seconds"
    ] == pytest.approx(rank["seconds"])
    text = (tmp_path / "profile/rank-0.txt").read_text()
    assert "steps 2 to 4" in text and "data wait" in text and "aten::" in text


def test_a_run_that_ends_inside_the_profile_reports_the_steps_it_had(tmp_path):
    naps({}, Ranks(), tmp_path, ProfileConfig(start=4, steps=10))
    assert json.loads((tmp_path / "profile/summary.json").read_text())["steps"] == [4, 5]
    assert part("forward") is part("backward"), "the profile is over"


def test_leaving_the_loop_early_drops_the_profile(tmp_path, caplog):
    with (
        closing(
            profiled_steps(iter(range(9)), 1, ProfileConfig(start=1, steps=3), Ranks(), tmp_path)
        ) as numbered,
        caplog.at_level("WARNING"),
    ):
        next(numbered)
        assert not isinstance(part("forward"), nullcontext)
        numbered.close()
    assert "no profile is written" in caplog.text and not list(tmp_path.iterdir())
    assert part("forward") is part("backward")


# ---- several ranks


def _rank(ranks, folder, naps_of_rank):
    messages = logging.handlers.MemoryHandler(1000)
    logging.getLogger("emotrain").addHandler(messages)
    logging.getLogger("emotrain").setLevel("INFO")
    naps(naps_of_rank[ranks.rank], ranks, folder, ProfileConfig(start=2, steps=3))
    (folder / f"log-{ranks.rank}").write_text(
        "\n".join(record.getMessage() for record in messages.buffer)
    )


@pytest.mark.parametrize(("slow_part", "where"), [("forward", 1), ("data wait", 0)])
def test_the_slow_rank_is_named_with_its_part(slow_part, where, tmp_path):
    """Both ranks' steps take as long; only the collective's time tells who waited."""
    slow = [{}, {}]
    slow[where] = {slow_part: 4 * NAP}
    run_ranks(_rank, 2, tmp_path, slow)
    summary = json.loads((tmp_path / "profile/summary.json").read_text())
    assert (
        summary["slowest"]["rank"] == where
        and summary["slowest"]["part"] == slow_part
        and summary["slowest"]["straggler"]
    )
    fast_rank, slow_rank = summary["ranks"][1 - where], summary["ranks"][where]
    assert fast_rank["seconds"] >= 4 * NAP, "a fast rank's step is as long: it waits"
    assert slow_rank["own_seconds"] >= 4 * NAP > fast_rank["own_seconds"]
    waits = [
        rank["parts"]["gradient communication"]["collective_seconds"]
        for rank in (slow_rank, fast_rank)
    ]
    assert waits[0] < waits[1]
    assert f"rank {where} on {slow_rank['host']} is slow" in (tmp_path / "log-0").read_text()
    assert "is slow" not in (tmp_path / "log-1").read_text(), "said once, by the first rank"
    assert {event["name"] for event in trace(tmp_path, 1)} >= {"part: forward", "gloo:all_reduce"}


def test_training_profiles_the_steps_it_was_asked_for_and_learns_the_same(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run", micro_batch=1, checkpoint_every=4)
    config = config_from_dict({**settings, "profile": {"start": 3, "steps": 2}})
    run_ranks(lambda ranks: run_module.train(config, ranks), 2)
    summary = json.loads((tmp_path / "run/profile/summary.json").read_text())
    assert summary["steps"] == [3, 4] and [rank["rank"] for rank in summary["ranks"]] == [0, 1]
    for rank in summary["ranks"]:
        assert set(rank["parts"]) == {
            "data wait",
            "forward",
            "loss",
            "backward",
            "clipping",
            "optimizer",
            "checkpoint copy",
            "other",
        }
        assert all(
            part["seconds"] >= part["collective_seconds"] >= 0 for part in rank["parts"].values()
        )
        # FSDP gathers parameters in forward, and sums gradients in backward.
        assert (
            rank["parts"]["forward"]["collective_seconds"]
            > 0
            < rank["parts"]["backward"]["collective_seconds"]
        )
    names = [
        event["name"]
        for event in trace(tmp_path / "run", 1)
        if event.get("cat") == "user_annotation"
    ]
    assert names.count("part: forward") == names.count("part: backward") == 2 * 2, (
        "two micro-batches a step"
    )
    run_module.train(config_from_dict(tiny_settings(tiny_data, tmp_path / "plain")))
    for line, plain in zip(
        *(
            (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            for name in ("run", "plain")
        ),
        strict=True,
    ):
        assert json.loads(line)["loss"] == pytest.approx(json.loads(plain)["loss"], rel=1e-5)
    assert not (tmp_path / "plain/profile").exists()


# ---- the rules, on made-up times


def measured(host: str, *own: float, waiting: float = 0.0) -> dict:
    return {
        "host": host,
        "steps": [
            {"forward": (seconds / 2, 0.0), "backward": (seconds / 2 + waiting, waiting)}
            for seconds in own
        ],
    }


def test_one_slow_step_does_not_make_a_straggler():
    summary = summarize(
        [5, 6, 7],
        [measured("a", 1.0, 1.0, 1.0), measured("b", 1.1, 9.0, 1.1), measured("c", 1.0, 1.0, 1.0)],
    )
    assert summary["slowest"] == {
        "rank": 1,
        "host": "b",
        "part": "forward",
        "ratio": pytest.approx(1.1),
        "straggler": False,
    }


def test_waiting_is_no_work_of_ones_own():
    """Rank 0 has the longest step only because it waits."""
    summary = summarize(
        [5], [measured("a", 1.0, waiting=2.0), measured("b", 1.5), measured("c", 1.0, waiting=0.5)]
    )
    assert (
        summary["slowest"]["rank"] == 1
        and summary["slowest"]["ratio"] == pytest.approx(1.5)
        and summary["slowest"]["straggler"]
    )
    assert summary["ranks"][0]["seconds"] == pytest.approx(3.0) and summary["ranks"][0][
        "own_seconds"
    ] == pytest.approx(1.0)
    text = table(summary)
    assert "rank 1 on b: 1,500.0 ms, 1.50 x the median" in text
    row = next(line for line in text.splitlines() if line.startswith("backward"))
    assert row.split() == ["backward", "2,500.0", "83.3%", "2,000.0", "ms"]


def test_parts_of_a_step_add_up_to_it():
    steps = step_parts(
        ["step 8", "part: forward", "part: backward", "part: forward", "step 9", "part: forward"],
        [(10.0, 4.0), (2.0, 1.0), (3.0, 1.0), (1.0, 0.5), (5.0, 0.0), (5.0, 0.0)],
    )
    assert steps == [
        {"other": (4.0, 1.5), "forward": (3.0, 1.5), "backward": (3.0, 1.0)},
        {"other": (0.0, 0.0), "forward": (5.0, 0.0)},
    ]


def event(name: str, start: float, end: float, *kernels: tuple[str, float]) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
    )


def test_collectives_under_way_together_count_once_and_only_inside_the_range():
    events = [
        event("gloo:all_gather", 10, 30),
        event("aten::mm", 0, 100),
        event("gloo:all_reduce", 20, 40),
        event("gloo:all_reduce", 90, 120),
    ]
    assert collective_seconds(events, [(0, 100), (0, 15), (50, 60)]) == pytest.approx(
        [40e-6, 5e-6, 0]
    )


def test_kernels_of_nccl_count_for_the_range_that_launched_them():
    """As on a GPU, where they run later than the host's range."""
    events = [
        event("c10d::allreduce_", 12, 14, ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 500.0)),
        event("aten::mm", 20, 22, ("ampere_sgemm", 900.0)),
        event("c10d::_allgather_base_", 60, 61, ("ncclDevKernel_AllGather_RING_LL", 70.0)),
    ]
    assert collective_seconds(events, [(0, 50), (50, 100)]) == pytest.approx([500e-6, 70e-6])
