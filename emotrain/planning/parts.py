"""Names of what a plan adds up: parts of the model and kinds of memory. The phases of a step are
training's own (`emotrain.training.engine.Phase`)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from torch import nn

from emotrain.model.attention import Attention
from emotrain.model.moe import MoELayer, RoutedExperts, SharedExperts
from emotrain.model.router import DocumentPoolRouter
from emotrain.model.transformer import RMSNorm


class Part(StrEnum):
    """The part of the model that a kernel or a collective belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    NORMS = "norms"
    ROUTER = "router"
    DISPATCH = "dispatch"
    """What brings rows to their experts and back."""
    EXPERTS = "experts"
    """The routed ones."""
    SHARED_EXPERTS = "shared experts"
    HEAD = "head"
    """The output head, with the cross entropy."""
    PARAMETER_COPIES = "parameter copies"
    """FSDP2's copies into and out of the buffers of its collectives."""
    OTHER = "other"


PARTS: Mapping[type[nn.Module], Part] = {
    nn.Embedding: Part.EMBEDDING,
    Attention: Part.ATTENTION,
    RMSNorm: Part.NORMS,
    DocumentPoolRouter: Part.ROUTER,
    MoELayer: Part.DISPATCH,
    RoutedExperts: Part.EXPERTS,
    SharedExperts: Part.SHARED_EXPERTS,
}
"""Part by class of a module. A module of another class belongs to the part around it."""


class Memory(StrEnum):
    """What a piece of memory is for."""

    PARAMETERS = "parameters"
    OPTIMIZER_STATE = "optimizer state"
    GRADIENTS = "gradients"
    GATHERED = "gathered parameters"
    REDUCTION = "gradients in reduction"
    """Buffers of gradients on their way to their owners."""
    ACTIVATIONS = "activations"
    """Made by forward passes and losses."""
    BACKWARD = "backward"
    """Made by backward."""
    RECOMPUTED = "recomputed"
    """Activations that backward computes again."""
    OPTIMIZER = "optimizer"
    """Made by clipping and by the optimizer."""
    BATCHES = "batches"
