"""Proves that training starts with threads that wait only shortly for each other, unless told
otherwise. How much that is worth is measured by benchmarks/contention.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from emotrain.threads import CHOSEN_BY_USER, SPINS, share_the_cores
from tests.conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses libgomp on Linux alone")
@pytest.mark.parametrize(
    ("door", "chosen", "spins"),
    [
        (["-m", "emotrain.cli", "train"], {}, SPINS),
        (["launch/pretrain.py"], {"GOMP_SPINCOUNT": "777"}, 777),
    ],
)
def test_what_libgomp_was_started_with(door: list[str], chosen: dict[str, str], spins: int) -> None:
    """libgomp itself says what it took, which shows that torch was not loaded before. The
    configuration is wrong so that nothing is trained."""
    environment = {key: value for key, value in os.environ.items() if key not in CHOSEN_BY_USER}
    done = subprocess.run(
        [sys.executable, *door, "configs/quickstart.yaml", "training.device=nowhere"],
        cwd=ROOT,
        env={**environment, **chosen, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_a_choice_of_the_user_is_left_alone() -> None:
    for name in CHOSEN_BY_USER:
        environ = {name: "ACTIVE"}
        share_the_cores(environ)
        assert environ == {name: "ACTIVE"}
