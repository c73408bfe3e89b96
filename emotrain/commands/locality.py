"""`emotrain locality`: how few experts serve a document, and what a cache of them hits."""

from __future__ import annotations

import argparse
from pathlib import Path

from emotrain.commands.common import (
    add_checkpoint_and_data,
    add_device,
    add_documents,
    add_json,
    add_micro_batch,
    finish,
    output_file,
)
from emotrain.files import json_text, write_whole
from emotrain.progress import ProgressBar
from emotrain.tables import short_names

DESCRIPTION = """\
Measure how local the choice of experts is, on held-out documents: what share of the routed slots
finds its expert where only some of a layer's experts are at hand. They are pinned (a few training
documents say which are used most), or in an LRU cache. Also: how many experts change from token to
token, and two measures of arXiv 2505.16056, SRP (how well one routing for a whole segment of tokens
can be that of its tokens, an F1) and SCH (the hit rate of the best cache of each segment)."""
EPILOG = """\
example:
  emotrain locality runs/quickstart --data data/sample
  emotrain locality runs/modularity/emo --data data/sample --compare runs/modularity/stdmoe

--export-pins writes how often the training documents choose each routed expert, as
{"logical_count": [[…] a layer]}: what SGLang and ktransformers read with --init-expert-location.
Experts have the numbers of `emotrain export --layout clean`. With --domains it is for these alone.

Reading it: a cache of a quarter of the experts that is right by chance hits 25 %. `cold` is the
cache of one document alone, `mixed` that of a server of all domains. A hit rate is per routed slot;
a miss waits for an expert to be copied, so that only rates near 100 % leave the speed as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint_and_data(parser)
    parser.add_argument(
        "--compare",
        metavar="CHECKPOINT",
        help="another model with the same tokenizer, measured on the same documents",
    )
    parser.add_argument(
        "--cache",
        type=float,
        nargs="+",
        default=(0.125, 0.25, 0.5),
        metavar="SHARE",
        help="shares of a layer's routed experts that are at hand, at least those of one token "
        "(default: 0.125 0.25 0.5)",
    )
    parser.add_argument(
        "--segments",
        type=int,
        nargs="+",
        default=(16, 64),
        metavar="TOKENS",
        help="lengths of a segment, for SRP and SCH (default: 16 64)",
    )
    parser.add_argument(
        "--pool",
        choices=("none", "trained"),
        default="none",
        help="without document pools, as at inference, or with pools drawn as in training "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--domains", nargs="+", default=(), metavar="NAME", help="domains to measure (default: all)"
    )
    parser.add_argument(
        "--calibration-documents",
        type=int,
        default=8,
        metavar="N",
        help="training documents of a domain that say what is pinned (default: %(default)s)",
    )
    add_documents(parser, 16, 1024)
    add_micro_batch(parser)
    add_device(parser)
    parser.add_argument("--export-pins", metavar="FILE", help="JSON file to write, as below")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for locality.json, .md, .csv and .png (default: RUN_DIR/locality)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.evaluation.locality import (
        LocalitySettings,
        check_models,
        logical_counts,
        measure_locality,
    )
    from emotrain.evaluation.locality_tables import locality_json, locality_tables, write_locality
    from emotrain.evaluation.measure import default_folder
    from emotrain.training.checkpoint import find

    settings = LocalitySettings(
        cache=tuple(args.cache),
        segments=tuple(args.segments),
        calibration_documents=args.calibration_documents,
        documents=args.documents,
        document_tokens=args.document_tokens,
        domains=tuple(args.domains),
        pool=args.pool,
    )
    checkpoints = [args.checkpoint, *([args.compare] if args.compare else [])]
    found = [find(checkpoint) for checkpoint in checkpoints]
    check_models(found, pins=bool(args.export_pins))
    folder = Path(args.out) if args.out else default_folder(found[0], "locality")
    pins = output_file(args.export_pins, "pins.json") if args.export_pins else None
    results = []
    with ProgressBar("batches") as bar:
        for checkpoint in found:
            results.append(
                measure_locality(
                    checkpoint,
                    args.data,
                    settings,
                    device=args.device,
                    micro_batch=args.micro_batch,
                    track=bar.track,
                    out=folder,
                )
            )
    models = list(zip(short_names(checkpoints), results, strict=True))
    finish(
        args,
        locality_json(models),
        "\n\n".join(table.text() for table in locality_tables(models)),
    )
    written = write_locality(models, folder)
    if pins:
        written.append(write_whole(pins, (json_text(logical_counts(results[0])) + "\n").encode()))
    if not args.json:
        print(*(f"wrote {path}" for path in written), sep="\n")
    return 0
