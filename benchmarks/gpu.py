"""What one GPU can prove and measure of emotrain, in one command and about 30 minutes.

    python benchmarks/gpu.py --out gpu-results [--minutes 30] [--phases env,correct] [--redo PHASE]
    [--items PATTERN] [--tiny] [--device cpu] [--json]

    env           versions, and the rates of copies, products, sorts
    correct       every kernel against its twin, twice for equal bits; FSDP2 and the all-to-all
                  dispatcher over one rank
    sync          where a step makes the host wait for the device: at most 6 times
    kernels       each launch of a published layer; the layer beside torch's grouped GEMM and a loop
    tune          every tile worth timing; prints the table to paste into kernels/tuning.py
    model         a layer at full width, time and memory, beside the plan's and transformers' OLMoE
    rates         the entries of emotrain/planning/hardware.py as measured; --apply writes them
    determinism   whether two runs give the same bits
    train         a run to its end, beside a CPU's, resumed, its checkpoint read on a CPU

Each phase writes OUT/PHASE.json after every item and gets its share of --minutes. The same command
goes on where an earlier one ended: what a file holds is not measured again, unless --redo names the
phase. On a GPU each phase is a process of its own, so that a kernel that hangs or breaks the device
ends one phase. Exit code 1: a check failed. No network is used, and no package beyond the
machine's own and what benchmarks/gpu_wheels.sh has put into .gpu_wheels.

`--tiny --device cpu` runs everything at tiny sizes, kernels in Triton's interpreter: it shows that
this program works, and its numbers say nothing of any GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".gpu_wheels"
SHARES = {
    "env": 1.0,
    "correct": 5.0,
    "sync": 0.5,
    "kernels": 3.0,
    "tune": 7.0,
    "model": 6.0,
    "rates": 1.0,
    "determinism": 1.0,
    "train": 3.5,
}
"""Phases in their order, and their shares of the time."""
REPEATABLE = ("determinism", "train")
"""Phases that ask for equal bits: cuBLAS promises them with a workspace of its own for each stream,
which the others, that measure, do without."""
GRACE_S = 120.0
"""Seconds that a phase in a process of its own may take over its share, to end the item under
way."""


def use_wheels(folder: Path = WHEELS) -> None:
    """Make the packages of the wheels in `folder` importable that are not installed."""
    unpacked = folder / "unpacked"
    for wheel in sorted(folder.glob("*.whl")):
        try:
            importlib.metadata.distribution(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
    if unpacked.is_dir():
        sys.path.append(str(unpacked))


def use_memory_as_launchers_do() -> None:
    """What launch/pretrain.py sets before torch reads it."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def phases_of() -> dict[str, list[Callable[[Any], None]]]:
    """What each phase runs. Imported late: whether a kernel is interpreted or compiled is decided
    when it is defined."""
    import _gpu_kernels
    import _gpu_model
    import _gpu_rates
    import _gpu_rowwise

    return {
        "env": [_gpu_rates.env],
        "correct": [_gpu_kernels.correct, _gpu_rowwise.correct, _gpu_model.one_rank],
        "sync": [_gpu_model.sync],
        "kernels": [_gpu_kernels.kernels, _gpu_rowwise.kernels],
        "tune": [_gpu_kernels.tune],
        "model": [_gpu_model.model],
        "rates": [_gpu_rates.rates],
        "determinism": [_gpu_model.determinism],
        "train": [_gpu_model.train],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the files")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all phases together")
    parser.add_argument("--phases", default=",".join(SHARES), help="which, by comma")
    parser.add_argument("--redo", action="append", default=[], metavar="PHASE", help="start anew")
    parser.add_argument("--items", default="*", help="pattern of the items of a phase to do")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--here", action="store_true", help="phases in this process, on a GPU too")
    parser.add_argument(
        "--apply", action="store_true", help="write what rates measured into hardware.py"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object ends standard output")
    args = parser.parse_args(argv)
    args.phases = args.phases.split(",")
    for name in (*args.phases, *args.redo):
        if name not in SHARES:
            parser.error(f"{name} is no phase; choose of {', '.join(SHARES)}")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is a rehearsal at tiny sizes: add --tiny")
    if args.apply and args.tiny:
        parser.error("--apply is for measurements, and --tiny is a rehearsal: leave one out")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on. Raises SystemExit: a GPU is asked for and there is none."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU was found; --tiny --device cpu rehearses on a CPU")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    return {"device": args.device, "name": name, "tiny": args.tiny, "torch": torch.__version__}


def run_here(
    phase: str, args: argparse.Namespace, settings: dict[str, Any], seconds: float
) -> None:
    from _gpu_run import PhaseRun

    run = PhaseRun(phase, args.out / f"{phase}.json", settings, seconds, args.items)
    for part in phases_of()[phase]:
        part(run)
    run.save(whole=args.items == "*" and not run.content["left_out"])


def run_alone(
    phase: str, args: argparse.Namespace, settings: dict[str, Any], seconds: float
) -> None:
    """The phase in a process of its own; that it broke or hung is written into its file."""
    from _gpu_run import PhaseRun

    command = [sys.executable, str(Path(__file__).resolve()), "--here", "--phases", phase]
    command += ["--out", str(args.out), "--minutes", str(seconds / 60), "--items", args.items]
    command += ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if phase in REPEATABLE else {}
    try:
        limit = seconds + GRACE_S
        done = subprocess.run(command, timeout=limit, check=False, env=os.environ | workspace)
        code = done.returncode
        # 1 is that of a failed check, which the file names.
        broken = "" if code in (0, 1) else f"the process ended with code {code}"
    except subprocess.TimeoutExpired:
        broken = f"the process was still running {GRACE_S:g} s after its share of time"
    run = PhaseRun(phase, args.out / f"{phase}.json", settings, 0)
    run.content["failed"].pop("process", None)
    if not broken and not run.path.is_file():
        broken = "the process wrote nothing"
    if broken:
        run.content["failed"]["process"] = broken
        run.save()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    use_wheels()
    if args.device == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if args.device == "cuda":
        use_memory_as_launchers_do()
    from _gpu_run import log, read_phase

    settings = settings_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for phase in args.redo:
        (args.out / f"{phase}.json").unlink(missing_ok=True)
    ends = time.monotonic() + 60 * args.minutes
    contents: dict[str, dict[str, Any]] = {}
    for index, phase in enumerate(args.phases):
        path = args.out / f"{phase}.json"
        before = read_phase(path)
        if before is not None and before["whole"] and before["settings"] == settings:
            log(f"== {phase}: {path} is whole (--redo {phase} measures again)")
        else:
            left = sum(SHARES[name] for name in args.phases[index:])
            seconds = max(0.0, ends - time.monotonic()) * SHARES[phase] / left
            log(f"== {phase}: {seconds:.0f} s")
            alone = args.device == "cuda" and not args.here
            (run_alone if alone else run_here)(phase, args, settings, seconds)
        contents[phase] = read_phase(path) or {}
    result = summary(contents, settings)
    log(describe(result))
    if args.apply and result["hardware_rates"]:
        from _gpu_apply import apply_rates

        path = ROOT / "emotrain/planning/hardware.py"
        log(f"{path}: {', '.join(apply_rates(result['hardware_rates'], path))} as measured")
    if args.json:
        print(json.dumps(result))
    return 1 if result["failed"] else 0


def summary(contents: dict[str, dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """What `--json` prints."""

    def by_phase(key: str) -> dict[str, Any]:
        return {phase: content[key] for phase, content in contents.items() if content.get(key)}

    def item(phase: str, name: str) -> Any:
        return contents.get(phase, {}).get("items", {}).get(name)

    tuned, rates = item("tune", "chosen"), item("rates", "hardware.py")
    return {
        "settings": settings,
        "whole": [phase for phase, content in contents.items() if content.get("whole")],
        "items": {phase: len(content.get("items", {})) for phase, content in contents.items()},
        "failed": by_phase("failed"),
        "skipped": by_phase("skipped"),
        "left_out": by_phase("left_out"),
        "host_waits_per_step": (item("sync", "waits of a step") or {}).get("waits"),
        "tuning_table": tuned["table"] if tuned else None,
        "hardware_rates": rates,
    }


def describe(result: dict[str, Any]) -> str:
    """The summary for people."""
    lines = []
    for title, key in (
        ("kernels/tuning.py, DEFAULTS:", "tuning_table"),
        ("emotrain/planning/hardware.py, RATES:", "hardware_rates"),
    ):
        if result[key]:
            lines += [title, result[key]]
    for phase, names in result["left_out"].items():
        lines.append(
            f"no time was left for {len(names)} items of {phase}; the same command goes on"
        )
    for phase, faults in result["failed"].items():
        lines += [f"FAILED {phase}: {name}: {text}" for name, text in faults.items()]
    if result["settings"]["device"] == "cpu":
        lines.append("A rehearsal on a CPU: these numbers say nothing of a GPU.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
