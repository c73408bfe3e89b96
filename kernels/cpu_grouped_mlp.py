"""The routed experts by a kernel of our own for CPUs (cpu_grouped_mlp.cpp), where a C++ compiler is
installed.

Torch needs some twenty small operations an expert, each a pass over memory and a fork and join of
its threads: at a width of 128 half of the time. The kernel is one call forward and one backward. It
is compiled when the first call comes that is large enough to gain from it (a few seconds, once for
a machine), and loaded by ctypes: it knows nothing of torch but the addresses of tensors. Without
g++ everything runs in torch as before.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from emotrain.kernels.cpu_library import load

SOURCE = Path(__file__).with_suffix(".cpp")
WIDTH_MULTIPLE = 32
"""D and H must be multiples of the widest panel."""
CHUNK_ROWS = 512
"""Most rows of an expert that a thread takes at once: enough for its GEMMs, and few enough for a
cache of 1 to 2 MB at D = 128."""
WORTH_COMPILING = 2**24
"""Slots * D * H from which a call counts as large: some 5 ms of arithmetic forward and backward.
Below, torch is fast enough."""


def supports(x_TD: Tensor, weights_TK: Tensor, gate_up_NFD: Tensor, down_NHD: Tensor) -> bool:
    """Whether the kernel can compute these operands: float32 on a CPU, D and H multiples of 32."""
    hidden, width = down_NHD.shape[1:]
    tensors = (x_TD, gate_up_NFD, down_NHD)
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and weights_TK.device.type == "cpu"
        and width % WIDTH_MULTIPLE == 0
        and hidden % WIDTH_MULTIPLE == 0
    )


def can_run(x_TD: Tensor, weights_TK: Tensor, gate_up_NFD: Tensor, down_NHD: Tensor) -> bool:
    """Whether the kernel can compute these operands, and is there or can be compiled."""
    return supports(x_TD, weights_TK, gate_up_NFD, down_NHD) and library() is not None


def grouped_mlp_cpu(
    x_TD: Tensor,
    weights_TK: Tensor,
    token_R: Tensor,
    slot_R: Tensor,
    ends_N: Tensor,
    gate_up_NFD: Tensor,
    down_NHD: Tensor,
) -> Tensor:
    """`grouped_mlp` of what `supports` allows. The result does not depend on the number of
    threads, to the last bit."""
    return _FusedMLP.apply(
        x_TD, weights_TK.to(x_TD.dtype), gate_up_NFD, down_NHD, token_R, slot_R, ends_N
    )


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weights_TK, gate_up_NFD, down_NHD, token_R, slot_R, ends_N):
        operands = [
            tensor.contiguous()
            for tensor in (x_TD, weights_TK, token_R, slot_R, gate_up_NFD, down_NHD)
        ]
        lengths = ends_N.diff(prepend=ends_N.new_zeros(1)).tolist()
        chunks, rows = cut(lengths)
        sizes = (len(chunks), *x_TD.shape, down_NHD.shape[1], rows)
        hidden = x_TD.new_empty(sum(chunk[4] for chunk in chunks), gate_up_NFD.shape[1])
        y_TD, seen_T = torch.empty(x_TD.shape), torch.zeros(x_TD.shape[0], dtype=torch.uint8)
        chunks_P6 = run_chunks(operands, chunks, rows, hidden, y_TD, seen_T)
        ctx.save_for_backward(*operands, chunks_P6, hidden)
        ctx.sizes, ctx.idle = (
            sizes,
            [expert for expert, length in enumerate(lengths) if length == 0],
        )
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        *operands, chunks_P6, hidden = ctx.saved_tensors
        x_TD, weights_TK, _, _, gate_up_NFD, down_NHD = operands
        grad_x_TD, grad_weights_TK = torch.empty_like(x_TD), torch.zeros_like(weights_TK)
        grad_gate_up_NFD, grad_down_NHD = torch.empty_like(gate_up_NFD), torch.empty_like(down_NHD)
        _call(
            "backward",
            *operands,
            chunks_P6,
            *ctx.sizes,
            hidden,
            grad_TD.contiguous(),
            grad_x_TD,
            grad_weights_TK,
            grad_gate_up_NFD,
            grad_down_NHD,
            *_scratch(ctx.sizes),
        )
        for expert in ctx.idle:
            grad_gate_up_NFD[expert].zero_()
            grad_down_NHD[expert].zero_()
        return grad_x_TD, grad_weights_TK, grad_gate_up_NFD, grad_down_NHD, None, None, None


def run_chunks(
    operands: list[Tensor],
    chunks: list[tuple[int, ...]],
    rows: int,
    hidden: Tensor,
    y_TD: Tensor,
    seen_T: Tensor,
) -> Tensor:
    """Run experts forward, all of a call or, call after call in the order of the experts, some of
    them. Returns the chunks as the kernel reads them.

    Args:
        operands: contiguous x_TD, weights_TK, token_R, slot_R, gate_up_NFD and down_NHD; a chunk
            says which rows of the last two it uses.
        chunks, rows: see `cut`.
        hidden: what is before the activation, of all chunks.
        y_TD: output; rows of tokens without an expert so far are zero.
        seen_T: uint8, zeros before the first call: tokens that an expert has added to.
    """
    sizes = (len(chunks), *y_TD.shape, operands[5].shape[1], rows)
    chunks_P6 = torch.tensor(chunks, dtype=torch.int64)
    _call("forward", *operands, chunks_P6, *sizes, hidden, y_TD, seen_T, *_scratch(sizes))
    return chunks_P6


def _library() -> ctypes.CDLL:
    """The kernel, which `supports` has found before."""
    found = library()
    assert found is not None
    return found


def cut(lengths: list[int]) -> tuple[list[tuple[int, ...]], int]:
    """The kernel's `struct Chunk` of each chunk, and the most rows of any, whole tiles all.

    An expert's rows are cut into the fewest chunks of at most CHUNK_ROWS, of nearly equal size. The
    cuts depend on nothing else: neither does the order of any sum.
    """
    tile = _library().tile_rows()
    chunks: list[tuple[int, ...]] = []
    first, hidden_row, most = 0, 0, 0
    for expert, length in enumerate(lengths):
        count = -(-length // CHUNK_ROWS)
        for part in range(count):
            start, stop = length * part // count, length * (part + 1) // count
            padded = -(-(stop - start) // tile) * tile
            chunks.append((expert, first + start, stop - start, hidden_row, padded, part == 0))
            hidden_row, most = hidden_row + padded, max(most, padded)
        first += length
    return chunks, most


def _scratch(sizes: tuple[int, ...]) -> tuple[Tensor, int]:
    threads = torch.get_num_threads()
    return torch.empty(threads, _library().scratch_size(*map(ctypes.c_int64, sizes[2:]))), threads


def _call(function: str, *arguments: Tensor | int) -> None:
    """Call the kernel with the addresses of tensors and with integers; the GIL is released."""
    getattr(library(), function)(
        *(
            ctypes.c_void_p(argument.data_ptr())
            if isinstance(argument, Tensor)
            else ctypes.c_int64(argument)
            for argument in arguments
        )
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, and one line in the log, where it cannot be compiled or loaded."""
    loaded = load(SOURCE, "experts run in torch, at about half the speed")
    if loaded is None:
        return None
    loaded.scratch_size.restype = loaded.tile_rows.restype = ctypes.c_int64
    loaded.forward.restype = loaded.backward.restype = None
    return loaded
