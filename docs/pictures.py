"""Draws the pictures of the README: docs/emo_layer.svg and docs/house.svg.

    python docs/pictures.py

Plain Python, so that a picture changes by changing a number here. tests/test_pictures.py compares
the files with what this script draws. Each picture has its own light card, so that it is readable
on a white page and on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

INK, SOFT, LINE, CARD, EMPTY = "#1f2430", "#5b6270", "#c5cad3", "#fbfbfd", "#eceef2"
BLUE, ORANGE, GREEN = "#2f6fd0", "#d9731a", "#2b8a57"

# ---- shapes


def rect(
    x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", more: str = ""
) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}" '
        f'stroke="{stroke}" {more}/>'
    )


def text(
    x: float,
    y: float,
    words: str,
    size: int = 13,
    fill: str = INK,
    anchor: str = "middle",
    more: str = "",
) -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f"{more}>{escaped}</text>"
    )


def line(x: float, y: float, to_x: float, to_y: float, stroke: str, more: str = "") -> str:
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{stroke}" '
        f'stroke-width="1.4" {more}/>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return line(x, y, to_x, to_y, SOFT, 'marker-end="url(#tip)"')


def svg(width: int, height: int, title: str, shapes: Sequence[str]) -> str:
    """A whole picture on its card."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img" '
        f'aria-label="{title}">'
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{SOFT}"/></marker></defs>'
    )
    card = rect(1, 1, width - 2, height - 2, CARD, LINE)
    return "\n".join([head, f"<title>{title}</title>", tip, card, *shapes, "</svg>"]) + "\n"


# ---- the EMO layer

DOCUMENTS = (
    ("document 1", ("let", "x", "=", "1"), 4, BLUE),
    ("document 2", ("to", "be", "or", "not"), 3, ORANGE),
)
"""Name, tokens, pool size and colour."""
LOGITS = (
    ((2.0, 0.1, 1.2, 0.3, 1.6, 0.0, 0.9, 0.2), (1.1, 0.4, 1.9, 0.0, 1.5, 0.3, 0.2, 0.6)),
    ((0.3, 0.2, 1.0, 0.5, 2.1, 0.4, 1.7, 0.1), (1.8, 0.0, 0.7, 0.2, 0.9, 1.9, 1.2, 0.3)),
    ((0.1, 2.0, 0.2, 1.4, 0.3, 1.5, 0.0, 0.6), (0.4, 1.6, 0.1, 2.1, 0.2, 0.8, 0.5, 0.3)),
    ((1.7, 1.2, 0.3, 0.6, 0.1, 2.2, 0.4, 0.0), (0.2, 1.5, 0.6, 1.8, 0.4, 1.3, 0.1, 0.9)),
)
"""Router logits of the tokens, two tokens a row."""
CHOSEN, EXPERTS = 2, 8
ROW, CELL = 27, 15


def probabilities(document: int) -> list[list[float]]:
    """Softmax of each token's logits."""
    rows = [row for pair in LOGITS[2 * document : 2 * document + 2] for row in pair]
    sums = [sum(map(math.exp, row)) for row in rows]
    return [[math.exp(v) / total for v in row] for row, total in zip(rows, sums, strict=True)]


def best(values: Sequence[float], count: int, among: Sequence[int]) -> list[int]:
    """The places of the largest values."""
    return sorted(sorted(among, key=lambda place: -values[place])[:count])


def emo_layer() -> str:
    """Tokens -> scores -> a pool for each document -> top-k inside -> experts -> sum."""
    shapes = []
    heads = (
        (62, "tokens"),
        (183, "1 score"),
        (343, "2 pool"),
        (503, "3 choose"),
        (705, "4 experts"),
        (908, "5 sum"),
    )
    notes = (
        (62, ("two documents", "in one batch")),
        (183, ("each token: softmax", "over all experts")),
        (343, ("sum over the document,", "keep the best experts")),
        (503, (f"top-{CHOSEN} of each token,", "inside of its pool")),
        (705, ("chosen experts, and one", "that all tokens share")),
        (908, ("weighted, plus", "the shared expert")),
    )
    for x, words in heads:
        shapes.append(text(x, 36, words, 16, more='font-weight="bold"'))
    for x, rows in notes:
        shapes += [text(x, 56 + 16 * i, row, 12, SOFT) for i, row in enumerate(rows)]
    for x in (106, 258, 423, 578):
        shapes += [arrow(x, 157, x + 13, 157), arrow(x, 307, x + 13, 307)]
    for index, top in enumerate((106, 256)):
        shapes += document_rows(index, top)
    return svg(980, 420, "The EMO layer", shapes + expert_bank())


def document_rows(index: int, top: float) -> list[str]:
    """Everything of one document that is left of the experts."""
    name, tokens, size, colour = DOCUMENTS[index]
    rows = probabilities(index)
    scores = [sum(column) for column in zip(*rows, strict=True)]
    pool = best(scores, size, range(EXPERTS))
    shapes = [text(62, top + 4 * ROW + 14, name, 12, colour)]
    for i, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        y = top + i * ROW
        shapes.append(rect(22, y, 80, 22, "#fff", colour))
        shapes.append(text(62, y + 16, token, 13, colour))
        chosen = best(row, CHOSEN, pool)
        for expert, value in enumerate(row):
            x = 183 - EXPERTS * CELL / 2 + expert * CELL
            shapes.append(rect(x, y + 4, CELL - 2, 14, EMPTY))
            share = f'fill-opacity="{min(1.0, value / 0.4):.2f}"'
            shapes.append(rect(x, y + 4, CELL - 2, 14, colour, more=share))
            x = 503 - EXPERTS * CELL / 2 + expert * CELL
            inside = 'stroke-dasharray="2 2"' if expert not in pool else ""
            fill = colour if expert in chosen else "#fff" if expert in pool else EMPTY
            stroke = colour if expert in pool else LINE
            shapes.append(rect(x, y + 4, CELL - 2, 14, fill, stroke, inside))
            if expert in chosen:
                more = 'stroke-opacity="0.45"'
                shapes.append(line(598, y + 11, 660, expert_y(expert) + 11, colour, more))
    shapes += pool_bars(scores, pool, top, colour)
    shapes.append(text(343, top + 4 * ROW + 14, f"size {size}, drawn at random", 12, colour))
    return shapes


def pool_bars(scores: Sequence[float], pool: Sequence[int], top: float, colour: str) -> list[str]:
    """A bar for each expert's score, filled where the expert is in the pool."""
    shapes = []
    for expert, score in enumerate(scores):
        x, height = 343 - EXPERTS * CELL / 2 + expert * CELL, 85 * score / max(scores)
        fill = colour if expert in pool else EMPTY
        stroke = colour if expert in pool else LINE
        shapes.append(rect(x, top + 4 * ROW - 8 - height, CELL - 3, height, fill, stroke))
    shapes.append(line(278, top + 4 * ROW - 7, 408, top + 4 * ROW - 7, SOFT))
    return shapes


def expert_y(expert: int) -> float:
    return 98 + expert * 29


def expert_bank() -> list[str]:
    """Routed experts in the colours of the documents whose pools hold them, the shared expert, and
    the sum."""
    owners: list[list[str]] = [[] for _ in range(EXPERTS)]
    for index, (_, _, size, colour) in enumerate(DOCUMENTS):
        scores = [sum(column) for column in zip(*probabilities(index), strict=True)]
        for expert in best(scores, size, range(EXPERTS)):
            owners[expert].append(colour)
    shapes = []
    for expert, colours in enumerate(owners):
        y = expert_y(expert)
        stroke = colours[0] if len(colours) == 1 else SOFT
        shapes.append(rect(660, y, 92, 22, "#fff" if colours else EMPTY, stroke))
        shapes.append(text(706, y + 16, f"expert {expert + 1}", 13, stroke))
        shapes.append(line(752, y + 11, 874, 214, LINE))
    shapes.append(rect(660, 350, 92, 24, "#fff", GREEN))
    shapes.append(text(706, 367, "shared", 13, GREEN))
    shapes.append(line(752, 362, 874, 214, GREEN, 'stroke-opacity="0.6"'))
    tail = "M62 391 L62 401 L630 401 L630 362 L652 362"
    tip = 'marker-end="url(#tip)" stroke-opacity="0.7"'
    shapes.append(f'<path d="{tail}" fill="none" stroke="{GREEN}" stroke-width="1.4" {tip}/>')
    shapes.append(text(343, 395, "every token", 12, GREEN))
    shapes.append(f'<circle cx="892" cy="214" r="19" fill="#fff" stroke="{INK}"/>')
    shapes += [text(892, 221, "Σ", 20), arrow(911, 214, 948, 214)]
    return shapes


# ---- the house

ROOMS = (
    ("kernels", "routing, experts, permutation, loss: Triton, C++ and PyTorch"),
    ("data", "documents to shards; loader"),
    ("model", "router, EMO layer, transformer, losses"),
    ("distributed", "processes, the parallel plan, expert parallelism"),
    ("modular", "choice of the experts of a domain"),
    ("training", "step, engines, run, checkpoints, metrics"),
    ("interop", "Hugging Face folders, read and written"),
    ("evaluation", "loss of expert subsets; locality; plots"),
    ("subsets", "experts chosen and taken out"),
    ("analysis", "what experts learned: clusters, coverage"),
    ("report", "runs as one page: curves, loads, findings"),
    ("explorer", "documents and experts as a page to look at"),
    ("generation", "KV cache, sampling, continuous batching"),
    ("tasks", "questions answered with all experts or few"),
    ("serving", "subsets of one model over HTTP"),
    ("sweeps", "evaluations of many models and subsets"),
    ("planning", "dry run, cost model, search of layouts"),
    ("commands", "the subcommands of emotrain"),
)
"""Rooms from the ground up and what they hold."""
BELOW: dict[str, set[str]] = {"kernels": set(), "data": set(), "model": {"kernels"}}
"""The rooms that a room may import, where these are not all below it."""
GROUND = "batch · config · errors"
GROUND_OF_MOST = "files · folders · progress · staging · tables"


def may_import(room: str) -> set[str]:
    names = [name for name, _ in ROOMS]
    return BELOW.get(room, set(names[: names.index(room)]))


def house() -> str:
    """The rooms as floors. Data stands beside kernels and model, which it does not know."""
    left, width, tall, step = 40, 660, 40, 48
    split = 404
    holds = dict(ROOMS)
    floors = [name for name, _ in reversed(ROOMS) if name not in BELOW]
    shapes = []
    for floor, name in enumerate(floors):
        shapes += room_box(left, 74 + floor * step, width, tall, name, holds[name], BLUE)
    ground = 74 + len(floors) * step
    shapes += tall_room(left, ground, split - left - 8, tall, "model", holds["model"])
    kernels = "routing, experts, permutation, loss"
    shapes += tall_room(left, ground + step, split - left - 8, tall, "kernels", kernels)
    shapes += tall_room(split, ground, left + width - split, tall + step, "data", holds["data"])
    under = ground + 2 * step + 6
    shapes.append(rect(left, under, width, 54, EMPTY, LINE))
    shapes.append(text(left + width / 2, under + 22, f"every room: {GROUND}", 13))
    most = f"every room but model and kernels: {GROUND_OF_MOST}"
    shapes.append(text(left + width / 2, under + 42, most, 12, SOFT))
    shapes.append(text(left, 34, "The house", 17, anchor="start", more='font-weight="bold"'))
    law = "A room may import the rooms below it, and none above."
    shapes.append(text(left, 56, law, 13, SOFT, "start"))
    shapes.append(arrow(722, 84, 722, under + 44))
    shapes.append(text(738, 230, "imports", 13, SOFT, "start"))
    shapes.append(text(738, 248, "go down", 13, SOFT, "start"))
    notes = ("model imports kernels", "alone; kernels and data", "import no room")
    for i, note in enumerate(notes):
        shapes.append(text(738, ground + 26 + 18 * i, note, 12, SOFT, "start"))
    return svg(890, int(under) + 78, "The rooms of emotrain", shapes)


def room_box(
    x: float, y: float, w: float, h: float, name: str, holds: str, colour: str
) -> list[str]:
    bold = 'font-weight="bold"'
    return [
        rect(x, y, w, h, "#fff", colour),
        text(x + 16, y + 25, name, 15, colour, "start", bold),
        text(x + 150, y + 25, holds, 13, INK, "start"),
    ]


def tall_room(x: float, y: float, w: float, h: float, name: str, holds: str) -> list[str]:
    """A room of the ground floor: narrower, so its words stand nearer."""
    bold, middle = 'font-weight="bold"', y + h / 2 + 5
    return [
        rect(x, y, w, h, "#fff", ORANGE),
        text(x + 16, middle, name, 15, ORANGE, "start", bold),
        text(x + (90 if w > 300 else 62), middle, holds, 13, INK, "start"),
    ]


def pictures() -> dict[str, str]:
    """File name -> content."""
    return {"emo_layer.svg": emo_layer(), "house.svg": house()}


if __name__ == "__main__":
    for file, content in pictures().items():
        (Path(__file__).parent / file).write_text(content, encoding="utf-8")
