"""The routed experts where only some are in memory at a time: `grouped_mlp` in several passes, to
the bit.

Weights lie in slots, in no order. An expert computes the same wherever it lies, and outputs are
added in the order of the experts' numbers, whichever of them a pass brings: the sums are those of
`grouped_mlp` over a whole bank. Forward only, on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emotrain.kernels import cpu_grouped_mlp
from emotrain.kernels.backends import choose_backend
from emotrain.kernels.grouped_mlp import add_expert, is_compiled, rows_by_expert
from emotrain.kernels.slots import SortedSlots


class PagedMLP:
    """One call of the experts, pass by pass; `y_TD` is its result once every expert of `experts`
    has been added.

        call = PagedMLP(x_TD, weights_TK, sorted_slots, gate_up_XFD, down_XHD)
        for some in batched(call.experts, slots_in_memory):
            call.add({expert: slot for ... in some})
        call.y_TD
    """

    def __init__(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        slots: SortedSlots,
        gate_up_XFD: Tensor,
        down_XHD: Tensor,
        backend: str = "auto",
    ):
        """
        Args:
            x_TD, weights_TK, slots, backend: as for `grouped_mlp`.
            gate_up_XFD, down_XHD: the memory that experts come to, a slot a row; where it is of
                another dtype than `x_TD`, an expert is converted when it is used.
        """
        num_experts = len(slots.ends_N)
        chosen = choose_backend(backend, x_TD, num_experts, has_megablocks=True)
        assert chosen == "torch" and x_TD.device.type == "cpu"
        lengths = slots.ends_N.diff(prepend=slots.ends_N.new_zeros(1)).tolist()
        self.experts = [expert for expert, length in enumerate(lengths) if length]
        """Numbers of the experts that have tokens, ascending."""
        self._x_TD, self._banks = x_TD, (gate_up_XFD, down_XHD)
        self._compiled = backend == "auto" and is_compiled(x_TD, weights_TK, gate_up_XFD, down_XHD)
        if self._compiled:
            self.y_TD = torch.empty(x_TD.shape)
            operands = (x_TD, weights_TK.to(x_TD.dtype), slots.token_R, slots.slot_R)
            self._operands = [tensor.contiguous() for tensor in (*operands, *self._banks)]
            self._chunks, self._rows = cpu_grouped_mlp.cut(lengths)
            self._seen_T = torch.zeros(x_TD.shape[0], dtype=torch.uint8)
            padded = sum(chunk[4] for chunk in self._chunks)
            self._hidden = x_TD.new_empty(padded, gate_up_XFD.shape[1])
            if not self.experts:
                self.y_TD.zero_()
        else:
            self.y_TD = torch.zeros_like(x_TD)
            token_R = slots.token_R[: slots.num_rows]
            weights_R = weights_TK.reshape(-1)[slots.slot_R[: slots.num_rows]].to(x_TD.dtype)
            hidden_RF = x_TD.new_empty(token_R.shape[0], gate_up_XFD.shape[1])
            in_use = [lengths[expert] for expert in self.experts]
            rows = rows_by_expert(in_use, token_R, weights_R[:, None], hidden_RF)
            self._rows_of = dict(zip(self.experts, zip(*rows, strict=True), strict=True))

    def add(self, slot_of: Mapping[int, int]) -> None:
        """Run experts that are in memory.

        Args:
            slot_of: the slot of each, ascending; all of them come after those of earlier calls.
        """
        if self._compiled:
            chunks = [
                (slot_of[expert], *rest) for expert, *rest in self._chunks if expert in slot_of
            ]
            cpu_grouped_mlp.run_chunks(
                self._operands, chunks, self._rows, self._hidden, self.y_TD, self._seen_T
            )
            return
        for expert, slot in slot_of.items():
            weights = (bank_XYD[slot].to(self._x_TD.dtype) for bank_XYD in self._banks)
            add_expert(self.y_TD, self._x_TD, *self._rows_of[expert], *weights)
