"""`emotrain select`: which experts a few documents need, as a file."""

from __future__ import annotations

import argparse

from emotrain.commands.common import (
    add_checkpoint,
    add_device,
    add_documents,
    add_json,
    add_micro_batch,
    finish,
    new_file,
)
from emotrain.progress import ProgressBar
from emotrain.tables import Table

DESCRIPTION = """\
Choose the experts that some text needs, from one example up, and write them to one JSON file: the
experts that each layer keeps, the score of every expert, and checksums of the model, the tokenizer
and the text. A quarter of the documents has no part in the choice: on these the subset is compared
with the full model, without labels."""
EPILOG = """\
examples:
  emotrain select runs/quickstart --calibration data/sample --domain rust --keep 8 --out rust.json
  emotrain select runs/quickstart --prompt "fn main() {" --keep 0.25 --out prompt.json
  emotrain select runs/quickstart --calibration questions.jsonl --memory 8MB --out questions.json

--keep counts shared experts, which always stay: 8 experts a layer (8), a quarter of each layer's
(0.25), a number for each layer (8,8,16,16), or all layers together, shared out by score (total:32).
As many in every layer is the safe choice: in published measurements every other way lost more.

Methods: `router` (the paper's: layer by layer, by routing probability, with the layers below
already reduced), `router_once` (the same in the full model), `easy_ep` and `reap` (what an expert's
output changes), `easy_ep_reference` (as the published code computes it), `frequency`, `random`.

Reading it: `acceptance` is the probability that the full model and the subset say the same next
token (1 is equal), `kl` the divergence of their predictions in nats (0 is equal)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser)
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="a folder written by `emotrain prepare` (its training documents), a cluster of them "
        "(clusters.parquet:7, of `emotrain cluster`), or a JSONL file of documents (text) or "
        "questions (question)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text instead; may be repeated",
    )
    parser.add_argument("--domain", default="", metavar="NAME", help="documents of this one alone")
    parser.add_argument("--keep", default="", metavar="N", help="experts to keep, as below")
    parser.add_argument(
        "--memory",
        default="",
        metavar="SIZE",
        help="instead of --keep: the most experts a layer that fit an extracted checkpoint of 4GB",
    )
    parser.add_argument(
        "--method", default="router", metavar="NAME", help="as below (default: %(default)s)"
    )
    add_documents(parser, 64, 0, "most documents to read")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the weights; the published scripts use bf16 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of --method random (default: %(default)s)"
    )
    add_micro_batch(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.subsets.selection import SelectSettings, select

    settings = SelectSettings(
        keep=args.keep,
        memory=args.memory,
        method=args.method,
        domain=args.domain,
        prompts=tuple(args.prompt),
        documents=args.documents,
        document_tokens=args.document_tokens,
        precision=args.precision,
        seed=args.seed,
    )
    out = new_file(args.out, "it.json")
    with ProgressBar("batches") as bar:
        subset = select(
            args.checkpoint,
            args.calibration,
            settings,
            device=args.device,
            micro_batch=args.micro_batch,
            track=bar.track,
        )
    subset.save(out)
    of, measured = subset.calibration, subset.fidelity
    assert measured is not None
    table = Table(
        f"experts of {subset.checkpoint} for {of.domain or of.source}: {of.documents} documents, "
        f"{of.tokens:,} tokens, method {subset.method}",
        ("layer", "kept", "of", "routed experts, by number"),
        tuple(
            (str(layer), str(len(kept)), str(most), " ".join(map(str, subset.routed(layer))))
            for layer, (kept, most) in enumerate(
                zip(subset.experts_kept_per_layer, subset.experts_per_layer, strict=True)
            )
        ),
        notes=1,
    )
    where = "held back" if measured.held_back else "which also chose them"
    finish(
        args,
        {**subset.to_json(), "out": str(out)},
        f"{table.text()}\nacceptance {measured.acceptance:.3f}, kl {measured.kl_nats:.3f} nats on "
        f"{measured.documents} documents, {where}\nwrote {out}",
    )
    return 0
