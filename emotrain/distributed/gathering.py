"""Parameters of a model under FSDP2 for whoever runs its parts by themselves, without a backward
pass. A plain model's parameters are where they are; nothing here changes that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn

Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block, a module's own parameters (not those of FSDP modules inside of it) are
    together in this process, for other methods than `forward`, which gathers them by itself. All
    ranks enter and leave alike, the whole model before its parts.
    """
    for spread in _spread([module]):
        # The first module to run takes itself for the whole model.
        spread._get_fsdp_state()._lazy_init()
        spread.unshard()
    try:
        yield
    finally:
        for spread in _spread([module]):
            spread.reshard()


def gathered_for(items: Iterable[Item], *modules: nn.Module) -> Iterator[Item]:
    """The items; the modules are `gathered` from the first one to after the last."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(gathered(module))
        yield from items


def gathered_in_turn(modules: Iterable[Module]) -> Iterator[Module]:
    """The modules, each `gathered` until the next one is asked for."""
    for module in modules:
        with gathered(module):
            yield module


def let_go(model: nn.Module) -> None:
    """Free what forward passes have left gathered for a backward pass that does not follow. The
    head has run after each of them: what was asked for ahead must have arrived."""
    for spread in _spread(model.modules()):
        spread.reshard()


def _spread(modules: Iterable[nn.Module]) -> list[Any]:
    """Those that FSDP2 spreads over processes, without an import of it: it takes as long as a
    small evaluation, and most have a plain model."""
    return [module for module in modules if hasattr(module, "unshard")]
