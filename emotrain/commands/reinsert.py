"""`emotrain reinsert`: put a tuned subset back into the model that it was taken from."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from emotrain.commands.common import (
    add_checkpoint,
    add_device,
    add_documents,
    add_json,
    finish,
)
from emotrain.progress import ProgressBar
from emotrain.tables import Table

DESCRIPTION = """\
Write the full model with the experts of a tuned subset in the places where they were taken from.
The full model's checkpoint is read and written piece by piece, so that the command needs little
memory. With --data it says what every domain has lost or won by it."""
EPILOG = """\
example:
  emotrain select runs/quickstart --calibration data/sample --domain rust --keep 8 --out rust.json
  emotrain extract runs/quickstart rust.json --out runs/rust
  emotrain finetune runs/rust --data data/sample --domain rust --train routed --out runs/rust-tuned
  emotrain reinsert runs/quickstart runs/rust-tuned rust.json --out runs/back --data data/sample

Routed experts come back by default, as in the published scripts. --parts takes more of them:
routed, shared, router (the rows of these experts), trunk (everything else). What was tuned beside
the experts and stays behind is lost, so train what will come back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser, "the full model: ")
    parser.add_argument("tuned", metavar="TUNED", help="the subset's checkpoint or run, tuned")
    parser.add_argument("subset", metavar="SUBSET", help="file that it was extracted with")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="checkpoint folder to write, a new one"
    )
    parser.add_argument(
        "--parts",
        default="routed",
        metavar="NAMES",
        help="what comes back, with commas (default: %(default)s)",
    )
    parser.add_argument(
        "--blend",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the tuned values, the full model's have the rest (default: %(default)s)",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder of `emotrain prepare`: measure every domain on it"
    )
    add_documents(parser, 16, 512)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.evaluation.settings import EvaluationSettings
    from emotrain.subsets.consequences import changes, read_held_out
    from emotrain.subsets.reinsertion import reinsert

    settings = EvaluationSettings(
        documents=args.documents, document_tokens=args.document_tokens, calibration_documents=1
    )
    domains = read_held_out(args.checkpoint, args.data, settings) if args.data else None
    with ProgressBar("files") as bar:
        done = reinsert(
            args.checkpoint,
            args.tuned,
            args.subset,
            args.out,
            parts=args.parts,
            blend=args.blend,
            track=bar.track,
        )
    result = {
        "out": str(done.path),
        "parts": list(done.parts),
        "blend": args.blend,
        "tensors": done.tensors,
        "changed_tensors": len(done.changed_tensors),
        "changed_tensor_names": list(done.changed_tensors),
        "changed_parameters": done.changed_parameters,
        "domains": None,
    }
    text = (
        f"wrote {done.path}: {len(done.changed_tensors)} of {done.tensors} tensors changed, "
        f"{done.changed_parameters:,} numbers in them"
    )
    if domains is not None:
        with ProgressBar("batches") as bar:
            found = changes(
                args.checkpoint, done.path, domains, device=args.device, track=bar.track
            )
        result["domains"] = {name: asdict(change) for name, change in found.items()}
        table = Table(
            "loss of each domain with all experts, in nats a token: a negative change is a gain",
            ("domain", "before", "after", "change", "± s.e."),
            tuple(
                (
                    name,
                    f"{change.before_nats:.4f}",
                    f"{change.after_nats:.4f}",
                    f"{change.change_nats:+.4f}",
                    f"{change.standard_error_nats:.4f}",
                )
                for name, change in found.items()
            ),
        )
        text = f"{text}\n{table.text()}"
    finish(args, result, text)
    return 0
