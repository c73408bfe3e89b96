"""What `emotrain inspect DATA` shows: tables for a terminal, and a page that loads nothing and
needs no script. How the page looks is `data.html.j2`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from emotrain.data.survey import LESSON, Survey
from emotrain.files import write_whole
from emotrain.tables import Table, csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_LONGER, SAME_LENGTH, LEAST_LENGTH, FEW_DOCUMENTS = 0.05, 0.5, 64, 2
"""From these a finding is to be looked at: shares of documents that are longer than a window and of
one length, the shortest such length that says something, and documents of a window."""
MOST_DOMAINS = 30
"""That are drawn; the table has all of them."""


def findings(found: Survey) -> list[tuple[bool, str]]:
    """Sentences about the data, and whether each is to be looked at."""
    lengths, cuts = found.lengths, found.cuts
    said = [
        (
            cuts.longer > MANY_LONGER,
            f"{cuts.longer:.1%} of the documents are longer than a sequence of {cuts.window:,} "
            f"tokens, and get a pool for each window that they touch; "
            f"model.router.pool.across_windows gives them one.",
        ),
        (
            False,
            f"Packed one after the other, {cuts.cut:.1%} of the documents are cut by the end of a "
            f"sequence; {cuts.one_pool_documents:.1%} of them, with {cuts.one_pool_tokens:.1%} of "
            f"the tokens, have one pool. A sequence has {cuts.documents_per_window:.1f} documents "
            f"on average.",
        ),
    ]
    if found.best_fit is not None:
        said.append(
            (
                False,
                f"With data.packing=best_fit {found.best_fit['one_pool']:.1%} of the documents "
                f"have one pool, and {found.best_fit['one_pool_of_fitting']:.1%} of those that are "
                f"not longer than a sequence.",
            )
        )
    is_same = lengths.most_common_share >= SAME_LENGTH and lengths.most_common >= LEAST_LENGTH
    if is_same and lengths.documents > 1:
        said.append(
            (
                True,
                f"{lengths.most_common_share:.0%} of the documents have the very same length of "
                f"{lengths.most_common:,} tokens: they look cut. {LESSON}.",
            )
        )
    if (trip := found.round_trip) is not None and trip.documents:
        lost = trip.documents - trip.same_text
        text = (
            f"{trip.same_text} of {trip.documents} documents come back from the tokenizer as the "
            f"same text, {trip.same_ids} of them as the same tokens."
        )
        said.append((lost > 0, text + (f" {trip.first_difference}." if lost else "")))
    if found.read_tokens < found.tokens:
        said.append(
            (
                False,
                f"The numbers are of {found.read_tokens:,} of {found.tokens:,} tokens, the start "
                f"of every shard; --tokens reads more.",
            )
        )
    return said


def headline(found: Survey) -> str:
    return (
        f"{found.split}: {found.tokens:,} tokens, {found.shards:,} shards, vocabulary "
        f"{found.vocab_size:,}, EOS {found.eos_id}; documents have {found.lengths.mean:,.0f} "
        f"tokens on average"
    )


def tables(found: Survey) -> list[Table]:
    lengths = found.lengths
    quantiles = [(f"{100 * float(q):g} %", f"{n:,}") for q, n in lengths.quantiles.items()]
    shown = [
        Table(
            "Length of documents in tokens, EOS included",
            ("not longer", "tokens"),
            (*quantiles, ("100 %", f"{lengths.largest:,}")),
        )
    ]
    if found.domains:
        whole = sum(of["tokens"] for of in found.domains.values())
        ordered = sorted(found.domains.items(), key=lambda item: -item[1]["tokens"])
        rows = [
            (name, f"{of['documents']:,}", f"{of['tokens']:,}", f"{of['tokens'] / whole:.1%}")
            for name, of in ordered
        ]
        shown.append(Table("Domains", ("domain", "documents", "tokens", "share"), tuple(rows)))
    return shown


def text(found: Survey, letters: int = 160) -> str:
    """All of it for a terminal; of each document that is shown `letters` at each end."""
    lines = [found.path, headline(found), ""]
    for table in (*tables(found), _histogram(found)):
        lines += [table.text(), ""]
    for look, sentence in findings(found):
        mark = "! " if look else "- "
        lines += textwrap.wrap(mark + sentence, 100, subsequent_indent="  ")
    for number, pieces in enumerate(found.windows, 1):
        lines += ["", f"Sequence {number}, {len(pieces)} documents"]
        for piece in pieces:
            domain = f", {piece.domain}" if piece.domain else ""
            said = " ".join(piece.text.split())
            if len(said) > 2 * letters:
                said = f"{said[:letters]} … {said[-letters:]}"
            lines.append(f"  | document {piece.document_id}{domain}, {piece.tokens:,} tokens")
            lines.append(f"  |   {said}")
    return "\n".join(lines)


def _histogram(found: Survey) -> Table:
    """Bars of letters."""
    lengths = found.lengths
    most = max(count for _, count in lengths.histogram)
    rows = [
        (f"{least:,} to {2 * least - 1:,}", f"{count:,}", "#" * round(40 * count / most))
        for least, count in lengths.histogram
    ]
    return Table("Documents by their tokens", ("tokens", "documents", ""), tuple(rows), notes=1)


def write_data_page(found: Survey, out: Path) -> Path:
    """Write the page.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
    """
    from emotrain.evaluation.figures import COLORS
    from emotrain.report.charts import bars, number, single
    from emotrain.report.page import data_uri, page_template

    lengths = found.lengths

    def draw(axes: Axes) -> None:
        least, counts = zip(*lengths.histogram, strict=True)
        axes.bar(range(len(least)), counts, width=0.9, color=COLORS[0])
        axes.set_xticks(range(len(least)), [number(float(n)) for n in least], rotation=60)
        axes.set(xlabel="tokens of a document, from", ylabel="documents")

    plots = [
        single(
            "lengths",
            "Length of documents",
            "A bar goes from its number to just below the next one.",
            f"Length of documents: half have at most {lengths.quantiles['0.5']:,} tokens, the "
            f"longest {lengths.largest:,}.",
            csv_text(("tokens_from", "documents"), lengths.histogram),
            draw,
        )
    ]
    if found.domains:
        ordered = sorted(found.domains.items(), key=lambda item: -item[1]["tokens"])
        rows = [(name, "", 0, float(of["tokens"])) for name, of in ordered[:MOST_DOMAINS]]
        rest = len(ordered) - len(rows)
        csv = csv_text(("domain", "tokens"), [(name, of["tokens"]) for name, of in ordered])
        about = f"{rest} smaller domains are in the table." if rest else ""
        plots.append(bars("domains", "Tokens by domain", "tokens", about, rows, csv))
    page = page_template("data.html.j2").render(
        title=found.path,
        headline=headline(found),
        findings=findings(found),
        tables=tables(found),
        plots=plots,
        windows=found.windows,
        data_uri=data_uri,
    )
    # A path may hold half of a surrogate pair, which is no text.
    return write_whole(out, page.encode("utf-8", "replace"))
