"""`emotrain extract`: a checkpoint with only the experts of a subset."""

from __future__ import annotations

import argparse
from typing import Any

from emotrain.commands.common import add_checkpoint, add_json, finish
from emotrain.errors import UserError
from emotrain.progress import ProgressBar

DESCRIPTION = """\
Write a checkpoint that has only the experts of a subset, and everything else of the model. It is a
checkpoint like any other: it can be evaluated, trained on and exported. Only what is kept is read,
so that the command needs the memory of the small model. Or write it as a Hugging Face folder."""
EPILOG = """\
examples:
  emotrain select runs/quickstart --calibration data/sample --domain rust --keep 8 --out rust.json
  emotrain extract runs/quickstart rust.json --out runs/rust --check
  emotrain extract runs/quickstart rust.json --out rust-hf --format huggingface --dtype bf16

--check compares logits of the new model with those of the full one whose other experts are left
out, on a few tokens: on a CPU they are equal to the last bit. It loads the full model.

--format huggingface writes a Hugging Face folder instead, as `emotrain export` does of the
checkpoint: --layout and --dtype are as there (default: clean, fp32). The checkpoint lies beside it
while the command runs. `emotrain import` makes one of the folder again.

Experts get new numbers, 0 and up, in the order of the old ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser, "the one the subset was selected from: ")
    parser.add_argument("subset", metavar="SUBSET", help="file written by `emotrain select`")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write, a new one")
    parser.add_argument(
        "--format",
        choices=("checkpoint", "huggingface"),
        default="checkpoint",
        help="what to write: a checkpoint, or a Hugging Face folder (default: %(default)s)",
    )
    parser.add_argument(
        "--layout",
        choices=("published", "clean"),
        help="of a Hugging Face folder: names of the experts (default: clean)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="of its weights; bf16 rounds them (default: fp32)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with the full model; exit code 1 if they differ",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.subsets.extraction import extract, extract_folder

    layout: Any = args.layout or "clean"
    dtype = args.dtype or "fp32"
    folder = args.format == "huggingface"
    if not folder and (args.layout or args.dtype):
        raise UserError(
            f"--{'layout' if args.layout else 'dtype'} is of a Hugging Face folder; add --format "
            f"huggingface, or leave it out"
        )
    with ProgressBar("tensors") as bar:
        words = (args.checkpoint, args.subset, args.out)
        done = (
            extract_folder(*words, layout, dtype, check=args.check, track=bar.track)
            if folder
            else extract(*words, check=args.check, track=bar.track)
        )
    share = done.parameters / done.full_parameters
    of_all = f"{share:.1%} of {done.full_parameters:,}"
    kind = f", a Hugging Face folder ({layout}, {dtype})" if folder else ""
    lines = [f"wrote {done.path}: {done.parameters:,} parameters, {of_all}{kind}"]
    if done.max_difference is not None:
        lines.append(
            f"largest difference of a logit from the masked full model: {done.max_difference:g}"
        )
    finish(
        args,
        {
            "out": str(done.path),
            "format": args.format,
            "layout": layout if folder else None,
            "dtype": dtype if folder else "fp32",
            "parameters": done.parameters,
            "full_parameters": done.full_parameters,
            "experts_per_layer": list(done.experts_per_layer),
            "max_difference": done.max_difference,
        },
        "\n".join(lines),
    )
    return 1 if done.max_difference else 0
