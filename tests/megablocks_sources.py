"""Install the Python code of MegaBlocks and of its grouped GEMM, without their compiled operators,
for test_kernels_megablocks.py.

    python tests/megablocks_sources.py .megablocks && python -m pytest
    tests/test_kernels_megablocks.py

Both packages come as sources that ask for a GPU while they are set up. Here their build step
compiles nothing, and nothing they depend on is installed: their own requirements would replace
torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("megablocks==0.10.0", "stanford-stk==0.7.1", "grouped_gemm==0.3.0")
BUILD_NOTHING = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

class BuildNothing(build_ext):
    def run(self):
        pass

cpp_extension.BuildExtension = BuildNothing
cpp_extension.CUDAExtension = lambda name, *arguments, **options: Extension(name, [])
"""


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python tests/megablocks_sources.py FOLDER", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        # Python imports `sitecustomize` when it starts, also where pip starts it to build.
        (Path(folder) / "sitecustomize.py").write_text(BUILD_NOTHING, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": folder, "TORCH_CUDA_ARCH_LIST": "9.0"}
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-build-isolation",
            "--no-deps",
            "--target",
            sys.argv[1],
            *PACKAGES,
        ]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
