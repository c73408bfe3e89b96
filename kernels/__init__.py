"""The operations that EMO spends its time in. One public function an operation; each runs on a
CPU."""

from emotrain.kernels.decision import Decision
from emotrain.kernels.grouped_mlp import grouped_mlp
from emotrain.kernels.linear_cross_entropy import HeadGradient, OfBlock, linear_cross_entropy
from emotrain.kernels.permute import permute, unpermute
from emotrain.kernels.rowwise import rms_norm, rotate_heads, swiglu_down
from emotrain.kernels.slots import SortedSlots, sort_slots

__all__ = [
    "Decision",
    "HeadGradient",
    "OfBlock",
    "SortedSlots",
    "grouped_mlp",
    "linear_cross_entropy",
    "permute",
    "rms_norm",
    "rotate_heads",
    "sort_slots",
    "swiglu_down",
    "unpermute",
]
