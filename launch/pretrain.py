"""Pretrain a model under torchrun or deepspeed: `emotrain train` as a script.

torchrun --nproc-per-node 8 launch/pretrain.py CONFIG [key=value ...]
"""

import sys

from emotrain.cli import main
from emotrain.gpu_settings import compile_on_own_disk, let_memory_grow

if __name__ == "__main__":
    let_memory_grow()
    # Of one process too: a launcher starts it, perhaps beside those of other nodes.
    compile_on_own_disk()
    sys.exit(main(["train", *sys.argv[1:]]))
