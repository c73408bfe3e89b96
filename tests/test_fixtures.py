"""Proves agreement with the reference: its worked example, a router's numbers and gradients, and
whole models in the published format. The values were computed once with the reference code; only
the first test needs no files."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import pools_of, route_all, tiny_config
from safetensors.torch import load_file
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import ModelConfig
from emotrain.interop.huggingface import load_huggingface
from emotrain.model.losses import router_loss
from emotrain.model.router import DocumentPoolRouter, draw_pool_sizes
from emotrain.model.transformer import Transformer

FOLDER = Path(
    os.environ.get("EMOTRAIN_FIXTURES", Path(__file__).resolve().parents[2] / "shared/fixtures")
)
MISSING = pytest.param(
    None, marks=pytest.mark.skip(reason=f"no fixtures in {FOLDER}; set EMOTRAIN_FIXTURES")
)


def found(pattern: str) -> list:
    return [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob(pattern))] or [MISSING]


def run_router(
    weight_ED: Tensor, x_TD: Tensor, document_BS: Tensor, per_token: int, shared: int, pool: int
) -> tuple[SimpleNamespace, tuple[Tensor, Tensor], DocumentPoolRouter]:
    """Route with a fixed pool; the routing, its balance and z-loss over this batch alone, and
    the router."""
    config: ModelConfig = tiny_config(
        model__d_model=x_TD.shape[1],
        model__num_heads=1,
        model__experts__routed=weight_ED.shape[0] - shared,
        model__experts__shared=shared,
        model__experts__top_k=per_token - shared,
        model__router__pool__kind="fixed",
        model__router__pool__size=pool,
        model__router__pool__allow_larger=True,
    ).model
    router = DocumentPoolRouter(config, layer=0)
    router.weight_ED.data.copy_(weight_ED)
    documents, document_BS = torch.unique(document_BS, return_inverse=True)
    batch = PackedBatch(document_BS, document_BS, document_BS, documents)
    sizes_LG = draw_pool_sizes(config.pool, documents, num_layers=1, seed=0, step=0)
    routing = route_all(router, x_TD, batch, sizes_LG[0])
    report = Transformer._report(batch, [routing])
    return routing, router_loss(report, [routing.counts_N], report.num_tokens), router


def test_worked_example() -> None:
    """Spec 2.10: two documents, pools {0,1,2} and {2,3,4}; losses there are divided by 4 tokens,
    ours by the 5 there are.

    Tokens 2 and 3 hold exact ties; we give them to the lower expert.
    """
    x_TD = torch.tensor(
        [
            [2, 1, 0, 0, -1, 9],
            [0, 2, 1, 0, -1, 9],
            [1, 0, 0, 3, 0, 9],
            [-1, 0, 2, 2, 1, 9],
            [0, 0, 0, 1, 4, 9],
        ]
    )
    routing, (balance, z), _ = run_router(
        torch.eye(6), x_TD.float(), torch.tensor([[0, 0, 1, 1, 1]]), per_token=3, shared=1, pool=3
    )
    expected = [
        [0.672458, 0.810193, 0.298053, 0.160318, 0.058978],
        [0.141425, 0.108343, 0.447029, 1.215157, 1.088046],
    ]
    torch.testing.assert_close(
        routing.document_scores_GN, torch.tensor(expected), atol=1e-6, rtol=0
    )
    weights = [
        [0.665241, 0.244728],
        [0.665241, 0.244728],
        [0.909443, 0.045279],
        [0.422319, 0.422319],
        [0.936240, 0.046613],
    ]
    torch.testing.assert_close(
        routing.weights_TK.detach(), torch.tensor(weights), atol=1e-6, rtol=0
    )
    chosen = [set(row) for row in routing.experts_TK.tolist()]
    assert chosen[:2] == [{0, 1}, {1, 2}] and chosen[3:] == [{2, 3}, {3, 4}]
    assert chosen[2] in ({3, 2}, {3, 4})
    if chosen[2] == {3, 2}:
        assert routing.counts_N.tolist() == [1, 2, 3, 3, 1]
    assert balance.item() * 5 / 4 == pytest.approx(1.288216, abs=1e-6)
    assert z.item() * 5 / 4 == pytest.approx(11.473527, abs=1e-5)


@pytest.mark.fixtures
@pytest.mark.parametrize("path", found("router_*.safetensors"))
def test_router(path: Path) -> None:
    """Weights, choices, counts, auxiliary loss and gradients of one layer, to 1e-5."""
    fixture = load_file(path)
    rows, length, width, num_experts, per_token, shared, pool = fixture["meta"].tolist()
    num_tokens, num_routed = rows * length, num_experts - shared
    x_TD = fixture["x"].reshape(num_tokens, width).requires_grad_()
    routing, (balance, z), router = run_router(
        fixture["router_weight"], x_TD, fixture["document_ids"], per_token, shared, pool
    )

    their_weights_TK = fixture["weights"].reshape(num_tokens, per_token)[:, : per_token - shared]
    their_experts_TK = fixture["indices"].reshape(num_tokens, per_token)[:, : per_token - shared]
    # Where a pool is smaller than the choices, the reference names experts outside it with weight
    # 0; ours are empty slots.
    their_experts_TK = torch.where(their_weights_TK > 0, their_experts_TK, num_routed)
    torch.testing.assert_close(
        *(w.sort(dim=1).values for w in (routing.weights_TK.detach(), their_weights_TK)),
        atol=1e-5,
        rtol=0,
    )
    differs_T = (routing.experts_TK.sort(dim=1).values != their_experts_TK.sort(dim=1).values).any(
        dim=1
    )
    assert not (differs_T & ~_has_tie(routing, their_experts_TK)).any(), (
        "choices differ where no probabilities are tied"
    )
    if differs_T.any():
        pytest.skip(
            "the reference broke a tie the other way: counts and gradients are those of another "
            "choice"
        )
    if (their_weights_TK > 0).all():
        assert routing.counts_N.tolist() == fixture["tokens_per_expert"][:num_routed].tolist()

    loss = 0.1 * balance + 0.001 * z
    torch.testing.assert_close(loss.detach(), fixture["aux_loss"].reshape(()), atol=1e-5, rtol=1e-5)
    cotangent_TN = torch.zeros(num_tokens, num_routed + 1).scatter_(
        1,
        their_experts_TK,
        fixture["cotangent"].reshape(num_tokens, per_token)[:, : per_token - shared],
    )
    (loss + (routing.weights_TK * cotangent_TN.gather(1, routing.experts_TK)).sum()).backward()
    torch.testing.assert_close(
        x_TD.grad, fixture["grad_x"].reshape(num_tokens, width), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        router.weight_ED.grad, fixture["grad_router_weight"], atol=1e-5, rtol=1e-5
    )


def _has_tie(routing: SimpleNamespace, their_experts_TK: Tensor) -> Tensor:
    """Tokens whose last choice and theirs have the same logit to rounding."""
    logits_TN = torch.nn.functional.pad(routing.logits_TN, (0, 1), value=-torch.inf)
    ours_TK, theirs_TK = (
        logits_TN.gather(1, experts_TK) for experts_TK in (routing.experts_TK, their_experts_TK)
    )
    return torch.isclose(ours_TK.amin(dim=1), theirs_TK.amin(dim=1), atol=1e-5, rtol=0)


@pytest.mark.fixtures
@pytest.mark.parametrize("folder", found("hf_*"))
def test_published_model(folder: Path) -> None:
    """Logits and router logits of a whole model in the published format, to 1e-4."""
    config, model = load_huggingface(folder)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        output = model(PackedBatch.from_rows(expected["input_ids"]), pools_of(None, details=True))
        logits_TV = model.logits(output)
    torch.testing.assert_close(
        logits_TV.view_as(expected["logits"]), expected["logits"], atol=1e-4, rtol=0
    )
    assert len(output.routing.layers) == config.num_layers
    for index, layer in enumerate(output.routing.layers):
        logits_TN = layer.details.logits_TN
        expected_TE = expected[f"router_logits.{index}"]
        assert expected_TE.shape[1] == config.experts_in_layer(index)
        torch.testing.assert_close(
            logits_TN, expected_TE[:, : logits_TN.shape[1]], atol=1e-4, rtol=0
        )
