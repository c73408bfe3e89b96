"""The tables of the page: numbers at the end, settings, data, environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emotrain.config import Config, flatten
from emotrain.data.manifest import MANIFEST, SPLITS, read_manifest
from emotrain.errors import UserError
from emotrain.files import json_text, sha256_of
from emotrain.report.charts import number
from emotrain.report.runs import Run
from emotrain.tables import Table

AT_THE_END = (
    ("step", "step", 0),
    ("tokens", "tokens", 0),
    ("cross_entropy", "training loss, nats/token", 3),
    ("tokens_per_second", "tokens/s", 0),
    ("memory_gib", "peak memory, GiB", 1),
    ("skipped_steps", "skipped updates", 0),
)
"""Keys of metrics.jsonl whose last values the page shows, their names, digits after the point."""
SHOWN_DOMAINS = 40


def headline(config: Config, tokens: float | None = None) -> str:
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
    done = f", trained on {tokens:,.0f} tokens" if tokens and np.isfinite(tokens) else ""
    total, active = (counts[key] / 1e6 for key in ("total_parameters", "active_parameters"))
    return (
        f"{kind}: {model.num_layers} layers of {count} routed experts ({experts.top_k} for a "
        f"token) and {experts.shared} shared, "
        f"{total:,.1f} million parameters of which {active:,.1f} work on a token{done}."
    )


def end_table(runs: Sequence[Run]) -> Table:
    """The last numbers of each run."""
    rows = []
    for key, name, digits in AT_THE_END:
        values = [_last(run, key) for run in runs]
        if any(value is not None for value in values):
            rows.append((name, *(_shown(value, digits) for value in values)))
    worst = [_worst_load(run) for run in runs]
    if any(value is not None for value in worst):
        rows.append(
            ("load of the fullest expert / mean, worst layer", *(_shown(v, 2) for v in worst))
        )
    return Table("At the end", ("", *_heads(runs, "value")), tuple(rows))


def _last(run: Run, key: str) -> float | None:
    if key == "step":
        return max((series.steps[-1] for series in run.history.series.values()), default=None)
    return run.history.last(key)


def _worst_load(run: Run) -> float | None:
    load = run.history.series.get("load_imbalance")
    return None if load is None else float(load.values[-1].max())


def _shown(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if np.isfinite(value) else "not finite"


def _heads(runs: Sequence[Run], alone: str) -> tuple[str, ...]:
    return tuple(run.label for run in runs) if len(runs) > 1 else (alone,)


def settings_table(runs: Sequence[Run], base: Config | None = None, named: str = "") -> Table:
    """Settings that differ: of one run from the base, of several from each other.

    Args:
        base: what a run is compared with; None: the defaults.
        named: what the base is called.
    """
    settings = [dict(flatten(run.config)) for run in runs]
    if len(runs) > 1 and base is None:
        keys = [key for key in settings[0] if len({repr(s[key]) for s in settings}) > 1]
        rows = [(key, *(_text(s[key]) for s in settings)) for key in keys]
        return Table(
            "Settings in which the runs differ", ("setting", *_heads(runs, "")), tuple(rows),
            names=1 + len(runs),
        )  # fmt: skip
    known = dict(flatten(Config() if base is None else base))
    keys = [key for key in known if any(s[key] != known[key] for s in settings)]
    rows = [(key, *(_text(s[key]) for s in settings), _text(known[key])) for key in keys]
    name = named or "the default"
    return Table(
        f"Settings that differ from {named or 'the defaults'}",
        ("setting", *_heads(runs, "this run"), name), tuple(rows), names=2 + len(runs),
    )  # fmt: skip


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json_text(value, ensure_ascii=False)


# ---- data


def data_tables(run: Run) -> tuple[list[Table], list[str]]:
    """What a run was trained on: its data set's manifest as it is now, and whether it is still the
    one of the run's starts; and notes."""
    path = Path(run.config.data.path)
    seen: list[dict[str, Any]] = [
        start["data"] for start in run.starts if isinstance(start.get("data"), dict)
    ]
    rows = [("path", str(path))]
    for key, name in (
        ("fingerprint", "fingerprint when the run started"),
        ("sequences", "sequences of an epoch"),
        ("tokens", "tokens of the training split"),
        ("sha256", f"sha256 of {MANIFEST} when the run started"),
    ):
        values = list(dict.fromkeys(_cell(data.get(key)) for data in seen if data.get(key)))
        if values and not (key == "fingerprint" and seen[-1].get("sources")):
            rows.append((name, ", then ".join(values)))
    notes: list[str] = []
    tables: list[Table] = []
    try:
        manifest = read_manifest(path) if path.is_dir() else None
    except (UserError, OSError) as error:
        manifest = None
        notes.append(f"The data set cannot be read now: {error}")
    if manifest is None:
        if not path.is_file():
            notes.append(
                "Its data set is not at this path now; what the run noted is all there is."
            )
    else:
        digest = sha256_of(path / MANIFEST)
        rows.append((f"sha256 of {MANIFEST} now", digest))
        then = seen[-1].get("sha256") if seen else None
        if then and then != digest:
            notes.append("The data set has changed since the run started: the hashes differ.")
        rows += _manifest_rows(manifest)
        tables.append(_domains_table(manifest))
    title = "The data set" if tables else "The data set, as the run noted it"
    if seen and isinstance(sources := seen[-1].get("sources"), dict):
        tables.append(_sources_table(sources))
    return [Table(title, ("", "value"), tuple(rows), names=2), *tables], notes


def _sources_table(sources: dict[str, Any]) -> Table:
    """The sources of a mixture, as the run noted them at its last start."""
    keys = ("path", "domain", "fingerprint", "tokens", "sequences", "weights")
    rows = [
        (str(name), *(_cell(source.get(key, "")) for key in keys))
        for name, source in sources.items()
        if isinstance(source, dict)
    ]
    return Table("Sources of the mixture", ("source", *keys), tuple(rows), names=4)


def _manifest_rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("vocabulary", f"{manifest['vocab_size']:,} tokens"),
        ("sha256 of the tokenizer", str(manifest["tokenizer_sha256"] or "not noted")),
    ]
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        documents, tokens = (sum(getattr(s, k) for s in shards) for k in ("documents", "tokens"))
        rows.append(
            (f"{split} split", f"{documents:,} documents, {tokens:,} tokens, shards: {len(shards)}")
        )
    skipped = {k: v for k, v in manifest["skipped_documents"].items() if v}
    rows.append(("skipped documents", json_text(skipped) if skipped else "none"))
    rows += [(f"prepared with {k}", _cell(v)) for k, v in dict(manifest["settings"]).items()]
    return rows


def _domains_table(manifest: dict[str, Any]) -> Table:
    splits = [manifest["splits"][split]["domains"] for split in SPLITS]
    names = sorted(
        {name for domains in splits for name in domains},
        key=lambda name: (-splits[0].get(name, {}).get("tokens", 0), name),
    )
    empty = {"documents": 0, "tokens": 0}
    rows = [
        (name, *(f"{d.get(name, empty)[k]:,}" for d in splits for k in ("documents", "tokens")))
        for name in names[:SHOWN_DOMAINS]
    ]
    left = f"; the {len(names) - SHOWN_DOMAINS} smallest are left out" if len(names) > 40 else ""
    return Table(
        f"Domains of the data set{left}",
        ("domain", *(f"{split} {k}" for split in SPLITS for k in ("documents", "tokens"))),
        tuple(rows),
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return json_text(value, ensure_ascii=False)
    return value if isinstance(value, str) else number(value)


# ---- environment


def environment_table(runs: Sequence[Run]) -> Table:
    """What each run ran on when it was started last."""
    columns = [_environment(run.starts[-1]) if run.starts else {} for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [(key, *(column.get(key, "–") for column in columns)) for key in keys]
    return Table(
        "Environment of the last start", ("", *_heads(runs, "value")), tuple(rows),
        names=1 + len(runs),
    )  # fmt: skip


def starts_table(run: Run) -> Table:
    """Every start of a run, and what was not as at the start before."""
    rows = []
    before: dict[str, str] = {}
    for index, start in enumerate(run.starts, 1):
        now = _environment(start)
        changed = [
            f"{key}: {before.get(key, '–')} → {now.get(key, '–')}"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key) and key != "started"
        ]
        step = _cell(start.get("step"))
        rows.append(
            (str(index), step, now.get("started", "–"), "; ".join(changed if before else []))
        )
        before = now
    title = "Starts of the run, and what had changed"
    return Table(title, ("start", "from step", "time (UTC)", "changed"), tuple(rows), names=4)


def _environment(start: dict[str, Any]) -> dict[str, str]:
    """An entry of environment.json as rows."""
    git, device, cpu, versions, command = (
        start.get(key) for key in ("git", "device", "cpu", "versions", "command")
    )
    rows: dict[str, str] = {}
    if isinstance(start.get("time"), str):
        rows["started"] = start["time"].replace("T", " ").removesuffix("+00:00")
    if isinstance(command, list):
        rows["command"] = " ".join(map(str, command))
    if isinstance(git, dict):
        changed = ", with changes that are not committed" if git.get("dirty") else ""
        rows["commit of emotrain"] = f"{git.get('commit')}{changed}"
    elif "git" in start:
        rows["commit of emotrain"] = "none: not run from a repository"
    if isinstance(device, dict):
        size = device.get("memory_gib")
        memory = f", {size:.1f} GiB" if isinstance(size, (int, float)) else ""
        rows["device"] = f"{device.get('name') or device.get('type')}{memory}"
    if "processes" in start:
        rows["processes"] = _cell(start["processes"])
    if isinstance(cpu, dict):
        rows["CPU"] = (
            f"{cpu.get('model')}, {cpu.get('cores')} cores, {cpu.get('threads')} threads of torch"
        )
    if "system" in start:
        rows["system"] = _cell(start["system"])
    if isinstance(versions, dict):
        rows |= {str(name): _cell(version) for name, version in versions.items()}
    return rows
