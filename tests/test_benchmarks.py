"""Each benchmark runs, at a tiny shape, and prints the keys that others read. No time is
asserted: that takes an idle machine."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from emotrain.config import config_from_dict, save_config
from emotrain.training.run import train
from tests.conftest import tiny_settings
from tests.processes import forked, run_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY_STEP = [
    "model.d_model=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.vocab_size=64",
    "model.experts.routed=3",
    "model.experts.top_k=1",
    "model.experts.hidden=16",
    "model.router.pool.min=1",
    "model.router.pool.max=3",
    "data.sequence_length=16",
    "training.global_batch=4",
    "training.micro_batch=2",
]


def measure(script: str, *arguments: str) -> dict:
    """The JSON object on the last line of a benchmark's output."""
    done = run_script(BENCHMARKS / script, "--json", "--threads", "1", "--repeats", "1", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["machine"]["threads"] == 1
    assert all(0 < times["min_ms"] <= times["median_ms"] for times in result["times"].values())
    return result


def test_router_prints_the_cost_of_the_pool():
    result = measure(
        "router.py",
        "--rows",
        "2",
        "--length",
        "32",
        "--documents",
        "5",
        "--width",
        "16",
        "--small-width",
        "8",
        "--routed",
        "6",
        "--chosen",
        "2",
    )
    assert result["documents"] == 5
    for key in (
        "pool_over_plain",
        "pool_ms",
        "plain_ms",
        "pool_over_plain_small_d",
        "loop_over_pool",
    ):
        assert result[key] > 0, key


def test_step_prints_emo_over_standard():
    result = measure("step.py", *TINY_STEP)
    assert result["tokens_per_step"] == 64
    for key in ("emo_over_standard", "emo_tokens_per_second", "standard_tokens_per_second"):
        assert result[key] > 0, key
    assert "speedup_over_hf" not in result


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="needs the bench extra: pip install -e '.[bench]'",
)
def test_step_measures_the_peer():
    result = measure("step.py", *TINY_STEP, "--peer", "hf")
    assert result["speedup_over_hf"] > 0
    assert result["hf_fastest_implementation"] in result["hf_tokens_per_second"]
    assert {*result["hf_tokens_per_second"], *result["hf_skipped"]} == {
        "eager",
        "grouped_mm",
        "batched_mm",
    }


def test_step_says_what_the_peer_needs(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError\n")
    code = (
        f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}, {str(BENCHMARKS)!r}]; "
        f"sys.argv = ['step.py', '--peer', 'hf', *{TINY_STEP}]; "
        f"runpy.run_path({str(BENCHMARKS / 'step.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0
    assert (
        done.stderr.splitlines()[-1]
        == "--peer hf needs transformers, which is not installed; pip install -e '.[bench]'"
    )


def test_experts_prints_its_share_of_the_matmul_rate():
    result = measure("experts.py", "--shape", "tiny")
    for key in (
        "fraction_of_matmul_peak",
        "speedup_over_grouped_mm",
        "speedup_over_loop",
        "gflops",
        "matmul_gflops",
    ):
        assert result["tiny"][key] > 0, key


@pytest.mark.parametrize("documents", [3, 10, 96])
def test_random_documents_fill_the_rows(monkeypatch, documents):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _measure import random_documents

    batch = random_documents(rows=3, length=32, documents=documents, vocab_size=7)
    assert batch.num_documents == documents
    assert batch.document_T.unique().tolist() == list(range(documents))
    assert batch.tokens_BS.shape == (3, 32) and int(batch.tokens_BS.max()) < 7


def test_dispatch_prints_the_bytes_of_the_exchange():
    """At the published number of experts and choices the ratio is a matter of counting, and
    holds at any size."""
    done = run_script(
        BENCHMARKS / "dispatch.py",
        *("--json", "--tokens", "256", "--width", "512", "--pools", "16"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["uniform"]["slots_per_token"] == 7
    # Two there and back, forward and backward; and one of sizes.
    assert result["uniform"]["exchanges"] == 5
    # 5.0 distinct ranks of 8 for 7 choices among 127 experts; routing weights travel on top.
    assert 0.70 < result["bytes_over_row_per_expert"] < 0.74
    assert result["pool_16"]["bytes_over_row_per_expert"] > 0


def test_balance_schedule_prints_the_deviation_of_running(tiny_data):
    result = measure(
        "balance_schedule.py",
        "--micro-batches",
        "1",
        "2",
        "--data",
        str(tiny_data),
        "--steps",
        "2",
        *TINY_STEP,
        "model.vocab_size=320",
        # In a pool of one expert load is what it is, whatever the schedule.
        "model.router.pool.min=2",
    )
    assert result["at_start"]["1"]["gradient_deviation"] < 1e-5, (
        "with one micro-batch the schedules are the same"
    )
    assert 1e-4 < result["at_start"]["2"]["gradient_deviation"] < 1
    assert result["trained_joint"].keys() == result["trained_running"].keys()


def test_contention_prints_its_ratios(tiny_data, monkeypatch, capsys):
    """One real run beside a busy process; the arithmetic of the rest on rates that are given."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contention

    processes = SimpleNamespace(run=forked, Popen=subprocess.Popen)
    monkeypatch.setattr(contention, "subprocess", processes)
    settings = ["configs/quickstart.yaml", f"data.path={tiny_data}", *TINY_STEP]
    settings += ["model.vocab_size=320"]
    assert contention.run(settings, steps=2, threads=1, spins=100, busy=True) > 0

    rates = {(contention.BEFORE, False): 100.0, (contention.BEFORE, True): 20.0}
    rates |= {(None, False): 90.0, (None, True): 45.0, (7, False): 1.0, (7, True): 1.0}
    monkeypatch.setattr(
        contention, "run", lambda settings, steps, threads, spins, busy: rates[spins, busy]
    )
    monkeypatch.setattr(sys, "argv", ["contention.py", "--json", "--spins", "7"])
    contention.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["quiet_over_before"] == 0.9
    assert result["contended_over_quiet"] == 0.5
    assert result["contended_over_before"] == 2.25
    assert result["tokens_per_second"]["spins_7_busy"] == 1.0


def test_placement_trains_both_models_and_prints_rows_and_load(
    tiny_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import placement

    small = [*TINY_STEP, "model.vocab_size=320", "model.experts.routed=8", "model.experts.top_k=2"]
    small += ["model.router.pool.max=8", "training.steps=2", "optimizer.warmup_steps=0"]
    folders = ["--data", str(tiny_data), "--out", str(tmp_path)]
    sizes = ["--ep", "2", "4", "--tokens", "2000", "--micro-batch", "1"]
    assert placement.main([*folders, *sizes, "--json", *small]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "placement.json").read_text())
    assert result["ep"] == 4
    assert result["rows_over_contiguous"] == result["emo"]["ep_4"]["rows_over_contiguous"]
    for name in ("emo", "standard"):
        for ep in (2, 4):
            of = result[name][f"ep_{ep}"]
            assert 1 <= of["rows_per_token"] <= 2 and of["load_max_over_mean"] >= 1
    given = ["--checkpoints", str(tmp_path / "emo"), str(tmp_path / "standard")]
    assert placement.main([*folders, *sizes, "--json", *given]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_clusters_compares_the_pair(tiny_data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import clusters

    for name in ("emo", "stdmoe"):
        settings = tiny_settings(tiny_data, tmp_path / "pair" / name, steps=2)
        if name == "stdmoe":
            settings["model"]["router"]["pool"] = {"kind": "none"}
        train(config_from_dict(settings))
    capsys.readouterr()
    out, few = tmp_path / "out", ["--clusters", "4", "--documents", "60", "--seeds", "2"]
    command = [str(tmp_path / "pair"), "--data", str(tiny_data), "--out", str(out), *few]
    assert clusters.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((out / "clusters.json").read_text())
    for key in ("domain_nmi", "token_identity_nmi", "document_domain_nmi"):
        by_seed = [of[key] for of in result["models"]["EMO"]["by_seed"]]
        assert result[f"emo_{key}"] == pytest.approx(sum(by_seed) / 2)
        difference = result[f"emo_{key}"] - result[f"standard_{key}"]
        assert result[f"emo_minus_standard_{key}"] == pytest.approx(difference)
    variants = result["models"]["standard MoE"]["variants"]
    assert list(variants) == ["layer 0 alone", "layer 1 alone"]
    assert variants["layer 1 alone"]["documents"] == 60
    assert {path.name for path in out.iterdir()} == {
        f"clusters.{ending}" for ending in ("json", "md", "csv", "png")
    }


def test_lazy_experts_prints_memory_speed_and_the_cost_of_a_cold_expert():
    result = measure(
        "lazy_experts.py",
        *["--layers", "2", "--experts", "8", "--chosen", "2", "--width", "16", "--hidden", "8"],
        *["--documents", "2", "--prompt", "16", "--share", "0.25"],
    )
    assert result["equal_logits"] is True
    assert result["resident_expert_memory_over_full"] == 0.25
    assert result["cold_experts_per_step"] == 4
    for key in (
        "decode_tokens_per_second_over_full",
        "prompt_tokens_per_second_over_full",
        "cold_expert_read_gb_per_second",
    ):
        assert result[key] > 0, key


@pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None,
    reason="needs the serve extra: pip install -e '.[serve,test]'",
)
def test_serving_prints_its_ratios():
    model = ["model.vocab_size=300", "model.experts.routed=8"]
    sizes = ["--prompt", "3", "--new", "4", "--rounds", "1"]
    result = measure("serve.py", *sizes, *TINY_STEP, *model)
    assert result["subset_expert_memory_over_full"] == 0.125
    assert result["cold_experts_per_request"] == 1
    for count in (1, 8, 32):
        assert result[f"tokens_per_second_{count}"] > 0
        assert result[f"mixed_tokens_per_second_{count}"] > 0
    for key in (
        "tokens_per_second_over_full",
        "lazy_over_loaded",
        "mixed_over_single",
        "first_token_p50_ms",
        "first_token_p99_ms",
        "token_p50_ms",
        "token_p99_ms",
    ):
        assert result[key] > 0, key
    assert "speedup_over_hf_8" in result or "transformers" in result["hf_skipped"]


def test_generation_prints_its_ratios():
    arguments = ["--prompt", "3", "--new", "4", "--sequences", "5", "--keep", "0.5"]
    result = measure("generate.py", *arguments, *TINY_STEP)
    assert result["sequences"] == 5 and result["new_tokens"] == 4
    for key in (
        "tokens_per_second_1",
        "tokens_per_second_8",
        "speedup_over_uncached",
        "mixed_over_single",
        "subset_over_full",
    ):
        assert result[key] > 0


def test_evaluate_counts_what_is_shared_and_changes_no_number(tiny_data, tmp_path):
    settings = tiny_settings(tiny_data, tmp_path / "run")
    settings["model"]["init_std"] = 0.3
    save_config(config_from_dict(settings), tmp_path / "config.yaml")
    done = run_script(
        BENCHMARKS / "evaluate.py",
        *("--json", "--data", str(tiny_data), "--config", str(tmp_path / "config.yaml")),
        *("--documents", "3", "--calibration-documents", "2", "--document-tokens", "24"),
        *("--keep", "1.0", "0.75", "0.5"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    terms = result["terms_forward_equivalents"]
    assert sum(terms.values()) == pytest.approx(result["forward_equivalents"])
    assert terms["full model"] == 1 and terms["arms, first attention"] == 0
    # Six arms do the whole head and the second of two layers; a pass of its own is a full one.
    share = result["forward_share_by_part"]
    assert terms["arms, head"] == pytest.approx(6 * share["head"])
    before = 7 + result["before_selection_forward_equivalents"]
    assert result["before_forward_equivalents"] == pytest.approx(before)
    saved = 6 * share["attention"] / 2
    assert result["forward_equivalents"] < before - saved
    assert result["largest_difference_nats"] < 1e-5


def test_prepare_prints_its_speed_over_the_library():
    result = measure("prepare.py", "--megabytes", "1", "--vocab-size", "300")
    assert result["tokens"] > 100_000 and result["workers"] == 1
    for key in ("prepare_over_tokenizers", "prepare_over_tokenizers_fast", "two_workers_over_one"):
        assert result[key] > 0 and result[f"{key}_cpu"] > 0, key


@pytest.mark.long
def test_loader_prints_rates_shares_memory_and_the_start():
    result = measure(
        "loader.py",
        *("--batches", "2"),
        *("--tokens", str(2**21)),
        *("--shard-tokens", str(2**18)),
        *("--index-tokens", str(2**24)),
    )
    assert (
        0
        < result["tokens_per_second_per_core"]
        == min(
            rate
            for name, rate in result["rates"].items()
            if not name.startswith("memmap") and "without" not in name
        )
    )
    assert 0 < result["loader_over_step"] < 1 and result["start_tokens"] >= 2**24
    assert result["utilisation_concat"] == result["utilisation_best_fit"] == 1
    assert result["one_pool_concat"] < result["one_pool_best_fit"] < 1
    assert result["peers"] == dict.fromkeys(("olmo_core", "grain"), {"skipped": "no --peers"})
    for packing in ("concat", "best_fit"):
        assert all(result[f"peak_mib_{packing}_{size}"] > 0 for size in ("1x", "10x", "100x"))
