"""What a forward pass returns, and says of its routing: numbers an expert and a document for losses
and metrics, and token by token only where they were asked for; and what losses add up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutingDetails:
    """Everything about one layer's routing, token by token. Only on request: it is larger than the
    activations of the layer."""

    logits_TN: Tensor
    """Router logits before any mask, without gradient."""
    weights_TK: Tensor
    """Routing weight of each slot, 0 in empty ones."""
    experts_TK: Tensor
    """int64 routed expert of each slot; N marks an empty slot."""
    document_scores_GN: Tensor
    """Sum over each document's tokens of the probabilities before a pool was drawn: what the pool
    is chosen by, and what selection, coverage and clustering read."""


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's routing of a micro-batch in numbers an expert [N] and a document [G], over the
    valid (not padding) tokens."""

    counts_N: Tensor
    """int64 slots that went to each routed expert."""
    probability_sum_N: Tensor
    """Sum over tokens of the routing probabilities among the experts whose load is balanced, which
    sum to 1 a token. With gradient."""
    z_sum: Tensor
    """Sum over tokens of logsumexp(logits)^2, with gradient."""
    entropy_sum: Tensor
    """Sum over tokens of the entropy of the routing probabilities, in nats."""
    effective_experts_G: Tensor
    """exp(entropy of a document's mean routing before a pool was drawn), for each document."""
    pool_size_G: Tensor | None
    """int64 pool size of each document; None without drawn sizes."""
    bank: int
    """The bank of routed experts that the layer uses: load is balanced over a bank."""
    details: RoutingDetails | None
    """Token by token, where the request asked for it."""
    chosen_TK: Tensor | None
    """int32: the routed experts of each token, where the request asked for choices."""
    choice_bias_spread: Tensor | None = None
    """The largest bias of an expert less the smallest, where the router has biases."""


@dataclass(frozen=True)
class RoutingReport:
    """What every reader of routing gets: the layers' statistics, and what they are over."""

    layers: tuple[LayerStatistics, ...]
    """One entry a layer with routed experts, in order."""
    num_tokens: Tensor
    """int64 scalar: valid tokens of the batch."""
    document_tokens_G: Tensor
    """int64 tokens of each document."""
    real_G: Tensor
    """bool, False for the pseudo-document of padding."""


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns. Logits are not among it: losses form them block by block
    (`Transformer.logits`)."""

    hidden_TD: Tensor
    """Normed final hidden states."""
    routing: RoutingReport
    """The routing of every layer."""


@dataclass(frozen=True)
class LossSums:
    """Sums over the tokens of one micro-batch; `lm` carries the gradient of the language-model
    terms."""

    lm: Tensor
    """Cross entropy plus its weighted z-loss."""
    cross_entropy: Tensor
    """Cross entropy in nats, without gradient."""
    z: Tensor
    """Squared log-normaliser of the logits, without gradient."""
    num_targets: Tensor
    """int64: positions with a loss."""
    by_source: Tensor | None = None
    """Of a mixture: see `source_losses`."""
