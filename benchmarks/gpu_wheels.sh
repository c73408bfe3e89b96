#!/usr/bin/env bash
# Fetch what benchmarks/gpu.py needs beyond torch, triton and numpy, on a machine with a network, into
# a folder that travels with the repository and is no part of it. 45 MB at most.
#
#     benchmarks/gpu_wheels.sh [FOLDER]          # .gpu_wheels by default
#     PYTHON=python3 PYTHON_VERSION=3.12         # pip of this Python fetches wheels for that one
set -euo pipefail

folder=${1:-"$(dirname "$0")/../.gpu_wheels"}
python=${PYTHON:-python3}
limit_mb=45

# Settings, progress and data of a run.
run=(omegaconf==2.4.0 pyyaml rich markdown-it-py mdurl pygments tokenizers==0.23.3 safetensors==0.8.0)
# The peer, transformers' OLMoE, and what it imports.
peer=(transformers==5.23.0 huggingface-hub httpx httpcore h11 anyio idna certifi fsspec filelock
  packaging regex tqdm typer click shellingham typing-extensions)

mkdir -p "$folder"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
  --python-version "${PYTHON_VERSION:-3.12}" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  "${run[@]}" "${peer[@]}"

bytes=$(cat "$folder"/*.whl | wc -c)
echo "$folder: $(ls "$folder"/*.whl | wc -l) wheels, $((bytes / 1000000)) MB"
if ((bytes > limit_mb * 1000000)); then
  echo "more than $limit_mb MB: too much to carry; leave the peer out of this script" >&2
  exit 1
fi
