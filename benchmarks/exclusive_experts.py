"""What experts of its own give a domain, and what other domains notice.

    python benchmarks/exclusive_experts.py RUN --data data/sample --domain rust [--json]

For every way to begin (--init), experts are added to a trained model, trained alone on the domain's
training documents, and evaluated on held-out documents of every domain. Two controls: the model
before, and the same with the new experts before they were trained.

    loss_nats              held-out loss of the domain: before, with new experts, trained
    other_domains_changed  how many other domains have another loss than before, in any digit
    frozen_changed         how many numbers of other experts and the trunk have changed

--work keeps checkpoints and runs; a second call goes on from what is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emotrain.evaluation.measure import evaluate
from emotrain.evaluation.settings import EvaluationSettings
from emotrain.files import json_text
from emotrain.subsets.exclusive import INITS, add_experts, remove_experts
from emotrain.subsets.tuning import TuneSettings, tuning_config
from emotrain.subsets.usage import sources_of
from emotrain.tables import Table
from emotrain.training.checkpoint import find, load_model
from emotrain.training.run import train


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(args.work or scratch)
        result = measure(args, work)
    if args.out:
        Path(args.out).write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    rows = [("before", result["before_loss_nats"], None)]
    for init, of in result["inits"].items():
        rows += [(f"{init}, untrained", of["untrained_loss_nats"], None)]
        rows += [(f"{init}, trained", of["trained_loss_nats"], of)]
    table = Table(
        f"held-out loss of {args.domain} in nats, {args.count} exclusive experts a layer",
        ("experts", "loss", "other domains changed", "frozen numbers changed"),
        tuple(
            (
                name,
                f"{loss:.4f}",
                str(of["other_domains_changed"]) if of else "",
                str(of["frozen_changed"]) if of else "",
            )
            for name, loss, of in rows
        ),
        notes=1,
    )
    print(json.dumps(result, allow_nan=False) if args.json else table.text())


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Losses before and after, for every way to begin."""
    before = losses(find(args.run), args, others=True)
    inits = {}
    for init in args.init:
        larger, run = work / f"add-{init}", work / f"run-{init}"
        if not larger.exists():
            text = None if init == "random" else args.data
            sources = partial(sources_of, init, args.count, args.run, text, args.domain)
            add_experts(args.run, larger, args.domain, args.count, sources=sources)
        settings = TuneSettings(
            args.data, args.domain, experts=f"exclusive:{args.domain}", steps=args.steps
        )
        summary = train(tuning_config(larger, run, settings, args.settings))
        trained = losses(run, args, others=True)
        inits[init] = {
            "untrained_loss_nats": losses(larger, args)[args.domain],
            "trained_loss_nats": trained.pop(args.domain),
            "other_domains": len(trained),
            "other_domains_changed": sum(trained[name] != before[name] for name in trained),
            "frozen_changed": frozen_changed(args, run, work / f"back-{init}"),
            "steps": summary["step"],
        }
    return {
        "domain": args.domain,
        "count": args.count,
        "settings": args.settings,
        "before_loss_nats": before[args.domain],
        "other_domains_before": {n: loss for n, loss in before.items() if n != args.domain},
        "inits": inits,
    }


def losses(
    checkpoint: str | Path, args: argparse.Namespace, others: bool = False
) -> dict[str, float | None]:
    """Held-out loss of the domain and, with `others`, of all others, each by itself."""
    settings = EvaluationSettings(
        keep=(1.0,),
        calibration_documents=1,
        documents=args.documents,
        document_tokens=args.document_tokens,
        domains=(args.domain,),
        random_seeds=0,
    )
    found = evaluate(checkpoint, args.data, settings).domains[args.domain].loss_nats
    result = {args.domain: found}
    for name in args.others if others else ():
        of_name = evaluate(checkpoint, args.data, replace(settings, domains=(name,)))
        result[name] = of_name.domains[name].loss_nats
    return result


def frozen_changed(args: argparse.Namespace, run: Path, back: Path) -> int:
    """Numbers that differ between the model before and the trained one without its experts."""
    if not back.exists():
        remove_experts(run, back, args.domain)
    pairs = zip(load_model(args.run)[1].parameters(), load_model(back)[1].parameters(), strict=True)
    with torch.no_grad():
        return sum(int((a != b).sum()) for a, b in pairs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a trained model")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--domain", required=True, metavar="NAME")
    parser.add_argument("--others", nargs="+", default=[], metavar="NAME", help="other domains")
    parser.add_argument("--count", type=int, default=2, metavar="N", help="experts a layer")
    parser.add_argument("--init", nargs="+", default=list(INITS), choices=INITS)
    parser.add_argument("--steps", type=int, default=100, metavar="N")
    parser.add_argument("--documents", type=int, default=16, metavar="N", help="held out")
    parser.add_argument("--document-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--work", metavar="FOLDER", help="kept; a temporary one by default")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["optimizer.lr=3e-3", "training.global_batch=16", "training.micro_batch=16"],
        metavar="key=value",
        help="of training (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
