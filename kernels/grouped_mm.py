"""The routed experts through torch's grouped GEMM: what runs on a GPU without Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels.slots import SortedSlots


def grouped_mm_mlp(
    x_TD: Tensor, weights_R: Tensor, slots: SortedSlots, gate_up_NFD: Tensor, down_NHD: Tensor
) -> Tensor:
    """The same through torch's grouped GEMM, without a host copy of the counts (CUDA, bfloat16)."""
    ends_N, token_R = slots.ends_N.to(torch.int32), slots.token_R[: slots.num_rows]
    # grouped_mm leaves the rows after the last group unwritten, in its result and in the gradient
    # of its input. Both ends are masked, so that whatever is there reaches neither a sum nor a
    # gradient, not even as 0 * inf.
    in_use_R = torch.arange(token_R.shape[0], device=x_TD.device) < ends_N[-1]
    x_RD = torch.where(in_use_R[:, None], x_TD[token_R], 0)
    hidden_RF = F.grouped_mm(x_RD, gate_up_NFD.transpose(1, 2), offs=ends_N)
    gate_RH, up_RH = hidden_RF.chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate_RH) * up_RH, down_NHD, offs=ends_N)
    y_RD = torch.where(in_use_R[:, None], y_RD, 0) * torch.where(in_use_R, weights_R, 0)[:, None]
    return torch.zeros_like(x_TD).index_add(0, token_R, y_RD)
