"""Proves of the loader that its order is a permutation in every epoch and a function of (seed,
position) alone, that neither ranks nor micro-batches change what a step trains on, and that each
token comes with the document that holds it."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_formats import make_dataset

from emotrain.config import RepetitionFilterConfig
from emotrain.data.formats import Dataset
from emotrain.data.loader import StreamWindows, keyed, mix64, permute
from emotrain.data.opening import open_loader
from emotrain.data.packing import pack_documents
from emotrain.data.prefetch import prefetch

SEQUENCE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "data"
    make_dataset(path, shards=(40, 3, 25, 31), valid=20)
    return path


@pytest.fixture
def loader(folder):
    return open_loader(folder, SEQUENCE, seed=3)


def same(one, other):
    return one.has_padding == other.has_padding and all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("tokens_BS", "targets_BS", "document_BS", "document_ids_G")
    )


@given(st.integers(1, 5000), st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_permutation(size, key):
    result = permute(np.arange(size), size, np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(result), np.arange(size))


@given(st.integers(2**40, 2**62), st.integers(0, 2**63), st.integers(0, 2**39))
@settings(max_examples=50, deadline=None)
def test_permute_of_a_range_too_large_to_store(size, key, start):
    result = permute(np.arange(start, start + 100), size, np.full(100, key, dtype=np.uint64))
    assert len(set(result.tolist())) == 100 and result.min() >= 0 and result.max() < size


def test_permute_looks_random():
    """Where each of 8 things goes, over 4,000 keys: every place equally often (chi-squared, 49
    degrees of freedom)."""
    keys = keyed(0, np.arange(4000))
    places = np.stack([permute(np.full(4000, thing), 8, keys) for thing in range(8)])
    counts = np.stack([np.bincount(row, minlength=8) for row in places])
    assert ((counts - 500) ** 2 / 500).sum() < 100
    steps = np.diff(permute(np.arange(10_000), 10_000, np.full(10_000, 7, dtype=np.uint64)))
    assert np.mean(np.abs(steps) <= 10) < 0.01


def test_mix64_is_that_of_splitmix64():
    """The first outputs of the published generator from seed 0."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in mix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_every_epoch_is_another_order_of_all_windows(loader):
    count = loader.num_sequences
    assert count == sum(
        info.tokens // SEQUENCE for info in loader.source.store.dataset.shards["train"]
    )
    epochs = [
        loader.windows(range(epoch * count, (epoch + 1) * count)).tolist() for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(count)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert (
        epochs[0]
        != open_loader(loader.source.store.path, SEQUENCE, seed=4).windows(range(count)).tolist()
    )


def test_order_is_stable():
    """These numbers are part of every checkpoint: a release that changes them would resume runs
    on other data."""
    order = permute(np.arange(10), 10, keyed(0, np.zeros(10, dtype=np.int64)))
    assert order.tolist() == [7, 2, 1, 8, 9, 3, 4, 0, 6, 5]


def test_each_token_has_the_document_that_holds_it(loader):
    """Against a plain loop over the documents of every shard."""
    dataset, flat = loader.source.store.dataset, []
    for shard, info in enumerate(dataset.shards["train"]):
        stream = []
        for row in range(info.documents):
            mapped = dataset.shard("train", shard)
            document_id = dataset.first_ids["train"][shard] + row
            stream += [
                (token, document_id)
                for token in mapped.tokens[mapped.offsets[row] : mapped.offsets[row + 1]].tolist()
            ]
        flat += [
            stream[start : start + SEQUENCE]
            for start in range(0, len(stream) - SEQUENCE + 1, SEQUENCE)
        ]
    positions = range(loader.num_sequences)
    batch = loader.batch(positions)
    for row, window in enumerate(loader.windows(positions)):
        tokens, ids = zip(*flat[window], strict=True)
        assert batch.tokens_BS[row].tolist() == list(tokens)
        assert batch.document_ids_G[batch.document_BS[row]].tolist() == list(ids)
        assert batch.targets_BS[row].tolist() == [*tokens[1:], -100]
    assert batch.tokens_BS.dtype == torch.int64 and not batch.has_padding


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.data())
@settings(max_examples=200, deadline=None)
def test_documents_in_window(lengths, data):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    start = data.draw(st.integers(0, int(offsets[-1]) - 1))
    stop = data.draw(st.integers(start + 1, int(offsets[-1])))
    owners = [document for document, length in enumerate(lengths) for _ in range(length)][
        start:stop
    ]
    dataset = object.__new__(Dataset)
    shard = SimpleNamespace(tokens=np.arange(offsets[-1]), offsets=offsets)
    dataset.__dict__ |= {"path": Path(), "verify_checksums": False, "vocab_size": 10**6}
    dataset.__dict__ |= {"_lock": threading.Lock(), "_mapped": lambda *_: shard}
    dataset.shards = {"train": [SimpleNamespace(file="", sums="", documents=len(lengths))]}
    dataset.shards["valid"] = []
    found = dataset.window("train", 0, start, stop)
    assert found.tokens.tolist() == list(range(start, stop)) and found.lengths.min() > 0
    assert np.repeat(found.ids, found.lengths).tolist() == owners
    edges = dataset.pieces("train", 0, start, stop)[2]
    assert edges.tolist() == [start, *(start + np.cumsum(found.lengths)).tolist()]


class IdsFromWindows:
    """A store that knows where a document begins only inside of the window that it is asked for,
    as files without an index do."""

    def __init__(self, store):
        self.path, self.split, self.fingerprint = store.path, store.split, store.fingerprint
        self.shard_tokens, self._store = store.shard_tokens, store

    def window(self, shard, start, stop):
        found = self._store.window(shard, start, stop)
        begins = start + np.cumsum(found.lengths) - found.lengths
        return found._replace(ids=begins + 10**6 * shard)


@pytest.mark.parametrize("span", [1, 2, 3])
def test_a_document_has_one_id_in_neighbouring_windows(folder, span):
    store = Dataset(folder).store()
    windows = StreamWindows(IdsFromWindows(store), SEQUENCE, span)
    known = StreamWindows(store, SEQUENCE, span)
    numbers = np.random.default_rng(0).permutation(windows.num_sequences)
    found, true = windows.rows(numbers), known.rows(numbers)
    assert np.array_equal(found.tokens_BS, true.tokens_BS)
    assert np.array_equal(found.lengths_G, true.lengths_G)
    rows = (np.cumsum(found.lengths_G) - found.lengths_G) // SEQUENCE
    groups = (numbers // span)[rows].tolist()
    pairs = set(zip(groups, true.ids_G.tolist(), found.ids_G.tolist(), strict=True))
    assert len({pair[:2] for pair in pairs}) == len({(g, i) for g, _, i in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2)]
)
def test_ranks_and_micro_batches_do_not_change_a_step(loader, world_size, micro_batch):
    for step in (0, 5, 40):
        whole = loader.batch(range(step * 12, step * 12 + 12))
        parts = [
            batch
            for rank in range(world_size)
            for batch in loader.step(step, 12, micro_batch, rank, world_size)
        ]
        assert torch.equal(torch.cat([part.tokens_BS for part in parts]), whole.tokens_BS)
        assert torch.equal(torch.cat([part.targets_BS for part in parts]), whole.targets_BS)
        assert torch.equal(
            torch.cat([part.document_ids_G[part.document_BS] for part in parts]),
            whole.document_ids_G[whole.document_BS],
        )


def test_a_run_goes_on_from_its_step_alone(loader, folder):
    straight = [loader.step(step, 6, 3) for step in range(20)]
    again = open_loader(folder, SEQUENCE, seed=3)
    assert all(
        same(a, b)
        for step in range(7, 20)
        for a, b in zip(straight[step], again.step(step, 6, 3), strict=True)
    )
    assert again.fingerprint == loader.fingerprint
    assert loader.fingerprint not in (
        open_loader(folder, 8, 3).fingerprint,
        open_loader(folder, SEQUENCE, 3, split="valid").fingerprint,
    )


def test_targets_across_documents_are_a_choice(folder):
    crossing = open_loader(folder, SEQUENCE, 3).batch(range(30))
    within = open_loader(folder, SEQUENCE, 3, cross_document_targets=False).batch(range(30))
    ends = crossing.document_BS[:, :-1] != crossing.document_BS[:, 1:]
    assert ends.any() and (within.targets_BS[:, :-1][ends] == -100).all()
    assert torch.equal(within.targets_BS[:, :-1][~ends], crossing.targets_BS[:, :-1][~ends])


def test_filtered_sequences_keep_their_tokens_and_lose_their_targets(folder):
    plain = open_loader(folder, SEQUENCE, 3).batch(range(60))
    config = RepetitionFilterConfig(enabled=True, max_period=2, max_count=1)
    filtered = open_loader(folder, SEQUENCE, 3, repetition_filter=config).batch(range(60))
    off = open_loader(
        folder, SEQUENCE, 3, repetition_filter=RepetitionFilterConfig(max_period=2, max_count=1)
    ).batch(range(60))
    assert same(plain, off) and torch.equal(plain.tokens_BS, filtered.tokens_BS)
    repeats_B = torch.tensor(
        [
            any(
                (row[i : i + 2 * p] == row[i + p : i + 3 * p]).all()
                for p in (1, 2)
                for i in range(SEQUENCE - 3 * p + 1)
            )
            for row in plain.tokens_BS.numpy()
        ]
    )
    assert torch.equal((filtered.targets_BS == -100).all(dim=1), repeats_B)
    assert torch.equal(filtered.targets_BS[~repeats_B], plain.targets_BS[~repeats_B])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda path: open_loader(path, 1, 0),
            "sequence_length=1: a sequence has at least 2 tokens",
        ),
        (lambda path: open_loader(path, SEQUENCE, -1), "seed=-1"),
        (
            lambda path: open_loader(path, 10_000, 0),
            "no train shard holds a whole sequence of 10000 tokens .* lower sequence_length",
        ),
        (lambda path: open_loader(path, SEQUENCE, 0, split="dev"), "split='dev' is not known"),
        (
            lambda path: open_loader(path, SEQUENCE, 0).batch([3, -1]),
            "position -1 is before the start",
        ),
        (
            lambda path: open_loader(path, SEQUENCE, 0).step(0, 10, 2, 0, 2),
            "global_batch=10 is not a multiple of micro_batch=2 times 2",
        ),
        (lambda path: open_loader(path, SEQUENCE, 0).step(0, 8, 2, 2, 2), "rank 2 of 2"),
        (lambda path: open_loader(path, SEQUENCE, 0).step(-1, 8, 2), "step -1"),
        (
            lambda path: next(prefetch(open_loader(path, SEQUENCE, 0), 0, 3, 7, 2)),
            "global_batch=7 is not a multiple",
        ),
        (lambda path: prefetch(open_loader(path, SEQUENCE, 0), 0, -1, 8, 2), "num_steps=-1"),
    ],
)
def test_mistakes_get_one_line(folder, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(folder)
    assert "\n" not in str(caught.value)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "emotrain-loader"]


def test_prefetch_gives_the_same_steps_and_ends(loader):
    with prefetch(loader, 4, 9, 6, 3) as steps:
        ahead = list(steps)
    assert len(ahead) == 9
    assert all(
        same(a, b)
        for index, step in enumerate(ahead)
        for a, b in zip(step, loader.step(4 + index, 6, 3), strict=True)
    )
    assert not loader_threads()


def test_prefetch_can_be_left_early(loader):
    with prefetch(loader, 0, 10**9, 6, 3, depth=1) as steps:
        next(steps)
    assert not loader_threads()
    assert list(steps) == []
    steps.close()


def test_prefetch_raises_where_the_step_would_have_come(loader, monkeypatch):
    real = loader.step
    monkeypatch.setattr(
        loader, "step", lambda index, *args: real(index, *args) if index < 2 else 1 / 0
    )
    with prefetch(loader, 0, 5, 6, 3) as steps:
        assert len([next(steps), next(steps)]) == 2
        with pytest.raises(ZeroDivisionError) as caught:
            next(steps)
        assert Path(__file__).name in str(caught.traceback[-1].path), "where it happened"
        assert list(steps) == []
    assert not loader_threads()


def test_closing_waits_for_one_step_and_no_more(loader, monkeypatch):
    made, go_on = [], threading.Event()
    monkeypatch.setattr(loader, "step", lambda index, *_: (go_on.wait(10), made.append(index)))
    with prefetch(loader, 0, 100, 6, 3, depth=8):
        threading.Timer(0.05, go_on.set).start()
    assert made == [0] and not loader_threads()


def test_prefetch_works_while_the_consumer_does(loader, monkeypatch):
    made = threading.Semaphore(0)
    real = loader.step
    monkeypatch.setattr(loader, "step", lambda *args: (made.release(), real(*args))[1])
    with prefetch(loader, 0, 100, 6, 3, depth=2) as steps:
        next(steps)
        assert all(made.acquire(timeout=10) for _ in range(3))
        time.sleep(0.05)
        assert not made.acquire(blocking=False) or not made.acquire(blocking=False)


def test_damage_is_noticed_when_a_shard_is_first_used(tmp_path):
    make_dataset(tmp_path / "data", shards=(40,))
    path = tmp_path / "data" / "train" / "shard-00000.arrow"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="its bytes have changed"):
        open_loader(tmp_path / "data", SEQUENCE, 0).batch([0])


@given(st.lists(st.integers(1, 25), min_size=1, max_size=20), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_packed_documents_come_out_whole(lengths, row_length):
    """Every token of every document once, in order, its successor as target, and padding apart."""
    documents = [
        np.arange(length, dtype=np.uint16) + 100 * number for number, length in enumerate(lengths)
    ]
    batch = pack_documents(
        documents, [7 * number for number in range(len(lengths))], row_length, pad_id=9999
    )
    found = {7 * number: [] for number in range(len(lengths))}
    ids_BS = batch.document_ids_G[batch.document_BS]
    for row in range(batch.tokens_BS.shape[0]):
        for column in range(row_length):
            document_id, token = int(ids_BS[row, column]), int(batch.tokens_BS[row, column])
            goes_on = (
                column + 1 < row_length
                and batch.document_BS[row, column + 1] == batch.document_BS[row, column]
            )
            if document_id < 0:
                assert token == 9999 and batch.targets_BS[row, column] == -100
                continue
            found[document_id].append(token)
            assert batch.targets_BS[row, column] == (token + 1 if goes_on else -100)
    assert [sorted(tokens) for tokens in found.values()] == [
        document.tolist() for document in documents
    ]
    assert batch.has_padding == bool((ids_BS < 0).any()) and (ids_BS >= 0).any(dim=1).all()


def test_packing_refuses_what_it_cannot_pack():
    for documents, ids in (([], []), ([np.zeros(0)], [1]), ([np.zeros(3)], [1, 2])):
        with pytest.raises(
            ValueError,
            match="cannot be packed into rows of 8; give at least one document, none empty",
        ):
            pack_documents(documents, ids, 8)
