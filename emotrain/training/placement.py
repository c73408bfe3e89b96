"""`parallel.placement=auto`: experts that tokens choose together move to one rank, where that pays.

At every multiple of `training.checkpoint_every` steps, the choices of that step alone decide, so
that a run that is stopped and goes on moves the same experts at the same steps. As in
`emotrain placement`, documents with even permanent ids place the experts and the others measure.

What a token costs is the rows that it sends and, for each of its K slots, how much longer the
others wait for the fullest rank of its exchange:

    cost = rows + K * load_max_over_mean

A row, four times between ranks, and the arithmetic of a slot take about as long: at width 2,048 and
experts of 1,024, at 300 GB/s and 400 TFLOP/s, 55 and 94 ns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from emotrain.batch import PackedBatch
from emotrain.config import Config
from emotrain.distributed.mesh import Layout
from emotrain.distributed.placement import place_experts
from emotrain.distributed.ranks import Ranks
from emotrain.model.report import RoutingReport
from emotrain.modular.placement import (
    Traffic,
    count_together,
    keep_ranks,
    order_of,
    place,
    rank_of,
    rows_and_slots,
    traffic_of,
)
from emotrain.training.checkpoint_folders import TrainingState
from emotrain.training.engine_protocol import Engine

MIN_FALL = 0.02
"""Of the rows of a token, that the cost must fall by before a bank moves: less is chance."""


@dataclass(frozen=True)
class Choices:
    """What the tokens of one step on this rank chose, without padding. Every step under `auto`
    reports its choices, though few are looked at: compiled blocks would else be compiled again."""

    layers: list[np.ndarray]
    """For each layer with routed experts int [T, K]; N marks an empty slot."""
    places_T: np.ndarray
    """bool, whether a token's document places the experts; else it measures."""
    exchange_T: np.ndarray
    """int64: the micro-batch of each token."""

    @classmethod
    def of(cls, reports: Sequence[RoutingReport], micro_batches: Sequence[PackedBatch]) -> Choices:
        ids = [b.document_ids_G[b.document_T].cpu().numpy() for b in micro_batches]
        ids_T = np.concatenate(ids)
        valid_T, exchange_T = ids_T >= 0, np.repeat(np.arange(len(ids)), [len(i) for i in ids])
        layers = []
        for parts in zip(*(report.layers for report in reports), strict=True):
            chosen = [part.chosen_TK for part in parts]
            layers.append(torch.cat(chosen).cpu().numpy()[valid_T])
        return cls(layers, ids_T[valid_T] % 2 == 0, exchange_T[valid_T])


def reconsider(
    config: Config,
    engine: Engine,
    state: TrainingState,
    reports: Sequence[RoutingReport],
    micro_batches: Sequence[PackedBatch],
    ranks: Ranks,
) -> tuple[TrainingState, dict[str, Any]]:
    """After a step, where `auto` looks: move the banks whose experts are better placed otherwise.
    All ranks call this alike.

    Returns:
        the state with the order that the experts are in now; and what to log: for each layer the
        rows a token and the load of the fullest rank of an exchange, before and after, and the
        experts that have changed their rank.
    """
    if config.parallel.placement != "auto" or state.step % config.training.checkpoint_every:
        return state, {}
    model, ep = config.model, config.parallel.ep
    layers = [i for i in range(model.num_layers) if model.routed_in_layer(i)]
    banks = [model.bank_of_layer(layer) for layer in layers]
    orders = state.placement or tuple(tuple(range(model.routed_in_layer(i))) for i in layers)
    now = [rank_of(np.array(order), ep) for order in orders]
    choices = Choices.of(reports, micro_batches)
    placed = _place(choices, now, banks, ep, ranks)
    then = [placed[bank] for bank in banks]
    before, after = (_measure(choices, rank_of_layer, ep, ranks) for rank_of_layer in (now, then))
    moved = [int((old != new).sum()) for old, new in zip(now, then, strict=True)]
    pays = _banks_that_pay(config, banks, before, after, moved, ranks)
    chosen = [bank in pays for bank in banks]
    orders = tuple(
        tuple(order_of(new).tolist()) if moves else order
        for order, new, moves in zip(orders, then, chosen, strict=True)
    )
    # What one rank found, so that no rounding of another makes the ranks differ.
    orders, chosen = ranks.gather((orders, chosen))[0]
    if any(chosen):
        place_experts(engine.model, orders, engine.optimizer)
        state = replace(state, placement=orders)
    kept = [b if not c else a for a, b, c in zip(after, before, chosen, strict=True)]
    return state, {
        "placement_rows_before": [t.rows_per_token for t in before],
        "placement_rows": [t.rows_per_token for t in kept],
        "placement_load_before": [t.exchange_load_max_over_mean for t in before],
        "placement_load": [t.exchange_load_max_over_mean for t in kept],
        "placement_moved_experts": [n * c for n, c in zip(moved, chosen, strict=True)],
    }


def _place(
    choices: Choices, now: list[np.ndarray], banks: list[int], ep: int, ranks: Ranks
) -> dict[int, np.ndarray]:
    """A placement of every bank, by the documents of all ranks that place. Ranks take the banks by
    turns: one of 127 experts takes a rank a few seconds."""
    counts = [
        count_together(chosen_TK[choices.places_T], len(rank_N))
        for chosen_TK, rank_N in zip(choices.layers, now, strict=True)
    ]
    flat = torch.from_numpy(np.concatenate([c.reshape(-1) for c in counts])).to(ranks.device)
    sums = np.split(ranks.sum(flat).cpu().numpy(), np.cumsum([c.size for c in counts])[:-1])
    together: dict[int, np.ndarray] = {}
    current = dict(zip(banks, now, strict=True))
    for bank, values, count in zip(banks, sums, counts, strict=True):
        together[bank] = together.get(bank, 0) + values.reshape(count.shape)
    mine = {
        bank: keep_ranks(place(counts_NN, ep), current[bank], ep)
        for index, (bank, counts_NN) in enumerate(together.items())
        if index % ranks.world_size == ranks.rank
    }
    return {bank: rank_N for part in ranks.gather(mine) for bank, rank_N in part.items()}


def _measure(
    choices: Choices, rank_of_layer: list[np.ndarray], ep: int, ranks: Ranks
) -> list[Traffic]:
    """What a placement costs the documents of all ranks that measure, for each layer."""
    measures_T = ~choices.places_T
    groups, exchanges = ranks.world_size // ep, int(choices.exchange_T.max(initial=0)) + 1
    found = np.zeros((len(rank_of_layer), 2 + groups * exchanges * ep))
    for row, chosen_TK, rank_N in zip(found, choices.layers, rank_of_layer, strict=True):
        rows, slots_XW = rows_and_slots(
            chosen_TK[measures_T], rank_N, ep, choices.exchange_T[measures_T], exchanges
        )
        row[:2] = rows, measures_T.sum()
        # The tokens of an exchange are those of neighbouring ranks, a micro-batch each.
        row[2:].reshape(groups, exchanges, ep)[ranks.rank // ep] = slots_XW
    found = ranks.sum(torch.from_numpy(found).to(ranks.device)).cpu().numpy()
    return [traffic_of(row[0], row[1], row[2:].reshape(-1, ep)) for row in found]


def _banks_that_pay(
    config: Config,
    banks: list[int],
    before: list[Traffic],
    after: list[Traffic],
    moved: list[int],
    ranks: Ranks,
) -> set[int]:
    """Banks whose cost falls by more than chance, and until the next look by more than the move
    takes: everything in rows."""
    model, setup = config.model, config.training
    row_bytes = 2 if setup.uses_bfloat16(ranks.device.type) else 4
    # Three matrices of an expert and two moments of each, in fp32, of which a rank holds a part;
    # a row goes four times.
    expert_dp = Layout.of(config, ranks.world_size).expert_dp
    expert_rows = 9 * model.experts.hidden * 4 / expert_dp / (4 * row_bytes)
    tokens = setup.checkpoint_every * config.tokens_per_step / ranks.world_size
    pays = set()
    for bank in set(banks):
        of_bank = [i for i, other in enumerate(banks) if other == bank]
        rows = sum(before[i].rows_per_token for i in of_bank)
        fall = rows - sum(after[i].rows_per_token for i in of_bank)
        slots = model.experts.top_k
        fall -= slots * sum(
            after[i].exchange_load_max_over_mean - before[i].exchange_load_max_over_mean
            for i in of_bank
        )
        price = moved[of_bank[0]] / config.parallel.ep * expert_rows
        if fall > MIN_FALL * rows and fall * tokens > price:
            pays.add(bank)
    return pays
