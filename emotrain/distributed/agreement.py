"""One answer on all ranks: a check that fails on one of them ends all of them, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from emotrain.distributed.ranks import Ranks
from emotrain.errors import UserError

T = TypeVar("T")


def on_every_rank(check: Callable[[], T], ranks: Ranks) -> T:
    """The result of `check`, unless it failed on any rank: then all raise what the first of them
    met."""
    results: list[T] = []
    failure = None
    try:
        results.append(check())
    except (OSError, ValueError) as error:
        failure = str(error)
    if first := next(filter(None, ranks.gather(failure)), None):
        raise UserError(first)
    return results[0]


def of_first_rank(make: Callable[[], T], ranks: Ranks) -> T:
    """What `make` gives on the first rank, which alone calls it, on all of them; any that pickle
    takes. Where it fails there, all raise.

    Raises:
        UserError: the first of several ranks met an OSError or a ValueError; a process alone raises
            what it met.
    """
    if ranks.world_size == 1:
        return make()
    values: list[Any] = [None, None]
    if ranks.is_first:
        try:
            values[0] = make()
        except (OSError, ValueError) as error:
            values[1] = str(error) or type(error).__name__
    dist.broadcast_object_list(values, device=ranks.device)
    result, failure = values
    if failure:
        raise UserError(failure)
    return result
