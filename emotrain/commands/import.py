"""`emotrain import`: a Hugging Face folder as a checkpoint."""

from __future__ import annotations

import argparse

from emotrain.commands.common import add_json, finish

DESCRIPTION = """\
Read a model in a Hugging Face format and write it as a checkpoint of step 0, which every other
command takes. The format is that of the released EMO models, or the clean one that `emotrain
export` writes. Weights are checked before anything is written, and streamed: a model of any size
passes through in little memory."""
EPILOG = """\
examples:
  emotrain import Emo_1b14b_1T --out checkpoints/emo-14b
  emotrain evaluate checkpoints/emo-14b --data DATA --out evaluation
  emotrain train checkpoints/emo-14b/config.yaml training.resume=checkpoints/emo-14b \\
    data.path=DATA training.run_dir=RUN training.tokens=1e9

The checkpoint has float32 weights, from float32 or bfloat16 ones without a loss. Its config.yaml
has no document pools, as the released code: training with pools wants
model.router.pool.kind=uniform. Rows of the vocabulary beyond config.json's vocab_size are padding
and are left out; rows that no token has are kept. Both are said. docs/interchange.md says more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="config.json and model.safetensors, or shards with model.safetensors.index.json",
    )
    parser.add_argument(
        "--out", required=True, metavar="CHECKPOINT", help="folder to make; it must not exist"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from emotrain.interop.import_folder import import_folder
    from emotrain.progress import ProgressBar

    with ProgressBar("bytes") as bar:
        result = import_folder(args.folder, args.out, bar)
    lines = [
        f"{result.checkpoint}: {result.parameters:,} parameters from {result.tensors:,} tensors "
        f"({', '.join(result.dtypes)}), {result.bytes / 1e6:,.1f} MB in {result.files} files"
    ]
    if result.dropped_vocab_rows:
        lines.append(
            f"vocabulary: {result.vocab_size:,} rows as in config.json; "
            f"{result.dropped_vocab_rows:,} more were padding and are left out"
        )
    if result.padded_vocab_rows:
        lines.append(
            f"vocabulary: {result.padded_vocab_rows:,} of {result.vocab_size:,} rows have no "
            f"token; they are kept, as in config.json"
        )
    if result.unused_settings:
        lines.append(
            f"not used, and not known to have no effect: {', '.join(result.unused_settings)}"
        )
    finish(args, vars(result), "\n".join(lines))
    return 0
