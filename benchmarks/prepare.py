"""How fast `emotrain prepare` is, against the library that it encodes with and on two processes.

    python benchmarks/prepare.py --json

    prepare_over_tokenizers       tokens/s of all of prepare (reading, encoding, shuffling, writing,
                                  hashing) over those of `encode_batch` of the tokenizers library,
                                  with its texts in memory and its ids thrown away, on as many cores
    prepare_over_tokenizers_fast  the same over `encode_batch_fast`, which leaves out the offsets
    two_workers_over_one          seconds of prepare with one worker over those with two
    *_cpu                         the same by seconds of CPU, which a busy machine changes less; for
                                  the workers, 2 * CPU of one / CPU of two

The corpus is the embedded one, repeated to --megabytes of text in four files of JSON lines. Every
call is a process of its own, arms take turns, and its imports are not counted; the start of workers
is.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _measure import Timing, arguments, report

FILES = 4

RAW = """
import json, os, resource, sys, time
from tokenizers import Tokenizer
tokenizer, call = Tokenizer.from_file(sys.argv[1]), sys.argv[2]
texts = [json.loads(line)["text"] for path in sys.argv[3:] for line in open(path)]
encode, tokens = getattr(tokenizer, call), 0
before = resource.getrusage(resource.RUSAGE_SELF)
start = time.perf_counter()
for first in range(0, len(texts), 1000):
    batch = encode(texts[first:first + 1000], add_special_tokens=False)
    tokens += sum(map(len, batch))
seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens + len(texts)}))
"""

PREPARE = """
import json, resource, sys, time
import pyarrow, tokenizers
from emotrain.preparation.prepare import prepare
start = time.perf_counter()
before = resource.getrusage(resource.RUSAGE_SELF)
made = prepare(sys.argv[4:], sys.argv[3], tokenizer=sys.argv[1], workers=int(sys.argv[2]))
seconds = time.perf_counter() - start
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(u.ru_utime + u.ru_stime for u in used) - before.ru_utime - before.ru_stime
print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": made["tokens"]}))
"""


def write_corpus(folder: Path, num_bytes: int) -> list[Path]:
    """The embedded documents, over and over, in FILES files."""
    from emotrain.data.documents import DocumentReader
    from emotrain.preparation.prepare import SAMPLE_DIR

    reader = DocumentReader()
    documents = [d for path in sorted(SAMPLE_DIR.glob("*.parquet")) for d in reader.read(path)]
    # Domains take turns, so that files are alike.
    documents = [d for start in range(97) for d in documents[start::97]]
    paths, written, number = [], 0, 0
    for file in range(FILES):
        paths.append(folder / f"{file}.jsonl")
        with open(paths[-1], "w", encoding="utf-8") as stream:
            while written < num_bytes * (file + 1) / FILES:
                document = documents[number % len(documents)]
                stream.write(json.dumps({"text": document.text, "domain": document.domain}) + "\n")
                written, number = written + document.size, number + 1
    return paths


def train(paths: list[Path], out: Path, vocab_size: int) -> None:
    from emotrain.data.tokenizer import train_tokenizer

    with open(paths[0], encoding="utf-8") as stream:
        texts = (json.loads(line)["text"] for line in stream)
        out.write_text(train_tokenizer(texts, vocab_size).to_json())


def call(program: str, *args: object, cores: int = 1) -> dict[str, Any]:
    env = os.environ | {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--megabytes", type=int, default=96, help="of text (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=16384, help="(default: %(default)s)")
    args = parser.parse_args()
    cores = min(args.threads, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, tokenizer = write_corpus(folder, args.megabytes * 10**6), folder / "tokenizer.json"
        train(paths, tokenizer, args.vocab_size)

        def prepared(workers: int) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                return call(PREPARE, tokenizer, workers, Path(out, "data"), *paths)

        arms = {
            "encode_batch": lambda: call(RAW, tokenizer, "encode_batch", *paths, cores=cores),
            "encode_batch_fast": lambda: call(
                RAW, tokenizer, "encode_batch_fast", *paths, cores=cores
            ),
            "prepare": lambda: prepared(cores),
            "one worker": lambda: prepared(1),
            "two workers": lambda: prepared(2),
        }
        if cores == 2:  # the same thing
            del arms["prepare"]
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for round_ in range(args.repeats):
            for arm in list(arms) if round_ % 2 == 0 else reversed(list(arms)):
                found[arm].append(arms[arm]())
    found.setdefault("prepare", found["two workers"])
    assert len({run["tokens"] for runs in found.values() for run in runs}) == 1, "not the same text"
    tokens = found["prepare"][0]["tokens"]

    def median(arm: str, key: str) -> float:
        return statistics.median(run[key] for run in found[arm])

    results: dict[str, Any] = {
        "tokens": tokens,
        "text_megabytes": args.megabytes,
        "workers": cores,
        "prepare_tokens_per_second": tokens / median("prepare", "seconds"),
        "tokenizers_tokens_per_second": tokens / median("encode_batch", "seconds"),
    }
    for ending, key in (("", "seconds"), ("_cpu", "cpu")):
        for name, arm in (("", "encode_batch"), ("_fast", "encode_batch_fast")):
            results[f"prepare_over_tokenizers{name}{ending}"] = median(arm, key) / median(
                "prepare", key
            )
    results["two_workers_over_one"] = median("one worker", "seconds") / median(
        "two workers", "seconds"
    )
    results["two_workers_over_one_cpu"] = (
        2 * median("one worker", "cpu") / median("two workers", "cpu")
    )
    results["cpu_seconds"] = {arm: median(arm, "cpu") for arm in found}
    timings = {
        arm: Timing(tuple(run["seconds"] * 1e3 for run in runs)) for arm, runs in found.items()
    }
    report("prepare", timings, results, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
