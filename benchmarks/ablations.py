"""Rows of settings, trained and measured alike: which rule trains the better model, and which the
better modules.

    python benchmarks/ablations.py configs/ablations/pools.yaml [--data data/sample] [--json]
    [--out runs/ablations] [--only ROW ...] [--seeds SEED ...] [--table]

Each cell (a row and a seed) is one training run and one measurement. Every cell reads the same data
in the order of its seed, and is measured on the same held-out documents. Interrupted, the same
command goes on: a run from its checkpoint, a cell that is measured not at all. `--table` trains
nothing and writes the tables and the plot of what is there.

    full_gap_percent      loss of the full model over that of the standard row of the same seed
    increase_nats         with a share of the experts over the full model; mean over domains:
        selected          training documents of the domain chose them
        prompted          the first half of each document chose them, the second is measured
        random            as many at random
        cross_domain      another domain's
    domain_cosine         of the domains' mean routing; the lower, the more the domains part ways
    lru_hits, srp, sch    of `emotrain locality`, a cache of a quarter of the experts
    rows_per_token        ranks that a token is sent to at ep 8 with placed experts

Means are over seeds; the spread is the largest value less the smallest. A row that lacks a seed is
not averaged: the table says which.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from emotrain.commands.common import add_json
from emotrain.errors import RunError, UserError
from emotrain.files import json_text, write_whole
from emotrain.tables import Table, csv_text

ROOT = Path(__file__).resolve().parent.parent
PLAN_KEYS = {"base", "standard", "keep", "seeds", "rows"}
ROW_KEYS = {"settings", "seeds", "keep", "from"}
EP, CACHE, SEGMENT = 8, 0.25, 16


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    settings: tuple[str, ...]
    """key=value, on top of the base configuration."""
    seeds: tuple[int, ...]
    keep: tuple[float, ...]
    """Shares of the experts to measure; none for a model without subsets."""
    begins: Row | None
    """The row that it goes on from."""


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    base: Path
    standard: str
    rows: tuple[Row, ...]


def read_plan(file: Path) -> Plan:
    """A plan of a YAML file.

    Raises:
        UserError: it is none, with the key that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        plan: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not readable as a plan ({reason})") from None
    _check_keys(file, "the plan", plan, PLAN_KEYS, {"base", "standard", "rows"})
    _check_keys(file, "rows", plan["rows"], None, {plan["standard"]})
    rows: dict[str, Row] = {}
    for name, row in plan["rows"].items():
        _check_keys(file, f"row {name!r}", row, ROW_KEYS, set())
        begins = str(row.get("from", ""))
        if begins and begins not in rows:
            raise UserError(f"{file}: row {name!r} is from {begins!r}, which is no row above it")
        seeds, keep = (
            row.get(key, plan.get(key, otherwise))
            for key, otherwise in (("seeds", [0]), ("keep", []))
        )
        settings = row.get("settings", [])
        for what, values, fits in (
            ("a list of key=value settings", settings, lambda of: isinstance(of, str)),
            ("seeds, a list of numbers from 0", seeds, lambda of: type(of) is int and of >= 0),
            (
                "shares to keep, a list of numbers below 1",
                keep,
                lambda of: isinstance(of, float) and 0 < of < 1,
            ),
        ):
            if not isinstance(values, list) or not all(map(fits, values)):
                raise UserError(f"{file}: row {name!r} needs {what}, not {values!r}")
        rows[str(name)] = Row(
            str(name), tuple(settings), tuple(seeds), tuple(keep), rows.get(begins)
        )
    return Plan(Path(plan["base"]), plan["standard"], tuple(rows.values()))


def _check_keys(
    file: Path, what: str, found: Any, known: set[str] | None, needed: set[str]
) -> None:
    if not isinstance(found, dict):
        raise UserError(f"{file}: {what} is no mapping; see configs/ablations/pools.yaml")
    if missing := sorted(needed - set(found)):
        raise UserError(f"{file}: {what} lacks {missing[0]!r}; see configs/ablations/pools.yaml")
    if known is not None and (strange := sorted(set(found) - known)):
        raise UserError(
            f"{file}: {what} has {strange[0]!r}, which is not known; its keys are "
            f"{', '.join(sorted(known))}"
        )


def main(arguments: list[str] | None = None) -> int:
    from emotrain.cli import guarded

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, help="YAML file of rows")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all rows")
    parser.add_argument("--data", default="data/sample", help="prepared data (%(default)s)")
    parser.add_argument("--out", default="runs/ablations", help="folder (%(default)s)")
    parser.add_argument("--only", nargs="+", default=(), metavar="ROW", help="rows to train")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="of each row these alone"
    )
    parser.add_argument("--documents", type=int, default=24, help="of a domain (%(default)s)")
    parser.add_argument("--table", action="store_true", help="train nothing, write the tables")
    add_json(parser)
    # Settings may stand after options.
    args = parser.parse_intermixed_args(arguments)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    plan, out = read_plan(args.plan), Path(args.out)
    if unknown := sorted(set(args.only) - {row.name for row in plan.rows}):
        raise UserError(f"--only {unknown[0]!r}: {args.plan} has no such row")
    if args.seeds:
        rows = [
            replace(of, seeds=tuple(s for s in of.seeds if s in args.seeds)) for of in plan.rows
        ]
        plan = replace(plan, rows=tuple(of for of in rows if of.seeds))
    for row in plan.rows:
        for seed in row.seeds:
            if not args.table and (not args.only or row.name in args.only):
                cell(plan, row, seed, out, args)
    results = summary(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    table = table_of(results, plan)
    write_whole(out / "ablations.json", (json_text(results, indent=1) + "\n").encode())
    write_whole(out / "ablations.md", table.markdown().encode())
    write_whole(out / "ablations.csv", csv_of(results).encode())
    if any("mean" in row for row in results["rows"].values()):
        write_whole(out / "ablations.png", picture(results))
    print(table.text(), file=sys.stderr)
    print(f"results in {out}/ablations.json, .md, .csv and .png", file=sys.stderr)
    if args.json:
        print(json_text(results))
    return 0


# ---- a cell


def folder_of(out: Path, row: str, seed: int) -> Path:
    return out / f"{row.replace('/', '-')}-{seed}"


def cell(plan: Plan, row: Row, seed: int, out: Path, args: argparse.Namespace) -> None:
    """Train and measure a row with a seed, if that is not done."""
    folder = folder_of(out, row.name, seed)
    asked = {
        "base": plan.base.read_text(encoding="utf-8"),
        "settings": settings_of(row, seed, args),
        "keep": list(row.keep),
        "documents": args.documents,
    }
    done = folder / "cell.json"
    if done.is_file():
        if _read(done)["asked"] == asked:
            return
        raise UserError(f"{done} is of other settings; give another --out, or remove {folder}")
    run_dir = train(plan, row, seed, out, args)
    measured = measure_cell(run_dir, args.data, row.keep, args.documents)
    write_whole(done, json_text({"asked": asked, **measured}, indent=1).encode())


def settings_of(row: Row, seed: int, args: argparse.Namespace) -> list[str]:
    return [f"data.path={args.data}", f"training.seed={seed}", *row.settings, *args.settings]


def train(plan: Plan, row: Row, seed: int, out: Path, args: argparse.Namespace) -> Path:
    """The folder of a row's run, which goes on where it was; that of the row before it first,
    which may be measured but not there."""
    from emotrain.training.checkpoint import find

    settings = settings_of(row, seed, args)
    if row.begins:
        begin = find(train(plan, row.begins, seed, out, args))
        settings = [setting.replace("{checkpoint}", str(begin)) for setting in settings]
    print(f"== {row.name}, seed {seed}", file=sys.stderr)
    run_dir = folder_of(out, row.name, seed) / "run"
    command = [sys.executable, "-m", "emotrain.cli", "train", str(plan.base), *settings]
    # Only results belong on stdout.
    code = subprocess.run(
        [*command, f"training.run_dir={run_dir}"], stdout=sys.stderr, check=False
    ).returncode
    if code:
        raise RunError(f"{row.name}, seed {seed}: training ended with exit code {code}")
    return run_dir


def measure_cell(run_dir: Path, data: str, keep: Sequence[float], documents: int) -> dict[str, Any]:
    """What the table says of one trained model."""
    from emotrain.evaluation.locality import LocalitySettings, measure_locality
    from emotrain.evaluation.measure import evaluate, precision_on
    from emotrain.evaluation.placement import compute_placements
    from emotrain.evaluation.prompted import prompted_losses
    from emotrain.evaluation.reading import read_domains
    from emotrain.evaluation.settings import EvaluationSettings
    from emotrain.training.checkpoint import find, load_model

    folder = find(run_dir)
    config, model = load_model(folder)
    settings = EvaluationSettings(
        keep=(1.0, *keep),
        documents=documents,
        # A document that is cut has no halves.
        document_tokens=config.data.sequence_length,
        random_seeds=2 if keep else 0,
    )
    found = evaluate(folder, data, settings)
    result: dict[str, Any] = {
        "full_loss_nats": found.mean.loss_nats,
        "increase_nats": {
            share: asdict(arms)
            for share, arms in found.mean.increase_nats.items()
            if float(share) < 1
        },
        "domain_cosine": found.routing.domain_cosine,
    }
    if not keep:
        return result
    domains = {
        name: [ids for ids in of.held_out if len(ids) >= 4]
        for name, of in read_domains(data, config, folder, settings).items()
    }
    precision = precision_on(config, model.head.weight.device)
    rows = config.training.micro_batch
    prompted = prompted_losses(model, config, domains, keep, rows, precision)
    for share, increase in prompted.increase_nats.items():
        result["increase_nats"][share]["prompted"] = increase
    locality = measure_locality(
        folder, data, LocalitySettings((CACHE,), (SEGMENT,), documents=min(documents, 16))
    ).overall
    cache = locality["cache"][str(CACHE)]
    [placed] = compute_placements(folder, data, [EP])
    return {
        **result,
        "switch_rate": locality["switch_rate"],
        "srp": locality["srp"][str(SEGMENT)],
        "lru_hits": cache["lru_cold_hit_rate"],
        "sch": cache[f"sch_{SEGMENT}_hit_rate"],
        "rows_per_token": placed.rows_per_token,
        "contiguous_rows_per_token": placed.contiguous_rows_per_token,
    }


def _read(cell: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(cell.read_text(encoding="utf-8"))
        values["asked"], values["full_loss_nats"] + 0
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{cell}: not readable ({error!r}); remove it to measure again") from None
    return values


# ---- the table


def summary(plan: Plan, out: Path) -> dict[str, Any]:
    """Each row's numbers: mean and spread over its seeds, or which seeds are not there yet."""
    cells: dict[str, dict[int, dict[str, Any]]] = {
        row.name: {
            seed: _flat(_read(file))
            for seed in row.seeds
            if (file := folder_of(out, row.name, seed) / "cell.json").is_file()
        }
        for row in plan.rows
    }
    # With --seeds, no seed of the standard row may be left.
    standard = cells.get(plan.standard, {})
    rows: dict[str, dict[str, Any]] = {}
    for row in plan.rows:
        found = cells[row.name]
        for seed, values in found.items():
            if seed in standard:
                ratio = values["full_loss_nats"] / standard[seed]["full_loss_nats"]
                values["full_gap_percent"] = 100 * (ratio - 1)
        if missing := sorted(set(row.seeds) - set(found)):
            rows[row.name] = {"missing_seeds": missing}
            continue
        names = [n for n in found[row.seeds[0]] if all(n in values for values in found.values())]
        by_name = {name: [found[seed][name] for seed in row.seeds] for name in names}
        rows[row.name] = {
            "seeds": list(row.seeds),
            "mean": {name: sum(values) / len(values) for name, values in by_name.items()},
            "least": {name: min(values) for name, values in by_name.items()},
            "most": {name: max(values) for name, values in by_name.items()},
        }
    return {"standard": plan.standard, "rows": rows}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by dotted name."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if name == "asked" or value is None:
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def table_of(results: Mapping[str, Any], plan: Plan) -> Table:
    shares = sorted({str(float(s)) for row in plan.rows for s in row.keep}, key=float, reverse=True)
    columns = {
        "full loss": "full_loss_nats",
        "gap, %": "full_gap_percent",
        **{f"{100 * float(s):g} %": f"increase_nats/{s}/selected" for s in shares},
        **{f"{100 * float(s):g} %, prompt": f"increase_nats/{s}/prompted" for s in shares},
        "cosine": "domain_cosine",
        "LRU hits": "lru_hits",
        "rows at ep 8": "rows_per_token",
    }

    def shown(row: Mapping[str, Any], name: str) -> str:
        if name not in row.get("mean", {}):
            return ""
        sign = "+" if "/" in name or "gap" in name else ""
        text = format(row["mean"][name], f"{sign}.3f")
        spread = row["most"][name] - row["least"][name]
        return text if len(row["seeds"]) == 1 else f"{text} ({spread:.3f})"

    def seeds(row: Mapping[str, Any]) -> str:
        if "missing_seeds" in row:
            return f"no {', '.join(map(str, row['missing_seeds']))}"
        return str(len(row["seeds"]))

    return Table(
        "Loss in nats a token, and its increase with a share of the experts that training "
        "documents or the document's own first half chose; mean over seeds (spread)",
        ("row", "seeds", *columns),
        tuple(
            (name, seeds(row), *(shown(row, column) for column in columns.values()))
            for name, row in results["rows"].items()
        ),
    )


def csv_of(results: Mapping[str, Any]) -> str:
    """row, number, mean, least, most, seeds: one line a number."""
    return csv_text(
        ("row", "number", "mean", "least", "most", "seeds"),
        [
            (name, number, mean, row["least"][number], row["most"][number], len(row["seeds"]))
            for name, row in results["rows"].items()
            for number, mean in row.get("mean", {}).items()
        ],
    )


PANELS = {
    "full_gap_percent": "full model over the standard row, %",
    "increase_nats/0.125/selected": "12.5 %, training documents chose, nats",
    "increase_nats/0.125/prompted": "12.5 %, the prompt chose, nats",
}
"""What is drawn, and its axis."""


def picture(results: Mapping[str, Any]) -> bytes:
    """A dot a row in each panel, with a line from the smallest seed to the largest; as PNG."""
    from emotrain.evaluation.figures import COLORS, png

    rows = [(name, row) for name, row in results["rows"].items() if "mean" in row]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for panel, (number, label) in zip(axes, PANELS.items(), strict=True):
            for place, (_, row) in enumerate(rows):
                if number in row["mean"]:
                    low, high = row["least"][number], row["most"][number]
                    panel.plot([low, high], [place, place], color=COLORS[0], linewidth=3)
                    panel.plot(row["mean"][number], place, "o", color=COLORS[0])
            panel.axvline(0, color=COLORS[6], linewidth=0.8)
            panel.set_xlabel(label)
        axes[0].set_yticks(range(len(rows)), [name for name, _ in rows])
        axes[0].invert_yaxis()

    return png(draw, (11, 1.2 + 0.26 * len(rows)))


if __name__ == "__main__":
    sys.exit(main())
