"""One self-contained HTML page about a run: `emotrain report RUN_DIR`. Opens anywhere, loads
nothing. What it says is put together here; how it looks is `report.html.j2`."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.config import Config, config_to_dict, flatten, load_config
from emotrain.errors import MissingFileError, MissingPackageError
from emotrain.evaluation import plots
from emotrain.evaluation.findings import findings
from emotrain.evaluation.results import Evaluation, read_evaluation
from emotrain.evaluation.tables import domain_table, mean_table, plain, routing_table
from emotrain.files import json_text, write_whole
from emotrain.tables import Table

TEMPLATE = "report.html.j2"

AT_THE_END = (
    ("step", "step", 0),
    ("tokens", "tokens", 0),
    ("cross_entropy", "training loss, nats/token", 3),
    ("tokens_per_second", "tokens/s", 0),
    ("memory_gib", "peak memory, GiB", 1),
    ("skipped_steps", "skipped updates", 0),
)
"""Keys of the last line of metrics.jsonl that the page shows, their names, digits after the
point."""


@dataclass(frozen=True)
class Picture:
    """A PNG in both colour schemes, as base64, so that it is inside of the page."""

    alt: str
    light: str
    dark: str


def write_report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html from its config.yaml, metrics.jsonl and evaluation/evaluation.json;
    returns its path.

    A run without metrics or evaluation yet gets a page without that part.

    Raises:
        FileNotFoundError: not a run folder. ValueError: a file of the run is not readable.
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise MissingFileError(
            f"{run_dir}: no config.yaml here; give the training.run_dir of a training run"
        )
    config = load_config(run_dir / "config.yaml")
    metrics, dropped = _read_metrics(run_dir / "metrics.jsonl")
    evaluated = run_dir / "evaluation" / "evaluation.json"
    result = read_evaluation(evaluated) if evaluated.is_file() else None
    page = _render(
        name=run_dir.resolve().name,
        headline=headline(config, metrics),
        subsets=_subsets(result) if result else None,
        commands=subset_commands(run_dir, config, result),
        training=_training(metrics) if metrics else None,
        dropped=dropped,
        changed=[f"{key}: {value}" for key, value in _changed(config).items()],
        settings=json_text(config_to_dict(config), indent=2),
    )
    return write_whole(run_dir / "report.html", page.encode("utf-8"))


def headline(config: Config, metrics: Sequence[Mapping[str, Any]]) -> str:
    """What was trained, in one sentence."""
    from emotrain.model.counts import parameter_counts

    model, experts, pool = config.model, config.model.experts, config.model.pool
    counts = parameter_counts(model)
    if all(model.routed_in_layer(layer) == 0 for layer in range(model.num_layers)):
        kind = "Dense model"
    else:
        kind = {
            "none": "Standard Mixture of Experts (no document pool)",
            "fixed": f"EMO with a document pool of {pool.size} experts",
            "uniform": f"EMO with document pools of {pool.min} to {pool.max} experts",
        }.get(pool.kind, f"EMO with document pools of kind {pool.kind}")
    per_layer = {model.routed_in_layer(layer) for layer in range(model.num_layers)}
    count = "/".join(map(str, sorted(per_layer)))
    done = (
        f", trained on {metrics[-1]['tokens']:,} tokens"
        if metrics and "tokens" in metrics[-1]
        else ""
    )
    total, active = (counts[key] / 1e6 for key in ("total_parameters", "active_parameters"))
    return (
        f"{kind}: {model.num_layers} layers of {count} routed experts ({experts.top_k} for a "
        f"token) and {experts.shared} shared, "
        f"{total:,.1f} million parameters of which {active:,.1f} work on a token{done}."
    )


def _subsets(result: Evaluation) -> dict[str, Any]:
    """What the page says of the expert subsets."""
    if result.mean.loss_nats is None:
        return {"step": result.step, "finite": False}
    evaluations = [("", result)]
    return {
        "step": result.step,
        "finite": True,
        "findings": findings(result),
        "picture": _picture(
            "Loss increase against the number of experts kept",
            lambda dark: plots.subset_figure(evaluations, dark),
        ),
        "tables": [mean_table(evaluations), domain_table(result), routing_table(result)],
    }


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


def _training(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page says of the training so far."""
    last = metrics[-1]
    rows = [
        (name, f"{last[key]:,.{digits}f}")
        for key, name, digits in AT_THE_END
        if isinstance(last.get(key), (int, float))
    ]
    if imbalance := last.get("load_imbalance"):
        rows.append(("load of the busiest expert / mean, worst layer", plain(max(imbalance), 2)))
    has_curves = bool(plots.training_panels(metrics))
    return {
        "picture": _picture("Training curves", lambda dark: plots.training_figure(metrics, dark))
        if has_curves
        else None,
        "table": Table("At the end", ("", "value"), tuple(rows)),
    }


def _changed(config: Config) -> dict[str, Any]:
    """Settings that differ from the defaults."""
    defaults = dict(flatten(Config()))
    return {key: value for key, value in flatten(config) if defaults[key] != value}


def _picture(alt: str, draw: Callable[[bool], bytes]) -> Picture:
    light, dark = (base64.b64encode(draw(is_dark)).decode("ascii") for is_dark in (False, True))
    return Picture(alt, light, dark)


def _render(**values: Any) -> str:
    """The page of these values, which are text and never markup."""
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError(
            "the report needs jinja2, which is not installed; pip install 'emotrain[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(values)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics file, and how many lines were none (a run killed in the middle of
    a line leaves one)."""
    if not path.is_file():
        return [], 0
    records, dropped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            record["step"] += 0
            records.append(record)
        except (ValueError, KeyError, TypeError):
            dropped += 1
    return records, dropped
