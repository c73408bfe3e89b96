"""Proves the progress bar: live on a terminal, a line now and then elsewhere, never markup."""

from __future__ import annotations

import io

import pytest

from emotrain.progress import SECONDS_BETWEEN_LINES, ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_short_pass_says_nothing_and_a_long_one_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar("files", stream=stream, clock=clock) as bar:
        for _ in bar.track(range(6), "reading [all]"):
            clock.now += SECONDS_BETWEEN_LINES / 2
        bar.start("writing", 3)
        bar.advance()
    assert stream.getvalue().splitlines() == [
        "reading [all] 2/6 files",
        "reading [all] 4/6 files",
        "reading [all] 6/6 files",
    ]


def test_a_line_can_be_asked_for_and_bytes_are_megabytes() -> None:
    stream = io.StringIO()
    with ProgressBar("bytes", stream=stream, clock=Clock()) as bar:
        bar.start("verifying", 5e9, done=1e9)
        bar.update(2e9, "disk a", line=True)
    assert stream.getvalue() == "verifying 2,000 of 5,000 MB  disk a\n"


def test_without_a_unit_it_is_per_cent() -> None:
    stream = io.StringIO()
    with ProgressBar(stream=stream, clock=Clock()) as bar:
        bar.start("encoding", 2e9)
        bar.update(5e8, line=True)
        bar.start("nothing to do", 0)
        bar.update(0, line=True)
    assert stream.getvalue().splitlines() == ["encoding 25%", "nothing to do 100%"]


def test_a_stream_that_cannot_be_written_ends_nothing() -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    with ProgressBar(stream=Full()) as bar:
        bar.start("training", 2)
        bar.update(1, line=True)


def test_hidden_bars_and_closed_ones_say_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        with ProgressBar(shown=False, stream=stream) as bar:
            bar.start("training", 5)
            bar.update(1, line=True)
    closed = io.StringIO()
    with ProgressBar(stream=closed) as bar:
        bar.start("training", 5)
    bar.update(1, line=True)
    assert stream.getvalue() == closed.getvalue() == ""


@pytest.mark.parametrize("unit", ["", "batches", "bytes"])
def test_a_terminal_shows_the_pass_under_way_as_plain_text(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with ProgressBar(unit, stream=stream, stays=True) as bar:
        list(bar.track(range(3), "first"))
        bar.start("keep [red]0.5[/]", 10)
        bar.update(4, "loss [1.5]")
    shown = stream.getvalue()
    assert "keep [red]0.5[/]" in shown and "loss [1.5]" in shown
    assert "first" not in shown.splitlines()[-1]


def test_an_error_ends_the_bar_and_passes() -> None:
    with pytest.raises(ZeroDivisionError), ProgressBar(stream=Terminal()) as bar:
        bar.start("dividing", 1)
        bar.advance(1 // 0)
    assert bar._live is None
