"""What an evaluation of expert subsets costs, in forward passes of the full model.

    emotrain prepare sample --out data/sample --train-tokenizer --vocab-size 4096
    python benchmarks/evaluate.py --data data/sample [--json]

It runs the evaluation of the quickstart, counts the multiplications and additions of every matrix
product while it runs, and divides them by those of one forward pass of the full model, head
included, over the same held-out documents: `forward_equivalents`. Padding counts where it is
computed. `before` gives each arm a pass of its own, and each share a selection. Weights are the
initial ones, which the counts do not depend on. Nothing is timed.

The terms say what is left to save. From the first experts on, the hidden states of a document
differ from subset to subset, so that no other layer and no head of an arm can be shared with
another: `least_forward_equivalents` is what remains when arms and shares find all outputs of the
first layer's experts computed. `half_controls_forward_equivalents` and `quarter_controls_…` measure
the random and the other domain's experts on so many of the documents (`--control-documents`), the
selected ones on all: another evaluation, with larger errors of the controls.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emotrain.commands.common import add_json
from emotrain.config import Config, load_config
from emotrain.evaluation.measure import group_of_each, mean_increase, measure
from emotrain.evaluation.perplexity import document_losses, pack
from emotrain.evaluation.reading import DomainDocuments, read_domains
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.files import json_text
from emotrain.model.transformer import Transformer
from emotrain.modular.counts import experts_kept
from emotrain.modular.select import cross_domain, greedy_select, random_select
from emotrain.progress import Track
from emotrain.tables import Table

ROOT = Path(__file__).resolve().parent.parent

PARTS = ("attention", "moe.router", "moe.experts", "moe.shared", "head")
Work = Counter[tuple[str, str, int]]
"""FLOPs by (selection or losses, part of the model, layer); the head is of the layer after the
last."""


class Meter:
    """Counts the FLOPs of matrix products that a model runs while it is open."""

    def __init__(self, model: Transformer):
        self.model, self.work, self.phase = model, Work(), "losses"

    def track(self, items: Sequence[Any], what: str) -> Sequence[Any]:
        """A `Track` that hears what is being done."""
        self.phase = "selection" if "calibration" in what or "ranking" in what else "losses"
        return items

    def __enter__(self) -> Meter:
        config, width = self.model.config, self.model.config.d_model
        expert = 2 * 3 * width * config.experts.hidden
        heads = config.num_heads * config.head_dim
        weights = width * (2 * heads + 2 * config.kv_heads * config.head_dim)

        def attention(inputs: Any) -> int:
            rows, length, _ = inputs[0].shape
            # On a CPU a row's scores are a square, whatever the mask leaves of it.
            return rows * length * (2 * weights + 4 * length * heads)

        counts: dict[str, Callable[[Any], int]] = {
            "attention": attention,
            "moe.router": lambda inputs: (
                2 * len(inputs[0]) * config.d_model * config.experts.routed
            ),
            "moe.experts": lambda inputs: expert * int(inputs[2].ends_N[-1]),
            "moe.shared": lambda inputs: expert * len(inputs[0]) * config.experts.shared,
            "head": lambda inputs: 2 * len(inputs[0]) * width * config.vocab_size,
        }

        def hook(part: str, layer: int) -> Callable[..., None]:
            def count(_module: Any, inputs: Any, _output: Any) -> None:
                self.work[self.phase, part, layer] += counts[part](inputs)

            return count

        self.hooks: list[Any] = [
            block.get_submodule(part).register_forward_hook(hook(part, layer))
            for layer, block in enumerate(self.model.blocks)
            for part in PARTS[:-1]
        ]
        last = len(self.model.blocks)
        self.hooks.append(self.model.head.register_forward_hook(hook("head", last)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.hooks:
            handle.remove()


def flops(
    work: Work, phase: str = "", parts: Sequence[str] = (), layers: Sequence[int] = ()
) -> int:
    """Of a phase, parts and layers; of all where none is named."""
    return sum(
        count
        for (of_phase, part, layer), count in work.items()
        if phase in ("", of_phase)
        and (not parts or part in parts)
        and (not layers or layer in layers)
    )


def one_by_one(
    model: Transformer,
    config: Config,
    domains: Mapping[str, DomainDocuments],
    settings: EvaluationSettings,
    track: Track[Any],
) -> dict[tuple[str, str], torch.Tensor]:
    """The same evaluation, a pass for each arm -> the increase of each domain, by share and arm."""

    def packed(groups: Sequence[Any]) -> tuple[Any, torch.Tensor]:
        documents = [document for group in groups for document in group]
        rows = config.data.sequence_length, config.training.micro_batch
        return pack(documents, *rows, config.model.attention.document_mask), group_of_each(groups)

    names = sorted(domains)
    calibration = packed([domains[name].calibration for name in names])
    held_out = packed([domains[name].held_out for name in names])
    full, found = document_losses(model, *held_out, None, track), {}
    for share in settings.keep:
        counts = experts_kept(config.model, share)
        if share == 1:
            continue
        selected = greedy_select(model, *calibration, len(names), counts, track)
        for arm, subsets in (
            ("selected", selected),
            ("random", random_select(config.model, len(names), counts, settings.seed)),
            ("cross_domain", cross_domain(selected)),
        ):
            change_U = document_losses(model, *held_out, subsets, track).loss_U - full.loss_U
            increase_J, _ = mean_increase(change_U, full.targets_U, held_out[1])
            found[str(float(share)), arm] = increase_J
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The counts, as the keys of --json."""
    config = load_config(args.config)
    settings = EvaluationSettings(
        keep=tuple(args.keep),
        calibration_documents=args.calibration_documents,
        documents=args.documents,
        document_tokens=args.document_tokens,
    )
    domains = read_domains(args.data, config, Path(args.data), settings)
    model = Transformer(config.model).initialize(0)
    length, rows = config.data.sequence_length, config.training.micro_batch
    held_out = [document for name in sorted(domains) for document in domains[name].held_out]
    batches = pack(held_out, length, rows, config.model.attention.document_mask)
    with Meter(model) as meter:
        document_losses(model, batches, torch.zeros(len(held_out), dtype=torch.int64))
    full = meter.work
    with Meter(model) as meter:
        alone = one_by_one(model, config, domains, settings, meter.track)
    before = meter.work
    with Meter(model) as meter:
        together = measure(model, domains, settings, length, rows, None, meter.track)
    now = meter.work
    fewer = {}
    for name, part in (("half", 2), ("quarter", 4)):
        some = replace(settings, control_documents=max(2, settings.documents // part))
        with Meter(model) as meter:
            measure(model, domains, some, length, rows, None, meter.track)
        fewer[f"{name}_controls_forward_equivalents"] = flops(meter.work) / flops(full)
    one, last = flops(full), config.model.num_layers
    later, experts = tuple(range(1, last)), ("moe.experts", "moe.shared", "moe.router")

    def share(parts: Sequence[str] = (), layers: Sequence[int] = ()) -> float:
        """What the arms add to the full model's pass."""
        return (flops(now, "losses", parts, layers) - flops(full, "", parts, layers)) / one

    terms = {
        "full model": 1.0,
        "arms, first attention": share(("attention",), (0,)),
        "arms, first experts": share(experts, (0,)),
        "arms, other layers": share((), later),
        "arms, head": share((), (last,)),
        "selection, first attention": flops(now, "selection", ("attention", "moe.router"), (0,))
        / one,
        "selection, first experts": flops(now, "selection", experts[:2], (0,)) / one,
        "selection, other layers": flops(now, "selection", (), later) / one,
    }
    shareable = "arms, first experts", "selection, first experts"
    tokens = sum(batch.tokens_BS.numel() for batch in batches)
    return {
        "forward_equivalents": flops(now) / one,
        "before_forward_equivalents": flops(before) / one,
        "over_before": flops(now) / flops(before),
        "terms_forward_equivalents": terms,
        "before_selection_forward_equivalents": flops(before, "selection") / one,
        "least_forward_equivalents": flops(now) / one - sum(terms[name] for name in shareable),
        **fewer,
        "forward_gflops": one / 1e9,
        "forward_share_by_part": {part: flops(full, "", (part,)) / one for part in PARTS},
        "held_out_tokens": tokens,
        "padding_share": 1 - sum(map(len, held_out)) / tokens,
        "largest_difference_nats": max(
            abs(together.domains[name].increase(keep, arm)[0] - float(increase_J[j]))  # type: ignore
            for (keep, arm), increase_J in alone.items()
            for j, name in enumerate(sorted(domains))
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data/sample", help="folder of `emotrain prepare`")
    parser.add_argument("--config", default=str(ROOT / "configs/quickstart.yaml"))
    parser.add_argument("--keep", type=float, nargs="+", default=(1.0, 0.5, 0.25, 0.125))
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--calibration-documents", type=int, default=6)
    parser.add_argument("--document-tokens", type=int, default=512)
    add_json(parser)
    args = parser.parse_args()
    result = measured(args)
    if args.json:
        print(json_text(result))
        return
    rows = [
        ("now", f"{result['forward_equivalents']:.2f}"),
        *(
            (f"  {name}", f"{value:.2f}")
            for name, value in result["terms_forward_equivalents"].items()
        ),
        ("before", f"{result['before_forward_equivalents']:.2f}"),
        ("at least", f"{result['least_forward_equivalents']:.2f}"),
        ("controls on half", f"{result['half_controls_forward_equivalents']:.2f}"),
        ("controls on a quarter", f"{result['quarter_controls_forward_equivalents']:.2f}"),
    ]
    print(Table("Work in forward passes of the full model", ("", "passes"), tuple(rows)).text())


if __name__ == "__main__":
    main()
