"""`emotrain export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_checkpoint, add_json, finish
from emotrain.errors import UserError

DESCRIPTION = """\
Write the model of a checkpoint as a Hugging Face folder: config.json, generation_config.json, the
tokenizer, safetensors files, and code with which transformers 5 loads it (trust_remote_code=True).
The checkpoint is verified first, and streamed: a model of any size, written by any number of
processes, passes through in little memory."""
EPILOG = """\
examples:
  emotrain export runs/quickstart --out exported --layout published
  emotrain export runs/quickstart --out exported-bf16 --layout clean --dtype bf16
  emotrain export --code-only Emo_1b14b_1T

--layout published has the names of the released models: a layer with 127 routed experts and 1
shared one has 128 `mlp.experts`, of which the shared one is the last, and as many rows of
`mlp.gate`. --layout clean has 127 of both and `mlp.shared_experts`, as transformers 5 and vLLM
expect; the router's row of the shared expert, which nothing depends on, is left out.
`emotrain import` reads both.

--code-only changes a folder that is there already, as one that was downloaded: the code that it
names may need a transformers of the past. Code files with names of their own are added, `auto_map`
in config.json names their classes, and config.original.json keeps what config.json was. Nothing
else changes, and the code that came with the folder stays in it, unused. To undo it, give
config.original.json its old name. The folder is checked before anything is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser, optional=True)
    parser.add_argument("--out", metavar="FOLDER", help="folder to make; it must not exist")
    parser.add_argument(
        "--layout", choices=("published", "clean"), help="names of the experts, see below"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="of the weights; bf16 rounds them (default: fp32)",
    )
    parser.add_argument(
        "--code-only",
        metavar="FOLDER",
        help="give a Hugging Face folder our code, in place; without CHECKPOINT, --out, --layout "
        "and --dtype",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    words = {
        "CHECKPOINT": args.checkpoint,
        "--out": args.out,
        "--layout": args.layout,
        "--dtype": args.dtype,
    }
    if args.code_only is not None:
        if given := [name for name, value in words.items() if value is not None]:
            raise UserError(
                f"--code-only changes FOLDER in place and takes no {given[0]}; leave that out"
            )
        return _swap_code(args)
    if missing := [name for name in list(words)[:3] if words[name] is None]:
        raise UserError(
            f"emotrain export: {', '.join(missing)} is missing; it needs CHECKPOINT, --out and "
            f"--layout, or --code-only FOLDER alone"
        )
    return _export(args)


def _swap_code(args: argparse.Namespace) -> int:
    from emotrain.interop.model_code import swap_code

    result = swap_code(args.code_only)
    kept = f"; {result.original_config} keeps the old one" if result.original_config else ""
    lines = [f"{result.folder}: config.json names {', '.join(result.code)}{kept}"]
    if result.unused_settings:
        lines.append(
            f"not used, and not known to have no effect: {', '.join(result.unused_settings)}"
        )
    finish(args, vars(result), "\n".join(lines))
    return 0


def _export(args: argparse.Namespace) -> int:
    from emotrain.interop.export_folder import export_checkpoint
    from emotrain.progress import ProgressBar

    with ProgressBar("bytes") as bar:
        result = export_checkpoint(
            args.checkpoint, args.out, args.layout, args.dtype or "fp32", bar
        )
    finish(
        args,
        {**vars(result), "files": {name: vars(entry) for name, entry in result.files.items()}},
        f"{result.folder}: {result.tensors:,} tensors in the {result.layout} layout, "
        f"{result.dtype}, {result.bytes / 1e6:,.1f} MB in {len(result.files)} files, from step "
        f"{result.step} of {result.checkpoint}",
    )
    return 0
