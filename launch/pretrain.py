"""Pretrain a model under torchrun or deepspeed: `emotrain train` as a script.

torchrun --nproc-per-node 8 launch/pretrain.py CONFIG [key=value ...]
"""

import os
import sys
import tempfile

# Before torch is imported, which reads it then. Expert parallelism asks for buffers of another size
# in every layer and step: in segments that cannot grow, the memory between them is lost.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# On the node's own disk: processes of many nodes that compile into one shared home wait for it.
os.environ.setdefault(
    "TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}")
)

from emotrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
