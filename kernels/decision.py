"""What routing decides: the type that the router and its kernels share, and the operators whose
results recomputation keeps. It imports nothing of emotrain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("emotrain", "DEF")
_LIBRARY.define("decided(Tensor decision) -> Tensor")
_LIBRARY.impl("decided", torch.clone, "CompositeExplicitAutograd")
# Its kernel is in triton_routing.py; its name is here, so that who keeps its results needs no
# Triton.
_LIBRARY.define(
    "route(Tensor logits, Tensor document, Tensor? pool, Tensor? valid, Tensor? bias, "
    "int num_chosen) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

decided: Any = torch.ops.emotrain.decided.default
"""Marks integers or bools as a routing decision: a copy of them, and, where backward computes a
block again, the copy of the first pass. By whatever operators a rule decides, and whatever rounding
does to its scores the second time, its answer is that of the first."""

ROUTING_DECISIONS = {decided, torch.ops.emotrain.route.default}
"""The operators whose results recomputation keeps; without gradient."""

TRITON_POOLS = ("none", "fixed", "uniform")
"""Kinds of pools that triton_routing.py draws. A kind that is not listed runs in PyTorch, so that a
new one can never train as another on a GPU."""

TRITON_GATINGS = ("softmax",)
"""Gatings that triton_routing.py computes."""


@dataclass(frozen=True)
class Decision:
    """Which experts each token uses, and what the router's losses and readers need to know of
    it."""

    probabilities_TN: Tensor
    """Probabilities inside the document's pool, 0 outside it. With gradient."""
    weights_TK: Tensor
    """Routing weight of each slot, 0 in empty ones. With gradient: it carries the task loss to the
    router."""
    experts_TK: Tensor
    """int64 routed expert of each slot, best first; N marks an empty slot."""
    lse_T: Tensor
    """logsumexp of the logits inside the pool. With gradient."""
    counts_N: Tensor
    """int64 slots that went to each expert."""
    scores_GN: Tensor
    """Sum over each document's tokens of the probabilities before a pool was drawn; without a drawn
    pool, over its valid tokens."""
    pool_GN: Tensor | None
    """bool, the experts that each document may use; None where it may use all."""
