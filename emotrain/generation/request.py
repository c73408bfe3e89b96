"""What one sequence asks for: its prompt, how it goes on, and which experts it may use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from emotrain.config import ModelConfig
from emotrain.errors import UserError
from emotrain.generation.sampling import Sampling
from emotrain.modular.budget import read_keep


@dataclass(frozen=True)
class PoolOfText:
    """A pool of the text so far: the experts that it gives the most routing probability, chosen
    when the prompt is read, layer by layer, each with the layers below already in their pools. That
    is how training chooses a document's pool, and `emotrain select --method router` a subset."""

    sizes: tuple[int, ...]
    """Routed experts of each layer."""
    renew_every: int = 0
    """Generated tokens after which the pool is chosen anew; 0 keeps that of the prompt."""

    def __post_init__(self) -> None:
        if self.renew_every < 0:
            raise UserError(
                f"a pool that is renewed every {self.renew_every} tokens cannot be; give 1 or more"
            )


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and what to make of it."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    sampling: Sampling = field(default_factory=Sampling)
    subset: Sequence[Tensor] | None = None
    """For each layer bool [N], the routed experts that may be used; None for all."""
    pool: PoolOfText | None = None
    """Inside of the subset."""


def read_pool(experts: str, pool: str, config: ModelConfig) -> PoolOfText | None:
    """`--experts auto:32` and `--pool sticky:64`, either empty: how many experts, and after how
    many tokens they are chosen anew.

    Without a number of experts the pool is as large as training's: its size, or the middle between
    its smallest and largest, as the published code evaluates (spec 2.3d).

    Raises:
        UserError: neither form, or a number that the model cannot have.
    """
    renew_every = 0
    if pool:
        match = re.fullmatch(r"sticky:([1-9]\d{0,8})", pool)
        if match is None:
            raise UserError(
                f"--pool {pool}: give sticky and after how many tokens it is renewed: sticky:64"
            )
        renew_every = int(match[1])
    elif not experts:
        return None
    if not any(map(config.routed_in_layer, range(config.num_layers))):
        raise UserError("the model is dense: it has no experts to choose; leave out the option")
    if experts:
        match = re.fullmatch(r"auto:(.+)", experts)
        if match is None or "total" in experts:
            raise UserError(
                f"--experts {experts}: give auto and how many experts a layer keeps, shared ones "
                f"counted: auto:32, or a share, auto:0.25"
            )
        try:
            counts = read_keep(match[1], config).counts
        except UserError as error:
            raise UserError(str(error).replace("--keep ", "--experts auto:")) from None
        return PoolOfText(tuple(count - config.experts.shared for count in counts), renew_every)
    of_training = config.pool
    if of_training.kind == "none":
        raise UserError(
            f"--pool {pool}: the model was trained without a pool, whose size could be taken; give "
            f"one, for example --experts auto:0.25"
        )
    size = of_training.size
    if of_training.kind == "uniform":
        size = (of_training.min + of_training.max) // 2
    layers = range(config.num_layers)
    return PoolOfText(tuple(min(size, config.routed_in_layer(i)) for i in layers), renew_every)
