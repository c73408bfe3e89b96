"""Training some experts of a bank, and their rows of the router: the other rows stay as they are,
to the bit.

A tensor has its gradient as a whole. Frozen rows get a gradient of zero before it is measured and
clipped, and no moments, so that AdamW moves them by exactly zero. Weight decay would move them: the
tensor has none, and trained rows alone are decayed here, as AdamW does it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from emotrain.config import Config, ModelConfig
from emotrain.distributed.ranks import local_part, offsets_of
from emotrain.errors import UserError
from emotrain.model.parts import layer_of, part_of
from emotrain.model.subset import own_range
from emotrain.modular.artefact import read_subset


class TrainedRows:
    """Which rows of which parameters are trained. `experts` are those of each layer, by number."""

    def __init__(self, model: nn.Module, experts: Sequence[Sequence[int]], weight_decay: float):
        self.weight_decay = weight_decay
        self._frozen: dict[nn.Parameter, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and part_of(name) in ("routed", "router"):
                self._frozen[parameter] = _frozen_rows(parameter, experts[layer_of(name)])

    @classmethod
    def of(cls, model: nn.Module, config: Config) -> TrainedRows:
        """As `finetune.experts` says.

        Raises:
            UserError: experts that the model does not have.
        """
        experts = trained_experts(config.finetune.experts, config.model)
        return cls(model, experts, config.optimizer.weight_decay)

    def __contains__(self, parameter: object) -> bool:
        """Whether some rows of a parameter alone are trained."""
        return parameter in self._frozen

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """No gradient for frozen rows. After backward, before the norm is taken."""
        for parameter, frozen in self._frozen.items():
            if parameter.grad is not None:
                local_part(parameter.grad).masked_fill_(frozen, 0)

    @torch.no_grad()
    def decay(self, rate: float) -> None:
        """Weight decay of trained rows at a learning rate. Before the update."""
        if self.weight_decay:
            for parameter, frozen in self._frozen.items():
                factor = torch.full_like(frozen, 1 - rate * self.weight_decay, dtype=torch.float32)
                local_part(parameter).mul_(factor.masked_fill_(frozen, 1))

    @torch.no_grad()
    def clear_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """No moments of frozen rows, whatever a checkpoint had."""
        for parameter, frozen in self._frozen.items():
            for tensor in optimizer.state.get(parameter, {}).values():
                if tensor.ndim:
                    local_part(tensor).masked_fill_(frozen, 0)


def _frozen_rows(parameter: nn.Parameter, trained: Sequence[int]) -> Tensor:
    """bool [rows here, 1, …]: which of this process' rows are frozen."""
    local, first = local_part(parameter), offsets_of(parameter)[0]
    is_frozen = torch.ones(parameter.shape[0], dtype=torch.bool)
    is_frozen[list(trained)] = False
    here = is_frozen[first : first + local.shape[0]].to(local.device)
    return here.view(-1, *[1] * (local.ndim - 1))


def trained_experts(text: str, model: ModelConfig) -> list[tuple[int, ...]]:
    """The routed experts of each layer that `finetune.experts` names.

    Raises:
        UserError: not a file of `emotrain select`, one of another model, or numbers that some layer
            does not have.
    """
    layers = [model.routed_in_layer(layer) for layer in range(model.num_layers)]
    if not is_file(text):
        kind, _, rest = text.partition(":")
        if kind == "exclusive":
            return _of_domain(rest, layers, model, text)
        if kind == "last":
            return [_checked(range(n - int(rest), n), n, text, i) for i, n in enumerate(layers)]
        numbers = sorted({int(number) for number in text.split(",")})
        return [_checked(numbers, routed, text, i) for i, routed in enumerate(layers)]
    subset = read_subset(text)
    here = tuple(map(model.experts_in_layer, range(model.num_layers)))
    if subset.experts_per_layer != here or subset.num_shared_experts != model.experts.shared:
        raise UserError(
            f"finetune.experts={text} is of a model with {subset.experts_per_layer} experts a "
            f"layer, {subset.num_shared_experts} of them shared, this one has {here} and "
            f"{model.experts.shared}; give a subset of this model"
        )
    return [subset.routed(layer) for layer in range(model.num_layers)]


def is_file(text: str) -> bool:
    """Whether `finetune.experts` names a file, and not numbers, the last ones or a domain."""
    return re.fullmatch(r"last:\d+|exclusive:.*|\d+( *, *\d+)*", text) is None


def _of_domain(
    domain: str, layers: Sequence[int], model: ModelConfig, text: str
) -> list[tuple[int, ...]]:
    exclusive = model.experts.exclusive
    if domain not in dict(exclusive):
        raise UserError(
            f"finetune.experts={text}: the model has no exclusive experts for {domain!r}; it has "
            f"them for {', '.join(dict(exclusive)) or 'no domain'} (emotrain experts add)"
        )
    return [tuple(own_range(exclusive, routed, domain)) for routed in layers]


def _checked(numbers: Sequence[int], routed: int, text: str, layer: int) -> tuple[int, ...]:
    if not numbers or numbers[0] < 0 or numbers[-1] >= routed:
        raise UserError(
            f"finetune.experts={text}: layer {layer} has routed experts 0 to {routed - 1}; give "
            f"numbers of those, at least one, or a file of emotrain select"
        )
    return tuple(numbers)
