"""How much of what a small subset has lost comes back by tuning a little of it to the full model.

    python benchmarks/router_repair.py RUN --data data/sample --out runs/repair [--json]

For every domain: `emotrain select` keeps 6.25 % of the experts, `emotrain extract` takes them out,
and `emotrain finetune --teacher RUN` tunes a part of the subset for 50 steps on the domain's
training documents. Losses are those of held-out documents, in nats a token; recovered is the share
of what the extracted model has lost against the full one that tuning has won back. It may be more
than 1: the subset learns the domain, too. Of a subset that has lost no more than two standard
errors (over documents, of the difference) there is nothing to win back, and no share.

Every cell is a file in OUT: a run that was stopped goes on with the cells that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from emotrain.cli import main as emotrain
from emotrain.data.formats import Dataset
from emotrain.evaluation.perplexity import DocumentLosses, document_losses, pack
from emotrain.evaluation.reading import read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.files import json_text, write_whole
from emotrain.training.checkpoint import find, load_model


@dataclass(frozen=True)
class Arm:
    """A way to repair."""

    name: str
    train: str
    lr: float
    temperature: float = 1.0
    teacher_weight: float = 1.0
    method: str = "router"


ARMS = (
    Arm("router", "router", 1e-2),
    Arm("router, temperature 2", "router", 1e-2, temperature=2.0),
    Arm("router, half labels", "router", 1e-2, teacher_weight=0.5),
    Arm("router, labels", "router", 1e-2, teacher_weight=0.0),
    Arm("router, chosen once", "router", 1e-2, method="router_once"),
    Arm("router, norms", "router,norms", 1e-2),
    Arm("router, shared", "router,shared", 3e-3),
    Arm("router, routed, shared", "router,routed,shared", 3e-3),
)


@dataclass(frozen=True)
class Cell:
    """One domain, one arm: losses in nats a token."""

    domain: str
    arm: str
    experts_kept: int
    steps: int
    documents: int
    targets: int
    full_nats: float
    subset_nats: float
    repaired_nats: float
    lost_standard_error_nats: float
    """Of subset_nats - full_nats."""
    won_standard_error_nats: float
    """Of subset_nats - repaired_nats."""

    @property
    def lost(self) -> bool:
        """Whether the subset has lost more than chance explains."""
        return self.subset_nats - self.full_nats > 2 * self.lost_standard_error_nats

    @property
    def recovered(self) -> float | None:
        """Share of the loss that came back."""
        lost = self.subset_nats - self.full_nats
        return (self.subset_nats - self.repaired_nats) / lost if self.lost else None


def command(*words: object) -> None:
    """A command of emotrain, in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = emotrain([str(word) for word in words])
    if code:
        sys.exit(f"emotrain {' '.join(map(str, words))}: exit code {code}")


def loss_of(checkpoint: Path, data: Path, domain: str, args: argparse.Namespace) -> DocumentLosses:
    """The losses of a domain's held-out documents."""
    config, model = load_model(find(checkpoint))
    settings = EvaluationSettings(
        calibration_documents=1,
        documents=args.documents,
        document_tokens=args.document_tokens,
        domains=(domain,),
    )
    held_out = read_domains(data, config, find(checkpoint), settings)[domain].held_out
    batches = pack(held_out, config.data.sequence_length, 16, config.model.attention.document_mask)
    return document_losses(model, batches, torch.zeros(len(held_out), dtype=torch.int64))


def mean_of(losses: DocumentLosses) -> float:
    """Nats a token."""
    return float(losses.loss_U.sum() / losses.targets_U.sum())


def standard_error(one: DocumentLosses, other: DocumentLosses) -> float:
    """Of the difference of two means over the same documents, as a ratio of sums."""
    targets_U = one.targets_U.double()
    difference_U = one.loss_U.double() - other.loss_U.double()
    rest_U = difference_U - difference_U.sum() / targets_U.sum() * targets_U
    spread = rest_U.square().sum() * len(rest_U) / (len(rest_U) - 1)
    return float(spread.sqrt() / targets_U.sum())


def measure(arm: Arm, domain: str, args: argparse.Namespace) -> Cell:
    """Select, extract, tune, and take the losses."""
    run, data, out = Path(args.run), Path(args.data), Path(args.out)
    stem = f"{domain}-{arm.method}"
    subset, small = out / f"{stem}.json", out / f"{stem}-extracted"
    tuned = out / f"{domain}-{arm.name.replace(', ', '-').replace(' ', '-')}"
    if not (small / "manifest.json").is_file():
        subset.unlink(missing_ok=True)  # of a run that was stopped
        command("select", run, "--calibration", data, "--domain", domain, "--keep", args.keep,
                "--method", arm.method, "--documents", args.calibration_documents,
                "--document-tokens", args.document_tokens, "--out", subset)  # fmt: skip
        command("extract", run, subset, "--out", small)
    shutil.rmtree(tuned, ignore_errors=True)
    command("finetune", small, "--data", data, "--domain", domain, "--train", arm.train,
            "--teacher", run, "--temperature", arm.temperature, "--teacher-weight",
            arm.teacher_weight, "--steps", args.steps, "--out", tuned,
            f"optimizer.lr={arm.lr}", f"training.global_batch={args.batch}",
            f"training.micro_batch={args.batch}", "losses.balance=0.0",
            "training.tensorboard=false", f"training.run_dir={tuned}")  # fmt: skip
    full, before, after = (loss_of(place, data, domain, args) for place in (run, small, tuned))
    shutil.rmtree(tuned)
    kept = len(json.loads(subset.read_text())["experts_kept_per_layer"][0])
    return Cell(
        domain, arm.name, kept, args.steps, len(full.loss_U), int(full.targets_U.sum()),
        mean_of(full), mean_of(before), mean_of(after),
        standard_error(before, full), standard_error(before, after),
    )  # fmt: skip


def cell_of(arm: Arm, domain: str, args: argparse.Namespace) -> Cell:
    """From its file, or measured into it."""
    file = Path(args.out) / f"{domain}-{arm.name.replace(', ', '-').replace(' ', '-')}.cell.json"
    if file.is_file():
        return Cell(**json.loads(file.read_text()))
    cell = measure(arm, domain, args)
    write_whole(file, json_text(asdict(cell), indent=1).encode())
    share = "nothing to win back" if cell.recovered is None else f"recovered {cell.recovered:.0%}"
    print(f"{domain}, {arm.name}: full {cell.full_nats:.3f}, subset {cell.subset_nats:.3f} "
          f"(± {cell.lost_standard_error_nats:.3f}), repaired {cell.repaired_nats:.3f}, {share}",
          file=sys.stderr)  # fmt: skip
    return cell


def summary(arm: Arm, cells: Sequence[Cell]) -> dict:
    """An arm over its domains; the mean is of the losses, each domain with the same weight."""
    full, subset, repaired = (
        sum(getattr(cell, f"{name}_nats") for cell in cells) / len(cells)
        for name in ("full", "subset", "repaired")
    )
    return {
        **asdict(arm),
        "domains": len(cells),
        "full_nats": full,
        "subset_nats": subset,
        "repaired_nats": repaired,
        "recovered": (subset - repaired) / (subset - full),
        "domains_that_lost": sum(cell.lost for cell in cells),
        "domains_recovering_a_third": sum((cell.recovered or 0) >= 1 / 3 for cell in cells),
        "cells": [asdict(cell) | {"recovered": cell.recovered} for cell in cells],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run or checkpoint of the full model")
    parser.add_argument("--data", required=True, help="folder of emotrain prepare")
    parser.add_argument("--out", required=True, help="folder of the cells")
    parser.add_argument("--keep", default="0.0625", help="as of emotrain select")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--domains", nargs="*", default=[], help="default: all")
    parser.add_argument(
        "--arms", nargs="*", default=[], choices=[arm.name for arm in ARMS], help="default: all"
    )
    parser.add_argument("--documents", type=int, default=64, help="held-out ones a domain")
    parser.add_argument("--calibration-documents", type=int, default=16)
    parser.add_argument("--document-tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    domains = args.domains or sorted(Dataset(args.data).domains["valid"])
    arms = [arm for arm in ARMS if arm.name in args.arms or not args.arms]
    found = [summary(arm, [cell_of(arm, domain, args) for domain in domains]) for arm in arms]
    if args.json:
        print(json_text({"run": str(args.run), "keep": args.keep, "arms": found}))
        return
    print(
        f"{'arm':28} {'full':>7} {'subset':>7} {'repaired':>8} {'recovered':>9}  "
        "domains ≥ 1/3, of those that lost"
    )
    for arm in found:
        print(f"{arm['name']:28} {arm['full_nats']:7.3f} {arm['subset_nats']:7.3f} "
              f"{arm['repaired_nats']:8.3f} {arm['recovered']:9.0%}  "
              f"{arm['domains_recovering_a_third']} of {arm['domains_that_lost']}")  # fmt: skip


if __name__ == "__main__":
    main()
