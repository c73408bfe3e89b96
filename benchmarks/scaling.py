"""What grows with the job: metadata, measured at simulated size, and the cost of a step from 8 to
1,024 GPUs, modelled.

    python benchmarks/scaling.py [--json] [--full] [--parts index checkpoint start plan] [--out
    FOLDER]

Measured, on this machine, each in a process of its own:

    index        the start of the loader and its first batch, on data sets of 10^10 to 1.3 * 10^12
                 tokens. The manifest and the names of all shards are real; a few shards are written
                 in full by the code of `prepare` (offsets, sources, checksums; token ids are 0,
                 holes in the file), and all names are hard links to these. Their pages are dropped
                 from memory before each start.
    checkpoint   the list of files and tensors of a checkpoint of many ranks: what the first rank
                 plans and writes, what every rank reads. The parts are those of the real plan; the
                 ranks' tensor files are holes of the right size and are not read.
    start        meshes and FSDP2 on a fake process group: what a rank computes by itself, no rank
                 answers; the first values of the model.

Modelled, by `emotrain plan` (a dry run and a model of the hardware; nothing is timed):

    plan         tokens/s, memory and bytes in collectives a GPU for each number of GPUs and each
                 `ep`, with a constant global batch (micro-batches get smaller where a GPU has fewer
                 sequences than the configured one) and with a constant batch a GPU (one
                 micro-batch).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _measure import Timing, arguments, machine, report
from _simulated import forget_pages, in_fresh_process, link_index, write_shards

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("index", "checkpoint", "start", "plan")
BATCHES = {"global": "constant global batch", "per_gpu": "constant batch a GPU"}
UNITS = ("seconds", "cpu_seconds", "peak_mib")
"""Wall time and processor time: on a busy machine the first grows, the second hardly."""
FULL = {"ranks": 1024, "gpus": [8, 16, 32, 64, 128, 256, 512, 1024], "ep": [1, 2, 4, 8]}
"""Options that --full stands for."""
TOKENS = 10**12
"""The size that `loader_...` are about: the smallest measured index of at least so many tokens,
else the largest."""


def measure_index(
    args: argparse.Namespace, folder: Path, timings: dict[str, Timing]
) -> dict[str, Any]:
    """Starts of the loader on data sets of `--shards` shards."""
    infos = write_shards(
        folder / "distinct", args.shard_tokens, args.document_tokens, args.distinct
    )
    sizes = {
        count: link_index(folder / "distinct", infos, folder / str(count), count)
        for count in sorted(args.shards)
    }
    chosen = next((count for count, size in sizes.items() if size["tokens"] >= TOKENS), max(sizes))
    arms = {(count, 0) for count in sizes} | {(chosen, args.resume_step)}
    taken: dict[tuple[int, int], list[dict[str, float]]] = {arm: [] for arm in sorted(arms)}
    for _ in range(args.repeats):
        for (count, step), runs in taken.items():
            forget_pages(folder / str(count))
            runs.append(
                in_fresh_process(
                    "start_loader",
                    folder=str(folder / str(count)),
                    sequence_length=args.sequence_length,
                    first_step=step,
                    steps=args.steps,
                    sequences=args.sequences,
                    global_batch=args.global_batch,
                )
            )
    medians = {
        arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for arm, runs in taken.items()
    }
    for (count, step), runs in taken.items():
        where = f"{sizes[count]['tokens']:.3g} tokens in {count:,} shards" + (
            f", step {step:,}" if step else ""
        )
        timings[f"loader start, {where}"] = Timing(
            tuple(run["start_seconds"] * 1e3 for run in runs)
        )
        timings[f"loader start and first batch, {where}"] = Timing(
            tuple(run["first_batch_seconds"] * 1e3 for run in runs)
        )
    smallest, largest = min(sizes), max(sizes)
    per_shard = (
        medians[largest, 0]["start_cpu_seconds"] - medians[smallest, 0]["start_cpu_seconds"]
    ) / max(1, largest - smallest)
    resumed = medians[chosen, args.resume_step]
    return (
        {f"index_{key}": value for key, value in sizes[chosen].items()}
        | {f"loader_{key}": value for key, value in medians[chosen, 0].items()}
        | {
            "loader_start_cpu_microseconds_per_shard": per_shard * 1e6,
            "loader_resume_step": args.resume_step,
            "loader_resume_seconds": resumed["first_batch_seconds"],
            "loader_resume_cpu_seconds": resumed["first_batch_cpu_seconds"],
            "loader_resume_peak_mib": resumed["first_batch_peak_mib"],
            "loader_by_shards": {str(count): sizes[count] | medians[count, 0] for count in sizes},
        }
    )


def measure_checkpoint(
    args: argparse.Namespace, folder: Path, timings: dict[str, Timing]
) -> dict[str, Any]:
    """Metadata of a checkpoint of `--ranks` ranks; `manifest_...` are what the first rank does
    to write it."""
    common = {
        "config": args.config,
        "settings": args.settings,
        "world_size": args.ranks,
        "folder": str(folder),
    }
    saved = in_fresh_process("save_metadata", **common)
    loaded = in_fresh_process("load_metadata", **common)
    for name, seconds in (
        ("plan all ranks' parts", saved["plan_seconds"]),
        ("write index and manifest", saved["write_seconds"]),
        ("read and check them", loaded["read_seconds"]),
        ("plan a rank's reads", loaded["load_plan_seconds"]),
    ):
        timings[f"checkpoint of {args.ranks:,} ranks: {name}"] = Timing((seconds * 1e3,))
    results = {
        "manifest_ranks": args.ranks,
        "manifest_files": saved["files"],
        "manifest_parts": saved["parts"],
        "manifest_bytes": saved["metadata_bytes"],
        "manifest_tensor_bytes": saved["tensor_bytes"],
    }
    for key, run, name in (
        ("manifest_plan", saved, "plan"),
        ("manifest", saved, "write"),
        ("manifest_read", loaded, "read"),
        ("manifest_load_plan", loaded, "load_plan"),
    ):
        results |= {f"{key}_{unit}": run[f"{name}_{unit}"] for unit in UNITS}
    return results


def measure_start(
    args: argparse.Namespace, folder: Path, timings: dict[str, Timing]
) -> dict[str, Any]:
    """What a rank does by itself before its first step."""
    results: dict[str, Any] = {"start_ranks": args.ranks}
    for world_size in (8, args.ranks):
        run = in_fresh_process(
            "start_meshes", config=args.config, settings=args.settings, world_size=world_size
        )
        for key, name in (("meshes", "process groups"), ("parallelize", "plan of the model")):
            timings[f"{name}, {world_size:,} ranks"] = Timing((run[f"{key}_seconds"] * 1e3,))
            if world_size == args.ranks:
                results |= {f"{key}_{unit}": run[f"{key}_{unit}"] for unit in UNITS}
    drawn = in_fresh_process("draw_initial_values", config=args.config, numbers=args.numbers)
    return results | {
        "initial_values_per_cpu_second": drawn["numbers_per_cpu_second"],
        "initial_values_rate_in_that_of_trunc_normal": drawn["of_torch"],
        "initial_values": drawn["all_numbers"],
        "initial_values_extrapolated_cpu_seconds": drawn["cpu_seconds"],
    }


def model_plan(
    args: argparse.Namespace, folder: Path, timings: dict[str, Timing]
) -> dict[str, Any]:
    """The grid of `emotrain plan`; `impossible` says why where a layout cannot be."""
    cases = [
        (args.config, args.gpu, batch, gpus, ep, args.global_batch)
        for batch in BATCHES
        for gpus in args.gpus
        for ep in args.ep
    ]
    if args.jobs == 1:
        return {"plan_gpu": args.gpu, "plan": [_plan_case(case) for case in cases]}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        return {"plan_gpu": args.gpu, "plan": list(pool.map(_plan_case, cases))}


def _plan_case(case: tuple[str, str, str, int, int, int]) -> dict[str, Any]:
    """One layout on one cluster. With a constant global batch a micro-batch is no larger than
    what a GPU has of it."""
    import warnings

    from emotrain.config import load_config
    from emotrain.distributed.mesh import Layout
    from emotrain.planning.hardware import Cluster, find_gpu
    from emotrain.planning.plan import make_plan
    from emotrain.planning.search import extrapolated
    from emotrain.planning.stand_ins import Routing

    warnings.filterwarnings("ignore")
    config, gpu, batch, world_size, ep, global_batch = case
    micro_batch = load_config(config).training.micro_batch
    if batch == "global":
        micro_batch = min(micro_batch, max(1, global_batch // world_size))
    else:
        global_batch = micro_batch * world_size
    result: dict[str, Any] = {
        "batch": batch,
        "gpus": world_size,
        "ep": ep,
        "micro_batch": micro_batch,
        "global_batch": global_batch,
    }
    try:
        configured = load_config(
            config,
            [
                f"parallel.ep={ep}",
                f"training.micro_batch={micro_batch}",
                f"training.global_batch={global_batch}",
            ],
        )
        Layout.check(configured, world_size)
    except ValueError as error:
        return result | {"impossible": str(error)}
    cluster = Cluster(find_gpu(gpu), max(1, world_size // 8), min(8, world_size))
    plan = make_plan(configured, cluster, measured=extrapolated(configured, cluster, Routing()))
    sent: dict[str, int] = {}
    for by_axis in plan.measured.bytes_by_kind_and_axis().values():
        for axis, number in by_axis.items():
            sent[axis] = sent.get(axis, 0) + number
    return result | {
        "tokens_per_second_per_gpu": plan.tokens_per_second,
        "step_seconds": plan.times["expected"].step,
        "mfu": plan.mfu,
        "peak_gib": plan.peak_gib,
        "fits": plan.fits,
        "state_gib": sum(plan.measured.state_bytes.values()) / 2**30,
        "micro_batches": plan.measured.micro_batches,
        "communication_bytes_by_axis": sent,
    }


def plan_tables(rows: Sequence[dict[str, Any]]) -> str:
    """The grid as Markdown, a table for each way to hold the batch."""
    lines: list[str] = []
    for batch, title in BATCHES.items():
        names = (
            "GPUs",
            "ep",
            "sequences a step",
            "micro-batches",
            "tokens/s",
            "peak GiB",
            "fits",
            "state GiB",
            "GB in collectives",
        )
        lines += [
            f"### A step of one GPU, {title} (modelled)",
            "",
            f"| {' | '.join(names)} |",
            "|---" * len(names) + "|",
        ]
        for row in (row for row in rows if row["batch"] == batch):
            start = f"| {row['gpus']:,} | {row['ep']} | {row['global_batch']:,} | "
            if "impossible" in row:
                lines.append(f"{start}{row['impossible']} |  |  |  |  |  |")
                continue
            sent = ", ".join(
                f"{axis} {number / 1e9:.1f}"
                for axis, number in sorted(row["communication_bytes_by_axis"].items())
                if number > 1e6
            )
            lines.append(
                f"{start}{row['micro_batches']} x {row['micro_batch']} | "
                f"{row['tokens_per_second_per_gpu']:,.0f} | "
                f"{row['peak_gib']:.1f} | {'yes' if row['fits'] else 'no'} | "
                f"{row['state_gib']:.1f} | {sent} |"
            )
        lines.append("")
    return "\n".join(lines)


def plan_figure(rows: Sequence[dict[str, Any]]) -> bytes:
    """Tokens/s, gigabytes in collectives and memory of a GPU over their number: a line an ep, a
    row for each way to hold the batch."""
    from emotrain.evaluation.figures import COLORS, STYLES, png

    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("tokens/s a GPU", lambda row: row["tokens_per_second_per_gpu"]),
        (
            "GB in collectives, a GPU and step",
            lambda row: sum(row["communication_bytes_by_axis"].values()) / 1e9,
        ),
        ("peak memory, GiB (hollow: does not fit)", lambda row: row["peak_gib"]),
    )

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, len(panels), squeeze=False)
        for axes_row, (batch, title) in zip(grid, BATCHES.items(), strict=True):
            for axes, (name, value) in zip(axes_row, panels, strict=True):
                for index, ep in enumerate(sorted({row["ep"] for row in rows})):
                    found = [
                        row
                        for row in rows
                        if row["batch"] == batch and row["ep"] == ep and "impossible" not in row
                    ]
                    axes.plot(
                        [row["gpus"] for row in found],
                        [value(row) for row in found],
                        color=COLORS[index],
                        linestyle=STYLES[index % len(STYLES)],
                        label=f"ep {ep}",
                        linewidth=1.4,
                    )
                    for row in found:
                        axes.plot(
                            row["gpus"],
                            value(row),
                            marker="o",
                            color=COLORS[index],
                            markersize=4,
                            fillstyle="full" if row["fits"] else "none",
                        )
                axes.set(title=f"{name}\n{title}", xlabel="GPUs")
                axes.set_xscale("log", base=2)
                axes.set_xticks(
                    sorted({row["gpus"] for row in rows}),
                    [str(gpus) for gpus in sorted({row["gpus"] for row in rows})],
                )
                axes.set_ylim(bottom=0)
        grid[0][0].legend(fontsize="small", frameon=False)
        figure.suptitle("A model (emotrain plan), not a measurement", fontsize="medium")

    return png(draw, (11, 6.4))


def plan_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of the picture."""
    from emotrain.tables import csv_text

    header = ("batch", "ep", "gpus", "tokens_per_second_per_gpu", "communication_bytes_per_step",
              "peak_gib", "fits")  # fmt: skip
    found = (row for row in rows if "impossible" not in row)
    return csv_text(
        header,
        (
            (*(row[key] for key in header[:4]), sum(row["communication_bytes_by_axis"].values()))
            + (row["peak_gib"], row["fits"])
            for row in found
        ),
    )


def main() -> None:
    parser = arguments(__doc__, repeats=2)
    option = parser.add_argument
    option(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do (default: all)"
    )
    option(
        "--shards",
        type=int,
        nargs="+",
        default=[75, 7451, 10000],
        help="shards of the data sets (default: %(default)s)",
    )
    option(
        "--shard-tokens",
        type=int,
        default=2**27,
        help="tokens of a shard (default: %(default)s, as `emotrain prepare`)",
    )
    option(
        "--document-tokens",
        type=int,
        default=800,
        help="mean tokens of a document (default: %(default)s)",
    )
    option(
        "--distinct",
        type=int,
        default=2,
        help="shards that are written; the others are links to them (default: %(default)s)",
    )
    option(
        "--sequence-length",
        type=int,
        default=4096,
        help="tokens of a sequence (default: %(default)s)",
    )
    option(
        "--global-batch", type=int, default=1024, help="sequences of a step (default: %(default)s)"
    )
    option(
        "--sequences",
        type=int,
        default=8,
        help="of these on a rank that the loader is started for (default: %(default)s)",
    )
    option(
        "--resume-step",
        type=int,
        default=200_000,
        help="step of the second first batch (default: %(default)s)",
    )
    option(
        "--steps",
        type=int,
        default=20,
        help="steps read after the first batch (default: %(default)s)",
    )
    option("--full", action="store_true", help=f"the sizes that are reported, some minutes: {FULL}")
    option(
        "--ranks",
        type=int,
        default=256,
        help="processes of the simulated job (default: %(default)s)",
    )
    option(
        "--numbers",
        type=int,
        default=10**7,
        help="initial values that are made (default: %(default)s)",
    )
    option(
        "--config",
        default=str(ROOT / "configs/emo_1b14b_1t.yaml"),
        help="model of checkpoint, start and plan (default: %(default)s)",
    )
    option(
        "--gpus",
        type=int,
        nargs="+",
        default=[8, 128, 1024],
        help="sizes of the cluster (default: %(default)s)",
    )
    option(
        "--ep",
        type=int,
        nargs="+",
        default=[1, 8],
        help="expert-parallel sizes (default: %(default)s)",
    )
    option("--gpu", default="h100-80gb", help="kind of GPU (default: %(default)s)")
    option("--jobs", type=int, default=2, help="layouts planned at a time (default: %(default)s)")
    option(
        "--out",
        help="folder for scaling.json and, of the plan, scaling.md, scaling.png (needs "
        "matplotlib) and its numbers as scaling.csv",
    )
    args = parser.parse_args()
    if args.full:
        vars(args).update(FULL)
    args.settings = [
        f"parallel.ep={max(args.ep)}",
        "training.micro_batch=1",
        f"training.global_batch={args.ranks}",
    ]
    results: dict[str, Any] = {}
    timings: dict[str, Timing] = {}
    folder = Path(tempfile.mkdtemp(prefix="emotrain-scaling-"))
    try:
        for part, measure in (
            ("index", measure_index),
            ("checkpoint", measure_checkpoint),
            ("start", measure_start),
            ("plan", model_plan),
        ):
            if part in args.parts:
                results |= measure(args, folder / part, timings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "plan" in results:
        print(plan_tables(results["plan"]), file=sys.stderr)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "scaling.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        if "plan" in results:
            (out / "scaling.md").write_text(plan_tables(results["plan"]), encoding="utf-8")
            (out / "scaling.png").write_bytes(plan_figure(results["plan"]))
            (out / "scaling.csv").write_text(plan_csv(results["plan"]), encoding="utf-8")
    if timings:
        single = {
            key: value for key, value in results.items() if not isinstance(value, (dict, list))
        }
        report("Measured: metadata at simulated size", timings, single, as_json=False)
    if args.json:
        times = {
            name: {"median_ms": timing.median, "min_ms": timing.minimum}
            for name, timing in timings.items()
        }
        print(json.dumps({**results, "times": times, "machine": machine()}))


if __name__ == "__main__":
    main()
