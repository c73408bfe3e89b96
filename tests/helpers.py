"""Small builders shared by the tests: configurations, batches and models that a CPU runs in
milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from emotrain.batch import PackedBatch
from emotrain.config import Config, ModelConfig, PoolConfig, RouterConfig, config_from_dict
from emotrain.data.packing import packed_rows
from emotrain.kernels import Decision
from emotrain.model.router import DocumentPoolRouter, LayerRequest, RoutingRequest, decide
from emotrain.model.transformer import Transformer

TINY: dict[str, Any] = {
    "model.vocab_size": 64,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.experts.routed": 8,
    "model.experts.shared": 1,
    "model.experts.top_k": 3,
    "model.experts.hidden": 8,
    "model.router.pool.min": 3,
    "model.router.pool.max": 0,
    "data.sequence_length": 16,
    "training.global_batch": 4,
    "training.micro_batch": 2,
}
"""8 routed experts, 3 chosen, 1 shared."""


def write(path: Path, text: str) -> Path:
    """A file of text, in a folder that is made."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def nested(key: str, value: Any) -> dict[str, Any]:
    """A setting by its dotted key as the nested groups of a file."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def refusal(settings: dict[str, Any]) -> str:
    """The line that refuses these settings."""
    with pytest.raises(ValueError) as caught:
        config_from_dict(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny_config(**overrides: Any) -> Config:
    """The tiny run; overrides name settings with `__` for the dot: `model__experts__routed=5`."""
    settings: dict[str, Any] = {}
    for key, value in {
        **TINY,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }.items():
        *parents, leaf = key.split(".")
        group = settings
        for parent in parents:
            group = group.setdefault(parent, {})
        group[leaf] = value
    return config_from_dict(settings)


def tiny_model(seed: int = 0, std: float = 0.3, **overrides: Any) -> Transformer:
    """A random tiny model. Its weights are larger than in training, so that routing is decided
    and differences show."""
    config: ModelConfig = tiny_config(**{"model__init_std": std, **overrides}).model
    return Transformer(config).initialize(seed)


def tiny_batch(
    lengths: Sequence[Sequence[int]] = ((5, 7, 4), (9, 7)),
    padded: bool = False,
    seed: int = 0,
    vocab: int = 64,
) -> PackedBatch:
    """Random tokens in documents of these lengths, with ids 100, 101, …; `padded` makes the last
    one padding."""
    ids = [
        [100 + sum(map(len, lengths[:row])) + i for i in range(len(of_row))]
        for row, of_row in enumerate(lengths)
    ]
    if padded:
        ids[-1][-1] = -1
    tokens = np.random.default_rng(seed).integers(0, vocab, (len(lengths), sum(lengths[0])))
    return packed_rows(tokens, lengths, ids, cross_document_targets=True)


def random_document_T(num_tokens: int, num_documents: int, seed: int) -> torch.Tensor:
    """Interleaved documents: every one has a token, in no order."""
    generator = torch.Generator().manual_seed(seed)
    document_T = torch.randint(num_documents, (num_tokens,), generator=generator)
    document_T[:num_documents] = torch.arange(num_documents)
    return document_T[torch.randperm(num_tokens, generator=generator)]


def decision_of(
    logits_TN: torch.Tensor,
    document_T: torch.Tensor,
    num_documents: int,
    num_chosen: int,
    pool_size_G: torch.Tensor | None = None,
    kept_GN: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
    gating: Literal["softmax", "sigmoid"] = "softmax",
    normalize: bool = False,
    backend: str = "auto",
    choice_bias_N: torch.Tensor | None = None,
) -> Decision:
    """`decide` on bare tensors. `valid_T` is False for all tokens of a document or for none."""
    ids_G = torch.arange(num_documents)
    if valid_T is not None:
        ids_G[document_T[~valid_T]] = -1
    batch = PackedBatch(*[document_T[None]] * 3, ids_G, has_padding=valid_T is not None)
    config = RouterConfig(gating=gating, normalize_weights=normalize)
    request = LayerRequest(None if pool_size_G is None else PoolConfig(), pool_size_G, kept_GN)
    return decide(logits_TN, batch, num_chosen, config, request, backend, choice_bias_N)


def route_all(
    router: DocumentPoolRouter,
    x_TD: torch.Tensor,
    batch: PackedBatch,
    pool_size_G: torch.Tensor | None = None,
    kept_GN: torch.Tensor | None = None,
    z_logits: str = "pool",
) -> SimpleNamespace:
    """A router's decision, statistics and details, as attributes of one object."""
    pool = None if pool_size_G is None else PoolConfig()
    request = LayerRequest(pool, pool_size_G, kept_GN, z_logits, details=True)
    decision, logits_TE = router(x_TD, batch, request)
    statistics = router.statistics(decision, logits_TE, batch, request)
    return SimpleNamespace(
        **vars(statistics),
        **vars(statistics.details),
        shared_weights_TM=router.shared_weights(logits_TE),
    )


def pools_of(
    sizes_LG: torch.Tensor | None, kept: Sequence[torch.Tensor] | None = None, details: bool = False
) -> RoutingRequest:
    """A request for pools of these sizes."""
    pool = None if sizes_LG is None else PoolConfig()
    return RoutingRequest(pool, sizes_LG, kept, details=details)
