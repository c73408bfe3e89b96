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
import math
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
    RoutingSummary,
    SubsetLosses,
)
from emotrain.evaluation.routing import (
    cosine_table,
    entropy_nats,
    mean_of_pairs,
    sum_by_group,
)
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

ArmLosses = dict[str, dict[Arm, Tensor | None]]
"""float64 [U] by share kept and arm: sum of each document's losses, the mean over the runs of an
arm; None without runs."""


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
    names, has_own = sorted(domains), dict(model.config.experts.exclusive)
    exclusive = [name if name in has_own else "" for name in names]

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
    each = [None, *(subsets for of_arm in runs.values() for subsets in of_arm)]
    documents = [domains[name].held_out for name in names]
    group_U, batches = group_of_each(documents), packed(documents, len(each))
    what = f"full model and {len(each) - 1} subsets"
    full, *others = losses_of_arms(
        model, batches, group_U, each, track, what, precision, rows_per_batch, ranks
    )
    rest = iter(others)
    losses = {key: _mean([next(rest).loss_U for _ in of_arm]) for key, of_arm in runs.items()}
    # Where nothing is left out, every arm is the full model, by definition and bit for bit.
    arms: ArmLosses = {
        keep: {
            arm: losses[keep, arm]
            if keep in sizes
            else (full.loss_U if _has_arm(arm, settings, len(names)) else None)
            for arm in ARMS
        }
        for keep in counts
    }
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
            if loss_U is None
            else mean_increase(loss_U - full.loss_U, full.targets_U, group_U)
            for arm, loss_U in by_arm.items()
        }
        for keep, by_arm in arms.items()
    }

    def table(value: Callable[[Tensor, Tensor], Tensor]) -> dict[str, ByArm]:
        return {
            keep: ByArm(
                **{arm: None if pair is None else _finite(value(*pair)) for arm, pair in of.items()}
            )
            for keep, of in increase.items()
        }

    def of_domain(j: int, name: str) -> DomainLosses:
        return DomainLosses(
            loss_nats=_finite(loss_J[j]),
            subset_loss_nats=table(lambda inc_J, _: loss_J[j] + inc_J[j]),
            increase_nats=table(lambda inc_J, _: inc_J[j]),
            standard_error_nats=table(lambda _, error_J: error_J[j]),
            documents=len(domains[name].held_out),
            targets=int(targets_J[j]),
            calibration_documents=len(domains[name].calibration),
        )

    mean = SubsetLosses(
        loss_nats=_finite(loss_J.mean()),
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


def routing_summary(full: DocumentLosses, group_U: Tensor, num_groups: int) -> RoutingSummary:
    """How far the domains part ways: cosine of their mean routing, and experts that one document
    spreads over."""
    cosines, effective = [], []
    for scores_UN in full.routing:
        effective.append(entropy_nats(scores_UN).exp().mean())
        if num_groups > 1:
            cosines.append(mean_of_pairs(cosine_table(sum_by_group(scores_UN, group_U))))
    return RoutingSummary(
        domain_cosine_per_layer=tuple(map(_finite, cosines)),
        domain_cosine=_finite(torch.stack(cosines).mean()) if cosines else None,
        effective_experts_per_layer=tuple(map(_finite, effective)),
        effective_experts=_finite(torch.stack(effective).mean()) if effective else None,
    )


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def group_of_each(documents: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """int64 [U]: the group of each document of all groups."""
    lengths = torch.tensor([len(group) for group in documents])
    return torch.repeat_interleave(torch.arange(len(documents)), lengths)


def with_own(subsets: Subsets, own: Subsets) -> Subsets:
    """Subsets with the exclusive experts of each domain, which are in all that it gets."""
    return tuple(a_JN | b_JN.to(a_JN.device) for a_JN, b_JN in zip(subsets, own, strict=True))


def _mean(runs: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(runs)).mean(dim=0) if runs else None


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
