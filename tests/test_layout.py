"""The layout does not change the result: processes, copies, expert parallelism, micro-batches,
recomputation, gathering and schedule give the losses, gradients, gradient norm, clipped update and
routing statistics of one process that runs the whole global batch as one micro-batch.

In fp64 to 1e-9 of each element; in fp32 and bf16 to `FP32` and `BF16`. The default suite runs every
layout of 1, 2 and 4 processes with the published model, and every other choice on some layouts
(`COMBINED`). `long` runs every layout of 1 to 4 processes with every choice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from emotrain.data.packing import packed_rows
from emotrain.distributed.ranks import Ranks
from emotrain.model.transformer import Transformer
from emotrain.training.engine import NativeEngine
from emotrain.training.metrics import routing_metrics
from emotrain.training.step import train_step
from tests.layouts import (
    DOCUMENTS,
    LENGTH,
    MODELS,
    ROWS,
    Case,
    Step,
    config,
    global_batch,
    layouts,
    micro_batches,
    one_process,
    train,
    train_on,
)
from tests.processes import run_ranks

pytestmark = pytest.mark.layout
RECOMPUTE = ("none", "selective", "full")

PLAIN = [
    Case(*layout, micro, recompute)
    for layout in layouts(1, 2, 4)
    for micro, recompute in ((1, "none"), (2, "selective"), (2, "full"))
]

COMBINED = [
    Case(1, 1, 1, 4, "full", model="sigmoid", documents="uneven"),
    Case(2, 1, 1, 2, "selective", False, False, "7 and 4 experts", "uneven"),
    Case(2, 1, 2, 1, "full", True, True, "7 and 4 experts", "length one"),
    Case(2, 2, 1, 2, "none", False, True, "one bank", "uneven"),
    Case(3, 1, 1, 2, "none", False, True),
    Case(3, 3, 1, 1, "full", True, True, "sigmoid", "length one"),
    Case(3, 1, 3, 2, "selective", False, False, "pools of one", "uneven"),
    Case(3, 1, 3, 1, "full", True, False, "one bank", "length one"),
    Case(4, 1, 4, 1, "none", True, True, "no pool", "uneven"),
    Case(4, 2, 2, 2, "selective", False, False, "pools below top_k", "length one"),
    Case(4, 1, 1, 1, "full", False, False, "pools of one", "uneven"),
    Case(4, 1, 2, 1, "none", True, True, "pools below top_k", "uneven"),
    Case(4, 4, 1, 2, "none", False, True, "no pool"),
    Case(2, 2, 1, 2, "full", False, True, "pools of parts", "uneven"),
    Case(4, 1, 2, 1, "selective", True, True, "pools of parts"),
    Case(2, 1, 2, 1, "full", True, True, "pools by a prefix", "length one"),
    Case(4, 2, 2, 2, "none", False, False, "pools by a prefix", "uneven"),
    Case(2, 1, 2, 2, "full", False, False, "pools across windows"),
    Case(4, 2, 2, 1, "selective", True, True, "pools across windows", "uneven"),
    Case(1, 1, 1, 4, "selective", model="biased", documents="uneven"),
    Case(2, 1, 1, 2, "full", False, True, "biased", "mixed"),
    Case(2, 1, 2, 1, "selective", model="biased bank", documents="length one"),
    Case(4, 2, 2, 2, "full", True, True, "biased bank", "uneven"),
    Case(2, 1, 2, 2, "full", False, False, "7 and 4 experts", "mixed", placed=True),
    Case(4, 1, 4, 2, "selective", placed=True),
    Case(4, 1, 2, 1, "none", False, False, "one bank", "uneven", placed=True),
    Case(4, 2, 2, 2, "full", True, True, "pools of one", placed=True),
]
"""What `PLAIN` leaves out, several choices at a time and each at least twice."""


def every_case() -> list[Case]:
    """The whole product of how a run is laid out, and every model with every kind of documents on
    every layout."""
    structure = [
        Case(*layout, micro, recompute, reshard, explicit_shard=not reshard)
        for layout in layouts(1, 2, 3, 4)
        for micro in (1, 2)
        for recompute in RECOMPUTE
        for reshard in (True, False)
    ]
    content = [
        Case(*layout, 2, "selective", reshard, not reshard, model, documents)
        for layout in layouts(1, 2, 3, 4)
        for index, model in enumerate(MODELS)
        for reshard, documents in zip((True, False, index % 2 == 0), DOCUMENTS, strict=True)
    ]
    # Four experts leave the last of three ranks without any, and one row is no two windows.
    no_layout = {("7 and 4 experts", "ep", 3), ("pools across windows", "size", 1)}
    return [
        case
        for case in structure + content
        if not any(case.model == of and getattr(case, name) == n for of, name, n in no_layout)
    ]


def with_long(cases: list[Case], others: list[Case]) -> pytest.MarkDecorator:
    """Parametrize by the cases, and by what is new among others as `long`."""
    more = [pytest.param(c, marks=pytest.mark.long) for c in others if c not in set(cases)]
    return pytest.mark.parametrize("case", [*cases, *more], ids=str)


def assert_same(got: list[Step], wanted: list[Step], parameters: float = 1e-12) -> None:
    """To 1e-9 of each element: for fp64.

    Args:
        parameters: what an element of a parameter that is near zero may be off.
    """
    for step, one in zip(got, wanted, strict=True):
        for key, values in vars(one).items():
            atol = parameters if key == "parameters" else 1e-12
            torch.testing.assert_close(vars(step)[key], values, rtol=1e-9, atol=atol)


@lru_cache(maxsize=4)
def train_together(
    cases: tuple[Case, ...], steps: int, dtype: torch.dtype = torch.float64, **training: str
) -> dict[Case, list[list[Step]]]:
    """What every rank records in each of some cases of one number of processes. The same processes
    train them one after the other: to start takes them longer than to train."""

    def train_all(ranks: Ranks) -> list[list[Step]]:
        return [case.train_as(ranks, steps, dtype, **training) for case in cases]

    size = cases[0].world_size
    by_rank = [train_all(Ranks())] if size == 1 else run_ranks(train_all, size)
    return {case: [records[i] for records in by_rank] for i, case in enumerate(cases)}


def records_of(
    case: Case, cases: list[Case], steps: int, *, of: str = "world_size", **options: Any
) -> list[list[Step]]:
    """What every rank records in a case, trained together with those of `cases` that have the same
    processes, or the same of another attribute."""
    same = [other for other in cases if getattr(other, of) == getattr(case, of)]
    return train_together(tuple(same if case in same else [case]), steps, **options)[case]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_no_layout_changes_training(case: Case) -> None:
    for record in records_of(case, PLAIN, 3, of="layout"):
        assert_same(record, one_process("published", "mixed", ROWS, 3))


@with_long(COMBINED, [case for case in every_case() if case not in PLAIN])
def test_no_layout_changes_training_whatever_the_model_and_the_documents(case: Case) -> None:
    # Where a document is one token, attention has no gradient: AdamW multiplies what rounding
    # leaves of it by lr / eps = 1e6.
    atol = 1e-10 if case.documents == "length one" else 1e-12
    for record in records_of(case, COMBINED, 3):
        assert_same(record, one_process(case.model, case.documents, case.rows, 3), atol)


def test_every_choice_is_met_twice() -> None:
    """By default, in cases that differ in more than that choice."""
    met = Counter(
        (field.name, getattr(case, field.name)) for case in COMBINED for field in fields(case)
    )
    choices = [
        ("world_size", 3),
        ("reshard", False),
        ("explicit_shard", True),
        ("placed", True),
        *(("model", model) for model in MODELS if model != "published"),
        *(("documents", documents) for documents in DOCUMENTS),
    ]
    assert {choice: met[choice] for choice in choices if met[choice] < 2} == {}


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 2, "full"),
        Case(2, 1, 1, 2, "selective", documents="uneven"),
        Case(2, 1, 2, 1, "full", reshard=False, model="pools of one"),
        Case(3, 1, 3, 2, model="sigmoid"),
        Case(2, 1, 1, 2, "full", model="biased"),
    ],
    ids=str,
)
def test_no_layout_changes_training_through_torch_compile(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as in a run, but run by PyTorch's own kernels (`aot_eager`): the
    generated ones take minutes to compile and know nothing of layouts."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for record in case.train(steps=2, compile=True):
        assert_same(record, one_process(case.model, case.documents, case.rows, 2))


# ---- other precisions


@dataclass(frozen=True)
class Distance:
    """How far apart two records are: the largest of all steps."""

    numbers: float
    """Of a loss, a norm or a statistic, relative."""
    gradients: float
    """Of a parameter's gradient: the norm of the difference in the norm of the gradient."""
    elements: float
    """Of an element of a gradient, in the largest element of all gradients."""
    parameters: float
    """Of an element of a parameter, in the largest element of all parameters."""

    @classmethod
    def between(cls, got: list[Step], wanted: list[Step]) -> Distance:
        steps = [cls._of_step(*pair) for pair in zip(got, wanted, strict=True)]
        return cls(*(max(column) for column in zip(*map(astuple, steps), strict=True)))

    @classmethod
    def _of_step(cls, got: Step, wanted: Step) -> Distance:
        relative = (got.numbers - wanted.numbers).abs() / wanted.numbers.abs().clamp(min=1e-9)
        off = {name: got.gradients[name] - one for name, one in wanted.gradients.items()}
        moved = [got.parameters[name] - one for name, one in wanted.parameters.items()]
        return cls(
            relative.max().item(),
            max((off[n].norm() / one.norm()).item() for n, one in wanted.gradients.items()),
            largest(off.values()) / largest(wanted.gradients.values()),
            largest(moved) / largest(wanted.parameters.values()),
        )


def largest(tensors: Iterable[torch.Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors)


FP32 = Distance(numbers=1e-5, gradients=1e-4, elements=1e-4, parameters=1e-4)
"""Of five steps. Seen: 1.3e-6, 1.1e-5, 1.3e-5 and 5.7e-6."""

BF16 = Distance(numbers=1e-3, gradients=1e-2, elements=1e-2, parameters=math.inf)
"""Of one step. Seen: 9.9e-5, 4.1e-3 and 3.4e-3. AdamW's first update is the sign of the gradient,
and near zero the sign is chance: parameters say nothing."""


def assert_near(got: list[Step], wanted: list[Step], limit: Distance) -> None:
    distance = Distance.between(got, wanted)
    assert all(off <= most for off, most in zip(astuple(distance), astuple(limit), strict=True)), (
        f"{distance} is more than {limit}"
    )


IN_FP32 = [Case(*layout, 2) for layout in layouts(1, 2, 4)]


@with_long(IN_FP32, [case for case in COMBINED if case.documents != "length one"])
def test_no_layout_changes_training_in_fp32(case: Case) -> None:
    for record in records_of(case, IN_FP32, 5, dtype=torch.float32):
        wanted = one_process(case.model, case.documents, case.rows, 5, torch.float32)
        assert_near(record, wanted, FP32)


IN_BF16 = [
    Case(1, 1, 1, 2),
    Case(2, 1, 1),
    Case(2, 1, 2, 2),
    Case(2, 2, 1, 2, "full"),
    Case(3, 1, 3, 1, "selective", reshard=False),
    Case(4, 1, 1, 2),
    Case(4, 2, 2, reshard=False),
]


@with_long(
    IN_BF16,
    [replace(case, micro_batches=micro) for case in COMBINED for micro in (1, 2)],
)
def test_no_layout_changes_a_step_in_bf16(case: Case) -> None:
    """Norm gains are not 1: one that is rounded in one layout alone is ten times as far off."""
    options = {"dtype": torch.float32, "precision": "bfloat16"}
    for record in records_of(case, IN_BF16, 1, **options):
        wanted = one_process(case.model, case.documents, case.rows, 1, torch.float32, "bfloat16")
        assert_near(record, wanted, BF16)


def test_in_fp32_only_parameters_without_a_gradient_move_apart() -> None:
    """Documents of one token leave queries and keys no gradient but its rounding, and AdamW divides
    a gradient by its own size: two layouts move them anywhere, by the learning rate. With an
    epsilon that is larger than the rounding nothing moves apart."""

    def records(eps: float) -> tuple[list[Step], list[Step]]:
        settings = config()
        settings = replace(settings, optimizer=replace(settings.optimizer, eps=eps))
        one, several = (
            train(settings, size, Ranks(), 5, torch.float32, "length one") for size in (ROWS, 1)
        )
        return several, one

    assert_near(*records(eps=1e-2), FP32)
    several, one = records(eps=1e-8)
    assert Distance.between(several, one).parameters > FP32.parameters
    assert_near(several, one, replace(FP32, parameters=math.inf))
    most = largest(one[-1].parameters.values())
    for name, wanted in one[-1].parameters.items():
        apart = (several[-1].parameters[name] - wanted).abs() > FP32.parameters * most
        for step in one:
            gradient = step.gradients[name].abs() / largest(step.gradients.values())
            assert not apart.any() or gradient[apart].max() < 1e-6, name


# ---- schedules, scopes, evaluation and padding


def test_evaluation_between_steps_changes_nothing() -> None:
    def evaluate(model: Transformer) -> None:
        model(micro_batches(99, ROWS, 0, 1)[0])

    evaluated = train(config(), ROWS, Ranks(), after_step=evaluate)
    for got, wanted in zip(evaluated, one_process("published", "mixed", ROWS, 5), strict=True):
        torch.testing.assert_close(vars(got), vars(wanted), rtol=0, atol=0)


def test_the_running_schedule_is_exact_with_one_micro_batch_and_only_near_with_several():
    joint, running = config(), config(balance_schedule="running")
    (one,) = train(running, ROWS, Ranks(), steps=1)
    (several,) = train(running, 1, Ranks(), steps=1)
    (exact,) = train(joint, 1, Ranks(), steps=1)
    torch.testing.assert_close(one.gradients, exact.gradients, rtol=1e-9, atol=1e-12)
    near, wanted = (
        torch.cat([gradient.flatten() for gradient in step.gradients.values()])
        for step in (several, exact)
    )
    assert not torch.allclose(near, wanted, rtol=1e-6)
    assert torch.dot(near, wanted) / near.norm() / wanted.norm() > 0.9


def test_scopes_count_what_they_say() -> None:
    """data_parallel balances each micro-batch over ranks, micro_batch each one alone."""
    whole = config(balance_scope="data_parallel")
    (wanted,) = train(config(), ROWS, Ranks(), steps=1)
    (one,) = train(whole, ROWS, Ranks(), steps=1)
    torch.testing.assert_close(one.gradients, wanted.gradients)
    # Two ranks with half of the rows each: one micro-batch a rank is the global batch again.
    for (step,) in train_on(2, whole, ROWS // 2, steps=1):
        torch.testing.assert_close(step.gradients, wanted.gradients, rtol=1e-9, atol=1e-12)
    # A micro-batch of one row counts itself alone: its experts look less balanced than those of the
    # whole batch do.
    balance = {
        scope: train(config(balance_scope=scope), 1, Ranks(), 1)[0].numbers[3]
        for scope in ("micro_batch", "global_batch")
    }
    assert balance["micro_batch"] > balance["global_batch"]


def test_padding_changes_no_loss_gradient_or_statistic():
    """Appending a row of padding to the global batch changes nothing."""
    settings = config()
    tokens, lengths, ids = global_batch(1)
    model = Transformer(settings.model).initialize(3).double()
    results = []
    for rows in (ROWS, ROWS + 1):
        padded = np.concatenate([tokens, np.zeros((1, LENGTH), dtype=tokens.dtype)])[:rows]
        batch = packed_rows(padded, [*lengths, [LENGTH]][:rows], [*ids, [-1]][:rows], True)
        result = train_step(NativeEngine(model), [batch], settings, 1, Ranks())
        results.append(
            (
                {
                    key: value
                    for key, value in vars(result).items()
                    if key not in ("reports", "micro_batch_losses", "by_source")
                },
                routing_metrics(result.reports, Ranks()),
                torch.cat([p.grad.flatten() for p in model.parameters()]),
            )
        )
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for key, values in results[0][1].items():
        assert np.array(values) == pytest.approx(np.array(results[1][1][key]), rel=1e-12), key
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-9, atol=1e-13)
