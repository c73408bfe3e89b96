"""`emotrain explore`: documents, their tokens and the experts of one or two models as one page."""

from __future__ import annotations

import argparse

from emotrain.commands.common import (
    add_checkpoint_and_data,
    add_device,
    add_documents,
    add_json,
    add_micro_batch,
    finish,
    output_file,
)
from emotrain.files import write_whole
from emotrain.progress import ProgressBar

DESCRIPTION = """\
Write one HTML file to look at what the experts of a model do, or those of two models side by side:
a map of documents by their routing, clusters with labels, documents with each token coloured by its
expert, a page for every expert, search, and histograms that filter one another. It opens from the
disk in a browser of 2024 or newer and loads nothing."""
EPILOG = """\
example:
  emotrain explore runs/quickstart --data data/sample --out explorer.html
  emotrain explore runs/modularity/emo runs/modularity/stdmoe --data data/sample --out both.html

Documents are clustered by their routing, as by `emotrain cluster`. --clusters takes the clusters
that it wrote, a file for each model; the page then shows the documents of these files.

Everything on the page is about the start of each document, --document-tokens long. 12,000 documents
of 128 tokens make a page of about 9 MiB for two models of 31 experts in four layers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint_and_data(parser)
    parser.add_argument(
        "other",
        metavar="CHECKPOINT2",
        nargs="?",
        help="another model with the same tokenizer, beside the first",
    )
    parser.add_argument(
        "--clusters",
        nargs="+",
        default=(),
        metavar="FILE",
        help="clusters.parquet of `emotrain cluster`, one for each model (default: cluster here)",
    )
    parser.add_argument(
        "--num-clusters",
        type=int,
        default=32,
        metavar="N",
        help="most clusters, without --clusters (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        choices=("train", "valid"),
        default="train",
        help="documents of which split, without --clusters (default: %(default)s)",
    )
    add_documents(parser, 12_000, 128, "most documents")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=(),
        metavar="LAYER",
        help="layers to show, from 0 (default: four, spread evenly)",
    )
    parser.add_argument(
        "--umap",
        action="store_true",
        help="a second map, by UMAP (pip install 'emotrain[umap]')",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the clusters and of UMAP (default: %(default)s)",
    )
    add_micro_batch(parser)
    add_device(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the HTML file to write")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.explorer.explore import ExploreSettings, explore

    settings = ExploreSettings(
        split=args.split,
        documents=args.documents,
        document_tokens=args.document_tokens,
        layers=tuple(args.layers),
        clusters=args.num_clusters,
        umap=args.umap,
        seed=args.seed,
    )
    out = output_file(args.out, "explorer.html")
    with ProgressBar("batches") as bar:
        explored = explore(
            [args.checkpoint, *([args.other] if args.other else [])],
            args.data,
            settings,
            clusters=args.clusters,
            device=args.device,
            micro_batch=args.micro_batch,
            track=bar.track,
        )
    write_whole(out, explored.page)
    result = {"out": str(out), **explored.result}
    finish(
        args,
        result,
        f"wrote {out}: {result['documents']:,} documents, the first {result['document_tokens']} "
        f"tokens of each, {result['size_mib']:.1f} MiB",
    )
    return 0
