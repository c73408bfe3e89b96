"""What torch and Triton read of a process' environment before a run on a GPU. Nothing here imports
them; whoever has set a variable is obeyed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping


def let_memory_grow(environ: MutableMapping[str, str] = os.environ) -> None:
    """Segments of torch's allocator that can grow. Expert parallelism asks for buffers of another
    size in every layer and step: in segments that cannot, the memory between them is lost. Call it
    before torch is imported, which reads this then."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in environ:
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def compile_on_own_disk(environ: MutableMapping[str, str] = os.environ) -> None:
    """Triton's kernels on the node's own disk: processes of many nodes that compile into one shared
    home wait for it."""
    folder = os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}")
    environ.setdefault("TRITON_CACHE_DIR", folder)


def set_up(environ: MutableMapping[str, str] = os.environ) -> None:
    """Both, before a run. One process alone keeps the kernels where Triton does: in its home, where
    the next run finds them after a restart of the machine too."""
    let_memory_grow(environ)
    if environ.get("WORLD_SIZE", "1") != "1":
        compile_on_own_disk(environ)
