"""One self-contained HTML page about a run: `emotrain report RUN_DIR`. Opens anywhere, loads
nothing."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emotrain.config import Config, config_to_dict, flatten, load_config
from emotrain.errors import MissingFileError, UserError
from emotrain.evaluation import plots
from emotrain.evaluation.tables import (
    Table,
    domain_table,
    keeps_everything,
    kept_label,
    mean_table,
    plain,
    routing_table,
)
from emotrain.files import json_text, write_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1b1d21; --soft: #5d636e; --line: #e0e3e8;
        --page: #ffffff; --card: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --soft: #9aa1ad; --line: #31353d; --page: #16181c; --card: #1f2228 } }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 60rem; background: var(--page);
       color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
p { max-width: 44rem } .soft, caption { color: var(--soft) }
img { width: 100%; height: auto; display: block }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .4rem; font-size: .85rem }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap }
th { font-weight: 600 } .name { text-align: left }
ul { padding-left: 1.2rem; max-width: 44rem } li { margin: .3rem 0 }
details { background: var(--card); border-radius: .5rem; padding: .6rem 1rem; margin: 1rem 0 }
summary { cursor: pointer }
pre { overflow-x: auto; font: .8rem/1.5 ui-monospace, monospace }
"""

NOISE = 2.0
"""An effect counts as seen when it is this many standard errors from zero."""


def write_report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html from its config.yaml, metrics.jsonl and evaluation/evaluation.json;
    returns its path.

    A run without metrics or evaluation yet gets a page without that part.

    Raises:
        FileNotFoundError: not a run folder. ValueError: a file of the run is not readable.
        ModuleNotFoundError: matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise MissingFileError(
            f"{run_dir}: no config.yaml here; give the training.run_dir of a training run"
        )
    config = load_config(run_dir / "config.yaml")
    metrics, dropped = _read_metrics(run_dir / "metrics.jsonl")
    evaluation = _read_evaluation(run_dir / "evaluation" / "evaluation.json")
    name = run_dir.resolve().name
    parts = [
        f'<h1>{html.escape(name)}</h1><p class="soft">{html.escape(headline(config, metrics))}</p>',
        *_evaluation_part(evaluation),
        *_training_part(metrics, dropped),
        _config_part(config),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return write_whole(run_dir / "report.html", page.encode("utf-8"))


def headline(config: Config, metrics: Sequence[Mapping[str, Any]]) -> str:
    """What was trained, in one sentence."""
    from emotrain.model.transformer import parameter_counts

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


def findings(result: Mapping[str, Any]) -> list[str]:
    """What an evaluation says, one plain sentence a finding, from its numbers alone and
    whichever way they point."""
    keeps = [keep for keep in result["mean"]["increase_nats"] if not keeps_everything(result, keep)]
    sentences = [_subset_sentence(result, keep) for keep in keeps]
    for keep in keeps[-1:]:
        sentences += [
            _control_sentence(
                result,
                keep,
                "random",
                "experts drawn at random",
                "so it matters which experts stay",
                "it does not matter which experts stay",
            ),
            _control_sentence(
                result,
                keep,
                "cross_domain",
                "experts chosen by another domain",
                "so the subsets are special to their domains",
                "the subsets are not special to their domains",
            ),
        ]
        if len(result["domains"]) > 1:
            sentences.append(_extremes_sentence(result, keep))
    cosine, effective = result["routing"]["domain_cosine"], result["routing"]["effective_experts"]
    if cosine is not None:
        sentences.append(
            f"The mean routing of two domains has a cosine of {cosine:.2f} on average (1 would "
            f"mean that they use the "
            f"same experts), and one document spreads over {effective:.1f} experts of a layer."
        )
    return [sentence for sentence in sentences if sentence]


def _subset_sentence(result: Mapping[str, Any], keep: str) -> str:
    increase, error = (
        result["mean"][key][keep]["selected"] for key in ("increase_nats", "standard_error_nats")
    )
    chosen_by = f"chosen by {result['settings']['calibration_documents']} of its documents"
    base = f"With {kept_label(result, keep)} experts, {chosen_by}, a domain's loss"
    if abs(increase) <= NOISE * error:
        return (
            f"{base} stays what it was on average: the change of {increase:+.3f} nats/token is "
            f"within {NOISE:g} standard errors."
        )
    effect = "rises" if increase > 0 else "falls"
    return (
        f"{base} {effect} by {abs(increase):.3f} nats/token on average: the perplexity is "
        f"{math.exp(increase):.2f} times that of "
        f"the full model."
    )


def _control_sentence(
    result: Mapping[str, Any], keep: str, arm: str, words: str, if_worse: str, if_equal: str
) -> str:
    mean = result["mean"]
    own, other = (mean["increase_nats"][keep][key] for key in ("selected", arm))
    if other is None:
        return ""
    # The arms share documents, so the error of their difference is at most the sum of their errors.
    margin = NOISE * sum(mean["standard_error_nats"][keep][key] for key in ("selected", arm))
    if other - own > margin:
        verdict = if_worse
    elif own - other > margin:
        verdict = "less than with its own choice: the selection does harm here"
    else:
        verdict = f"no clear difference: {if_equal}, and the model is not modular by this measure"
    return (
        f"With {kept_label(result, keep)} {words} the change is {other:+.3f} instead of "
        f"{own:+.3f} nats/token, {verdict}."
    )


def _extremes_sentence(result: Mapping[str, Any], keep: str) -> str:
    cost = {
        name: domain["increase_nats"][keep]["selected"]
        for name, domain in result["domains"].items()
    }
    best, worst = min(cost, key=cost.__getitem__), max(cost, key=cost.__getitem__)
    return (
        f"{kept_label(result, keep)} experts serve {best} best ({cost[best]:+.3f} nats/token) "
        f"and {worst} worst ({cost[worst]:+.3f})."
    )


def _evaluation_part(result: Mapping[str, Any] | None) -> list[str]:
    if result is None:
        return [
            "<h2>Expert subsets</h2><p>Not evaluated yet: <code>emotrain evaluate RUN_DIR --data "
            "DIR</code>, then write this page "
            "again.</p>"
        ]
    if result["mean"]["loss_nats"] is None:
        return [
            f"<h2>Expert subsets</h2><p>Step {result['step']:,}: the losses of this model are not "
            f"finite, so that no subset can be compared with it.</p>"
        ]
    intro = (
        f"Step {result['step']:,}. Each domain chooses the experts it keeps with a few training "
        f"documents; the loss is taken on "
        f"held-out documents. A modular model loses little with the experts a domain chose, and "
        f"much with others. Losses are in nats a token: a loss that is 0.1 higher means that the "
        f"right token gets a probability a tenth lower, on the geometric mean."
    )
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(result))
    evaluations = [("", result)]
    return [
        f"<h2>Expert subsets</h2><p>{html.escape(intro)}</p><ul>{items}</ul>",
        _image(
            lambda dark: plots.subset_figure(evaluations, dark),
            "Loss increase against the number of experts kept",
        ),
        mean_table(evaluations).html(),
        domain_table(result).html(),
        routing_table(result).html(),
    ]


def _training_part(metrics: Sequence[Mapping[str, Any]], dropped: int) -> list[str]:
    if not metrics:
        return ["<h2>Training</h2><p>No metrics yet.</p>"]
    curves = (
        _image(lambda dark: plots.training_figure(metrics, dark), "Training curves")
        if plots.training_panels(metrics)
        else ""
    )
    last = metrics[-1]
    shown = [
        ("step", "step", 0),
        ("tokens", "tokens", 0),
        ("cross_entropy", "training loss, nats/token", 3),
        ("tokens_per_second", "tokens/s", 0),
        ("memory_gib", "peak memory, GiB", 1),
        ("skipped_steps", "skipped updates", 0),
    ]
    rows = tuple(
        (name, f"{last[key]:,.{digits}f}")
        for key, name, digits in shown
        if isinstance(last.get(key), (int, float))
    )
    imbalance = last.get("load_imbalance")
    if imbalance:
        rows += (("load of the busiest expert / mean, worst layer", plain(max(imbalance), 2)),)
    note = f"<p>{dropped} unreadable lines of metrics.jsonl are left out.</p>" if dropped else ""
    return ["<h2>Training</h2>", curves, Table("At the end", ("", "value"), rows).html(), note]


def _config_part(config: Config) -> str:
    defaults = dict(flatten(Config()))
    changed = {key: value for key, value in flatten(config) if defaults[key] != value}
    lines = "\n".join(f"{key}: {value}" for key, value in changed.items())
    full = json_text(config_to_dict(config), indent=2)
    return (
        f"<h2>Settings</h2><p>Those that differ from the "
        f"defaults:</p><pre>{html.escape(lines)}</pre>"
        f"<details><summary>All settings</summary><pre>{html.escape(full)}</pre></details>"
    )


def _image(draw: Callable[[bool], bytes], text: str) -> str:
    """A picture in both colour schemes, inside the page itself."""
    light, dark = (base64.b64encode(draw(is_dark)).decode("ascii") for is_dark in (False, True))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}">'
        f'<img alt="{html.escape(text)}" src="data:image/png;base64,{light}"></picture>'
    )


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


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["format"] != 1:
            raise UserError(f"format {result['format']!r}, not 1")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a result of `emotrain evaluate` ({error}); run it again"
        ) from None
    return result
