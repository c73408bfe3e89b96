"""A bank of routed experts that are in memory as far as they are used: it takes the place of
`RoutedExperts` in a model, and computes the same to the bit."""

from __future__ import annotations

from torch import Tensor, nn

from emotrain.config import ModelConfig
from emotrain.kernels import SortedSlots
from emotrain.kernels.paged_mlp import PagedMLP
from emotrain.model.moe import RoutedExperts
from emotrain.model.transformer import Transformer
from emotrain.modular.expert_store import ExpertReadError, ExpertStore


class LazyExperts(RoutedExperts):
    """Experts of one bank, held in a store while they run. Forward only: it has no parameters."""

    def __init__(self, store: ExpertStore, bank: int, config: ModelConfig):
        """
        Args:
            bank: key of the bank in the store.
        """
        nn.Module.__init__(self)  # without the parameters of a bank
        self.store, self.bank, self.backend = store, bank, config.experts.backend

    def forward(self, x_TD: Tensor, weights_TK: Tensor, slots: SortedSlots) -> Tensor:
        """Weighted sum of each token's routed experts -> [T, D].

        Where a step needs more experts than the store holds, it runs in several passes.

        Raises:
            ExpertReadError: an expert that tokens are routed to cannot be read; says which tokens.
        """
        store = self.store
        call = PagedMLP(x_TD, weights_TK, slots, store.gate_up_XFD, store.down_XHD, self.backend)
        starts = range(0, len(call.experts), store.slots)
        for start in starts:
            experts = call.experts[start : start + store.slots]
            try:
                with store.hold(self.bank, experts) as slot_of:
                    call.add(slot_of)
            except ExpertReadError as error:
                first, end = ([0, *slots.ends_N.tolist()][error.expert + at] for at in (0, 1))
                error.tokens = tuple(slots.token_R[first:end].tolist())
                raise
        return call.y_TD


def store_of(model: Transformer) -> ExpertStore | None:
    """The store that a model's experts are in; None where they are loaded."""
    banks = (bank for bank in model.expert_banks() if isinstance(bank, LazyExperts))
    return next((bank.store for bank in banks), None)
