"""Proves what settings may be: types, words, bounds, combinations, pools that fit the experts."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from helpers import nested, refusal, write

from emotrain.config import (
    Config,
    config_from_dict,
    flatten,
    load_config,
    setting_types,
    warnings_of,
)

ROOT = Path(__file__).resolve().parents[1]


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


# ---- the configurations that come with the project


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_a_long_run_loses_at_most_a_thousand_steps_and_keeps_checkpoints_for_good(path):
    """The interval of those that stay is the published one: 5,000 steps, 20,000 of a trillion
    tokens."""
    config = load_config(path)
    run = config.training
    if config.num_steps > 5000:
        assert 0 < run.checkpoint_every <= 1000 and run.keep_checkpoints > 0
        assert run.permanent_every == (
            20_000 if "1t" in path.stem or config.anneal.checkpoint else 5000
        )
        assert run.permanent_every % run.checkpoint_every == 0
