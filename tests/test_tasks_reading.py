"""Task files: what a line may say, what is refused with its line, and what a model is shown."""

from __future__ import annotations

import json
import logging
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emotrain.errors import UserError
from emotrain.tasks.items import in_order, read_file
from emotrain.tasks.metrics import bits_per_byte, choose, exact_match, f1, mean_and_error
from emotrain.tasks.prompts import read_tasks
from emotrain.tasks.settings import TaskSettings

CHOICE = {"question": "2 + 2 = ?", "choices": ["3", "4", "5"], "answer": 1}


def write_lines(path, *records):
    """Objects as JSON lines, bytes as they are."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# ---- what is read


@pytest.mark.parametrize("answer", [1, "B", "4"])
def test_a_right_choice_is_a_number_a_letter_or_a_text(tmp_path, answer):
    (item,) = read_file(write_lines(tmp_path / "a.jsonl", {**CHOICE, "answer": answer})).items
    assert (item.kind, item.gold, item.answer, item.split) == ("choice", 1, "4", "test")
    assert item.prompt == "Question: 2 + 2 = ?\nAnswer:"


def test_a_letter_that_is_also_a_text_is_taken_where_both_are_one(tmp_path):
    same = {**CHOICE, "choices": ["A", "B"], "answer": "B"}
    assert read_file(write_lines(tmp_path / "a.jsonl", same)).items[0].gold == 1


def test_every_kind_and_field_is_read(tmp_path, caplog):
    file = write_lines(
        tmp_path / "a.jsonl",
        {"prompt": "1 1 2 3", "answer": "5", "split": "train", "subject": "numbers", "id": "7"},
        b"",
        {"question": "Who?", "answers": ["Ada", "Lovelace"], "source": "made up", "colour": 3},
    )
    with caplog.at_level(logging.WARNING):
        first, second = read_file(file).items
    assert (first.prompt, first.split, first.subject) == ("1 1 2 3", "train", "numbers")
    assert (second.line, second.kind, second.answers) == (3, "generation", ("Ada", "Lovelace"))
    assert caplog.messages == [f"{file}: has fields that are not read: colour"]
    (text,) = read_file(write_lines(tmp_path / "b.jsonl", {"text": "Once.", "domain": "x"})).items
    assert (text.kind, text.answer, text.prompt) == ("text", "Once.", "")


def test_equal_choices_are_named_and_the_first_counts(tmp_path, caplog):
    file = write_lines(tmp_path / "a.jsonl", {**CHOICE, "choices": ["3", "4", "4"]})
    with caplog.at_level(logging.WARNING):
        assert read_file(file).items[0].gold == 1
    assert "the same choice stands twice in line 1;" in caplog.text


HOSTILE = {
    "no JSON": b'{"question": ',
    "not UTF-8": b'{"question": "\xff"}',
    "a number that is none": b'{"question": "a", "choices": ["b", "c"], "answer": NaN}',
    "a key twice": b'{"question": "a", "question": "b", "answer": "c"}',
    "deep": b"[" * 100_000,
    "too many digits": b'{"question": "a", "answer": ' + b"1" * 5000 + b"}",
    "a list": ["question"],
    "nothing asked": {"answer": "4"},
    "two things asked": {"question": "a", "prompt": "b", "answer": "4"},
    "a text with an answer": {"text": "a", "answer": "4"},
    "no answer": {"question": "a"},
    "two answers": {"question": "a", "answer": "b", "answers": ["c"]},
    "no answers": {"question": "a", "answers": []},
    "an answer of another type": {"question": "a", "answer": 4},
    "a blank question": {"question": " \n", "answer": "b"},
    "a question of another type": {"question": ["a"], "answer": "b"},
    "half a character": b'{"question": "\\ud800", "answer": "b"}',
    "no choices": {**CHOICE, "choices": []},
    "one choice": {**CHOICE, "choices": ["4"], "answer": 0},
    "choices that are a text": {**CHOICE, "choices": "345"},
    "a blank choice": {**CHOICE, "choices": ["3", " "]},
    "a choice of another type": {**CHOICE, "choices": ["3", 4]},
    "a choice that is null": {**CHOICE, "choices": ["3", None]},
    "an answer too large": {**CHOICE, "answer": 3},
    "an answer too small": {**CHOICE, "answer": -1},
    "an answer of 4,000 digits": {**CHOICE, "answer": 10**4000},
    "a letter too large": {**CHOICE, "answer": "D"},
    "a small letter": {**CHOICE, "answer": "b"},
    "true": {**CHOICE, "answer": True},
    "half of a choice": {**CHOICE, "answer": 1.5},
    "no choice": {**CHOICE, "answer": "22"},
    "a letter and a text of two choices": {**CHOICE, "choices": ["B", "A"], "answer": "A"},
    "a later equal": {**CHOICE, "choices": ["4", "4"], "answer": 1},
    "choices and answers": {**CHOICE, "answers": ["4"]},
    "a split of another type": {**CHOICE, "split": 1},
    "another kind than the first": {"question": "a", "answer": "b"},
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_used_is_one_line_with_its_file_and_number(tmp_path, line):
    file = write_lines(tmp_path / "a.jsonl", CHOICE, line)
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 ") as caught:
        read_file(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_line_of_two_gigabytes_is_refused_before_it_is_read(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", CHOICE)
    os.truncate(file, 2 << 30)  # a hole, which takes no room on the disk
    with pytest.raises(UserError, match="line 2 has more than 16 MiB"):
        read_file(file)


@pytest.mark.parametrize("name", ["none.jsonl", "folder", "pipe"])
def test_what_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no such file of questions"):
        read_file(tmp_path / name)


def test_a_file_without_a_line_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no questions and no texts"):
        read_file(write_lines(tmp_path / "a.jsonl", b"", b"  "))


# ---- what a model is shown


def examples(count, split="train", **more):
    return [
        {"question": f"{i} + {i} = ?", "answer": str(2 * i), "split": split, **more}
        for i in range(count)
    ]


def tasks_of(*files, **settings):
    return read_tasks(files, TaskSettings(**settings))


def test_shots_are_the_same_for_all_questions_and_for_every_order_of_a_file(tmp_path):
    asked = examples(3, "test", id="asked")
    asked = [{**one, "question": f"What is {one['question']}"} for one in asked]
    lines = [*examples(9), *asked]
    (task,) = tasks_of(write_lines(tmp_path / "a.jsonl", *lines), shots=2, seed=3)
    (same,) = tasks_of(write_lines(tmp_path / "b.jsonl", *reversed(lines)), shots=2, seed=3)
    (other,) = tasks_of(write_lines(tmp_path / "c.jsonl", *lines), shots=2, seed=4)
    heads = {task.prompt(item).rsplit("\n\n", 1)[0] for item in task.questions}
    assert heads == {same.prompt(item).rsplit("\n\n", 1)[0] for item in same.questions}
    assert heads != {other.prompt(item).rsplit("\n\n", 1)[0] for item in other.questions}
    (head,) = heads
    shown = head.split("\n\n")
    assert len(set(shown)) == 2
    for one in shown:
        question, answer = one.removeprefix("Question: ").split("\nAnswer: ")
        assert {"question": question, "answer": answer, "split": "train"} in lines
    assert task.prompt(task.questions[0]).endswith("\n\nQuestion: What is 0 + 0 = ?\nAnswer:")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_no_question_is_its_own_shot(tmp_path_factory, seed, shots):
    file = write_lines(tmp_path_factory.mktemp("t") / "a.jsonl", *examples(5, "test"))
    (task,) = tasks_of(file, shots=shots, shots_from=str(file), seed=seed)
    for item in task.questions:
        assert task.prompt(item).count(item.prompt) == 1
    # Nor does one that is asked choose experts.
    with pytest.raises(UserError, match="has 0 examples that are not asked, 1 are needed"):
        task.calibration(1)


def test_too_few_shots_name_the_file_and_the_question(tmp_path):
    asked = {"question": "a", "answer": "b", "subject": "letters"}
    lines = [*examples(9, subject="numbers"), *examples(1, "dev"), asked]
    (task,) = tasks_of(write_lines(tmp_path / "a.jsonl", *lines), shots=2)
    with pytest.raises(UserError, match=r"1 examples of subject 'letters' for .*a.jsonl, line 11,"):
        task.prompt(task.questions[0])


def test_calibration_is_shots_question_and_answer_of_examples_that_are_no_shots(tmp_path):
    lines = [*examples(9), {"question": "a", "answer": "b"}]
    (task,) = tasks_of(write_lines(tmp_path / "a.jsonl", *lines), shots=2)
    found = task.calibration(3)
    shots = task.prompt(task.questions[0]).split("\n\n")[:-1]
    for text in found:
        *before, last = text.split("\n\n")
        assert before == shots and last not in shots
        assert last.split("Answer: ")[1]
    assert len({text.rsplit("\n\n", 1)[1] for text in found}) == 3


def test_a_split_is_asked_and_a_limit_is_remembered(tmp_path):
    lines = [*examples(4, "validation"), *examples(2, "test")]
    (task,) = tasks_of(write_lines(tmp_path / "a.jsonl", *lines), split="validation", limit=3)
    assert (len(task.questions), task.available, len(task.examples)) == (3, 4, 2)
    with pytest.raises(UserError, match="no questions of split 'dev', its splits are test, valid"):
        tasks_of(tmp_path / "a.jsonl", split="dev")


def test_tasks_that_cannot_stand_together_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "a.jsonl", *examples(4, "test"))
    files = tmp_path / "x/a.jsonl", tmp_path / "y/a.jsonl"
    with pytest.raises(UserError, match="second task of the name a"):
        tasks_of(*files)
    with pytest.raises(UserError, match="examples of one task, 2 are given"):
        tasks_of(*files, shots_from=str(files[0]))
    text = write_lines(tmp_path / "text.jsonl", {"text": "a b c"})
    with pytest.raises(UserError, match="of kind text, .* is of kind generation"):
        tasks_of(files[0], shots_from=str(text))
    with pytest.raises(UserError, match="plain texts have no examples"):
        tasks_of(text, shots=1)


@settings(max_examples=25, deadline=None)
@given(st.permutations(list(range(6))), st.integers(0, 99))
def test_the_order_of_a_seed_is_that_of_the_items(tmp_path_factory, places, seed):
    folder = tmp_path_factory.mktemp("t")
    items = read_file(write_lines(folder / "a.jsonl", *examples(6))).items
    shuffled = [items[place] for place in places]
    assert in_order(items, seed) == in_order(shuffled, seed)


# ---- numbers


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "expected"),
    [
        ("The  Beatles!", ["beatles"], 1, 1),
        ("Paris, France", ["Paris"], 0, 2 / 3),
        ("a b b c", ["b b d", "x"], 0, 2 * 2 / (3 + 3)),  # `a` is an article
        ("Theatre", ["theatre", "cinema"], 1, 1),
        ("", ["x"], 0, 0),
        ("the", ["a"], 1, 1),
        ("no", ["yes", "an oui"], 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(answer, accepted, exact, expected):
    assert exact_match(answer, accepted) == exact
    assert f1(answer, accepted) == pytest.approx(expected)


def test_each_normalisation_chooses_by_its_own_score():
    chosen = choose([-3.0, -4.0, -6.0], ["a", "bbbb", "cc"], [-1.0, -1.5, -9.0])
    assert chosen == {"raw": 0, "per_char": 1, "unconditional": 2}
    assert choose([-1.0, -1.0], ["a", "a"], [0.0, 0.0])["raw"] == 0


def test_errors_are_over_questions():
    assert mean_and_error([1.0, 0.0, 0.0, 1.0]) == pytest.approx((0.5, (1 / 12) ** 0.5))
    assert mean_and_error([1.0]) == (1.0, None)
    assert bits_per_byte([3.0 * 0.6931471805599453], [6]) == pytest.approx((0.5, None))
    value, error = bits_per_byte([1.0, 2.0, 4.0], [10, 10, 20])
    assert value == pytest.approx(7 / 40 / 0.6931471805599453) and error > 0
    # All texts alike: nothing is uncertain.
    assert bits_per_byte([1.0, 2.0], [5, 10])[1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"shots": -1}, "shots=-1 cannot be; give 0 or more"),
        ({"limit": -1}, "limit=-1 cannot be"),
        ({"answer_tokens": 0}, "answer_tokens=0 cannot be; give 1 or more"),
        ({"calibration_documents": 0}, "calibration_documents=0 cannot be"),
        ({"random_seeds": -1}, "random_seeds=-1 cannot be"),
        ({"normalisation": "softmax"}, "choose one of raw, per_char, unconditional"),
        ({"split": ""}, "split is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, line):
    with pytest.raises(UserError, match=line):
        TaskSettings(**settings)
