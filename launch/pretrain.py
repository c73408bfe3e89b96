"""Pretrain a model under torchrun or deepspeed: `emotrain train` as a script.

torchrun --nproc-per-node 8 launch/pretrain.py CONFIG [key=value ...]
"""

import sys

from emotrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
