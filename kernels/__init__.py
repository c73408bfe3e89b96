"""The operations that EMO spends its time in. One public function an operation; each runs on a
CPU."""

from emotrain.kernels.grouped_mlp import SortedSlots, grouped_mlp, sort_slots
from emotrain.kernels.linear_cross_entropy import linear_cross_entropy
from emotrain.kernels.permute import permute, unpermute
from emotrain.kernels.pool_routing import PoolRouting, pool_routing

__all__ = [
    "PoolRouting",
    "SortedSlots",
    "grouped_mlp",
    "linear_cross_entropy",
    "permute",
    "pool_routing",
    "sort_slots",
    "unpermute",
]
