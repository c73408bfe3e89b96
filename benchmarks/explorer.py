"""The explorer's page of 12,000 documents in headless Chromium: its size, how soon it answers, and
how long it ever keeps the browser busy.

    python benchmarks/explorer.py [CHECKPOINT [CHECKPOINT2]] [--json]

Documents are pieces of the embedded corpus, tokenized as the checkpoints' training data. Without
checkpoints, the quickstart and the same model as a standard MoE train for a few steps first: the
page of two models is the largest. A fresh page is opened from the disk several times.

    size_mib                  of the file
    interactive_s             from the start of the navigation to the first picture of the map, when
                              clicks are answered: median (and the largest, interactive_max_s)
    searchable_s              until the texts of all documents can be searched: median
    longest_task_ms           the longest time that the page kept its browser busy while domains,
                              clusters and experts were filtered and text was searched; what takes
                              less than 50 ms the browser does not report, and counts as 0;
                              longest_task_median_ms is the median over openings, which other work
                              on the machine changes less
    opening_longest_task_ms   the same until then
    answer_ms                 from a click on a filter to the next picture: median
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from emotrain.cli import main as emotrain
from emotrain.preparation.prepare import SAMPLE_DIR

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
PIECE = 1000
"""Characters of a document: a little more than 128 tokens have."""
LONG_TASKS = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longTasks.push(entry.duration);
}).observe({type: "longtask", buffered: true});
"""
ANSWER = """(index) => new Promise((resolve) => {
  const start = performance.now();
  document.querySelectorAll("#filters .row")[index].click();
  requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - start)));
})"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="one or two")
    parser.add_argument("--documents", type=int, default=12_000, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of training (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="keep the page here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--page", type=Path, help="only open this page, which --out has kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        page = args.page or make_page(Path(name), args)
        result = {
            "size_mib": page.stat().st_size / 2**20,
            **measure(page, args.repeats),
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
        }
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:24} {value}" for key, value in result.items()))
    return 0


def make_page(folder: Path, args: argparse.Namespace) -> Path:
    """The page of the checkpoints, or of models trained for it."""
    page, checkpoints = args.out or folder / "page.html", list(map(Path, args.checkpoints))
    tokenizer: list[object] = ["--train-tokenizer", "--vocab-size", 4096]
    if checkpoints:
        tokenizer = ["--tokenizer", next(checkpoints[0].rglob("tokenizer.json"))]
    write_pieces(folder / "pieces.jsonl")
    command("prepare", folder / "pieces.jsonl", "--out", folder / "data", *tokenizer)
    checkpoints = checkpoints or list(train(folder, args.steps))
    data = ["--data", folder / "data", "--documents", args.documents]
    command("explore", *checkpoints, *data, "--out", page)
    return page


def command(*words: object) -> None:
    if code := emotrain([str(word) for word in words]):
        raise SystemExit(code)


def write_pieces(path: Path) -> None:
    """The training documents of the embedded corpus in pieces of at most PIECE characters."""
    with open(path, "w", encoding="utf-8") as file:
        for source in sorted(SAMPLE_DIR.glob("*.parquet")):
            for record in pq.read_table(source).to_pylist():
                for start in range(0, len(record["text"]), PIECE):
                    piece = record["text"][start : start + PIECE]
                    row = {"text": piece, "domain": record["domain"], "split": "train"}
                    file.write(json.dumps(row) + "\n")


def train(folder: Path, steps: int) -> Iterator[Path]:
    """The quickstart's EMO and the same model as a standard MoE, briefly trained."""
    for name, settings in (("emo", []), ("standard", ["model.router.pool.kind=none"])):
        run = folder / name
        command(
            "train",
            QUICKSTART,
            f"data.path={folder / 'data'}",
            f"training.run_dir={run}",
            f"training.steps={steps}",
            "training.tensorboard=false",
            *settings,
        )
        yield run


def measure(page: Path, repeats: int) -> dict[str, Any]:
    """Open the page so many times, each in a new process of the browser, and use it."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("needs a browser: apt-get install chromium")
    ready, searchable, opening, using, answers = [], [], [0.0], [], []
    with sync_playwright() as playwright:
        for _ in range(repeats):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1280, "height": 800})
            tab.add_init_script(LONG_TASKS)
            tab.goto(page.resolve().as_uri(), wait_until="commit")
            ready.append(mark(tab, "interactive") / 1e3)
            searchable.append(mark(tab, "searchable") / 1e3)
            opening += tab.evaluate("window.longTasks.splice(0)")
            rows = tab.locator("#filters .row").count()
            documents = int(tab.inner_text("#panel h2").split()[0].replace(",", ""))
            models = tab.locator("figure").count()
            for index in range(0, rows, max(1, rows // 40)):
                answers.append(tab.evaluate(ANSWER, index))
            for words in ("the", "function", "zzzz"):
                tab.fill("#search", words)
                tab.keyboard.press("Enter")
                tab.wait_for_timeout(200)
            tab.keyboard.press("Escape")
            tab.wait_for_timeout(300)
            using.append(max([0.0, *tab.evaluate("window.longTasks.splice(0)")]))
            browser.close()
    return {
        "documents": documents,
        "models": models,
        "interactive_s": statistics.median(ready),
        "interactive_max_s": max(ready),
        "searchable_s": statistics.median(searchable),
        "longest_task_ms": max(using),
        "longest_task_median_ms": statistics.median(using),
        "opening_longest_task_ms": max(opening),
        "answer_ms": statistics.median(answers),
        "repeats": repeats,
    }


def mark(tab: Any, name: str) -> float:
    """When the page set a mark, in ms after its navigation began."""
    for _ in range(3000):
        if found := tab.evaluate(f"performance.getEntriesByName('{name}')[0]?.startTime ?? 0"):
            return found
        tab.wait_for_timeout(20)
    raise SystemExit(f"the page is not {name} after a minute")


if __name__ == "__main__":
    sys.exit(main())
