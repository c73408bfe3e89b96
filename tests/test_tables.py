"""Proves the table: aligned columns, and cells that are text whatever they hold."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from emotrain.tables import Table, csv_text, short_names

TABLE = Table(
    "Memory", ("part", "GiB", ""), (("weights", "1.5", "fp32"), ("all", "12.0", "")), notes=1
)


def test_plain_columns_have_names_and_notes_left_and_numbers_right() -> None:
    assert TABLE.plain().splitlines() == [
        "Memory",
        "part      GiB",
        "weights   1.5  fp32",
        "all      12.0",
    ]
    assert Table("", ("a",), ()).plain() == "a"


def test_stdout_that_is_no_terminal_gets_plain_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print(TABLE.text())
    assert capsys.readouterr().out.rstrip() == TABLE.plain()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_gets_a_drawn_table_that_it_can_show(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", Terminal(io.BytesIO(), encoding=encoding))
    text = TABLE.text()
    assert "weights" in text and text.encode(encoding)


def test_a_terminal_that_is_too_narrow_loses_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", Terminal())
    for columns, wide in (("200", True), ("40", False)):
        monkeypatch.setenv("COLUMNS", columns)
        table = Table("", ("name", "x", "y"), (("a" * 30, "1" * 20, "2" * 20),))
        assert "2" * 20 in table.text()
        assert (table.text() == table.plain()) is not wide


def test_markdown_aligns_the_same() -> None:
    assert TABLE.markdown().splitlines() == [
        "**Memory**",
        "",
        "| part | GiB |  |",
        "| :-- | --: | :-- |",
        "| weights | 1.5 | fp32 |",
        "| all | 12.0 |  |",
    ]


def test_cells_are_text_and_never_markup() -> None:
    table = Table("[red]t", ("[b]name", "x"), (("a|b <i>[red]\nc [/]", "1"),))
    assert "| a\\|b <i>[red] c [/] | 1 |" in table.markdown()
    assert table.plain().splitlines()[-1] == "a|b <i>[red] c [/]  1"
    stream = io.StringIO()
    Console(file=stream, width=60).print(table.rich())
    shown = stream.getvalue()
    assert "[red]t" in shown and "[b]name" in shown and "a|b <i>[red]" in shown and "[/]" in shown


def test_names_stay_whole_on_a_narrow_terminal() -> None:
    name = "数学と物理の長い名前"
    table = Table("", ("domain", "a long header"), ((name, "1"),))
    stream = io.StringIO()
    Console(file=stream, width=30).print(table.rich())
    assert name in stream.getvalue()


def test_no_text_of_a_csv_is_a_formula_and_numbers_stay():
    cells = ["=1+1", "+law", "-law", "@law", "\tlaw", "\rlaw", "law=1", "-1.5", "+2", "-inf", "-"]
    [header, row] = csv.reader(io.StringIO(csv_text(cells, [[*cells[:-1], -0.5]])))
    guarded = ["'=1+1", "'+law", "'-law", "'@law", "'\tlaw", "'\nlaw"]
    assert header == [*guarded, *cells[6:-1], "'-"]
    assert row == [*guarded, *cells[6:-1], "-0.5"]


def test_short_names_tell_paths_apart():
    assert short_names(["a/x.json", "b/y.json"]) == ["x", "y"]
    assert short_names(["a/x.json", "b/x.json"]) == ["a/x", "b/x"]
    assert short_names(["a/x.json", "a/x"]) == ["x.json", "x"]
    assert short_names(["a/x.json", "a/x.json"]) == ["x", "x"]
