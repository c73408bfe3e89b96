"""The operations that EMO spends its time in. One public function an operation; each runs on a
CPU."""

from emotrain.kernels.decision import Decision
from emotrain.kernels.grouped_mlp import SortedSlots, grouped_mlp, sort_slots
from emotrain.kernels.linear_cross_entropy import linear_cross_entropy
from emotrain.kernels.permute import permute, unpermute

__all__ = [
    "Decision",
    "SortedSlots",
    "grouped_mlp",
    "linear_cross_entropy",
    "permute",
    "sort_slots",
    "unpermute",
]
