"""Proves that results of evaluations stay readable: their keys, files of before, and one line for
a file that is none."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emotrain.cli import main
from emotrain.errors import UserError
from emotrain.evaluation.measure import measure
from emotrain.evaluation.results import ARMS, Evaluation, read_evaluation
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.files import json_text
from tests.conftest import ROOT
from tests.helpers import tiny_model
from tests.test_evaluation import ROW, domains_of

OLD_RUN = Path(__file__).parent / "old_run"
"""What a run and its evaluation wrote before `document_tokens` and `domains` were settings."""
FILE = Path("evaluation.json")


def old_result() -> dict[str, Any]:
    return json.loads((OLD_RUN / "evaluation/evaluation.json").read_text(encoding="utf-8"))


def test_json_keys_are_stable() -> None:
    """Scripts and pages read these; a renamed key is a broken promise."""
    found = measure(tiny_model(), domains_of(2), EvaluationSettings(keep=(1, 0.25)), ROW, 2)
    evaluation = Evaluation(
        **vars(found), checkpoint="run/step", step=7, data="data", sequence_length=ROW
    )
    result = json.loads(json_text(evaluation.to_json()))
    assert Evaluation.from_json(result, FILE) == evaluation
    assert list(result) == [
        *("format", "checkpoint", "step", "data", "sequence_length"),
        *("settings", "experts", "domains", "mean", "routing"),
    ]
    assert set(result["settings"]) == {
        "keep",
        "domains",
        "document_tokens",
        "calibration_documents",
        "control_documents",
        "documents",
        "seed",
        "random_seeds",
        "cross_domain",
    }
    assert result["settings"]["keep"] == [1.0, 0.25]
    assert result["settings"]["domains"] == ["code", "law"]
    assert result["experts"] == {
        "per_layer": [9, 9],
        "shared": 1,
        "per_token": 4,
        "kept_per_layer": {"1.0": [9, 9], "0.25": [2, 2]},
    }
    losses = {"loss_nats", "subset_loss_nats", "increase_nats", "standard_error_nats"}
    assert set(result["domains"]["law"]) == losses | {
        "documents",
        "targets",
        "calibration_documents",
    }
    assert set(result["mean"]) == losses
    for table in losses - {"loss_nats"}:
        assert set(result["mean"][table]) == {"1.0", "0.25"}
        assert set(result["mean"][table]["0.25"]) == set(ARMS)
    assert set(result["routing"]) == {
        "domain_cosine_per_layer",
        "domain_cosine",
        "effective_experts_per_layer",
        "effective_experts",
    }


def test_a_folder_of_before_has_its_report(tmp_path: Path) -> None:
    run_dir = shutil.copytree(OLD_RUN, tmp_path / "run")
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    for number in ("4.772", "-0.007 ± 0.013", "+0.005 ± 0.027", "-0.029 ± 0.016", "0.910"):
        assert number in page
    evaluation = read_evaluation(run_dir / "evaluation/evaluation.json")
    assert evaluation.settings.document_tokens == 0 and evaluation.step == 7


def test_a_file_of_before_may_hold_a_bare_nan(tmp_path: Path) -> None:
    """Numbers that were not finite were written so."""
    text = (OLD_RUN / "evaluation/evaluation.json").read_text(encoding="utf-8")
    loss = json_text(old_result()["mean"]["loss_nats"])
    (tmp_path / "evaluation.json").write_text(text.replace(loss, "NaN"), encoding="utf-8")
    assert read_evaluation(tmp_path / "evaluation.json").mean.loss_nats is None


def test_results_kept_beside_the_benchmarks_are_readable() -> None:
    file = ROOT / "benchmarks/results/modularity.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["evaluations"]
    for label in ("EMO", "standard MoE"):
        assert len(Evaluation.from_json(kept[label], file).domains) == 16


OBJECTS: list[tuple[str, ...]] = [
    (),
    ("settings",),
    ("experts",),
    ("domains", "law"),
    ("domains", "law", "increase_nats", "0.5"),
    ("mean",),
    ("mean", "standard_error_nats", "1.0"),
    ("routing",),
]
"""Paths of objects with keys of their own, one of each dataclass and more."""


@pytest.mark.parametrize("path", OBJECTS, ids=".".join)
def test_a_key_that_is_unknown_or_missing_is_named(path: tuple[str, ...]) -> None:
    result = old_result()
    prefix = "".join(f"{key}." for key in path)

    def refusal(change: Callable[[dict[str, Any]], None]) -> str:
        changed = copy.deepcopy(result)
        place = changed
        for key in path:
            place = place[key]
        change(place)
        with pytest.raises(UserError) as caught:
            Evaluation.from_json(changed, FILE)
        return str(caught.value)

    keys = result
    for key in path:
        keys = keys[key]
    for key in keys.keys() - {"format"}:
        message = refusal(lambda place, key=key: place.pop(key))
        assert (
            f"evaluation.json: not a result of `emotrain evaluate` ({prefix}{key} is missing)"
            in (message)
        )
    message = refusal(lambda place: place.update(extra=1))
    assert f"{prefix}extra is not known" in message and message.endswith("run it again")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), 2, "format is 2, not 1"),
        (("step",), 7.0, "step is 7.0, not a whole number"),
        (("step",), True, "step is True, not a whole number"),
        (("checkpoint",), None, "checkpoint is None, not text"),
        (("domains",), [], "domains is [], not an object"),
        (("domains",), {}, "domains is empty"),
        (("experts", "per_layer"), {}, "experts.per_layer is {}, not a list"),
        (("experts", "per_layer"), [9, "9"], "experts.per_layer is '9', not a whole number"),
        (("experts", "kept_per_layer"), {"0.5": [4]}, "experts.kept_per_layer has the shares 0.5"),
        (("mean", "loss_nats"), "3", "mean.loss_nats is '3', not a number"),
        (("mean", "increase_nats", "x"), dict.fromkeys(ARMS), "mean.increase_nats has the shares"),
        (("routing", "domain_cosine_per_layer"), [0.5], "has not 2 entries"),
        (("settings", "documents"), 1, "documents=1 gives no standard error"),
    ],
)
def test_values_that_cannot_be_are_named(path: tuple[str, ...], value: Any, said: str) -> None:
    result = old_result()
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UserError) as caught:
        Evaluation.from_json(result, FILE)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000, '{"format": 1}', "\ud800"])
def test_a_file_that_is_no_result_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="evaluation.json: not a result of `emotrain evaluate`"):
        read_evaluation(file)


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Evaluation.from_json(old_result(), FILE).step = 8
