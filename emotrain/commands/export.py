"""`emotrain export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_checkpoint, add_json, finish

DESCRIPTION = """\
Write the model of a checkpoint as a Hugging Face folder: config.json, generation_config.json, the
tokenizer and safetensors files. The checkpoint is verified first, and streamed: a model of any
size, written by any number of processes, passes through in little memory."""
EPILOG = """\
examples:
  emotrain export runs/quickstart --out exported --layout published
  emotrain export runs/quickstart --out exported-bf16 --layout clean --dtype bf16

--layout published has the names of the released models: a layer with 127 routed experts and 1
shared one has 128 `mlp.experts`, of which the shared one is the last, and as many rows of
`mlp.gate`. --layout clean has 127 of both and `mlp.shared_experts`, as transformers 5 and vLLM
expect; the router's row of the shared expert, which nothing depends on, is left out.
`emotrain import` reads both."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    add_checkpoint(parser)
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder to make; it must not exist"
    )
    parser.add_argument(
        "--layout",
        required=True,
        choices=("published", "clean"),
        help="names of the experts, see below",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the weights; bf16 rounds them (default: %(default)s)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.interop.export_folder import export_checkpoint
    from emotrain.progress import ProgressBar

    with ProgressBar("bytes") as bar:
        result = export_checkpoint(args.checkpoint, args.out, args.layout, args.dtype, bar)
    finish(
        args,
        {**vars(result), "files": {name: vars(entry) for name, entry in result.files.items()}},
        f"{result.folder}: {result.tensors:,} tensors in the {result.layout} layout, "
        f"{result.dtype}, {result.bytes / 1e6:,.1f} MB in {len(result.files)} files, from step "
        f"{result.step} of {result.checkpoint}",
    )
    return 0
