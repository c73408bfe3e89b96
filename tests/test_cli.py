"""Proves how commands end: one line for what a person can mend, a traceback for a defect, and exit
codes that a cluster can act on. Also that a launcher's variables are read with care."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import emotrain
from emotrain.cli import guarded, main
from emotrain.commands import COMMANDS
from emotrain.config import config_from_dict, save_config
from emotrain.distributed.launcher import Launch
from emotrain.errors import MissingPackageError, RunError, UserError
from tests.conftest import ROOT, run_command, tiny_settings
from tests.processes import run_script


def raising(error: BaseException) -> Any:
    def run() -> int:
        raise error

    return run


# ---- classes of errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("lr=-1 must\n be positive"), 2, "error: lr=-1 must be positive"),
        (MissingPackageError("no rich"), 2, "error: no rich"),
        (RunError("rank 3 is lost"), 1, "error: rank 3 is lost"),
        (
            OSError(28, "No space left on device", "a/b"),
            1,
            "error: a/b: No space left on device; free space or choose another folder",
        ),
        (PermissionError(13, "Permission denied", "c"), 1, "error: c: Permission denied"),
        (
            OSError(18, "Invalid cross-device link", "c", None, "d"),
            1,
            "error: c -> d: Invalid cross-device link",
        ),
        (OSError(5, "Input/output error"), 1, "error: Input/output error"),
        (BrokenPipeError(32, "Broken pipe"), 1, "error: Broken pipe"),  # of some socket
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error)) == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    "error",
    [ValueError("a"), RuntimeError("b"), KeyError("c"), OSError("made by a library"), TypeError()],
)
def test_a_defect_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded(raising(error))


def test_a_shape_bug_shows_its_file_and_line(tmp_path: Path) -> None:
    """What a researcher sees who changes an idea and gets a shape wrong."""
    plant = (
        "import sys, torch\n"
        "from emotrain import inspection\n"
        "from emotrain.cli import main\n"
        "def planted(config):\n"
        "    return torch.ones(5, 7) @ torch.ones(5, 7)\n"
        "import emotrain.commands.inspect as command\n"
        "command.run_costs = planted\n"
        f"sys.exit(main(['inspect', {str(ROOT / 'configs/quickstart.yaml')!r}]))\n"
    )
    script = tmp_path / "planted.py"
    script.write_text(plant)
    done = run_script(script)
    assert done.returncode == 1
    assert f'File "{script}", line 5, in planted' in done.stderr
    assert "mat1 and mat2 shapes cannot be multiplied" in done.stderr


def test_a_traceback_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMOTRAIN_TRACEBACK", "1")
    assert guarded(raising(UserError("lr"))) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: lr\n")


def test_exit_codes_are_in_the_help_and_in_the_page_for_clusters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text, page = capsys.readouterr().out, (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for code in (0, 1, 2, 75, 130):
        assert re.search(rf"^ *{code}  ", text, re.MULTILINE), code
        assert re.search(rf"^\| {code} \|", page, re.MULTILINE), code
    assert "EMOTRAIN_TRACEBACK" in text and "EMOTRAIN_TRACEBACK" in page


# ---- stdout


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("environment", [BUFFERED, {**os.environ, "PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize(
    "words", [["settings"], ["settings", "--json"], ["--help"], ["inspect", "--help"]]
)
def test_a_reader_that_has_enough_is_no_error(
    words: list[str], environment: dict[str, str]
) -> None:
    """As `| head`: the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "emotrain.cli", *words],
        cwd=ROOT,
        env=environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    # argparse, unbuffered, notices nothing.
    assert done.returncode == (0 if environment is not BUFFERED and "--help" in words else 141)


def test_the_package_runs_as_the_command() -> None:
    done = run_command("-m", "emotrain", "--version")
    assert (done.returncode, done.stdout) == (0, f"emotrain {emotrain.__version__}\n"), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["settings", "--json"], ["--version"]])
def test_a_full_disk_behind_stdout_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "emotrain.cli", *words],
            cwd=ROOT,
            env=BUFFERED,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert re.fullmatch("error: .*No space left on device.*\n", done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_that_is_not_utf_8_shows_every_help(command: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for words in ([command, "--help"], [command, "no-such-thing-…", "--nor-this"]):
        done = run_command("-m", "emotrain.cli", *words, env=environment)
        assert done.returncode == (0 if "--help" in words else 2), done.stderr
        assert "Traceback" not in done.stderr


def test_results_with_any_letter_are_shown_on_any_terminal(tmp_path: Path) -> None:
    file = tmp_path / "ü…😀.yaml"
    file.write_text("training: {run_dir: ü}\n", encoding="utf-8")

    def ascii_terminal() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")

    for words, code in (["inspect", file], 0), (["inspect", f"{file}x"], 2):
        done = run_script("emotrain", *words, first=ascii_terminal)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert (done.stdout + done.stderr).isascii()


def test_log_lines_go_to_stderr_as_it_is_at_the_moment(tmp_path: Path) -> None:
    """As they must where a live bar stands in for it."""
    code = (
        "import io, logging, sys\n"
        "from emotrain.cli import guarded\n"
        "guarded(lambda: 0)\n"
        "before, sys.stderr = sys.stderr, io.StringIO()\n"
        "logging.getLogger('emotrain').info('a checkpoint')\n"
        "assert sys.stderr.getvalue() == 'a checkpoint\\n'\n"
    )
    done = run_command("-c", code)
    assert done.returncode == 0, done.stderr


# ---- commands


def test_kernels_without_triton_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("emotrain.kernels.backends.HAS_TRITON", False)
    assert main(["kernels"]) == 2
    assert "pip install 'emotrain[kernels]'" in capsys.readouterr().err
    assert main(["kernels", "--target", "sm_12"]) == 2
    assert "target sm_12 is not known" in capsys.readouterr().err


def test_train_alone_and_without_a_launcher(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "run.yaml"
    save_config(config_from_dict(tiny_settings(tiny_data, tmp_path / "run")), file)
    assert main(["train", str(file), "training.steps=2"]) == 0
    shown = capsys.readouterr()
    assert "step 2 of 2, loss" in shown.out and str(tmp_path / "run") in shown.out
    assert "optimizer.warmup_steps=2 is not less than the 2 steps of the run" in caplog.text
    assert main(["train", str(file), "training.steps=2"]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert main(["train", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- what a launcher says

TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_launcher_variables() -> None:
    assert Launch.read({}) == Launch(0, 1, 0)
    assert Launch.read({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) == Launch(0, 1, 0)
    assert Launch.read({**TWO, "LOCAL_RANK": "1"}) == Launch(1, 2, 1)
    assert Launch.read({**TWO, "LOCAL_WORLD_SIZE": "2"}).local_world_size == 2


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' must be a whole number of at least 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' must be"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' must be"),
        ({"RANK": "1.5"}, "RANK='1.5' must be a whole number of at least 0"),
        ({"RANK": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK='gpu0' must be"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK; start the run with a launcher"),
        ({**TWO, "MASTER_ADDR": ""}, "WORLD_SIZE=2 without MASTER_ADDR"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT='http' must be"),
        ({**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is above 65535"),
        ({**TWO, "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_launcher_variables_that_cannot_be_are_one_line(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        Launch.read(environ)
    assert "\n" not in str(caught.value)


def test_importing_and_help_do_not_wait_for_torch() -> None:
    code = (
        "import sys, emotrain, emotrain.cli\n"
        "def helped(words, late):\n"
        "    try:\n        emotrain.cli.main([*words, '--help'])\n"
        "    except SystemExit:\n        pass\n"
        "    assert not late & sys.modules.keys(), (words, late & sys.modules.keys())\n"
        "helped([], {'torch', 'numpy', 'omegaconf', 'rich'})\n"
        "for command in emotrain.cli.COMMANDS:\n    helped([command], {'torch', 'rich'})\n"
    )
    done = run_command("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("local_rank", "local_world_size", "num_gpus", "expected"),
    [
        (3, 8, 8, 3),
        # Each process sees its own GPU alone, and the launcher does not say how many there are.
        (3, 0, 1, 0),
        (0, 1, 1, 0),
        (1, 2, 1, "2 processes on a machine with 1 GPU: each needs its own; start 1, or"),
        (0, 8, 4, "8 processes on a machine with 4 GPUs: each needs its own; start 4, or"),
        (5, 0, 4, "6 processes on a machine with 4 GPUs: each needs its own; start 4, or"),
    ],
)
def test_every_process_has_a_gpu_of_its_own(local_rank, local_world_size, num_gpus, expected):
    launch = Launch(local_rank, 16, local_rank, local_world_size)
    if isinstance(expected, int):
        assert launch.gpu(num_gpus) == expected
        return
    with pytest.raises(UserError) as caught:
        launch.gpu(num_gpus)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
