"""Few tokens through a layer by a kernel of our own for CPUs (cpu_rows.cpp): what a step of
generation computes.

In torch a layer is some forty small operations, whose overhead is most of the time of a token; here
it is four calls. And a token is the same to the last bit in every batch: its sums have an order of
their own, which a matrix product does not promise. The readable twin of the whole is
`emotrain.generation.forward`, which computes the same with the modules of the model. Compiled when
first used; without g++ there is the twin alone. Forward only.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from emotrain.kernels.cpu_library import load

SOURCE = Path(__file__).with_suffix(".cpp")
WORTH_A_THREAD = 1 << 16
"""Numbers of weights from which a second thread is worth its start."""

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "linear": [*[_POINTER] * 3, *[_INT] * 4],
    "attend": [*[_POINTER] * 17, ctypes.c_float, _INT],
    "route": [_POINTER, _INT, *[_POINTER] * 5, *[_INT] * 5],
    "experts": [*[_POINTER] * 7, *[_INT] * 6],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, and one line in the log, where it cannot be compiled or loaded."""
    loaded = load(SOURCE, "tokens are generated in torch, more slowly")
    if loaded is None:
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def can_run(*tensors: Tensor) -> bool:
    """Whether the kernel is there, or can be compiled, and reads these tensors: contiguous, float32
    and on a CPU."""
    return (
        all(
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
            for tensor in tensors
        )
        and library() is not None
    )


def linear(x_TX: Tensor, weight_YX: Tensor) -> Tensor:
    """x @ weight.T -> [T, Y]."""
    y_TY = x_TX.new_empty(x_TX.shape[0], weight_YX.shape[0])
    _library().linear(
        x_TX.data_ptr(),
        weight_YX.data_ptr(),
        y_TY.data_ptr(),
        *x_TX.shape,
        weight_YX.shape[0],
        _threads(weight_YX.numel()),
    )
    return y_TY


class Attend:
    """The first half of a block, of a model whose sizes are given once:

    x += attention(norm(x)); normed = moe_norm(x); logits = normed @ router.T
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, page: int, eps: float):
        self.heads, self.kv_heads, self.head_dim, self.page = heads, kv_heads, head_dim, page
        self.eps = eps

    def __call__(
        self,
        x_TD: Tensor,
        weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
        angles: tuple[Tensor, Tensor],
        store: Tensor,
        tokens: tuple[Tensor, Tensor, Tensor],
        pages_BX: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Changes `x_TD` in place, and writes keys and values of the tokens to the cache. Returns
        normed [T, D] and logits [T, E].

        Args:
            weights: norm [D], qkv, out, norm of the experts [D], and the router [E, D] (None: no
                logits).
            angles: cos and sin of every position, [S, C / 2].
            store: [pages, page, 2 * kv_heads, C].
            tokens: int64 [T] each: position; row of the cache; sequence, which is a row of
                `pages_BX`, int64.
        """
        norm_D, qkv, out, moe_norm_D, router_ED = weights
        num_tokens, width = x_TD.shape
        num_experts = 0 if router_ED is None else router_ED.shape[0]
        normed_TD = torch.empty_like(x_TD)
        logits_TE = x_TD.new_empty(num_tokens, num_experts)
        scratch = x_TD.new_empty(num_tokens, qkv.shape[0] + self.heads * self.head_dim)
        shape = (_INT * 8)(
            num_tokens,
            width,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.page,
            pages_BX.shape[1],
            num_experts,
        )
        _library().attend(
            x_TD.data_ptr(),
            norm_D.data_ptr(),
            qkv.data_ptr(),
            out.data_ptr(),
            moe_norm_D.data_ptr(),
            None if router_ED is None else router_ED.data_ptr(),
            *(part.data_ptr() for part in (*angles, store, *tokens, pages_BX)),
            normed_TD.data_ptr(),
            logits_TE.data_ptr(),
            scratch.data_ptr(),
            ctypes.addressof(shape),
            self.eps,
            _threads(qkv.numel() * num_tokens),
        )
        return normed_TD, logits_TE


def route(
    logits_TE: Tensor,
    sizes: tuple[int, int],
    rules: tuple[bool, bool],
    mask_BN: Tensor | None,
    seats_T: Tensor,
    choice_bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`emotrain.model.router.route` of the first N logits of each token -> weights and experts
    [T, K]. Of equal experts the one of lower number is chosen.

    Args:
        sizes: N and K.
        rules: whether gates are sigmoids (else softmax), and whether weights are normalised.
        mask_BN: 0, or -inf where a seat may not use an expert; None: all may use all.
        seats_T: int64, the row of the mask.
        choice_bias_N: added to probabilities where experts are chosen, and nowhere else.
    """
    num_routed, num_chosen = sizes
    num_tokens, num_experts = logits_TE.shape
    weights_TK = logits_TE.new_empty(num_tokens, num_chosen)
    experts_TK = torch.empty(num_tokens, num_chosen, dtype=torch.int64)
    _library().route(
        logits_TE.data_ptr(),
        num_experts,
        None if mask_BN is None else mask_BN.data_ptr(),
        seats_T.data_ptr(),
        None if choice_bias_N is None else choice_bias_N.data_ptr(),
        weights_TK.data_ptr(),
        experts_TK.data_ptr(),
        num_tokens,
        num_routed,
        num_chosen,
        *rules,
    )
    return weights_TK, experts_TK


def add_experts(
    y_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor | None,
    experts_TK: Tensor | None,
    gate_up_XFD: Tensor,
    down_XHD: Tensor,
    place_N: Tensor | None = None,
) -> None:
    """Add to each token its experts' outputs, in the order of the experts' numbers: y += sum of
    weight * SwiGLU (spec 3.2).

    Args:
        weights_TK: float32; None for 1 each.
        experts_TK: int64, N or more for an empty slot; None: every token uses all experts.
        gate_up_XFD, down_XHD: as of `grouped_mlp`; expert n lies in row `place_N[n]`, in row n
            without.
        place_N: int64; -1 leaves an expert out.
    """
    rows, hidden, width = down_XHD.shape
    num_experts = rows if place_N is None else place_N.shape[0]
    chosen = rows if experts_TK is None else experts_TK.shape[1]
    _library().experts(
        x_TD.data_ptr(),
        None if weights_TK is None else weights_TK.data_ptr(),
        None if experts_TK is None else experts_TK.data_ptr(),
        None if place_N is None else place_N.data_ptr(),
        gate_up_XFD.data_ptr(),
        down_XHD.data_ptr(),
        y_TD.data_ptr(),
        x_TD.shape[0],
        chosen,
        num_experts,
        width,
        hidden,
        _threads(3 * hidden * width * chosen * x_TD.shape[0]),
    )


def _library() -> ctypes.CDLL:
    """The kernel, which `can_run` has found before."""
    found = library()
    assert found is not None
    return found


def _threads(work: int) -> int:
    """Threads for a call of so many multiplications. How many changes no bit of the result."""
    return max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD))
