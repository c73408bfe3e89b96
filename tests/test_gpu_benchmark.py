"""Proves that benchmarks/gpu.py works before there is a GPU: all of its phases run at tiny sizes on
a CPU, go on where they ended, and fail where a kernel is wrong."""

from __future__ import annotations

import fnmatch
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT, run_command
from tests.processes import forked, run_script

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'emotrain[kernels]'")
# Rows past the last token are -inf everywhere; their softmax is selected away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BENCHMARKS = ROOT / "benchmarks"
TINY = ["--tiny", "--device", "cpu", "--json"]


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the JSON of one run of every phase, as a command."""
    out = tmp_path_factory.mktemp("gpu")
    done = run_script(BENCHMARKS / "gpu.py", *TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "logs belong to standard error"
    return out, json.loads(done.stdout)


def test_every_phase_runs_on_a_cpu(whole, gpu):
    out, result = whole
    assert result["whole"] == list(gpu.SHARES)
    assert not result["failed"] and not result["left_out"]
    for phase in gpu.SHARES:
        content = json.loads((out / f"{phase}.json").read_text())
        assert content["items"] and content["settings"]["name"] == "CPU", phase
    # What a CPU cannot do is named; everything else was done.
    assert set(result["skipped"]) <= {"correct", "model"}
    assert 1 <= result["host_waits_per_step"] <= 6
    layers = json.loads((out / "kernels.json").read_text())["items"]
    arms = next(row["ms"] for name, row in layers.items() if name.startswith("layer"))
    assert set(arms) == {"triton", "grouped_mm", "loop"}
    for name in ("rms_norm", "rotate_heads", "swiglu_down"):
        row = layers[f"rowwise {name}"]
        assert set(row["ms"]) == {"triton", "twin", "eager"} and len(row["launches"]) == 2
    assert set(layers["head T30"]["ms"]) == {"triton", "torch"}


def test_the_tables_can_be_pasted(whole):
    from emotrain.kernels.tuning import GEMM_KERNELS, WALKERS, TileConfig
    from emotrain.planning.hardware import RATES, Rate

    _, result = whole
    table = eval("{" + result["tuning_table"] + "}", {"torch": torch, "TileConfig": TileConfig})
    tiles = table[torch.bfloat16]
    assert set(tiles) == set(GEMM_KERNELS)
    assert len({tiles[name].rows for name in WALKERS}) == 1, "they walk the same tiles"
    rates = eval("{" + result["hardware_rates"] + "}", {"Rate": Rate})
    assert {"dense_gemm", "grouped_gemm", "flash_attention", "memory", "host_s"} <= set(rates)
    for name, rate in rates.items():
        ordered = [rate.pessimistic, rate.value, rate.optimistic]
        falls = RATES[name].optimistic < RATES[name].pessimistic
        assert ordered == sorted(ordered, reverse=falls), name
        assert rate.kind == "measured" and "not timed" not in rate.meaning


def test_measured_rates_take_the_place_of_assumed_ones(whole, gpu, tmp_path, capsys):
    from _gpu_apply import apply_rates

    from emotrain.planning.hardware import RATES, Rate

    entries = whole[1]["hardware_rates"]
    measured = eval("{" + entries + "}", {"Rate": Rate})
    file = tmp_path / "hardware.py"
    file.write_text((ROOT / "emotrain/planning/hardware.py").read_text())
    for _ in range(2):  # what was measured is measured again
        assert set(apply_rates(entries, file)) == set(measured)
        written = runpy.run_path(str(file), run_name="emotrain.planning.hardware")["RATES"]
        shown = {name: vars(rate) for name, rate in written.items()}
        assert shown == {name: vars(rate) for name, rate in (RATES | measured).items()}
    assert max(map(len, file.read_text().splitlines())) <= 100
    with pytest.raises(SystemExit):
        gpu.main(["--tiny", "--device", "cpu", "--apply"])
    assert "--apply is for measurements" in capsys.readouterr().err


def test_the_same_command_goes_on(whole, gpu, capsys):
    """A whole phase is not measured again, unless it is named."""
    out, _ = whole
    path = out / "env.json"
    before = path.read_text()
    arguments = [*TINY, "--out", str(out), "--phases", "env"]
    assert gpu.main(arguments) == 0 and path.read_text() == before
    assert gpu.main([*arguments, "--redo", "env"]) == 0 and path.read_text() != before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["whole"] == ["env"]


def test_a_phase_without_time_says_what_it_left_out(tmp_path, gpu, capsys):
    arguments = [*TINY, "--out", str(tmp_path), "--phases", "env"]
    assert gpu.main([*arguments, "--minutes", "0"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not result["whole"] and "versions" in result["left_out"]["env"]
    # Part of it is there: only the rest is measured.
    path = tmp_path / "env.json"
    content = json.loads(path.read_text())
    content["items"]["copy TB/s"] = -1.0
    path.write_text(json.dumps(content))
    assert gpu.main(arguments) == 0
    content = json.loads(path.read_text())
    assert content["whole"] and content["items"]["copy TB/s"] == -1.0


def test_a_file_of_another_machine_is_not_gone_on_from(tmp_path, gpu):
    arguments = [*TINY, "--out", str(tmp_path), "--phases", "sync"]
    assert gpu.main(arguments) == 0
    path = tmp_path / "sync.json"
    content = json.loads(path.read_text())
    content["settings"]["name"], content["items"] = "NVIDIA H100", {"waits of a step": {"waits": 0}}
    path.write_text(json.dumps(content))
    assert gpu.main(arguments) == 0
    assert json.loads(path.read_text())["items"]["waits of a step"]["waits"] > 0


AHEAD = """
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from _gpu_compile import Attempt, _compile, compile_ahead
from _gpu_kernels import TINY
from emotrain.kernels.tuning import TileConfig, default_tiles

def kept():
    return {p.name for p in Path(os.environ["TRITON_CACHE_DIR"]).iterdir() if p.is_dir()}

if __name__ == "__main__":
    base = default_tiles("sm_90", torch.bfloat16)
    tiles = [TileConfig(64, 64, 32, 4, 3, group=group) for group in (1, 4)]
    attempts = [Attempt("weight_grad", tile, base) for tile in tiles]
    of_layer = ("sm_90", torch.bfloat16, TINY)
    none = compile_ahead(*of_layer, attempts[:1], 0, False)
    assert none["left"] == 1, none
    done = compile_ahead(*of_layer, [*attempts, Attempt("rows", tiles[0], base)], 300, False)
    assert (done["compiled"], done["refused"], done["left"]) == (2, 1, 0), done
    before = kept()
    for attempt in attempts:
        _compile(*of_layer, attempt, False)
    assert before and kept() == before, "it was compiled again"
    _compile(*of_layer, Attempt("weight_grad", TileConfig(64, 64, 32, 4, 4), base), False)
    assert kept() > before
"""


@pytest.mark.long
def test_tiles_are_compiled_by_other_processes_before_they_are_timed(tmp_path, monkeypatch):
    """For a GPU that is not there: the process that times finds all of it in Triton's cache. Rows
    that other kernels do not share are refused, as they are when timed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    program = tmp_path / "program.py"
    program.write_text(AHEAD)
    done = run_command(str(program), str(BENCHMARKS), timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]


def wrong_values(monkeypatch) -> None:
    """Of the result and the gradient of x."""
    from emotrain.kernels import triton_grouped_mlp as module

    real = module.combine_rows
    monkeypatch.setattr(module, "combine_rows", lambda *a: real(*a) * 1.02)


def wrong_weight_gradient(monkeypatch) -> None:
    from emotrain.kernels import triton_grouped_mlp as module

    real = module._weight_grad
    monkeypatch.setattr(module, "_weight_grad", lambda *a: real(*a) * 1.02)


def unwritten_row(monkeypatch) -> None:
    """The rows of one expert's last tile stay as the memory was."""
    from emotrain.kernels import triton_grouped_mlp as module

    real = module._multiply_rows

    def leaves_out(a_RJ, *rest, **options):
        y_RD = real(a_RJ, *rest, **options)
        y_RD[0] = torch.empty_like(y_RD[0])
        return y_RD

    monkeypatch.setattr(module, "_multiply_rows", leaves_out)


def other_bits(monkeypatch) -> None:
    """Every call rounds otherwise, as a sum by float atomics does."""
    from emotrain.kernels import triton_grouped_mlp as module

    real, calls = module.combine_rows, iter(range(10**6))
    monkeypatch.setattr(
        module, "combine_rows", lambda *a: real(*a) * (1 + 1e-6 * (next(calls) % 3))
    )


def wrong_choices(monkeypatch) -> None:
    from dataclasses import replace

    from emotrain.kernels import triton_routing as module

    real = module.decide_in_triton

    def shifted(*arguments, **options):
        decision = real(*arguments, **options)
        return replace(decision, experts_TK=decision.experts_TK.flip(1))

    monkeypatch.setattr(module, "decide_in_triton", shifted)


def wrong_rotation(monkeypatch) -> None:
    from emotrain.kernels import triton_rowwise as module

    real = module.rotate_back
    monkeypatch.setattr(module, "rotate_back", lambda *a: real(*a) * 1.02)


FAULTS = [
    (wrong_rotation, "rowwise*"),
    (wrong_values, "experts*"),
    (wrong_weight_gradient, "experts*"),
    (unwritten_row, "experts*"),
    (other_bits, "experts*"),
    (wrong_choices, "routing*"),
]


@pytest.mark.parametrize(("fault", "items"), FAULTS)
def test_a_wrong_kernel_ends_in_1(whole, tmp_path, gpu, monkeypatch, capsys, fault, items):
    right = json.loads((whole[0] / "correct.json").read_text())
    assert fnmatch.filter(right["items"], items) and not right["failed"], "right without the fault"
    fault(monkeypatch)
    arguments = [*TINY, "--out", str(tmp_path), "--phases", "correct", "--items", items]
    assert gpu.main(arguments) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]["correct"]


def test_a_model_that_differs_over_one_rank_ends_in_1(tmp_path, gpu, monkeypatch):
    """The meshes, FSDP2 and the dispatcher are under test too."""
    from emotrain.distributed import dispatch

    arguments = [*TINY, "--out", str(tmp_path), "--phases", "correct", "--items", "one rank*joint"]
    real = dispatch.combine
    monkeypatch.setattr(dispatch, "combine", lambda *a, **k: real(*a, **k) * 1.01)
    assert gpu.main(arguments) == 1
    content = json.loads((tmp_path / "correct.json").read_text())
    assert "differs from the plain model" in content["failed"]["one rank with all meshes, joint"]


def test_a_process_that_breaks_or_hangs_is_a_failure(tmp_path, gpu, monkeypatch):
    """On a GPU a phase is a process of its own."""
    args = gpu.parse([*TINY, "--out", str(tmp_path), "--phases", "env"])
    settings = gpu.settings_of(args)

    def failed(run) -> str:
        monkeypatch.setattr(gpu.subprocess, "run", run)
        gpu.run_alone("env", args, settings, 1.0)
        content = json.loads((tmp_path / "env.json").read_text())
        assert not content["whole"]
        return content["failed"]["process"]

    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    assert "code -11" in failed(lambda *a, **k: SimpleNamespace(returncode=-11))
    assert "still running" in failed(hangs)


def test_a_phase_in_a_process_of_its_own(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(gpu.subprocess, "run", forked)
    args = gpu.parse([*TINY, "--out", str(tmp_path), "--phases", "env"])
    settings = gpu.settings_of(args)
    gpu.run_alone("env", args, settings, 60.0)
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["whole"] and content["settings"] == settings and not content["failed"]


@pytest.mark.parametrize("peer", ["through_grouped_mm", "through_loop"])
def test_the_peers_compute_the_same_in_bfloat16(gpu, peer):
    """As on a GPU: routing weights in float32, everything else in bfloat16."""
    import experts
    from _gpu_kernels import LIMITS, TINY, check_experts
    from _gpu_run import problem

    # grouped_mm wants rows of a multiple of 16 bytes.
    task = problem(TINY._replace(width=48, hidden=32), torch.bfloat16, torch.device("cpu"))
    check_experts(task, getattr(experts, peer), LIMITS[torch.bfloat16])


def test_an_item_that_raises_is_a_failure_and_the_next_one_runs(tmp_path, gpu):
    from _gpu_run import PhaseRun

    settings = {"device": "cpu", "tiny": True}
    run = PhaseRun("env", tmp_path / "env.json", settings, 60)
    assert run.item("broken", lambda: 1 / 0) is None
    assert run.item("next", lambda: 2) == 2
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["failed"] == {"broken": "ZeroDivisionError: division by zero"}
    assert content["items"] == {"next": 2} and not content["whole"]


def test_what_cannot_be_is_refused_in_a_line(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, code, text in (
        (["--device", "cpu"], 2, "add --tiny"),
        (["--phases", "env,corect"], 2, "corect is no phase"),
        (["--tiny"], "no GPU was found; --tiny --device cpu rehearses on a CPU", ""),
    ):
        with pytest.raises(SystemExit) as error:
            gpu.main(arguments)
        assert error.value.code == code and text in capsys.readouterr().err


def test_a_machine_without_pyarrow_leaves_training_out(tmp_path, gpu, monkeypatch, capsys):
    """Its wheel alone is as large as all that gpu_wheels.sh may bring."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert gpu.main([*TINY, "--out", str(tmp_path), "--phases", "train"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "pip install pyarrow" in result["skipped"]["train"]["data"] and not result["failed"]
    assert result["items"]["train"] == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ("expandable_segments:True", None)), ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, (None, "a:1"))],
)
def test_memory_grows_in_place_as_under_a_launcher(gpu, monkeypatch, given, expected):
    """Set before torch looks for a GPU, and in all processes that phases are run in."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # is put back at the end
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = []

    def look() -> bool:
        seen.append(tuple(map(os.environ.get, names)))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", look)
    with pytest.raises(SystemExit, match="no GPU was found"):
        gpu.main([])
    assert seen == [expected]


@pytest.mark.parametrize(("left_s", "most_s"), [(-20, 60), (100, 160), (1000, 300)])
def test_the_sanitizer_ends_before_its_phase_is_ended(tmp_path, gpu, monkeypatch, left_s, most_s):
    """That it took too long is no failure."""
    import _gpu_kernels

    def hangs(command, timeout, **options):
        assert most_s - 5 < timeout <= most_s < left_s + gpu.GRACE_S
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(_gpu_kernels.shutil, "which", lambda name: f"/{name}")
    monkeypatch.setattr(_gpu_kernels.subprocess, "run", hangs)
    deadline = _gpu_kernels.time.monotonic() + left_s
    run = SimpleNamespace(is_cuda=True, deadline=deadline, path=tmp_path / "correct.json")
    with pytest.raises(_gpu_kernels.Skipped, match="not done within"):
        _gpu_kernels._sanitized(run, "memcheck")


@pytest.mark.parametrize(("size", "code"), [(1000, 0), (46_000_000, 1)])
def test_wheels_that_are_too_large_are_refused(tmp_path, size, code):
    """pip is replaced: no network is used."""
    pip = tmp_path / "python"
    folder = tmp_path / "wheels"
    pip.write_text(f"#!/bin/sh\ntruncate -s {size} {folder}/a-1-py3-none-any.whl\n")
    pip.chmod(0o755)
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_wheels.sh"), str(folder)],
        env=os.environ | {"PYTHON": str(pip)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr


def test_wheels_are_used_where_a_package_is_not_installed(tmp_path, gpu, monkeypatch):
    import zipfile

    for name in ("torch-2.13.0", "unheard_of-1.0"):
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.partition('-')[0]}/__init__.py", "here = True\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu.use_wheels(tmp_path)
    import unheard_of

    assert unheard_of.here and not (tmp_path / "unpacked/torch").exists()
