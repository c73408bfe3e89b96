"""Subsets of experts on the page: curves and tables of `emotrain evaluate`, and the commands that
use a subset."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emotrain.config import Config
from emotrain.data.mixture_file import is_mixture
from emotrain.evaluation.figures import COLORS
from emotrain.evaluation.plots import draw_arms, draw_choices
from emotrain.evaluation.results import Evaluation
from emotrain.evaluation.tables import domain_table, mean_table, routing_table, subset_csv
from emotrain.report.charts import Plot, single
from emotrain.report.runs import Run
from emotrain.tables import Table

ARMS_PLOT, CHOICES_PLOT = "subsets-arms", "subsets-domains"


def subset_plots(runs: Sequence[Run]) -> list[Plot]:
    """Loss increase against experts kept, of the runs whose evaluation has finite losses."""
    found = [
        (number, run.label, run.evaluation)
        for number, run in enumerate(runs)
        if run.evaluation is not None and run.evaluation.mean.loss_nats is not None
    ]
    if not found:
        return []
    several = len(runs) > 1
    evaluations = [(label if several else "", result) for _, label, result in found]
    colors = [COLORS[number % len(COLORS)] for number, _, _ in found]
    csv = subset_csv(evaluations)
    unit = "loss increase over the full model, nats/token, against experts kept"
    text = " ".join(
        f"{f'{label}, step' if several else 'Step'} {result.step:,}: {_ends(result)}."
        for _, label, result in found
    )
    return [
        single(
            ARMS_PLOT,
            "Who chose the experts",
            f"Mean over domains. A modular model loses little with the experts that a domain chose "
            f"itself. {text}",
            f"Who chose the experts: {unit}. {text}",
            csv,
            lambda axes: draw_arms(axes, evaluations, colors),
        ),
        single(
            CHOICES_PLOT,
            "Domain by domain" if len(found) == 1 else "Experts of the domain's own choice",
            "Each domain with the experts that it chose itself."
            if len(found) == 1
            else "Mean over domains; the band goes from the best domain to the worst.",
            f"Each domain with its own experts: {unit}.",
            csv,
            lambda axes: draw_choices(axes, evaluations, colors),
        ),
    ]


def _ends(result: Evaluation) -> str:
    """The loss and its increase with the fewest experts."""
    assert result.mean.loss_nats is not None
    keep = min(result.keeps, key=float)
    increase = result.mean.increase(keep, "selected")
    ending = "" if increase is None else f", {increase[0]:+.3f} with {result.experts.label(keep)}"
    return f"{result.mean.loss_nats:.3f} nats/token with all experts{ending}"


def subset_tables(runs: Sequence[Run]) -> list[Table]:
    """Means of all runs; domains and routing of a run alone."""
    evaluations = [
        (run.label, run.evaluation)
        for run in runs
        if run.evaluation is not None and run.evaluation.mean.loss_nats is not None
    ]
    if not evaluations:
        return []
    result = evaluations[0][1]
    more = [domain_table(result), routing_table(result)] if len(runs) == 1 else []
    return [mean_table(evaluations), *more]


def subset_commands(run_dir: Path, config: Config, result: Evaluation | None) -> list[str]:
    """Commands that take a quarter of the experts out of this run, tune them and use them, for the
    domain that loses least with the experts it chose; none where there is no subset to take.

    Args:
        result: the run's evaluation, which names the data and the domains; without one the data is
            that of the training, and the commands are for all of its domains.
    """
    trained = any((run_dir / "checkpoints").glob("step-*"))
    routed = sum(map(config.model.routed_in_layer, range(config.model.num_layers)))
    if not trained or not routed or config.model.experts.sharing != "none":
        return []
    data, domain = (result.data, _most_modular(result)) if result else (config.data.path, "")
    if is_mixture(data):
        data = "DATA"  # a data set of its tokenizer, which nobody named
    # A domain is any text, and a file's name is not.
    name = re.sub("[^A-Za-z0-9]+", "-", domain).strip("-") or "subset"
    out = f"{run_dir}-{name}"
    # argparse would take a name of the form -x for an option.
    dashed = domain.startswith("-")
    of_domain = [f"--domain={domain}"] if dashed else ["--domain", domain] if domain else []
    commands: list[list[Any]] = [
        ["select", run_dir, "--calibration", data, *of_domain, "--keep", 0.25]
        + ["--out", f"{out}.json"],
        ["extract", run_dir, f"{out}.json", "--out", out, "--check"],
        ["evaluate", out, "--data", data, "--keep", "1.0"]
        + ["--documents", 8, "--document-tokens", 512],
        ["finetune", out, "--data", data, *of_domain, "--train", "routed", "--out", f"{out}-tuned"]
        + ["optimizer.lr=1e-3"],
        ["generate", f"{out}-tuned", "Once"],
        ["reinsert", run_dir, f"{out}-tuned", f"{out}.json", "--out", f"{out}-back"],
        ["serve", run_dir, "--subset", f"{name}={out}.json"],
    ]
    return [shlex.join(["emotrain", *map(str, words)]) for words in commands]


def _most_modular(result: Evaluation) -> str:
    """The domain that loses least with its own experts, at the smallest share; empty if none."""
    share = min(result.keeps, key=float)
    losses = {
        name: increase[0]
        for name, domain in result.domains.items()
        if (increase := domain.increase(share, "selected")) is not None
    }
    return min(losses, key=lambda name: losses[name], default="")
