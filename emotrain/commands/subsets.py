"""`emotrain subsets`: subsets of experts combined and compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emotrain.commands.common import (
    add_device,
    add_document_tokens,
    add_json,
    add_micro_batch,
    finish,
    new_file,
    output_file,
)
from emotrain.tables import short_names

if TYPE_CHECKING:
    from emotrain.modular.algebra import Operand, Overlap
    from emotrain.modular.artefact import Subset
    from emotrain.subsets.interference import Interference

DESCRIPTION = """\
Combine subsets of one model's experts, or compare them. All but `fidelity` and `interference` need
the files of `emotrain select` alone: no model is read. A combined subset is a file like any other,
for `emotrain extract` too. Shared experts are in every subset."""
EPILOG = """\
examples:
  emotrain subsets union rust.json python.json --out code.json
  emotrain subsets merge rust.json python.json --weights 2 1 --keep 8 --out code.json
  emotrain subsets difference rust.json python.json --out rust-only.json
  emotrain subsets overlap rust.json python.json lisp.json --plot overlap.png
  emotrain subsets fidelity code.json --checkpoint runs/it --data data/sample
  emotrain subsets interference rust.json python.json --checkpoint runs/it --data data/sample

`emotrain subsets OPERATION --help` says more. Every operation has --json."""

OPERATIONS = {
    "union": (
        "experts that any of the subsets keeps",
        "Keep every expert that one of the subsets keeps, as many as these are; `merge` has a "
        "budget.",
    ),
    "merge": (
        "the best experts of the union, within a budget",
        "Keep the experts of the union with the highest scores, weighted mean over the subsets, as "
        "many as the budget allows. A score counts as a share of its layer's scores, so that "
        "subsets of different methods and lengths of text weigh alike.",
    ),
    "intersection": (
        "experts that all of the subsets keep",
        "Keep the experts that all of the subsets keep. Every layer needs one at least.",
    ),
    "difference": (
        "experts of the first subset that no other keeps",
        "Keep the experts of the first subset that none of the others keeps. Every layer needs one "
        "at least.",
    ),
}
OVERLAP = """\
Compare every two subsets: Jaccard index (experts in common as a share of the experts of both),
layer by layer and as a mean, beside what random subsets of the same sizes have on average. The last
column says how many standard deviations the experts in common lie above chance."""
FIDELITY = """\
Measure on held-out documents how near each subset comes to the full model, without labels: as masks
over its experts (what `emotrain generate --subset` runs) and as a model of its own (what `emotrain
extract` writes), and by how much a log probability differs between these two. The full model and
one subset are in memory together."""
INTERFERENCE = """\
Measure on held-out documents of each subset's domain what it loses in the union of all: against the
subset alone, and both against the full model. Each subset is measured on the domain that it was
selected for. With one subset, this is its loss."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    operations = parser.add_subparsers(dest="operation", required=True, metavar="OPERATION")
    for name, (summary, description) in OPERATIONS.items():
        of_one = _add(operations, name, summary, description)
        if name == "merge":
            _add_budget(of_one)
        of_one.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
        add_json(of_one)
    compare = _add(operations, "overlap", "experts that subsets have in common", OVERLAP)
    compare.add_argument(
        "--plot", metavar="FILE", help="picture to write, as PNG; its numbers go beside it, as .csv"
    )
    add_json(compare)
    near = _add(operations, "fidelity", "how near subsets come to the full model", FIDELITY)
    _add_measuring(
        near,
        "domains to measure on (default: those that a subset, or what it was made of, was "
        "selected for)",
    )
    measure = _add(operations, "interference", "what each domain loses in the union", INTERFERENCE)
    _add_measuring(measure, "domain of each subset (default: those that they were selected for)")
    measure.add_argument(
        "--composed", metavar="FILE", help="measure this subset instead of the union"
    )


def _add(operations: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser = operations.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter
        if "\n" in description
        else argparse.HelpFormatter,
    )
    parser.add_argument(
        "subsets", nargs="+", metavar="SUBSET", help="file of `emotrain select` or of this command"
    )
    return parser


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[],
        metavar="W",
        help="weight of each subset's scores, in their order (default: as much for each)",
    )
    parser.add_argument(
        "--keep",
        default="",
        metavar="N",
        help="experts to keep, shared ones counted, as in `emotrain select`: 8, 0.25, 8,8,16,16 or "
        "total:32",
    )
    parser.add_argument(
        "--memory",
        default="",
        metavar="SIZE",
        help="instead of --keep: the most experts a layer that fit an extracted checkpoint of 4GB",
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        help="with --memory: where the model is, of which the configuration is read (default: "
        "where it was selected from)",
    )


def _add_measuring(parser: argparse.ArgumentParser, domains: str) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="the one that the subsets were selected from, or its run",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder written by `emotrain prepare`, with the model's tokenizer",
    )
    parser.add_argument("--domains", nargs="+", default=[], metavar="NAME", help=domains)
    parser.add_argument(
        "--documents",
        type=int,
        default=64,
        metavar="N",
        help="most held-out documents of a domain (default: %(default)s); more of them, smaller "
        "errors",
    )
    add_document_tokens(parser, 0)
    add_micro_batch(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.operation == "overlap":
        return _overlap(args)
    if args.operation == "fidelity":
        return _fidelity(args)
    return _interference(args) if args.operation == "interference" else _combine(args)


# ---- combine


def _combine(args: argparse.Namespace) -> int:
    from emotrain.modular.algebra import combine, merge, read_operands

    out = new_file(args.out, "it.json")
    operands = read_operands(args.subsets)
    if args.operation == "merge":
        weights = args.weights or [1.0] * len(operands)
        subset = merge(operands, weights, _budget(args, operands[0].subset))
    else:
        subset = combine(args.operation, operands)
    subset.save(out)
    finish(args, {**subset.to_json(), "out": str(out)}, f"{_sizes(operands, subset)}\nwrote {out}")
    return 0


def _budget(args: argparse.Namespace, subset: Subset) -> Any:
    from emotrain.errors import UserError
    from emotrain.modular.algebra import counted_model
    from emotrain.modular.budget import read_keep, read_memory

    if bool(args.keep) == bool(args.memory):
        raise UserError(
            "say how many experts to keep, once: --keep 32 or --memory 4GB (union keeps all)"
        )
    if args.checkpoint and not args.memory:
        raise UserError("--checkpoint says what --memory needs, and --keep does not; leave it out")
    if args.keep:
        return read_keep(args.keep, counted_model(subset))
    from emotrain.subsets.selection import require_same_model
    from emotrain.training.checkpoint_folders import find, read_config

    folder = find(args.checkpoint or subset.checkpoint)
    config = read_config(folder)
    require_same_model(subset, folder, config)
    return read_memory(args.memory, config.model)


def _sizes(operands: Sequence[Operand], subset: Subset) -> str:
    """A table of how many experts each layer keeps."""
    from emotrain.tables import Table

    names = [Path(operand.file).stem for operand in operands]
    columns = [operand.subset.experts_kept_per_layer for operand in operands]
    title = f"experts that each layer keeps, {subset.num_shared_experts} shared included"
    return Table(
        title,
        ("layer", *names, subset.method, "of", "routed experts, by number"),
        tuple(
            (
                str(layer),
                *(str(len(kept[layer])) for kept in columns),
                str(len(subset.experts_kept_per_layer[layer])),
                str(most),
                " ".join(map(str, subset.routed(layer))),
            )
            for layer, most in enumerate(subset.experts_per_layer)
        ),
        notes=1,
    ).text()


# ---- compare


def _overlap(args: argparse.Namespace) -> int:
    from emotrain.files import write_whole
    from emotrain.modular.algebra import overlap, read_operands

    plot = output_file(args.plot, "overlap.png") if args.plot else None
    if plot is not None and plot.suffix == ".csv":
        from emotrain.errors import UserError

        raise UserError(
            f"--plot {plot}: is the name of the numbers; name a picture, as overlap.png"
        )
    found = overlap(read_operands(args.subsets))
    text = _overlap_table(found)
    if plot is not None:
        from emotrain.evaluation.plots import overlap_figure

        names = short_names(found.files)
        write_whole(plot, overlap_figure(names, found.jaccard, found.chance))
        numbers = write_whole(plot.with_suffix(".csv"), _overlap_csv(found).encode())
        text += f"\nwrote {plot}\nwrote {numbers}"
    finish(args, {**found.to_json(), "plot": str(plot) if plot else None}, text)
    return 0


def _overlap_csv(found: Overlap) -> str:
    """The numbers of the plot: a row for each two files."""
    from emotrain.tables import csv_text

    indices = range(len(found.files))
    rows = [
        (found.files[i], found.files[j], found.jaccard[i][j], found.chance[i][j])
        for i in indices
        for j in indices
    ]
    return csv_text(("subset", "other_subset", "jaccard", "jaccard_by_chance"), rows)


def _overlap_table(found: Overlap) -> str:
    from emotrain.tables import Table

    names = short_names(found.files)
    rows = []
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            layers = [of_layer[i][j] for of_layer in found.jaccard_per_layer]
            above = found.deviations[i][j]
            rows.append(
                (
                    other,
                    one,
                    f"{found.jaccard[i][j]:.3f}",
                    f"{min(layers):.3f}",
                    f"{max(layers):.3f}",
                    f"{found.chance[i][j]:.3f}",
                    "-" if above is None else f"{above:+.1f}",
                )
            )
    title = "Jaccard index of routed experts: mean, lowest and highest of a layer; by chance"
    header = ("subset", "subset", "mean", "lowest", "highest", "by chance", "deviations above it")
    return Table(title, header, tuple(rows), names=2).text()


# ---- measure


def _documents(args: argparse.Namespace) -> dict[str, Any]:
    """What both of these commands are told of the documents, and how they run."""
    names = ("domains", "documents", "document_tokens", "device", "micro_batch")
    return {name: getattr(args, name) for name in names}


def _fidelity(args: argparse.Namespace) -> int:
    from emotrain.progress import ProgressBar
    from emotrain.subsets.composed import composed_fidelity, to_json
    from emotrain.tables import Table

    with ProgressBar("batches") as bar:
        found = composed_fidelity(
            args.checkpoint, args.data, args.subsets, track=bar.track, **_documents(args)
        )
    names = dict(zip(args.subsets, short_names(args.subsets), strict=True))
    table = Table(
        "acceptance by the full model and KL from it (nats), as masks and as a model of its own; "
        "largest difference of a log probability between the two",
        ("subset", "domain", "documents", "acceptance", "KL", "extracted", "KL", "difference"),
        tuple(
            (
                names[of.file],
                of.domain,
                str(of.documents),
                f"{of.acceptance:.3f}",
                f"{of.kl_nats:.3f}",
                f"{of.extracted_acceptance:.3f}",
                f"{of.extracted_kl_nats:.3f}",
                f"{of.max_difference_nats:.1e}",
            )
            for of in found
        ),
        names=2,
    )
    finish(args, to_json(found), table.text())
    return 0


def _interference(args: argparse.Namespace) -> int:
    from emotrain.progress import ProgressBar
    from emotrain.subsets.interference import interference

    with ProgressBar("batches") as bar:
        found = interference(
            args.checkpoint,
            args.data,
            args.subsets,
            composed=args.composed,
            track=bar.track,
            **_documents(args),
        )
    finish(args, found.to_json(), _interference_table(found))
    return 0


def _interference_table(found: Interference) -> str:
    from emotrain.tables import Table

    kept = " ".join(map(str, dict.fromkeys(found.experts_per_layer)))
    composed = "union" if found.composed == "union" else Path(found.composed).stem
    return Table(
        f"loss of the full model in nats a token, and what is lost with the subset and with the "
        f"{composed} ({kept} experts a layer); ± standard error",
        ("subset", "domain", "documents", "full model", "subset", composed, "interference"),
        tuple(
            (
                name,
                of.domain,
                str(of.documents),
                f"{of.loss_nats:.3f}",
                f"{of.own_increase_nats:+.3f} ± {of.own_standard_error_nats:.3f}",
                f"{of.composed_increase_nats:+.3f} ± {of.composed_standard_error_nats:.3f}",
                f"{of.interference_nats:+.3f} ± {of.interference_standard_error_nats:.3f}",
            )
            for name, of in zip(
                short_names([of.file for of in found.subsets]), found.subsets, strict=True
            )
        ),
        names=2,
    ).text()
