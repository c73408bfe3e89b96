"""Proves that the page of `emotrain report` says what is in the files of its runs: every plot's CSV
is the metrics, several runs are told apart, nothing is loaded from elsewhere, and no file and no
name breaks it."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from helpers import tiny_config

from emotrain.cli import main
from emotrain.config import config_from_dict, save_config
from emotrain.evaluation.findings import findings as of_evaluation
from emotrain.evaluation.results import read_evaluation
from emotrain.report.page import write_report
from emotrain.training.profiling import summarize
from emotrain.training.run import train
from tests.conftest import ROOT, tiny_settings
from tests.test_labels import NAMES, result_of

VOID = {"meta", "br", "link", "img", "input"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "nav", "h1", "h2", "h3"),
    *("a", "ul", "li", "p", "strong", "code", "pre", "details", "summary", "div"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "g", "path", "defs", "use", "text", "tspan", "clippath", "rect", "image"),
}
"""All that a page may hold. Anything else came out of a name."""


class Page(HTMLParser):
    """A page as a reader sees it."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.source, self.open, self.tags, self.words = text, [], set(), []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.links: list[dict[str, Any]] = []
        self.pictures: dict[str, dict[str, Any]] = {}
        self.attributes: set[str] = set()
        self._figure = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        of_tag = dict(attributes)
        self.tags.add(tag)
        self.attributes |= set(of_tag)
        if "id" in of_tag:
            self.ids.append(of_tag["id"])
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "xlink:href")]
        if tag == "a":
            self.links.append(of_tag)
        if tag == "figure":
            self._figure = of_tag["id"]
        if tag == "svg":
            self.pictures[self._figure] = of_tag
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def figure(self, name: str) -> str:
        """The source of a plot."""
        return re.search(f'<figure id="{name}">.*?</figure>', self.source, re.DOTALL)[0]

    def rows(self, name: str) -> list[dict[str, str]]:
        """The CSV of a plot."""
        [link] = [link for link in self.links if link.get("download") == f"{name}.csv"]
        head, _, content = link["href"].partition(",")
        assert head == "data:text/csv;charset=utf-8"
        return list(csv.DictReader(io.StringIO(unquote(content))))


def page_of(*folders: Path, **options: Any) -> Page:
    return Page(write_report(list(folders), **options).path.read_text(encoding="utf-8"))


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def bare_run(folder: Path, *lines: Any, **settings: Any) -> Path:
    """A run of a configuration and lines of metrics, which may be text as it stands."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(tiny_config(**settings), folder / "config.yaml")
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


STEP = {"other": (0.5, 0.1), "forward": (0.3, 0.0), "backward": (0.4, 0.2)}
MEASURED = [{"host": "here", "steps": [STEP, STEP]}]
"""What a profile measures: seconds of the parts of two steps, and of these in collectives."""


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory) -> list[Path]:
    """A run that was stopped, went on, and is evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    first = folder / "one"
    settings = tiny_settings(tiny_data, first, steps=4)
    train(config_from_dict(settings))
    settings["training"]["steps"] = 6
    train(config_from_dict(settings))
    (first / "profile").mkdir()
    (first / "profile/summary.json").write_text(json.dumps(summarize([5, 6], MEASURED)))
    words = ["evaluate", str(first), "--data", str(tiny_data), "--keep", "1.0", "0.5", "0.25"]
    assert main([*words, "--random-seeds", "1", "--documents", "2"]) == 0
    return [first]


@pytest.fixture(scope="module")
def page(runs) -> Page:
    return page_of(runs[0])


# ---- one run


def test_every_plot_has_its_numbers_and_they_are_those_of_the_run(page, runs):
    lines = lines_of(runs[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("cross_entropy", "loss", "grad_norm", "lr", "balance_loss", "z_loss",
                 "router_z_loss", "skipped_steps", "tokens_per_second", "memory_gib"):  # fmt: skip
        rows = page.rows(name)
        assert [int(row["step"]) for row in rows] == [line["step"] for line in lines]
        assert [int(row["tokens"]) for row in rows] == [line["tokens"] for line in lines]
        values = [float(row[name]) for row in rows]
        assert values == pytest.approx([line[name] for line in lines], rel=1e-6)
        assert {row["run"] for row in rows} == {"one"}
    for name in ("load_imbalance", "dead_experts", "effective_experts", "token_entropy_nats"):
        for row, line in zip(page.rows(name), lines, strict=True):
            layers = [float(row["layer 1"]), float(row["layer 2"])]
            assert layers == pytest.approx(line[name], rel=1e-6)
    for row, line in zip(page.rows("pool_size"), lines, strict=True):
        assert float(row["mean"]) == pytest.approx(np.mean(line["pool_size_mean"]), rel=1e-6)
        assert float(row["smallest"]) == min(line["pool_size_min"])
        assert float(row["largest"]) == max(line["pool_size_max"])


def test_the_load_of_every_expert_is_that_of_the_run(page, runs):
    records = lines_of(runs[0] / "expert_loads.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for layer in (0, 1):
        for row, record in zip(page.rows(f"loads-0-{layer + 1}"), records, strict=True):
            slots = np.array(record["slots"][layer])
            relative = [float(row[f"expert {i}"]) for i in range(7)]
            assert relative == pytest.approx(slots / slots.mean(), rel=5e-3, abs=5e-4)
            assert int(row["step"]) == record["step"]
    for row, record in zip(page.rows("little-used"), records, strict=True):
        for layer in (0, 1):
            slots = np.array(record["slots"][layer])
            assert int(row[f"layer {layer + 1}"]) == (slots < 0.1 * slots.mean()).sum()


def test_subsets_and_parts_of_a_step_are_there(page, runs):
    result = read_evaluation(runs[0] / "evaluation/evaluation.json")
    for sentence in of_evaluation(result):
        assert sentence in page.text
    rows = page.rows("subsets-domains")
    assert rows == page.rows("subsets-arms")
    [own] = [
        float(row["increase_nats"])
        for row in rows
        if (row["domain"], row["share_kept"], row["arm"]) == ("kitchen", "0.25", "selected")
    ]
    assert own == result.domains["kitchen"].increase("0.25", "selected")[0]
    [rank] = json.loads((runs[0] / "profile/summary.json").read_text())["ranks"]
    parts = {row["part"]: float(row["milliseconds_per_step"]) for row in page.rows("phases")}
    assert parts == pytest.approx({k: 1e3 * v["seconds"] for k, v in rank["parts"].items()})
    assert list(parts) == ["forward", "backward", "other"]  # what is left over comes last
    assert "backward" in page.figure("phases")


def test_data_environment_and_starts_are_there(page, runs, tiny_data):
    manifest = json.loads((tiny_data / "dataset.json").read_text())
    assert manifest["tokenizer_sha256"] in page.text and str(tiny_data) in page.text
    assert all(name in page.text for name in ("kitchen", "harbour", "garden"))
    assert "has changed" not in page.text
    starts = json.loads((runs[0] / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4]
    assert starts[0]["data"]["fingerprint"] in page.text
    assert starts[0]["versions"]["torch"] in page.text and starts[0]["cpu"]["model"] in page.text
    assert "started twice; it went on at step 4." in page.text
    assert "training.steps" in page.text and "model.vocab_size" in page.text


def test_changed_data_are_said(runs, tmp_path):
    other = tmp_path / "run"
    other.mkdir()
    for name in ("config.yaml", "environment.json"):
        (other / name).write_bytes((runs[0] / name).read_bytes())
    noted = json.loads((other / "environment.json").read_text())
    noted["starts"][-1]["data"]["sha256"] = "0" * 64
    (other / "environment.json").write_text(json.dumps(noted))
    assert "The data set has changed since the run started" in page_of(other).text


def check_whole(page: Page) -> None:
    """It loads nothing, its links lead somewhere, and every plot can be read and saved."""
    assert not page.open and page.tags <= TAGS, page.tags - TAGS
    assert not [name for name in page.attributes if name.startswith("on")]
    assert len(set(page.ids)) == len(page.ids)
    for address in page.addresses:
        inside = address.startswith(("data:image/png;base64,", "data:text/csv;charset=utf-8,"))
        assert inside or (address[0] == "#" and address[1:] in page.ids), address[:80]
    for used in re.findall(r"url\(([^)]*)\)", page.source):
        assert used[0] == "#" and used[1:] in page.ids
    for name, svg in page.pictures.items():
        assert set(svg) == {"viewbox", "role", "aria-label"}
        assert svg["role"] == "img" and len(svg["aria-label"]) > 20 and page.rows(name)
        assert "http" not in page.figure(name)


def test_the_page_is_whole_in_itself(page):
    check_whole(page)
    assert len(page.pictures) >= 20
    for name in page.pictures:
        # Numbers and words of the axes are text, not shapes.
        assert len(re.findall("<text", page.figure(name))) >= 3


def test_units_are_on_every_plot(page):
    for name, unit in {
        "cross_entropy": "nats/token", "grad_norm": "norm before clipping",
        "tokens_per_second": "tokens/s", "memory_gib": "GiB", "little-used": "experts",
        "loads-0-1": "load / mean load", "phases": "ms a step", "subsets-arms": "nats/token",
    }.items():  # fmt: skip
        assert unit in page.figure(name).partition("</svg>")[0].partition(">")[2], name
        assert unit in page.pictures[name]["aria-label"] or unit in page.figure(name)


def test_colours_of_plots_are_the_pages(page):
    """So that they change with the theme and in print."""
    drawn = page.figure("cross_entropy").partition("</svg>")[0]
    assert "var(--s0)" in drawn and "var(--ink)" in drawn
    assert not re.search("#[0-9a-f]{6}", drawn)
    used = set(re.findall(r"var\((--\w+)\)", page.source))
    for theme in re.findall(r":root \{.*?\}", page.source, re.DOTALL):
        assert used <= set(re.findall(r"(--\w+):", theme))


# ---- several runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    """Two runs of few metrics, whose steps have other numbers of tokens."""
    folders = []
    for name, batch in (("one", 4), ("two", 8)):
        lines = [
            {"step": step, "tokens": 16 * batch * step, "cross_entropy": 4 - batch / step,
             "lr": 1e-3, "load_imbalance": [1.0 + step, 2.0]} for step in (1, 2, 3)
        ]  # fmt: skip
        folder = bare_run(
            tmp_path_factory.mktemp("pair") / name, *lines, training__global_batch=batch
        )
        record = {"step": 1, "slots": [[1, 2], [3, 4]]}
        (folder / "expert_loads.jsonl").write_text(json.dumps(record) + "\n")
        folders.append(folder)
    (folders[1] / "profile").mkdir()
    (folders[1] / "profile/summary.json").write_text(json.dumps(summarize([5, 6], MEASURED)))
    return folders


@pytest.fixture(scope="module")
def comparison(pair, tmp_path_factory) -> Page:
    return page_of(*pair, out=tmp_path_factory.mktemp("out") / "both.html")


def test_several_runs_are_on_one_page(comparison, pair):
    check_whole(comparison)
    rows = comparison.rows("cross_entropy")
    for folder in pair:
        lines = lines_of(folder / "metrics.jsonl")
        values = [float(row["cross_entropy"]) for row in rows if row["run"] == folder.name]
        assert values == pytest.approx([line["cross_entropy"] for line in lines], rel=1e-6)
    assert {row["run"] for row in comparison.rows("load_imbalance")} == {"one", "two"}
    assert {"loads-0-1", "loads-1-1"} <= set(comparison.pictures)
    drawn = comparison.figure("lr")
    assert "var(--s0)" in drawn and "var(--s1)" in drawn and ">one<" in drawn and ">two<" in drawn
    # A plot of the second run alone has its colour, not that of the first one.
    alone = comparison.figure("phases").partition("</svg>")[0]
    assert "var(--s1)" in alone and "var(--s0)" not in alone


def test_settings_that_differ_are_side_by_side(comparison):
    table = re.search(r"<caption>Settings in which the runs differ.*?</table>", comparison.source,
                      re.DOTALL)[0]  # fmt: skip
    text = re.sub("<[^>]*>", " ", table)
    assert re.search(r"training\.global_batch +4 +8 ", text)
    assert "model.d_model" not in text


def test_runs_whose_steps_have_other_sizes_are_compared_by_tokens(comparison, page):
    assert ">tokens<" in comparison.figure("cross_entropy")
    assert ">step<" in page.figure("cross_entropy")
    assert "the axes count tokens" in comparison.text


def test_a_base_configuration_is_compared_with(tmp_path, capsys):
    lines = [{"step": step, "cross_entropy": 3.0} for step in (1, 2)]
    folder = bare_run(tmp_path / "run", *lines)
    out = tmp_path / "page.html"
    base = str(ROOT / "configs/quickstart.yaml")
    words = ["report", str(folder), "--out", str(out), "--base", base, "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"report", "runs", "findings"} and result["report"] == str(out)
    assert set(result["findings"][0]) == {"run", "kind", "text", "rule", "plot"}
    text = Page(out.read_text()).text
    assert f"Settings that differ from {base}" in text and "data.cross_document_targets" in text


# ---- whatever lies in the folder


def test_metrics_of_a_run_that_was_killed_went_back_and_diverged(tmp_path):
    folder = bare_run(
        tmp_path / "run",
        {"step": 1, "cross_entropy": 4.0, "load_imbalance": [1.0, 2.0]},
        {"step": 2, "cross_entropy": 3.0, "load_imbalance": [1.0, 2.0]},
        {"step": 3, "cross_entropy": 9.0},
        {"step": 2, "cross_entropy": 2.5, "load_imbalance": [1.5, None]},
        '{"step": 3, "cross_entropy": NaN}',
        {"step": 4, "cross_entropy": None},
        '{"step": 5, "cross_entropy": 1e999, "huge": 1' + "0" * 400 + "}",
        {"step": 6, "cross_entropy": "low", "text": "x", "flag": True, "nested": {"a": 1}},
        {"step": 10**30, "cross_entropy": 1.0},
        {"step": 2.5}, {"step": -1}, [], 3, "null", "\x00\x00",
        '{"step": 7, "cross_en',
    )  # fmt: skip
    page = page_of(folder)
    check_whole(page)
    rows = [(int(row["step"]), row["cross_entropy"]) for row in page.rows("cross_entropy")]
    assert rows == [(1, "4"), (2, "2.5"), (3, "nan"), (4, "nan"), (5, "inf")]
    assert "8 unreadable lines of metrics.jsonl are left out" in page.text
    assert "2 steps stand more than once in metrics.jsonl" in page.text
    assert "not finite" in page.figure("cross_entropy").partition("</svg>")[0]
    assert "not finite in 3 of 5 lines" in page.text
    assert [row["layer 2"] for row in page.rows("load_imbalance")] == ["2", "nan"]
    assert "other-0" in page.pictures  # the huge number


@pytest.mark.parametrize(
    "line",
    [
        {"step": 1, "tokens": 64, "cross_entropy": 4.0, "load_imbalance": [2.0, 1.5]},
        {"step": 1, "cross_entropy": None, "grad_norm": None, "load_imbalance": [None, None]},
        {"step": 0, "tokens": 0, "cross_entropy": 0.0, "grad_norm": 0, "lr": 0},
        {"step": 1, "tokens": None, "cross_entropy": 3.0, "tokens_per_second": float("inf")},
        {"step": 1, "tokens": [1], "cross_entropy": 3.0},
        {"step": 1, "something": 3, "a list": [], "lists": [[1]], "pool_size_mean": [3.0]},
        {"step": 1},
    ],
)
def test_a_run_of_one_step_has_a_page(line, tmp_path):
    check_whole(page_of(bare_run(tmp_path / "run", line)))


def test_a_page_says_what_is_not_there_yet(tmp_path):
    folder = bare_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    page = page_of(folder)
    check_whole(page)
    for sentence in ("No metrics yet", "Not evaluated yet", "No environment.json",
                     "not at this path now", "Nothing to say yet"):  # fmt: skip
        assert sentence in page.text
    assert not page.pictures


def test_a_dense_model_and_a_run_from_before_have_pages(tmp_path):
    dense = bare_run(
        tmp_path / "dense", {"step": 1, "cross_entropy": 3.0},
        model__experts__routed=0, model__experts__top_k=0,
    )  # fmt: skip
    old = tmp_path / "old"
    old.mkdir()
    for file in ("config.yaml", "metrics.jsonl", "evaluation/evaluation.json"):
        (old / file).parent.mkdir(exist_ok=True)
        (old / file).write_bytes((ROOT / "tests/old_run" / file).read_bytes())
    both = page_of(dense, old, out=tmp_path / "both.html")
    check_whole(both)
    assert "Dense model" in both.text and "from before the load of every expert" in both.text
    assert {row["model"] for row in both.rows("subsets-arms")} == {"old"}


MARKUP = '</script><img src=x onerror="alert(1)">\'" & #0072b2 $x$ {{ 7 * 7 }}'


def test_pools_and_tasks_of_evaluations_are_curves(tmp_path):
    """One plot for a quantity, with a line for each pool, task and share of experts; with several
    runs a plot for each of them."""
    line = {
        "step": 1,
        "cross_entropy": 3.0,
        "evaluation/loss_nats": 2.0,
        "evaluation/loss_nats/pool_32": 2.5,
        "evaluation/domains/law/loss_nats": 2.0,
        "evaluation/domains/law/loss_nats/pool_32": 2.5,
        "evaluation/tasks/capitals/accuracy_raw": 0.5,
        "evaluation/tasks/capitals/accuracy_raw/0.25": 0.25,
        "evaluation/tasks/rivers/accuracy_raw": 0.75,
    }
    folders = [bare_run(tmp_path / name, line, {**line, "step": 2}) for name in ("one", "two")]

    def columns(page):
        found = (page.rows(name)[0] for name in page.pictures if name.startswith("evaluated"))
        return [
            tuple(name for name in row if name not in ("run", "step", "tokens")) for row in found
        ]

    page = page_of(folders[0])
    assert columns(page) == [
        ("without pools", "pools of 32 experts"),
        ("law",),
        ("law",),
        ("capitals", "capitals, 0.25 kept", "rivers"),
    ]
    titles = ("Held-out loss, pools of 32 experts, by domain", "Tasks: right choices")
    assert all(title in page.text for title in titles)
    both = page_of(*folders)
    assert len(columns(both)) == 5
    assert "Tasks: right choices, capitals, 0.25 kept" in both.text


def test_names_of_any_kind_are_text(tmp_path):
    names = [*NAMES, MARKUP, "=1+1", "a,b\nc"]
    result = result_of(names)
    line = {"step": 1, "cross_entropy": 3.0, MARKUP: 1.0, f"evaluation/{MARKUP}": 2.0}
    line |= {f"evaluation/domains/{name}/loss_nats": 3.0 for name in names}
    folder = bare_run(
        tmp_path / "<i>run</i> & ]]>", line, {**line, "step": 2}, data__path=MARKUP
    )  # fmt: skip
    (folder / "evaluation").mkdir()
    (folder / "evaluation/evaluation.json").write_text(json.dumps(result))
    start = {"step": MARKUP, "time": MARKUP, "command": [MARKUP], "git": {"commit": MARKUP},
             "versions": {MARKUP: MARKUP}, "device": {"name": MARKUP, "memory_gib": "x"},
             "cpu": {"model": [MARKUP]}, "data": {"fingerprint": [MARKUP]}}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({"starts": [start, 3, start]}))
    page = page_of(folder)
    check_whole(page)
    assert "{{ 7 * 7 }}" in page.text and "49 }" not in page.text
    assert "#0072b2 $x$" in page.figure("subsets-domains").partition("</svg>")[0]
    in_csv = {"'=1+1" if name == "=1+1" else name for name in names}
    assert {row["domain"] for row in page.rows("subsets-domains")} == {"", *in_csv}
    [domains] = [n for n in page.pictures if n.startswith("evaluated") and "a,b\nc" in
                 page.rows(n)[0]]  # fmt: skip
    assert set(page.rows(domains)[0]) == {"run", "step", "tokens", *in_csv}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"starts": 3}',
        '{"ranks": [{"parts": {"x": {"seconds": NaN, "collective_seconds": 1}}}]}',
        '{"starts": [3, null]}',
        "[" * 100_000,
        "\x00",
    ],
)
def test_side_files_that_are_damaged_are_as_if_they_were_not_there(text, tmp_path):
    folder = bare_run(tmp_path / "run", {"step": 1, "cross_entropy": 3.0})
    (folder / "profile").mkdir()
    for name in ("environment.json", "expert_loads.jsonl", "profile/summary.json"):
        (folder / name).write_text(text)
    page = page_of(folder)
    check_whole(page)
    assert "No environment.json" in page.text and list(page.pictures) == ["cross_entropy"]


def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, capsys):
    bad = bare_run(tmp_path / "bad")
    (bad / "evaluation").mkdir()
    (bad / "evaluation/evaluation.json").write_text("{}")
    for words, message in (
        ([str(tmp_path / "nothing")], "no config.yaml here"),
        ([str(bad)], "not a result of `emotrain evaluate`"),
        ([str(runs[0]), str(runs[0])], "is named twice"),
        ([str(runs[0]), "--out", str(tmp_path)], "is a folder; give the name of a file"),
        ([str(runs[0]), "--base", "nowhere.yaml"], "no such configuration file"),
        ([*map(str, (tmp_path / f"r{i}" for i in range(40)))], "a page tells at most 28 apart"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    for package in ("jinja2", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert main(["report", str(runs[0]), "--out", str(tmp_path / "out.html")]) == 2
        assert "pip install 'emotrain[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists() and not (bad / "report.html").exists()


@pytest.mark.long
def test_the_page_of_a_long_run_is_small(tmp_path):
    """100,000 steps of 16 layers and 128 experts."""
    from emotrain.training.expert_loads import ExpertLoads

    random, layers, experts = np.random.default_rng(0), 16, 128
    folder = bare_run(
        tmp_path / "run", model__num_layers=layers, model__experts__routed=experts,
        model__experts__top_k=4, model__router__pool__min=4,
    )  # fmt: skip
    loads, share = ExpertLoads(folder, 0, 10), random.gamma(2.0, 1.0, (layers, experts))
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(10, 100_001, 10):
            line: dict[str, Any] = {"step": step, "tokens": 1000 * step}
            for key in ("cross_entropy", "loss", "grad_norm", "lr", "z_loss", "tokens_per_second"):
                line[key] = random.random() + 3
            for key in ("load_imbalance", "dead_experts", "effective_experts",
                        "token_entropy_nats", "pool_size_mean", "pool_size_min",
                        "pool_size_max"):  # fmt: skip
                line[key] = (random.random(layers) + 1).tolist()
            if step == 55_550:
                line["cross_entropy"] = 1e6
            file.write(json.dumps(line) + "\n")
            if step % 160 == 0:
                loads.write(step, random.poisson(share * 1000).tolist())
    loads.close()
    page = page_of(folder)
    check_whole(page)
    assert len(page.source) < 2_200_000
    assert (folder / "expert_loads.jsonl").stat().st_size < 9_000_000
    rows = {int(row["step"]): float(row["cross_entropy"]) for row in page.rows("cross_entropy")}
    assert len(rows) <= 700 and rows[55_550] == 1e6 and {10, 100_000} <= set(rows)
    assert "of 10,000 points" in page.text and len(page.pictures) > 25
