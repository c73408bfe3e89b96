"""`emotrain cluster`: groups of documents and tokens that get the same experts."""

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
)
from emotrain.progress import ProgressBar

DESCRIPTION = """\
Group documents, and the tokens in them, by the experts that a model gives them, and measure what
these groups are: the domains of the documents, of which the model was told nothing, or the surface
of the text, which token it is, its script, its length. As published: routing probabilities of all
layers over the first 100 tokens of many documents, principal components with 95 % of the variance,
unit vectors, spherical k-means. Needs scikit-learn (pip install 'emotrain[analysis]')."""
EPILOG = """\
examples:
  emotrain cluster runs/quickstart --data data/sample
  emotrain cluster runs/quickstart --data data/sample --clusters 64 --layers 2 3 --out clusters
  emotrain select runs/quickstart --calibration runs/quickstart/clusters/clusters.parquet:7 \\
      --keep 8 --out cluster7.json

The folder has clusters.parquet (a row a document), tokens.parquet (a row a token), cluster.json and
.md, and two pictures with their numbers as .csv. docs/analysis.md says what is in them.

Reading it: normalised mutual information (NMI) is 1 where clusters are the labels and 0 where they
know nothing of them; `shuffled` is what labels in any order give. Experts that have learned
subjects give a high domain_nmi and a low token_identity_nmi. Both are of the clusters of tokens;
document_domain_nmi is of those of documents."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint_and_data(parser)
    parser.add_argument(
        "--clusters",
        type=int,
        default=32,
        metavar="N",
        help="most clusters, of documents and of tokens (default: %(default)s)",
    )
    add_documents(parser, 12_000, 100, "most documents, those of under 32 tokens passed over")
    parser.add_argument(
        "--split",
        choices=("train", "valid"),
        default="train",
        help="documents to read; `select` takes clusters of train alone (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="layers whose routing counts, from 0 (default: all that route)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of k-means, samples and shuffled labels (default: %(default)s)",
    )
    add_micro_batch(parser)
    add_device(parser)
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: RUN_DIR/clusters)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.analysis.cluster import ClusterSettings, cluster
    from emotrain.analysis.cluster_tables import cluster_tables, write_clusters
    from emotrain.evaluation.measure import default_folder
    from emotrain.files import make_writable
    from emotrain.training.checkpoint import find

    settings = ClusterSettings(
        clusters=args.clusters,
        documents=args.documents,
        document_tokens=args.document_tokens,
        split=args.split,
        layers=tuple(args.layers),
        seed=args.seed,
    )
    folder = Path(args.out) if args.out else default_folder(find(args.checkpoint), "clusters")
    make_writable(folder)
    with ProgressBar("parts") as bar:
        result = cluster(
            args.checkpoint,
            args.data,
            settings,
            folder,
            device=args.device,
            micro_batch=args.micro_batch,
            track=bar.track,
        )
    written = write_clusters(result, folder)
    finish(
        args,
        result.to_json(),
        "\n\n".join(table.text() for table in cluster_tables(result)),
    )
    if not args.json:
        print(*(f"wrote {path}" for path in written), sep="\n")
    return 0
