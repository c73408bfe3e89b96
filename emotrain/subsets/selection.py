"""A checkpoint and a few documents in, a subset of its experts out: `emotrain select`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.batch import PackedBatch
from emotrain.config import Config, ModelConfig
from emotrain.errors import UserError
from emotrain.evaluation.measure import choose_device, rows_of
from emotrain.evaluation.perplexity import pack
from emotrain.files import sha256_of
from emotrain.model.transformer import Transformer
from emotrain.modular.artefact import Calibration, Subset, kept_of
from emotrain.modular.budget import Budget, read_keep, read_memory, share_out
from emotrain.modular.scores import CRITERIA, collect_scores
from emotrain.modular.select import (
    Subsets,
    allowed_experts,
    best_experts,
    greedy_ranking,
    own_experts,
    random_select,
)
from emotrain.progress import Track, untracked
from emotrain.subsets.calibration import CalibrationText, read_calibration
from emotrain.subsets.fidelity import fidelity
from emotrain.training.checkpoint import find, load_model
from emotrain.training.checkpoint_folders import identity, read_config

METHODS = ("router", *CRITERIA, "random")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SelectSettings:
    """What to select."""

    keep: str = ""
    """See `emotrain.modular.budget.read_keep`."""
    memory: str = ""
    """See `read_memory`; instead of `keep`."""
    method: str = "router"
    domain: str = ""
    prompts: tuple[str, ...] = ()
    documents: int = 64
    """Most calibration documents."""
    document_tokens: int = 0
    """Tokens of a document that count, from its start; 0 for all."""
    precision: str = "fp32"
    """Of the weights while experts are scored; the published scripts use bf16."""
    seed: int = 0
    """Of `random`."""

    def __post_init__(self) -> None:
        if bool(self.keep) == bool(self.memory):
            raise UserError("say how many experts to keep, once: --keep 32 or --memory 4GB")
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("precision", self.precision, tuple(PRECISIONS)),
        ):
            if value not in choices:
                raise UserError(f"{name}={value} is not known; choose one of {', '.join(choices)}")


def select(
    checkpoint: str | Path,
    calibration: str | Path | None,
    settings: SelectSettings,
    *,
    device: str = "auto",
    micro_batch: int = 0,
    track: Track[Any] = untracked,
) -> Subset:
    """Choose the experts of a checkpoint that calibration text needs, and measure the choice on
    text that was held back.

    Args:
        checkpoint: a checkpoint folder, or a run folder (then its newest).
        calibration: see `read_calibration`; None with `settings.prompts`.
        micro_batch: rows of one forward pass; 0 means as in training.
    Raises:
        UserError: a checkpoint, text or budget that cannot be used.
    """
    folder, target = find(checkpoint), choose_device(device)
    config = read_config(folder)
    if config.model.experts.sharing != "none":
        raise UserError(
            f"{folder}: its layers share experts (model.experts.sharing="
            f"{config.model.experts.sharing}), of which a layer has no subset of its own"
        )
    rows = rows_of(micro_batch, config.training.micro_batch)
    budget = (
        read_keep(settings.keep, config.model)
        if settings.keep
        else read_memory(settings.memory, config.model)
    )
    domain = settings.domain if settings.domain in dict(config.model.experts.exclusive) else ""
    own = own_experts(config.model, [domain])
    text = read_calibration(
        calibration,
        settings.prompts,
        config,
        folder,
        settings.domain,
        settings.documents,
        settings.document_tokens,
    )

    def packed(documents: Sequence[Any]) -> list[PackedBatch]:
        length = min(config.data.sequence_length, max(map(len, documents)))
        batches = pack(documents, length, rows, config.model.attention.document_mask)
        return [replace(batch, domain=domain) for batch in batches]

    _, model = load_model(folder, target)
    model = model.to(PRECISIONS[settings.precision])
    kept, scores, passes = _choose(
        model, packed(text.choose), len(text.choose), budget, settings, own, track
    )
    measured = fidelity(model, packed(text.measure), kept, len(text.measure), text.held_back, track)
    return Subset(
        experts_kept_per_layer=tuple(
            kept_of(mask_N.nonzero()[:, 0].tolist(), len(mask_N), config.model.experts.shared)
            for mask_N in kept
        ),
        experts_per_layer=_experts_per_layer(config.model),
        num_shared_experts=config.model.experts.shared,
        method=settings.method,
        precision=settings.precision,
        budget=budget.text,
        checkpoint=str(folder),
        checkpoint_fingerprint=identity(folder),
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        calibration=provenance(text),
        scores_per_layer=tuple(tuple(score_N.tolist()) for score_N in scores),
        forward_passes=passes,
        seed=settings.seed,
        fidelity=measured,
    )


def _choose(
    model: Transformer,
    batches: Sequence[PackedBatch],
    num_documents: int,
    budget: Budget,
    settings: SelectSettings,
    own: Subsets,
    track: Track[Any],
) -> tuple[list[Tensor], list[Tensor], int]:
    """For each layer bool [N], the experts kept; their scores [N]; and the passes of the
    calibration text that it took."""
    config, passes = model.config, 0
    group_U = torch.zeros(num_documents, dtype=torch.int64)
    criterion = settings.method if settings.method in CRITERIA else "router_once"
    scores: list[Tensor] = []
    if settings.method in CRITERIA or budget.total:
        found = collect_scores(model, batches, group_U, 1, track)
        scores, passes = [layer[criterion][0] for layer in found], 1
    counts = budget.counts or share_out(budget.total, [s.numpy() for s in scores], config)
    _check_exclusive(counts, own, config)
    if settings.method == "random":
        drawn = [count - int(mask_JN.sum()) for count, mask_JN in zip(counts, own, strict=True)]
        masks = random_select(config, 1, drawn, settings.seed)
        return [(a_JN | b_JN)[0] for a_JN, b_JN in zip(masks, own, strict=True)], [], passes
    if settings.method == "router":
        domains = [batches[0].domain]
        masks, ranking = greedy_ranking(model, batches, group_U, 1, counts, track, domains)
        scores = [score_JN[0].cpu() for score_JN in ranking]
        return [mask_JN[0].cpu() for mask_JN in masks], scores, passes + 1
    shared = config.experts.shared
    kept = [
        best_experts(score_N[None], own_JN, count - shared)[0]
        for score_N, own_JN, count in zip(scores, own, counts, strict=True)
    ]
    return kept, scores, passes


def _check_exclusive(counts: Sequence[int], own: Subsets, config: ModelConfig) -> None:
    """Refuse counts that the exclusive experts of the text do not fit, or that reach for those of
    other domains."""
    for layer, (count, own_JN) in enumerate(zip(counts, own, strict=True)):
        num_own, shared = int(own_JN.sum()), config.experts.shared
        most = config.common_in_layer(layer) + num_own + shared
        least = min(most, num_own + shared + 1)
        if not least <= count <= most:
            raise UserError(
                f"layer {layer} cannot keep {count} experts for this text; keep {least} to {most}, "
                f"which counts {shared} shared and {num_own} exclusive ones (--domain says whose)"
            )


def tokenizer_fingerprint(checkpoint: Path) -> str:
    """sha256 of a checkpoint's tokenizer; empty without one."""
    file = checkpoint / "tokenizer.json"
    return sha256_of(file) if file.is_file() else ""


def provenance(text: CalibrationText) -> Calibration:
    """What is recorded of a text that chose."""
    return Calibration(text.source, text.domain, len(text.choose), text.tokens, text.fingerprint)


def _experts_per_layer(config: ModelConfig) -> tuple[int, ...]:
    return tuple(map(config.experts_in_layer, range(config.num_layers)))


def require_same_model(subset: Subset, folder: Path, config: Config) -> None:
    """Refuse a subset of another checkpoint.

    Raises:
        UserError: another model, weights or tokenizer.
    """
    if subset.experts_per_layer != _experts_per_layer(config.model) or (
        subset.num_shared_experts != config.model.experts.shared
    ):
        raise UserError(
            f"{folder}: has {_experts_per_layer(config.model)} experts a layer, the subset is of a "
            f"model with {subset.experts_per_layer}; give the checkpoint it was selected from, "
            f"{subset.checkpoint}"
        )
    for what, own, selected in (
        ("other weights", identity(folder), subset.checkpoint_fingerprint),
        ("another tokenizer", tokenizer_fingerprint(folder), subset.tokenizer_fingerprint),
    ):
        if own != selected:
            raise UserError(
                f"{folder}: has {what} than the checkpoint that the subset was selected from, "
                f"{subset.checkpoint}; give that one"
            )


def require_allowed(file: str, subset: Subset, domain: str, config: Config) -> None:
    """Refuse a subset that leaves a domain no expert in some layer: exclusive ones of another
    domain are none.

    Raises:
        UserError: it does; names `file`.
    """
    for layer, allowed_N in enumerate(allowed_experts(config.model, domain)):
        if len(allowed_N) and not allowed_N[list(subset.routed(layer))].any():
            raise UserError(
                f"{file}: layer {layer} keeps no expert that {domain} may use, only exclusive ones "
                f"of other domains; measure other subsets"
            )
