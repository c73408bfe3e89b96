"""What `emotrain coverage` says of a checkpoint or a run: JSON and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from emotrain.analysis.coverage import FORMAT, Coverage
from emotrain.analysis.coverage_numbers import LEVELS, SubsetOverlap, Together
from emotrain.analysis.coverage_steps import RunCoverage
from emotrain.analysis.together import by_chance, closest_partners, lift
from emotrain.evaluation.tables import plain
from emotrain.tables import Table

PARTNERS = 5
"""Most partners of an expert, and domains of a group, that are named."""


# ---- JSON


def coverage_json(run: RunCoverage) -> dict[str, Any]:
    """For `emotrain.files.json_text`. Matrices have the domains in the order of `domains`."""
    of = run.last
    return {
        "format": FORMAT,
        "checkpoint": of.checkpoint,
        "step": of.step,
        "data": of.data,
        "settings": dataclasses.asdict(of.settings),
        "layers": list(of.layers),
        "routed_experts_per_layer": list(of.routed_experts_per_layer),
        "domain_order": list(of.names),
        "domains": {name: _domain_json(of, j, name) for j, name in enumerate(of.names)},
        "domain_cosine": of.domain_cosine,
        "domain_cosine_per_layer": list(of.domain_cosine_per_layer),
        "cosine_matrix_per_layer": of.cosine_LJJ.tolist(),
        "subset_method": "router_once",
        "overlap": {keep: _overlap_json(overlap) for keep, overlap in of.overlap.items()},
        "together": [_together_json(of, bank) for bank in of.together],
        "steps": [dataclasses.asdict(step) for step in run.steps],
        "settled_step": run.settled_step if len(run.steps) > 1 else None,
        "skipped_checkpoints": list(run.skipped),
    }


def _domain_json(of: Coverage, j: int, name: str) -> dict[str, Any]:
    use = {
        measure: {
            scope: {
                key: value
                for number, table_JL in numbers.items()
                for key, value in (
                    (number, float(table_JL[j].mean())),
                    (f"{number}_per_layer", table_JL[j].tolist()),
                )
            }
            for scope, numbers in scopes.items()
        }
        for measure, scopes in of.use.items()
    }
    subsets = {
        keep: [np.flatnonzero(kept_JN[j]).tolist() for kept_JN in layers]
        for keep, layers in of.subsets.items()
    }
    return {"documents": of.documents[j], "tokens": of.tokens[j], **use, "subsets": subsets}


def _overlap_json(of: SubsetOverlap) -> dict[str, Any]:
    values = {**vars(of), "jaccard_matrix": of.jaccard.tolist()}
    del values["jaccard"]
    return values


def _together_json(of: Coverage, bank: Together) -> dict[str, Any]:
    lift_NN = lift(bank.counts_NN)
    return {
        "bank": bank.bank,
        "layers": list(bank.layers),
        "pool_experts": bank.pool_experts,
        "pools": bank.pools,
        "modularity": bank.modularity,
        "held_out_modularity": bank.held_out_modularity,
        "groups": [
            {
                "experts": members,
                "lift": _lift_inside(bank, members),
                "domains": [{"domain": name, "lift": value} for name, value in domains],
            }
            for members, domains in groups_of(of, bank)
        ],
        "experts_in_no_pool": np.flatnonzero(bank.group_N < 0).tolist(),
        "partners_per_expert": [
            [
                {
                    "expert": partner,
                    "lift": float(lift_NN[expert, partner]),
                    "pools": int(bank.counts_NN[expert, partner]),
                }
                for partner in partners
            ]
            for expert, partners in enumerate(closest_partners(bank.counts_NN, PARTNERS))
        ],
    }


def _lift_inside(bank: Together, members: list[int]) -> float | None:
    """Pairs of the group in pools, over those by chance."""
    inside = np.ix_(members, members)
    chance = by_chance(bank.counts_NN)[inside].sum()
    counts_NN = bank.counts_NN[inside]
    return float((counts_NN.sum() - counts_NN.trace()) / chance) if chance else None


def groups_of(of: Coverage, bank: Together) -> Iterator[tuple[list[int], list[tuple[str, float]]]]:
    """For each group its experts, and the domains whose pools hold more of it than those of all
    documents do: (name, how many times as much), the most first."""
    documents_J = np.array(of.documents)
    for group, share_J in enumerate(bank.group_share_JX.T):
        ratio_J = share_J * documents_J.sum() / max(share_J @ documents_J, 1e-30)
        order = np.argsort(-ratio_J, kind="stable")[:PARTNERS].tolist()
        domains = [(of.names[j], float(ratio_J[j])) for j in order if ratio_J[j] > 1]
        yield np.flatnonzero(bank.group_N == group).tolist(), domains


# ---- tables


def coverage_tables(run: RunCoverage) -> list[Table]:
    """What is printed; what sums it up comes last."""
    of = run.last
    tables = [domain_table(of), layer_table(of), together_table(of)]
    if len(run.steps) > 1:
        tables.append(step_table(run))
    return [*tables, overlap_table(of)]


def domain_table(of: Coverage) -> Table:
    """How many experts a document and a domain use, one line a domain."""
    document, domain = of.use["slots"]["document"], of.use["slots"]["domain"]
    columns = [
        document["used_experts"],
        *(document[f"carry_{level}_experts"] for level in LEVELS),
        document["effective_experts"],
        domain["used_experts"],
        domain["carry_90_experts"],
        domain["effective_experts"],
    ]
    rows = [
        (
            name,
            str(of.documents[j]),
            f"{of.tokens[j]:,}",
            *(plain(float(table_JL[j].mean()), 1) for table_JL in columns),
        )
        for j, name in enumerate(of.names)
    ]
    return Table(
        f"Routed experts of one document (doc) and of the whole domain, of {_experts(of)} in a "
        f"layer: chosen at all, carrying so many % of the routed slots, and effective (exp of the "
        f"entropy of the slots); mean over layers",
        (
            "domain",
            "docs",
            "tokens",
            "doc: used",
            *(f"{level} %" for level in LEVELS),
            "effective",
            "domain: used",
            "90 %",
            "effective",
        ),
        tuple(rows),
    )


def layer_table(of: Coverage) -> Table:
    """The same by layer, mean over domains, and how alike domains are."""
    document, domain = of.use["slots"]["document"], of.use["slots"]["domain"]
    cosines = of.domain_cosine_per_layer or [None] * len(of.layers)
    middle = _middle(of)
    overlap = of.overlap[middle]
    rows = [
        (
            str(layer),
            str(of.routed_experts_per_layer[i]),
            plain(float(document["used_experts"][:, i].mean()), 1),
            plain(float(document["carry_90_experts"][:, i].mean()), 1),
            plain(float(document["effective_experts"][:, i].mean()), 1),
            plain(float(domain["effective_experts"][:, i].mean()), 1),
            plain(cosines[i], 3),
            plain(overlap.between_per_layer[i], 3),
            plain(overlap.within_per_layer[i], 3),
            plain(overlap.chance_per_layer[i], 3),
        )
        for i, layer in enumerate(of.layers)
    ]
    return Table(
        f"By layer, mean over domains: routed experts as above; cosine of the mean routing of two "
        f"domains; Jaccard index of the experts that they keep ({float(middle):.3g} of the layer)",
        (
            "layer",
            "experts",
            "doc: used",
            "90 %",
            "effective",
            "domain: effective",
            "cosine",
            "two domains",
            "halves of one",
            "chance",
        ),
        tuple(rows),
    )


def overlap_table(of: Coverage) -> Table:
    """How far subsets overlap, one line a share kept."""
    rows = [
        (
            keep,
            _range(overlap.routed_kept_per_layer),
            plain(overlap.between, 3),
            plain(overlap.within, 3),
            f"{overlap.chance:.3f} ± {overlap.chance_deviation:.3f}",
        )
        for keep, overlap in of.overlap.items()
    ]
    return Table(
        "Experts that two domains both choose, of those that either does (Jaccard index, mean over "
        "pairs and layers); the same of two halves of one domain's documents; of two random "
        "subsets, ± standard deviation of one pair",
        ("kept", "routed", "two domains", "halves of one", "chance"),
        tuple(rows),
    )


def together_table(of: Coverage) -> Table:
    """How well experts fall into groups, one line a bank."""
    rows = [
        (
            _layers(bank),
            str(bank.pool_experts),
            " ".join(str(len(experts)) for experts, _ in groups_of(of, bank)),
            plain(bank.modularity, 3),
            plain(bank.held_out_modularity, 3),
        )
        for bank in of.together
    ]
    return Table(
        "Groups of experts that are in the same documents' pools: how many experts each has; "
        "modularity (pairs of one group in pools less those by chance, as a share of all pairs), "
        "and that of groups made by half of the documents, on the other half",
        ("layer", "pool", "groups", "modularity", "held out"),
        tuple(rows),
    )


def group_table(of: Coverage) -> Table:
    """Every group, its experts and its domains."""
    rows = []
    for bank in of.together:
        for group, (experts, domains) in enumerate(groups_of(of, bank)):
            rows.append(
                (
                    _layers(bank),
                    str(group),
                    plain(_lift_inside(bank, experts), 2),
                    " ".join(map(str, experts)),
                    ", ".join(f"{name} ×{value:.1f}" for name, value in domains),
                )
            )
    return Table(
        "Experts that go together: pools that hold two of a group, over those by chance, and the "
        "domains whose pools hold more of the group than the mean, how many times as much",
        ("layer", "group", "times chance", "experts", "domains"),
        tuple(rows),
        notes=2,
    )


def step_table(run: RunCoverage) -> Table:
    """The checkpoints of a run, beside the last one."""
    middle = _middle(run.last)
    rows = [
        (
            f"{step.step:,}",
            *(plain(value, 3) for value in step.subset_jaccard_mean.values()),
            plain(step.routing_cosine_mean, 3),
            plain(step.domain_cosine, 3),
            plain(step.between[middle], 3),
            plain(step.within[middle], 3),
            plain(step.document_effective_experts, 1),
            plain(step.domain_effective_experts, 1),
            plain(step.held_out_modularity, 3),
        )
        for step in run.steps
    ]
    settled = ", ".join(
        f"{float(keep):.3g}: {'only there' if step is None else step}"
        for keep, step in run.settled_step.items()
    )
    return Table(
        f"Steps. Same experts: Jaccard index of a domain's subset with that of the last step, by "
        f"share kept; its routing: cosine with that of the last step. Two domains, halves: as "
        f"below, with {float(middle):.3g} kept. Effective experts, modularity held out: as above. "
        f"Subsets are settled (as like the last as halves of documents are) from step: {settled}",
        (
            "step",
            *(f"same experts {float(keep):.3g}" for keep in run.last.overlap),
            "its routing",
            "cosine",
            "two domains",
            "halves of one",
            "doc: effective",
            "domain",
            "modularity",
        ),
        tuple(rows),
        names=0,
    )


def _middle(of: Coverage) -> str:
    """One share kept, where there is room for one."""
    return list(of.overlap)[len(of.overlap) // 2]


def _experts(of: Coverage) -> str:
    return _range(of.routed_experts_per_layer)


def _range(counts: tuple[int, ...]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _layers(bank: Together) -> str:
    first, last = bank.layers[0], bank.layers[-1]
    return str(first) if first == last else f"{first} to {last}"
