"""Set algebra on subsets against sets of numbers and against counting everything that can be: the
files alone, no model."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.cli import main
from emotrain.errors import UserError
from emotrain.modular.algebra import (
    OPERATIONS,
    Operand,
    combine,
    counted_model,
    jaccard_by_chance,
    merge,
    overlap,
)
from emotrain.modular.artefact import Calibration, Subset, kept_of, read_subset
from emotrain.modular.budget import Budget, read_keep
from tests.conftest import run_command

ROUTED = (8, 1, 5)
SHARED = 1


def subset_of(kept, scores=(), **changes) -> Subset:
    """A subset of a model of three layers."""
    of = {
        "experts_kept_per_layer": tuple(
            kept_of(experts, routed, SHARED) for experts, routed in zip(kept, ROUTED, strict=True)
        ),
        "experts_per_layer": tuple(routed + SHARED for routed in ROUTED),
        "num_shared_experts": SHARED,
        "method": "router",
        "precision": "fp32",
        "budget": "3",
        "checkpoint": "runs/it",
        "checkpoint_fingerprint": "ab" * 32,
        "tokenizer_fingerprint": "",
        "calibration": Calibration("data", "rust", 6, 700, "cd" * 32),
        "scores_per_layer": tuple(map(tuple, scores)),
    }
    return Subset(**{**of, **changes})


def operand(kept, scores=(), file="a.json", **changes) -> Operand:
    return Operand(file, "ef" * 32, subset_of(kept, scores, **changes))


def routed_of(subset: Subset) -> list[set[int]]:
    return [set(subset.routed(layer)) for layer in range(len(ROUTED))]


@st.composite
def operands(draw: st.DrawFn, most: int = 4) -> list[Operand]:
    """Subsets of sizes of their own, each with the best by its scores."""
    found = []
    for number in range(draw(st.integers(2, most))):
        scores = [
            draw(st.lists(st.floats(0, 1e6), min_size=routed, max_size=routed)) for routed in ROUTED
        ]
        kept = []
        for of_layer in scores:
            count = draw(st.integers(1, len(of_layer)))
            best = sorted(range(len(of_layer)), key=lambda i, of=of_layer: (-of[i], i))
            kept.append(sorted(best[:count]))
        found.append(operand(kept, scores, f"{number}.json"))
    return found


# ---- combining


@settings(max_examples=30, deadline=None)
@given(operands(), st.sampled_from(sorted(OPERATIONS)))
def test_every_expert_is_where_the_operation_puts_it(given, operation):
    expected = []
    for layer, routed in enumerate(ROUTED):
        inside = [[i in of.subset.routed(layer) for of in given] for i in range(routed)]
        rule = {
            "union": any,
            "intersection": all,
            "difference": lambda of: of[0] and not any(of[1:]),
        }[operation]
        expected.append({i for i in range(routed) if rule(inside[i])})
    if not all(expected):
        with pytest.raises(UserError, match=f"{operation} of 0.json, .* would keep no routed exp"):
            combine(operation, given)
        return
    found = combine(operation, given)
    assert routed_of(found) == expected
    # As every subset, it has the shared experts, can be written, and is read as itself.
    for kept, routed in zip(found.experts_kept_per_layer, ROUTED, strict=True):
        assert kept[-1] == routed
    assert [parent.file for parent in found.parents] == [of.file for of in given]
    assert all(sum(of_layer) < 1 + 1e-9 for of_layer in found.scores_per_layer)


@settings(max_examples=30, deadline=None)
@given(operands(), st.data())
def test_a_merge_keeps_the_best_of_the_union(given, data):
    counts = tuple(data.draw(st.integers(2, routed + SHARED)) for routed in ROUTED if routed)
    weights = [data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in given]
    found = merge(given, weights, Budget("it", counts))
    for layer, (kept, routed) in enumerate(zip(routed_of(found), ROUTED, strict=True)):
        weighted = [0.0] * routed
        for of, weight in zip(given, weights, strict=True):
            scores = of.subset.scores_per_layer[layer]
            for i in range(routed):
                # The share first: half of the smallest float is 0.
                weighted[i] += weight * (scores[i] / (sum(scores) or 1)) / sum(weights)
        union = set().union(*(of.subset.routed(layer) for of in given))
        assert kept <= union and len(kept) == min(counts[layer] - SHARED, len(union))
        left_out = [weighted[i] for i in union - kept]
        assert min(weighted[i] for i in kept) >= max(left_out, default=0) - 1e-12
        assert found.scores_per_layer[layer] == pytest.approx(weighted)


@settings(max_examples=30, deadline=None)
@given(operands())
def test_a_merge_with_room_for_all_is_the_union(given):
    full = Budget("all", tuple(routed + SHARED for routed in ROUTED))
    total = Budget("total", total=sum(routed + SHARED for routed in ROUTED))
    union = combine("union", given)
    for budget in (full, total):
        merged = merge(given, [1.0] * len(given), budget)
        assert merged.experts_kept_per_layer == union.experts_kept_per_layer
        assert merged.scores_per_layer == union.scores_per_layer


@settings(max_examples=30, deadline=None)
@given(operands(most=2), st.integers(6, 17))
def test_a_total_is_spent_as_far_as_the_union_goes(given, total):
    found = merge(given, [1.0, 1.0], Budget("total", total=total))
    size = sum(map(len, combine("union", given).experts_kept_per_layer))
    assert sum(map(len, found.experts_kept_per_layer)) == min(total, size)


def test_a_weight_decides_whose_experts_stay():
    one = operand([[0, 1], [0], [0]], [[4, 3, 2, 1, 0, 0, 0, 0], [1], [1, 0, 0, 0, 0]])
    other = operand([[6, 7], [0], [4]], [[0, 0, 0, 0, 0, 0, 30, 40], [9], [0, 0, 0, 0, 7]])
    budget = read_keep("3,2,2", counted_model(one.subset))
    for weights, best, last in (((3, 1), {0, 1}, 0), ((1, 3), {6, 7}, 4), ((1, 1), {0, 7}, 0)):
        found = routed_of(merge([one, other], weights, budget))
        # By shares 0.4 and 0.3 against 0.57 and 0.43, though the numbers of one are ten times less.
        assert found == [{6, 7} if weights == (1, 1) else best, {0}, {last}]


def test_what_a_subset_was_made_of_is_written_down(tmp_path):
    files = []
    for name, domain, method in (("a", "rust", "router"), ("b", "haiku", "reap")):
        calibration = Calibration("data", domain, 6, 700, "cd" * 32)
        subset = subset_of(
            [[1, 2], [0], [3]], [[1.0] * n for n in ROUTED], calibration=calibration, method=method
        )
        files.append(str(subset.save(tmp_path / f"{name}.json")))
    out = tmp_path / "c.json"
    words = ["merge", *files, "--weights", "1", "2", "--keep", "0.5", "--out", str(out)]
    assert main(["subsets", *words]) == 0
    found = read_subset(out)
    assert [(p.file, p.method, p.domain, p.weight) for p in found.parents] == [
        (files[0], "router", "rust", 1.0),
        (files[1], "reap", "haiku", 2.0),
    ]
    assert found.method == "merge" and found.budget == "0.5" and found.precision == "fp32"
    assert (found.calibration.domain, found.calibration.documents) == ("rust, haiku", 12)
    published = json.loads(out.read_text())
    assert published["pruning_method"] == "merge" and published["task"] == "rust, haiku"
    # A file from before parents were written is read as ever.
    del published["parents"]
    out.write_text(json.dumps(published))
    assert read_subset(out) == dataclasses.replace(found, parents=())


# ---- overlap


@pytest.mark.parametrize("total", [1, 2, 5, 6])
def test_chance_is_the_mean_over_all_subsets(total):
    for a, b in itertools.product(range(1, total + 1), repeat=2):
        one = set(range(a))
        every = [set(other) for other in itertools.combinations(range(total), b)]
        indices = [len(one & other) / len(one | other) for other in every]
        mean, variance = statistics.mean(indices), statistics.pvariance(indices)
        assert jaccard_by_chance(a, b, total) == pytest.approx((mean, variance), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(operands())
def test_overlap_is_counted_by_hand(given):
    found = overlap(given)
    size = len(given)
    for i, j in itertools.product(range(size), repeat=2):
        layers = [
            len(one & other) / len(one | other)
            for one, other in zip(
                routed_of(given[i].subset), routed_of(given[j].subset), strict=True
            )
        ]
        assert [of_layer[i][j] for of_layer in found.jaccard_per_layer] == layers
        assert found.jaccard[i][j] == pytest.approx(statistics.mean(layers))
        assert found.jaccard[i][j] == found.jaccard[j][i] and found.jaccard[i][i] == 1
    assert found.routed_per_layer == ROUTED
    assert found.union_per_layer == tuple(map(len, routed_of(combine("union", given))))
    assert found.common_per_layer == tuple(
        len(set.intersection(*of_layer))
        for of_layer in zip(*(routed_of(of.subset) for of in given), strict=True)
    )


def test_deviations_are_those_of_the_number_in_common():
    """Of all pairs of subsets of these sizes, counted, over two layers that can vary."""
    sizes = ((3, 2, 8), (2, 4, 5))
    numbers = [
        sum(common)
        for common in itertools.product(
            *(
                [len(set(range(a)) & set(other)) for other in itertools.combinations(range(n), b)]
                for a, b, n in sizes
            )
        )
    ]
    mean, deviation = statistics.mean(numbers), statistics.pstdev(numbers)
    one, other = operand([[0, 1, 2], [0], [0, 1]]), operand([[1, 2], [0], [1, 2, 3, 4]])
    assert overlap([one, other]).deviations[0][1] == pytest.approx((3 - mean) / deviation)
    full = operand([range(8), [0], range(5)])
    assert overlap([full, other]).deviations[0][1] is None


def test_overlap_is_a_table_and_a_picture(tmp_path, capsys):
    files = []
    for name, kept in (
        ("a", [[1, 2], [0], [3]]),
        ("b", [[2, 3], [0], [3]]),
        ("c_", [[0], [0], [0]]),
    ):
        files.append(str(subset_of(kept).save(tmp_path / f"{name}.json")))
    plot = tmp_path / "overlap.png"
    assert main(["subsets", "overlap", *files]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 3 and table[2].split()[:3] == ["a", "b", "0.778"]
    pytest.importorskip("matplotlib")
    assert main(["subsets", "overlap", *files, "--plot", str(plot), "--json"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(plot.with_suffix(".csv").read_text().splitlines()))
    [row] = [r for r in rows if (r["subset"], r["other_subset"]) == (files[0], files[1])]
    assert len(rows) == 9 and float(row["jaccard"]) == pytest.approx(7 / 9)
    assert main(["subsets", "overlap", *files, "--plot", str(plot.with_suffix(".csv"))]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["plot"] == str(plot) and result["jaccard"][0][1] == pytest.approx(7 / 9)


# ---- without torch


def test_neither_torch_nor_the_checkpoint_is_needed(tmp_path):
    file = subset_of([[1], [0], [3]], [[1.0] * n for n in ROUTED]).save(tmp_path / "a.json")
    code = (
        "import sys\nfrom emotrain.cli import main\n"
        f"a, folder = {str(file)!r}, {str(tmp_path)!r}\n"
        "for words in (['union'], ['intersection'], ['merge', '--keep', '2'], ['overlap']):\n"
        "    out = [] if words == ['overlap'] else ['--out', f'{folder}/{words[0]}.json']\n"
        "    assert main(['subsets', words[0], a, a, *words[1:], *out, '--json']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run_command("-c", code)
    assert done.returncode == 0, done.stderr
    assert sys.executable and (tmp_path / "merge.json").is_file()


# ---- what cannot be


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    scores = [[1.0] * n for n in ROUTED]
    good = [[1, 2], [0], [3]]
    subsets = {
        "a": subset_of(good, scores),
        "b": subset_of([[2, 3], [0], [4]], scores),
        "weights": subset_of(good, scores, checkpoint_fingerprint="00" * 32),
        "tokenizer": subset_of(good, scores, tokenizer_fingerprint="00" * 32),
        "random": subset_of(good, method="random"),
        "shape": Subset(
            **{
                **vars(subset_of(good)),
                "experts_kept_per_layer": ((0, 8),) * 2,
                "experts_per_layer": (9, 9),
            }
        ),
    }
    found = {name: str(of.save(tmp_path / f"{name}.json")) for name, of in subsets.items()}
    (tmp_path / "taken.json").write_text("mine")
    (tmp_path / "broken.json").write_text("{")
    return {**found, "taken": str(tmp_path / "taken.json"), "broken": str(tmp_path / "broken.json")}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["union", "a"], "1 subset is too few; give 2 or more"),
        (["union", "a", "nowhere"], "nowhere: no such subset; write one with emotrain select"),
        (["union", "a", "broken"], "broken.json: is not a usable subset"),
        (["union", "a", "weights"], "weights.json: is of a model with other weights than"),
        (["union", "a", "tokenizer"], "tokenizer.json: is of a model with another tokenizer than"),
        (["overlap", "a", "shape"], "shape.json: is of a model with another number of experts"),
        (["intersection", "a", "b"], "layer 2 would keep no routed expert, and every layer needs"),
        (["difference", "a", "b"], "layer 1 would keep no routed expert"),
        (["difference", "a", "a"], "layer 0 (and 2 more) would keep no routed expert"),
        (["merge", "a", "b"], "say how many experts to keep, once: --keep 32 or --memory 4GB"),
        (["merge", "a", "b", "--keep", "3", "--memory", "1GB"], "say how many experts to keep"),
        (["merge", "a", "b", "--keep", "1"], "layer 0 cannot keep 1 of its 9 experts; keep 2 to 9"),
        (["merge", "a", "b", "--keep", "99"], "--keep 99: the largest layer has 9 experts"),
        (["merge", "a", "b", "--keep", "total:5"], "3 layers keep 6 to 17 experts together"),
        (["merge", "a", "b", "--keep", "3", "--weights", "1"], "has 1 numbers for 2 subsets"),
        (["merge", "a", "b", "--keep", "3", "--weights", "1", "0"], "--weights 1 0: must be above"),
        (["merge", "a", "b", "--keep", "3", "--weights", "1", "nan"], "must be above 0"),
        (["merge", "a", "random", "--keep", "3"], "random.json: has no scores (method random)"),
        (["merge", "a", "b", "--keep", "3", "--checkpoint", "x"], "--checkpoint says what --mem"),
        (["merge", "a", "b", "--memory", "1GB"], "runs/it: no checkpoint here"),
        (["union", "a", "b", "--out", "taken"], "taken.json: exists; remove it or choose another"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(words, fault, files, tmp_path, capsys):
    words = [files.get(word, word) for word in words]
    if words[0] != "overlap" and "--out" not in words:
        words += ["--out", str(tmp_path / "out.json")]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["subsets", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and fault in line
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
