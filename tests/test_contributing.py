"""Proves that the recipe of CONTRIBUTING.md for a pool rule works to the letter: its code, put into
a copy of the project where the page says, trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import emotrain, torch
assert emotrain.__file__.startswith(FOLDER), emotrain.__file__
from helpers import tiny_batch, tiny_config
from emotrain.distributed.parallelize import parallelize
from emotrain.distributed.ranks import Ranks
from emotrain.model.router import POOL_RULES, LayerRequest
from emotrain.model.transformer import Transformer
from emotrain.training.engine import NativeEngine
from emotrain.training.step import train_step

scores_GN = torch.rand(40, 7)
scores_GN[0] = 0.1
pool_GN = POOL_RULES["above_mean"](scores_GN, LayerRequest())
for scores_N, pool_N in zip(scores_GN.tolist()[1:], pool_GN.tolist()[1:], strict=True):
    assert pool_N == [score >= sum(scores_N) / 7 for score in scores_N]
assert pool_GN[0].any()

gradients = {}
for recompute in ("none", "full"):
    settings = tiny_config(
        model__router__pool__kind="above_mean", model__init_std=0.3, parallel__recompute=recompute
    )
    model = parallelize(Transformer(settings.model).initialize(0), settings)
    result = train_step(NativeEngine(model), [tiny_batch()], settings, 1, Ranks())
    assert all(layer.pool_size_G is None for layer in result.reports[0].layers)
    gradients[recompute] = [parameter.grad for parameter in model.parameters()]
assert all(torch.equal(*pair) for pair in zip(*gradients.values(), strict=True))
print("trained")
"""


def code_blocks(section: str) -> list[str]:
    """The indented code of a section of CONTRIBUTING.md."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^ {7}.*\n|^\n(?= {7}))+", text, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") for block in found]


def put(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_recipe_of_a_pool_rule_trains(tmp_path: Path) -> None:
    kind, rule, no_size = code_blocks("How to add a pool rule")
    rule, line = rule.rsplit("\n\n", 1)
    shutil.copytree(
        ROOT / "emotrain", tmp_path / "emotrain", ignore=shutil.ignore_patterns("sample")
    )
    router = tmp_path / "emotrain/model/router.py"
    put(
        tmp_path / "emotrain/config/schema.py",
        'kind: Literal["none", "fixed", "uniform"] = "uniform"',
        kind,
    )
    put(router, "POOL_RULES: ", f"{rule}\n\n\nPOOL_RULES: ")
    put(router, '    "uniform": _best_experts,\n', f'    "uniform": _best_experts,\n    {line}\n')
    put(
        router,
        'if pool.kind == "none":\n        return None',
        f"{no_size}\n        return None",
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("FOLDER", repr(str(tmp_path)))],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "trained\n", done.stderr
