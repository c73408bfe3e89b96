"""`emotrain experts`: experts that one domain has to itself."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from emotrain.commands.common import (
    add_checkpoint,
    add_device,
    add_documents,
    add_json,
    add_micro_batch,
    finish,
)
from emotrain.progress import ProgressBar
from emotrain.tables import Table

DESCRIPTION = """\
Give a domain experts of its own, take them away, or list them. Exclusive experts are in the pool of
each document of their domain and in no other one's: for all other text the model computes what it
did before, to the last bit. Everything else of the checkpoint stays as it is."""
EPILOG = """\
examples:
  emotrain experts add runs/quickstart --domain rust --count 2 --out runs/larger
  emotrain experts list runs/larger
  emotrain experts remove runs/larger --domain rust --out runs/smaller

New experts begin as --init says: `random`, as in a new model; `nearest`, copies of the experts that
the domain's text uses most; `mean`, the mean of the K most used, or of all without text, with a
little noise. Rows of the router go with them.

Train them alone, on the domain's documents:
  emotrain finetune runs/larger --data data/sample --domain rust --experts exclusive:rust \\
      --steps 100 --out runs/rust-experts optimizer.lr=3e-3

Every action has a --help of its own, and --json: the result as one JSON object, the last line of
stdout."""
ACTIONS = {
    "add": "write a checkpoint with experts for a domain",
    "remove": "write a checkpoint without the experts of a domain",
    "list": "say which domains have experts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in ACTIONS.items():
        action = actions.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        add_checkpoint(action)
        if name != "list":
            action.add_argument(
                "--domain", required=True, metavar="NAME", help="the domain of the experts"
            )
            action.add_argument(
                "--out", required=True, metavar="FOLDER", help="checkpoint folder to write, new"
            )
            action.add_argument(
                "--check",
                action="store_true",
                help="compare logits of other text with the checkpoint before; exit code 1 if they "
                "differ",
            )
        if name == "add":
            _add_new(action)
        add_json(action)


def _add_new(parser: argparse.ArgumentParser) -> None:
    """What new experts are."""
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="experts a layer (default: %(default)s)"
    )
    parser.add_argument(
        "--init",
        default="random",
        metavar="HOW",
        help="random, mean or nearest, as `emotrain experts --help` says (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="text of the domain for mean and nearest: a folder written by `emotrain prepare` (its "
        "training documents of the domain), or a JSONL file of documents",
    )
    add_documents(parser, 64, 0, "most documents of it to read")
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of random values and noise (default: that of the checkpoint's training)",
    )
    add_micro_batch(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        return _list(args)
    from emotrain.subsets.exclusive import add_experts, remove_experts
    from emotrain.subsets.usage import sources_of

    with ProgressBar("bytes") as bar:
        if args.action == "add":
            sources = partial(
                sources_of,
                args.init,
                args.count,
                args.checkpoint,
                args.calibration,
                args.domain,
                documents=args.documents,
                document_tokens=args.document_tokens,
                device=args.device,
                micro_batch=args.micro_batch,
                track=bar.track,
            )
            done = add_experts(
                args.checkpoint,
                args.out,
                args.domain,
                args.count,
                sources=sources,
                seed=args.seed,
                check=args.check,
                bar=bar,
            )
        else:
            done = remove_experts(args.checkpoint, args.out, args.domain, check=args.check, bar=bar)
    names = ", ".join(f"{count} of {name}" for name, count in done.exclusive) or "none"
    lines = [f"wrote {done.path}: {done.parameters:,} parameters, exclusive experts: {names}"]
    if done.max_difference is not None:
        lines.append(f"largest difference of a logit of other text: {done.max_difference:g}")
    result = {
        "out": str(done.path),
        "exclusive": dict(done.exclusive),
        "experts_per_layer": list(done.experts_per_layer),
        "parameters": done.parameters,
        "sources_per_layer": [[list(of) for of in layer] for layer in done.sources],
        "max_difference": done.max_difference,
    }
    finish(args, result, "\n".join(lines))
    return 1 if done.max_difference else 0


def _list(args: argparse.Namespace) -> int:
    from emotrain.model.subset import own_range
    from emotrain.training.checkpoint_folders import find, read_config

    folder = find(args.checkpoint)
    model = read_config(folder).model
    layers = range(model.num_layers)
    domains: dict[str, Any] = {
        name: {
            "count": count,
            "experts_per_layer": [
                list(own_range(model.experts.exclusive, model.routed_in_layer(layer), name))
                for layer in layers
            ],
        }
        for name, count in model.experts.exclusive
    }
    common = [model.common_in_layer(layer) for layer in layers]
    table = Table(
        f"exclusive experts of {folder}; {_numbers(common)} experts of a layer are common to all",
        ("domain", "experts a layer", "by number"),
        tuple(
            (
                name,
                str(of["count"]),
                _numbers([f"{own[0]}-{own[-1]}" for own in of["experts_per_layer"]]),
            )
            for name, of in domains.items()
        ),
        notes=1,
    )
    text = table.text() if domains else f"{folder}: has no exclusive experts"
    finish(args, {"checkpoint": str(folder), "common_per_layer": common, "domains": domains}, text)
    return 0


def _numbers(of_layers: list[Any]) -> str:
    """One number where layers are alike, else that of each."""
    words = list(map(str, of_layers))
    return words[0] if len(set(words)) == 1 else " ".join(words)
