"""How much a domain loses when it keeps only some of the experts: `emotrain evaluate`.

Three arms at every share of kept experts, all against the full model on the same held-out
documents:

    selected      the experts that a few training documents of the domain chose
                  (`emotrain.modular.select`)
    random        as many experts drawn at random: what any subset costs
    cross_domain  the experts that another domain chose: what the wrong subset costs

A modular model loses little with `selected` and much with the other two: the more alike the three,
the less modular.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, ModelConfig
from emotrain.distributed.agreement import of_first_rank
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import ALONE
from emotrain.errors import UserError
from emotrain.evaluation.perplexity import DocumentLosses, autocast, losses_of_arms, pack_groups
from emotrain.evaluation.plots import subset_figure
from emotrain.evaluation.reading import DomainDocuments, read_domains
from emotrain.evaluation.results import (
    ARMS,
    Arm,
    ByArm,
    DomainLosses,
    Evaluation,
    ExpertCounts,
    Measurement,
    SubsetLosses,
)
from emotrain.evaluation.routing import finite, routing_summary, sum_by_group
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.evaluation.tables import subset_csv, tables
from emotrain.files import json_text, make_writable, write_whole
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import counted_experts, experts_kept
from emotrain.modular.select import (
    Subsets,
    cross_domain,
    greedy_rankings,
    own_experts,
    random_select,
)
from emotrain.progress import Track, untracked
from emotrain.training.checkpoint import find, load_state
from emotrain.training.checkpoint_folders import read_config
from emotrain.training.spread_model import layout_of, load_to_predict

log = logging.getLogger("emotrain")

ArmLosses = dict[str, dict[Arm, tuple[Tensor, Tensor] | None]]
"""By share kept and arm, float64 [u] and int64 [u]: the sum of the losses of each document that the
arm was measured on, the mean over its runs, and the numbers of these documents among all; None
without runs."""


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[PackedBatch] = untracked,
    folder: Path | None = None,
    ranks: Ranks | None = None,
    layout: Sequence[str] = (),
) -> Evaluation:
    """Evaluate a checkpoint on the held-out documents of a prepared data set.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest).
        data: a folder written by `emotrain prepare`.
        device: `cpu`, `cuda` or `auto`.
        micro_batch: rows of one forward pass; 0 means as in training.
        folder: where results will be written, found out to be writable before the work.
        ranks: processes that evaluate together, each with a part of the model and some of the
            documents; by default this one alone, on `device`. All get the same result.
        layout: `parallel.*` settings that say how those share the model (`layout_of`).
    Raises:
        ValueError: settings, checkpoint or data that cannot be used; FileNotFoundError: one of them
            is not there. On all ranks.
    """
    settings = settings or EvaluationSettings()
    rows_of(micro_batch, 1)
    ranks = ranks or Ranks(device=choose_device(device))

    def read() -> tuple[Path, Config, dict[str, DomainDocuments]]:
        found = find(checkpoint)
        config = layout_of(read_config(found), layout)
        counts_of(settings, config.model)  # refuses shares before any data is read
        domains = read_domains(data, config, found, settings)
        if folder is not None:
            make_writable(folder)
        return found, config, domains

    checkpoint_folder, config, domains = of_first_rank(read, ranks)
    model = load_to_predict(checkpoint_folder, config, ranks)
    result = measure(
        model,
        domains,
        settings,
        config.data.sequence_length,
        rows_of(micro_batch, config.training.micro_batch),
        precision_on(config, ranks.device),
        track,
        ranks,
    )
    if result.mean.loss_nats is None and ranks.is_first:
        log.warning("%s: the losses of this model are not finite", checkpoint_folder)
    return Evaluation(
        **vars(result),
        checkpoint=str(checkpoint_folder),
        step=load_state(checkpoint_folder).step,
        data=str(data),
        sequence_length=config.data.sequence_length,
    )


@torch.no_grad()
def measure(
    model: Transformer,
    domains: Mapping[str, DomainDocuments],
    settings: EvaluationSettings,
    row_length: int,
    rows_per_batch: int,
    precision: torch.dtype | None = None,
    track: Track[PackedBatch] = untracked,
    ranks: Ranks = ALONE,
) -> Measurement:
    """Select experts for all domains and shares at once, and measure every arm in one pass; see
    `evaluate`."""
    names = sorted(domains)
    exclusive = exclusive_domains(names, model.config)

    def packed(documents: Sequence[Sequence[np.ndarray]], copies: int = 1) -> list[PackedBatch]:
        rows, mask = max(1, rows_per_batch // copies), model.config.attention.document_mask
        return pack_groups(documents, exclusive, row_length, rows, mask)

    counts = counts_of(settings, model.config)
    everything = counted_experts(model.config)
    sizes = {keep: kept for keep, kept in counts.items() if kept != everything}
    selected: dict[str, Subsets] = {}
    if sizes:
        documents = [domains[name].calibration for name in names]
        groups = group_of_each(documents), len(names), list(sizes.values())
        with autocast(model.head.weight.device, precision):
            found = greedy_rankings(model, packed(documents), *groups, track, exclusive, ranks)
        selected = {keep: subsets for keep, (subsets, _) in zip(sizes, found, strict=True)}
    own = own_experts(model.config, exclusive)
    runs = {
        (keep, arm): [with_own(subsets, own) for subsets in of_arm]
        for keep, kept in sizes.items()
        for arm, of_arm in _arms(model.config, selected[keep], kept, settings).items()
    }
    documents = [domains[name].held_out for name in names]
    fewer = [held_out[: settings.control_documents or None] for held_out in documents]
    index_u = _numbers_of_first(documents, fewer)
    together = len(index_u) == sum(map(len, documents))
    own_choice = {key: of for key, of in runs.items() if together or key[1] == "selected"}
    controls = {key: of for key, of in runs.items() if key not in own_choice}

    def losses_of(
        documents: Sequence[Sequence[np.ndarray]], each: Sequence[Subsets | None], what: str
    ) -> list[DocumentLosses]:
        group_U, batches = group_of_each(documents), packed(documents, len(each))
        return losses_of_arms(
            model, batches, group_U, each, track, what, precision, rows_per_batch, ranks
        )

    each = [None, *(subsets for of_arm in own_choice.values() for subsets in of_arm)]
    full, *others = losses_of(documents, each, f"full model and {len(each) - 1} subsets")
    whole_U = torch.arange(len(full.loss_U))
    losses = _by_run(own_choice, others, whole_U)
    if controls:
        each = [subsets for of_arm in controls.values() for subsets in of_arm]
        others = losses_of(fewer, each, f"{len(each)} subsets of the controls")
        losses |= _by_run(controls, others, index_u)
    arms = _table_of_arms(losses, full, counts, sizes, settings, len(names))
    group_U = group_of_each(documents)
    by_domain, mean = _summary(names, domains, full, arms, group_U)
    return Measurement(
        settings=dataclasses.replace(
            settings, keep=tuple(map(float, counts)), domains=tuple(names)
        ),
        experts=ExpertCounts(
            per_layer=tuple(map(model.config.experts_in_layer, range(model.config.num_layers))),
            shared=model.config.experts.shared,
            per_token=model.config.experts.top_k + model.config.experts.shared,
            kept_per_layer=counts,
        ),
        domains=by_domain,
        mean=mean,
        routing=routing_summary(full, group_U, len(names)),
    )


def counts_of(settings: EvaluationSettings, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Experts that each layer keeps at each share, the largest first. A dense model, too, keeps all
    of its own.

    Raises:
        UserError: a share that is none, or that a dense model cannot keep.
    """
    return {
        str(float(share)): counted_experts(model) if share == 1 else experts_kept(model, share)
        for share in sorted(set(settings.keep), reverse=True)
    }


def _arms(
    config: ModelConfig, selected: Subsets, kept: Sequence[int], settings: EvaluationSettings
) -> dict[Arm, list[Subsets]]:
    """The subsets of each arm that keep as many experts, one a run."""
    num_groups = len(selected[0])
    shifts = range(1, num_groups)[: 1 if settings.cross_domain == "next" else None]
    return {
        "selected": [selected],
        "random": [
            random_select(config, num_groups, kept, settings.seed + run)
            for run in range(settings.random_seeds)
        ],
        "cross_domain": [cross_domain(selected, shift) for shift in shifts],
    }


def _summary(
    names: Sequence[str],
    domains: Mapping[str, DomainDocuments],
    full: DocumentLosses,
    arms: ArmLosses,
    group_U: Tensor,
) -> tuple[dict[str, DomainLosses], SubsetLosses]:
    """Losses of each domain, and their unweighted mean over domains."""
    targets_J = sum_by_group(full.targets_U.double(), group_U)
    loss_J = sum_by_group(full.loss_U, group_U) / targets_J
    increase = {
        keep: {
            arm: None
            if found is None
            else mean_increase(
                found[0] - full.loss_U[found[1]], full.targets_U[found[1]], group_U[found[1]]
            )
            for arm, found in by_arm.items()
        }
        for keep, by_arm in arms.items()
    }

    def table(value: Callable[[Tensor, Tensor], Tensor]) -> dict[str, ByArm]:
        return {
            keep: ByArm(
                **{arm: None if pair is None else finite(value(*pair)) for arm, pair in of.items()}
            )
            for keep, of in increase.items()
        }

    def of_domain(j: int, name: str) -> DomainLosses:
        return DomainLosses(
            loss_nats=finite(loss_J[j]),
            subset_loss_nats=table(lambda inc_J, _: loss_J[j] + inc_J[j]),
            increase_nats=table(lambda inc_J, _: inc_J[j]),
            standard_error_nats=table(lambda _, error_J: error_J[j]),
            documents=len(domains[name].held_out),
            targets=int(targets_J[j]),
            calibration_documents=len(domains[name].calibration),
        )

    mean = SubsetLosses(
        loss_nats=finite(loss_J.mean()),
        subset_loss_nats=table(lambda inc_J, _: (loss_J + inc_J).mean()),
        increase_nats=table(lambda inc_J, _: inc_J.mean()),
        # Domains hold different documents, so their errors are independent.
        standard_error_nats=table(lambda _, error_J: error_J.square().sum().sqrt() / len(error_J)),
    )
    return {name: of_domain(j, name) for j, name in enumerate(names)}, mean


def mean_increase(change_U: Tensor, targets_U: Tensor, group_U: Tensor) -> tuple[Tensor, Tensor]:
    """Each group's increase in nats a token, and its standard error over documents, both float64
    [J].

    Documents, not tokens, are the independent draws. The increase is a ratio of two sums over them,
    whose error follows from the documents' residuals (the linearised ratio estimator).
    """
    targets_J = sum_by_group(targets_U.double(), group_U)
    documents_J = sum_by_group(torch.ones_like(change_U), group_U)
    increase_J = sum_by_group(change_U, group_U) / targets_J
    residual_U = change_U - increase_J[group_U] * targets_U
    error_J = (
        sum_by_group(residual_U.square(), group_U) * documents_J / (documents_J - 1)
    ).sqrt() / targets_J
    return increase_J, error_J


def exclusive_domains(names: Sequence[str], config: ModelConfig) -> list[str]:
    """Each domain's name where the model has exclusive experts for it, else empty."""
    has_own = dict(config.experts.exclusive)
    return [name if name in has_own else "" for name in names]


def group_of_each(documents: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """int64 [U]: the group of each document of all groups."""
    lengths = torch.tensor([len(group) for group in documents])
    return torch.repeat_interleave(torch.arange(len(documents)), lengths)


def with_own(subsets: Subsets, own: Subsets) -> Subsets:
    """Subsets with the exclusive experts of each domain, which are in all that it gets."""
    return tuple(a_JN | b_JN.to(a_JN.device) for a_JN, b_JN in zip(subsets, own, strict=True))


def _table_of_arms(
    losses: Mapping[tuple[str, Arm], tuple[Tensor, Tensor] | None],
    full: DocumentLosses,
    counts: Mapping[str, Sequence[int]],
    sizes: Mapping[str, Sequence[int]],
    settings: EvaluationSettings,
    num_groups: int,
) -> ArmLosses:
    """Where nothing is left out (`sizes` lacks the share), every arm is the full model, by
    definition and bit for bit."""
    everything = full.loss_U, torch.arange(len(full.loss_U))
    return {
        keep: {
            arm: losses[keep, arm]
            if keep in sizes
            else (everything if _has_arm(arm, settings, num_groups) else None)
            for arm in ARMS
        }
        for keep in counts
    }


def _numbers_of_first(
    groups: Sequence[Sequence[np.ndarray]], fewer: Sequence[Sequence[np.ndarray]]
) -> Tensor:
    """int64 [u]: the numbers of the first documents of each group among those of all groups."""
    ends = np.cumsum([len(group) for group in groups])
    starts = [int(end) - len(group) for end, group in zip(ends, groups, strict=True)]
    first = [torch.arange(len(few)) + start for start, few in zip(starts, fewer, strict=True)]
    return torch.cat(first)


def _by_run(
    runs: Mapping[tuple[str, Arm], Sequence[Subsets]],
    found: Sequence[DocumentLosses],
    index_u: Tensor,
) -> dict[tuple[str, Arm], tuple[Tensor, Tensor] | None]:
    """The mean over the runs of each share and arm, of losses that lie in the order of the runs."""
    rest = iter(found)
    losses = {key: [next(rest).loss_U for _ in of_arm] for key, of_arm in runs.items()}
    return {
        key: (torch.stack(of_arm).mean(dim=0), index_u) if of_arm else None
        for key, of_arm in losses.items()
    }


def _has_arm(arm: Arm, settings: EvaluationSettings, num_groups: int) -> bool:
    return {"selected": True, "random": settings.random_seeds > 0, "cross_domain": num_groups > 1}[
        arm
    ]


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda needs a GPU and a CUDA build of torch, none was found; use --device cpu"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def rows_of(micro_batch: int, of_training: int) -> int:
    """Rows of one forward pass: those asked for; for 0 those of training.

    Raises:
        UserError: fewer than 0.
    """
    if micro_batch < 0:
        raise UserError(
            f"micro_batch={micro_batch} must be a positive number of rows, or 0 for that of "
            f"training"
        )
    return micro_batch or of_training


def precision_on(config: Config, device: torch.device) -> torch.dtype | None:
    """The precision of training: bfloat16 by autocast, or None for fp32."""
    return torch.bfloat16 if config.training.uses_bfloat16(device.type) else None


def default_folder(checkpoint: Path, name: str = "evaluation") -> Path:
    """RUN_DIR/evaluation of a checkpoint in its run; beside a checkpoint that stands alone."""
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / name
    return checkpoint.with_name(f"{checkpoint.name}-{name}")


def write_results(result: Evaluation, folder: Path) -> list[Path]:
    """Write evaluation.json, evaluation.md, subsets.csv and, where matplotlib is installed, its
    picture subsets.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        write_whole(
            folder / "evaluation.json",
            (json_text(result.to_json(), indent=1, ensure_ascii=False) + "\n").encode(),
        ),
        write_whole(
            folder / "evaluation.md",
            "\n".join(table.markdown() for table in tables(result)).encode(),
        ),
        write_whole(folder / "subsets.csv", subset_csv([("", result)]).encode()),
    ]
    try:
        written.append(write_whole(folder / "subsets.png", subset_figure([("", result)])))
    except ModuleNotFoundError as error:
        # A picture from before would now stand beside other numbers.
        (folder / "subsets.png").unlink(missing_ok=True)
        log.warning("subsets.png was not drawn: %s", error)
    return written
