"""Proves that files and checkpoints with the names that settings had before stay readable."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write

from emotrain.config import (
    load_config,
    save_config,
)

ROOT = Path(__file__).resolve().parents[1]


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
