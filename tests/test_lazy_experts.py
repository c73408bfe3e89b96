"""A model whose experts come when they are needed computes what the model that is loaded as a
whole computes, to the bit: whatever the limit, however experts come and go, whatever is asked of
the router, wherever the files come from, and after a file broke under it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import pools_of, tiny_batch, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emotrain.cli import main
from emotrain.config import Config
from emotrain.errors import UserError
from emotrain.files import sha256_of
from emotrain.interop.export_folder import export_checkpoint
from emotrain.interop.huggingface import load_huggingface
from emotrain.kernels import cpu_grouped_mlp
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import FULL, Transformer
from emotrain.modular.expert_store import ExpertReadError, ExpertStore, Piece, WeightFile
from emotrain.subsets.lazy_model import LazyModel, load_lazy
from emotrain.training.checkpoint import load_model, save
from emotrain.training.checkpoint_folders import TrainingState
from emotrain.training.optimizer import build_optimizer

LAYERS, EXPERTS = 2, 8


def checkpoint_of(
    folder: Path, tokenizer: Path | None = None, **overrides
) -> tuple[Path, Transformer]:
    """A checkpoint of a random tiny model with an optimizer that has made a step, and the model."""
    config: Config = tiny_config(model__init_std=0.3, **overrides)
    model = Transformer(config.model).initialize(0)
    state = TrainingState(0, 0, "", 0, 4, 0.0)
    optimizer = build_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return save(folder, model, optimizer, config, state, tokenizer), model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Transformer]:
    """Two layers of 8 routed experts and a shared one. Experts of 300 and 600 bytes: none but the
    first is aligned to more than its numbers."""
    shape = {"model__d_model": 20, "model__experts__hidden": 5}
    return checkpoint_of(tmp_path_factory.mktemp("run"), **shape)


def lazy_of(path: Path, slots: int = LAYERS * EXPERTS, dtype=torch.float32) -> LazyModel:
    """Loaded so that this many experts fit."""
    whole = load_lazy(path, dtype=dtype)
    assert whole.store is not None
    return load_lazy(path, whole.trunk_bytes + slots * whole.store.expert_bytes, dtype)


@torch.inference_mode()
def assert_same(model: Transformer, lazy: LazyModel, batch, request=FULL) -> None:
    want, got = model(batch, request), lazy.model(batch, request)
    assert torch.equal(model.logits(want), lazy.model.logits(got))
    for one, other in zip(want.routing.layers, got.routing.layers, strict=True):
        assert torch.equal(one.counts_N, other.counts_N)


requests = st.one_of(
    st.just(FULL),
    st.lists(st.integers(1, EXPERTS), min_size=8, max_size=8).map(
        lambda sizes: pools_of(torch.tensor(sizes[:4]).view(LAYERS, 2))
    ),
    # Documents of one batch, each with a subset of its own.
    st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=4, max_size=4).map(
        lambda kept: RoutingRequest(
            kept=[
                torch.tensor([[i in of for i in range(EXPERTS)] for of in kept[start : start + 2]])
                for start in (0, 2)
            ]
        )
    ),
    st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=2, max_size=2).map(
        lambda kept: RoutingRequest(subset=[torch.tensor(sorted(of)) for of in kept])
    ),
)


# ---- equal to the bit


@given(
    slots=st.integers(1, LAYERS * EXPERTS),
    steps=st.lists(st.tuples(st.integers(0, 99), requests, st.booleans()), min_size=1, max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_any_limit_any_request_and_any_order_give_the_same_bits(tiny, slots, steps):
    path, model = tiny
    trunk_bytes = 4 * sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)
    lazy = load_lazy(path, trunk_bytes + slots * 4 * 3 * 20 * 5)
    store = lazy.store
    assert store.slots == slots
    for seed, request, in_bf16 in steps:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16):
            assert_same(model, lazy, tiny_batch(((7, 9),), seed=seed), request)
        assert len(store.resident()) <= slots
        assert lazy.resident_bytes == trunk_bytes + len(store.resident()) * 4 * 3 * 20 * 5


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_the_compiled_kernel_in_several_passes_gives_the_same_bits(slots, tmp_path, monkeypatch):
    if cpu_grouped_mlp.library() is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(cpu_grouped_mlp, "WORTH_COMPILING", 0)
    monkeypatch.setattr(cpu_grouped_mlp, "CHUNK_ROWS", 16)
    path, model = checkpoint_of(tmp_path, model__d_model=32, model__experts__hidden=32)
    lazy = lazy_of(path, slots)
    for seed in range(3):
        batch = tiny_batch(((30, 20, 14), (60, 4)), padded=seed == 1, seed=seed)
        assert_same(model, lazy, batch)


@pytest.mark.parametrize(
    "overrides",
    [
        {"model__experts__sharing": "all"},
        {"model__experts__routed_per_layer": [8, 3]},
        {
            "model__experts__routed": 0,
            "model__experts__top_k": 0,
            "model__router__pool__kind": "none",
        },
    ],
    ids=["one bank for all layers", "layers of their own sizes", "dense"],
)
def test_banks_of_every_kind(overrides, tmp_path):
    path, model = checkpoint_of(tmp_path, **overrides)
    lazy = load_lazy(path)
    assert_same(model, lazy, tiny_batch())
    bytes_of_banks = 4 * sum(p.numel() for bank in model.expert_banks() for p in bank.parameters())
    assert lazy.expert_bytes == bytes_of_banks
    assert lazy.trunk_bytes + bytes_of_banks == 4 * sum(p.numel() for p in model.parameters())


def test_weights_in_bf16_take_half_and_give_what_the_converted_model_gives(tiny):
    path, _ = tiny
    lazy = lazy_of(path, 5, torch.bfloat16)
    assert_same(load_model(path)[1].to(torch.bfloat16), lazy, tiny_batch())
    assert lazy.store.expert_bytes == 2 * 3 * 20 * 5
    assert (
        lazy.store.counters.bytes_read == 2 * lazy.store.counters.misses * lazy.store.expert_bytes
    )


def test_parts_of_many_ranks_along_every_axis(tiny, tmp_path):
    """The bank of the first layer as eight ranks may leave it: cut between experts, rows and
    columns."""
    path, model = tiny
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors, index = (
        load_file(path / "model-00000.safetensors"),
        json.loads((path / "tensors.json").read_text()),
    )
    files: dict[str, dict[str, torch.Tensor]] = {f"model-{i:05d}.safetensors": {} for i in range(8)}
    for name, tensor in tensors.items():
        if not name.startswith("blocks.0.moe.experts"):
            files["model-00000.safetensors"][name] = tensor
            continue
        parts = index["tensors"][name]["parts"] = []
        for number, file in enumerate(files):
            part, start = tensor, []
            for axis, size in enumerate(tensor.shape):
                cut = (size + 1) // 2
                low, high = ((0, cut), (cut, size))[number >> axis & 1]
                part, start = part.narrow(axis, low, high - low), [*start, low]
            files[file][name] = part.contiguous()
            parts.append({"file": file, "offsets": start, "shape": list(part.shape)})
    (folder / "tensors.json").write_text(json.dumps(index))
    manifest = json.loads((path / "manifest.json").read_text())
    for name, held in files.items():
        save_file(held, folder / name)
    for name in ["tensors.json", *files]:
        size = (folder / name).stat().st_size
        manifest["files"][name] = {"bytes": size, "sha256": sha256_of(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lazy = lazy_of(folder, 3)
    assert_same(load_model(folder)[1], lazy, tiny_batch())
    assert_same(model, lazy, tiny_batch(seed=1))


@pytest.mark.parametrize(("layout", "dtype"), [("clean", "fp32"), ("published", "bf16")])
def test_an_exported_folder(layout, dtype, tiny, tmp_path):
    export_checkpoint(tiny[0], tmp_path / "folder", layout, dtype)
    lazy = lazy_of(tmp_path / "folder", 5)
    assert_same(load_huggingface(tmp_path / "folder")[1], lazy, tiny_batch())
    assert lazy.store.counters.evictions > 0


# ---- what is in memory


@contextmanager
def reads_and_advice() -> Iterator[tuple[list, list]]:
    """(offset, bytes) of all reads, and (offset, bytes, advice), while the context lasts."""
    reads: list[tuple[int, int]] = []
    advice: list[tuple[int, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        read, advise = os.preadv, os.posix_fadvise
        patch.setattr(
            os,
            "preadv",
            lambda fd, buffers, at: reads.append((at, len(buffers[0]))) or read(fd, buffers, at),
        )
        patch.setattr(
            os, "posix_fadvise", lambda fd, *what: advice.append(what) or advise(fd, *what)
        )
        yield reads, advice


@pytest.fixture(scope="module")
def numbered_file(tmp_path_factory) -> Path:
    """12 experts of H = 2, D = 3, gate and up, then down: expert i holds i everywhere."""
    path = tmp_path_factory.mktemp("numbered") / "file"
    path.write_bytes(torch.arange(12.0).repeat_interleave(18).numpy().tobytes())
    return path


def numbered_store(path: Path, slots: int) -> ExpertStore:
    file = WeightFile(path)

    def pieces(bank: int, expert: int) -> list[Piece]:
        start = (bank * 6 + expert) * 72
        return [
            Piece(file, start, torch.float32, 0, (0, 0), (4, 3)),
            Piece(file, start + 48, torch.float32, 1, (0, 0), (2, 3)),
        ]

    return ExpertStore(pieces, 12, hidden=2, width=3, memory=slots * 72)


@given(
    slots=st.integers(1, 12),
    steps=st.lists(
        st.tuples(st.integers(0, 1), st.sets(st.integers(0, 5), min_size=1)), max_size=30
    ),
)
@settings(max_examples=60, deadline=None)
def test_the_store_is_a_list_in_the_order_of_last_use(numbered_file, slots, steps):
    store = numbered_store(numbered_file, slots)
    used: list[tuple[int, int]] = []  # the oracle: the most recent last
    hits = misses = evictions = 0
    with reads_and_advice() as (reads, advice):
        for bank, wanted in steps:
            experts = sorted(wanted)[:slots]
            keys = [(bank, expert) for expert in experts]
            found = [key for key in used if key in keys]
            others = [key for key in used if key not in keys]
            goes = max(0, len(others) + len(keys) - slots)
            hits, evictions = hits + len(found), evictions + goes
            misses += len(keys) - len(found)
            used = others[goes:] + sorted(found) + [key for key in keys if key not in found]
            with store.hold(bank, experts) as slot_of:
                assert list(slot_of) == experts and len(set(slot_of.values())) == len(experts)
                for expert, slot in slot_of.items():
                    assert store.gate_up_XFD[slot].unique().tolist() == [bank * 6 + expert]
                    assert store.down_XHD[slot].unique().tolist() == [bank * 6 + expert]
            assert store.resident() == used and store.resident_bytes == 72 * len(used)
    counters = store.counters
    assert (counters.hits, counters.misses, counters.evictions) == (hits, misses, evictions)
    assert len(reads) == 2 * misses and counters.bytes_read == 72 * misses
    # What was read is in one place: the system is told to forget it, whole pages.
    assert [what[2] for what in advice] == [os.POSIX_FADV_DONTNEED] * len(reads)
    for (at, size), (start, length, _) in zip(reads, advice, strict=True):
        assert start <= at and at + size <= start + length
        assert start % 4096 == 0 and length % 4096 == 0


def test_who_holds_experts_keeps_them_while_another_waits(numbered_file):
    store = numbered_store(numbered_file, 2)

    def other() -> None:
        with store.hold(1, [4, 5]):
            pass

    thread = threading.Thread(target=other)
    with store.hold(0, [1, 2]) as slot_of:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and store.resident() == [(0, 1), (0, 2)]
        assert store.down_XHD[slot_of[2]].unique().tolist() == [2]
    thread.join(10)
    assert store.resident() == [(1, 4), (1, 5)]


def test_subsets_of_one_trunk_share_their_experts_and_bring_no_others(tiny):
    path, model = tiny
    lazy = lazy_of(path)
    for kept in ([0, 1, 2], [1, 2, 3]):
        subset = [torch.tensor(kept)] * LAYERS
        for seed in range(3):
            assert_same(model, lazy, tiny_batch(seed=seed), RoutingRequest(subset=subset))
    assert sorted(lazy.store.resident()) == [(layer, i) for layer in (0, 1) for i in range(4)]
    assert lazy.store.counters.misses == 8 and lazy.store.counters.evictions == 0
    assert lazy.resident_bytes == lazy.trunk_bytes + lazy.expert_bytes // 2


def test_the_least_memory_is_said_and_is_enough(tiny):
    path, model = tiny
    with pytest.raises(UserError, match="give at least [0-9,]+ bytes") as refused:
        load_lazy(path, 1000)
    assert "\n" not in str(refused.value)
    least = int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(UserError):
        load_lazy(path, least - 1)
    lazy = load_lazy(path, least)
    assert lazy.store.slots == 1
    assert_same(model, lazy, tiny_batch())


def test_it_is_not_for_training(tiny):
    lazy = load_lazy(tiny[0])
    assert not any(parameter.requires_grad for parameter in lazy.model.parameters())
    assert not [name for name, _ in lazy.model.named_parameters() if ".moe.experts." in name]


# ---- faults


def copied(path: Path, tmp_path: Path) -> Path:
    folder = tmp_path / path.name
    folder.mkdir()
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def only(*experts: int) -> RoutingRequest:
    return RoutingRequest(subset=[torch.tensor(experts)] * LAYERS)


def cut_short(file: Path) -> None:
    os.truncate(file, 1000)


def written_over(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(bytes(8))
    os.utime(file, ns=(1, 1))  # a clock that is coarse would show no change so soon


@pytest.mark.parametrize("spoil", [cut_short, written_over])
def test_a_file_that_changes_fails_those_who_need_it_and_nobody_else(spoil, tiny, tmp_path):
    model = tiny[1]
    path = copied(tiny[0], tmp_path)
    lazy = lazy_of(path, 8)
    for seed in range(3):
        assert_same(model, lazy, tiny_batch(seed=seed), only(0, 1, 2))
    resident = set(lazy.store.resident())
    spoil(path / "model-00000.safetensors")
    for _ in range(2):
        with pytest.raises(ExpertReadError, match=r"expert 5 of layer 0 .*was changed or cut"):
            lazy.model(tiny_batch(), only(5))
        assert_same(model, lazy, tiny_batch(seed=4), only(0, 1, 2))
    assert set(lazy.store.resident()) == resident


def test_the_error_says_which_tokens_need_the_expert(tiny, tmp_path):
    path = copied(tiny[0], tmp_path)
    lazy = lazy_of(path)
    batch = tiny_batch(((7, 9),))
    kept = torch.zeros(2, EXPERTS, dtype=torch.bool)
    kept[0, :3], kept[1, 5] = True, True
    assert_same(tiny[1], lazy, batch, only(0, 1, 2))
    cut_short(path / "model-00000.safetensors")
    with pytest.raises(ExpertReadError) as failed, torch.inference_mode():
        lazy.model(batch, RoutingRequest(kept=[kept] * LAYERS))
    assert failed.value.expert == 5
    assert failed.value.tokens == tuple(range(7, 16)), "the second document's"


def test_a_file_that_is_removed_can_be_read_on(tiny, tmp_path):
    path = copied(tiny[0], tmp_path)
    lazy = lazy_of(path, 3)
    for file in path.iterdir():
        file.unlink()
    assert_same(tiny[1], lazy, tiny_batch())


def test_a_disk_that_fails_for_a_while_costs_one_request(tiny, monkeypatch):
    path, model = tiny
    lazy, read = lazy_of(path, 4), os.preadv
    assert_same(model, lazy, tiny_batch())

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ExpertReadError, match="Input/output error"):
        lazy.model(tiny_batch(seed=1))
    # A file system that gives a few bytes at a time.
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: read(fd, [to[0][:100]], at))
    for seed in range(3):
        assert_same(model, lazy, tiny_batch(seed=seed))


def test_damage_before_the_start_is_found_at_the_start(tiny, tmp_path):
    path = copied(tiny[0], tmp_path)
    written_over(path / "model-00000.safetensors")
    with pytest.raises(UserError, match="contents differ from the checksum"):
        load_lazy(path)
    (path / "model-00000.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        load_lazy(path)


# ---- the command


@pytest.fixture(scope="module")
def speaking(tiny_data, tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer, for texts of up to 64 tokens."""
    return checkpoint_of(
        tmp_path_factory.mktemp("speaking"),
        tiny_data / "tokenizer.json",
        model__vocab_size=320,
        data__sequence_length=64,
    )[0]


def test_generate_in_little_memory_writes_the_same_text(speaking, capsys):
    def generated(*words: str) -> dict:
        command = ["generate", str(speaking), "bread salt", "anchor", "--max-tokens", "12"]
        assert main([*command, *words, "--json"]) == 0
        out = capsys.readouterr()
        told.append(out.err)
        return json.loads(out.out.splitlines()[-1])

    told: list[str] = []
    lazy = load_lazy(speaking)
    one = lazy.store.expert_bytes
    for words in ([], ["--experts", "auto:3", "--pool", "sticky:4"]):
        full = generated(*words)
        few = generated(*words, "--memory", str(lazy.trunk_bytes + 5 * one))
        assert few["generations"] == full["generations"]
        assert full["experts_in_memory"] is None and "evicted" not in told[-2]
        held = few["experts_in_memory"]
        assert held["weights_bytes"] == lazy.trunk_bytes + 5 * one
        assert held["resident_bytes"] == 5 * one and held["evictions"] == held["misses"] - 5 > 0
        assert f"{held['misses']} times read, {held['evictions']} evicted" in told[-1]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--memory", "1KB"], "1,000 bytes do not hold the trunk"),
        (["--memory", "much"], "--memory much: give a size such as 4GB or 500MiB"),
        (["--memory", "1GB", "--device", "cuda"], "--memory keeps experts for the CPU"),
    ],
)
def test_memory_that_cannot_be_is_one_line(words, fault, speaking, capsys):
    assert main(["generate", str(speaking), "bread", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert fault in line
