"""Proves of best-fit packing that every sequence is full and every token comes once, that documents
are whole where they fit, and that its order is a permutation and the same on every layout."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_formats import make_dataset

from emotrain.config import RepetitionFilterConfig, config_from_dict
from emotrain.data import best_fit
from emotrain.data.best_fit import BestFitWindows, pack
from emotrain.data.formats import Dataset
from emotrain.data.loader import keyed
from emotrain.data.mixture_file import open_mixture
from emotrain.data.opening import open_loader
from emotrain.data.packing_shares import packing_shares
from emotrain.data.survey import cuts_of
from emotrain.training.data_source import build_loader

SEQUENCE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("best_fit") / "data"
    make_dataset(path, shards=(600, 3, 25, 450), valid=0)
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 sequences, 3 in a group: some 40 blocks of this data."""
    monkeypatch.setattr(best_fit, "BLOCK_SEQUENCES", 8)
    monkeypatch.setattr(best_fit, "GROUP_BLOCKS", 3)


def pack_slowly(lengths, num, size, begun, least):
    """The rules, one after the other, over all sequences each time: sets of (start, length)."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    sequences, room, loose = [], [], []
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        is_cut = length > size - (length == size) or (i == 0 and begun) or i == len(lengths) - 1
        while length >= size:
            sequences.append({(start, size)})
            room.append(0)
            start, length, is_cut = start + size, length - size, True
        if length:
            loose.append((is_cut, -length, start))
    sequences += [set() for _ in range(num - len(sequences))]
    room += [size] * (num - len(room))
    left = []
    for _, minus, start in sorted(loose):
        length = -minus
        fits = [(room[s], s) for s in range(num) if room[s] >= length]
        good = [(r, s) for r, s in fits if r == length or r >= length + least]
        if not fits:
            left.append((length, start))
            continue
        _, where = min(good or fits)
        sequences[where].add((start, length))
        room[where] -= length
    left.sort()
    for _, where in sorted(((room[s], s) for s in range(num) if room[s]), reverse=True):
        while room[where]:
            length, start = left.pop()
            part = min(room[where], length)
            sequences[where].add((start, part))
            room[where] -= part
            if length > part:
                left.append((length - part, start + part))
    return sequences


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_documents_lie_where_the_rules_put_them(data):
    size, num = data.draw(st.sampled_from([2, 5, 13, 600])), data.draw(st.integers(1, 6))
    cuts = data.draw(st.sets(st.integers(1, max(1, num * size - 1)), max_size=25))
    edges = np.array(sorted({0, num * size} | cuts))
    begun = data.draw(st.booleans())
    starts, lengths = pack(edges, num, size, begun)
    # Every token once; every sequence is full.
    assert sorted(
        token
        for start, length in zip(starts, lengths, strict=True)
        for token in range(start, start + length)
    ) == list(range(num * size))
    ends = np.cumsum(lengths)
    assert set(range(size, num * size + 1, size)) <= set(ends.tolist())
    found = [set() for _ in range(num)]
    for start, length, end in zip(starts.tolist(), lengths.tolist(), ends.tolist(), strict=True):
        found[(end - 1) // size].add((start, length))
    expected = pack_slowly(np.diff(edges).tolist(), num, size, begun, size // best_fit.LEAST_PIECE)
    assert found == expected


def test_the_example_of_the_file():
    edges = np.array([0, 4, 6, 15, 18, 20])
    starts, lengths = pack(edges, 4, 5, begun=False)
    names = "aaaabbcccccccccdddee"
    text = "".join(names[s : s + n] for s, n in zip(starts, lengths, strict=True))
    assert [text[i : i + 5] for i in range(0, 20, 5)] == ["ccccc", "aaaae", "bbddd", "cccce"]


@pytest.mark.parametrize("span", [1, 3])
def test_every_epoch_is_another_order_of_all_sequences(folder, span):
    windows = BestFitWindows(Dataset(folder).store(), SEQUENCE, span)
    count, places = windows.num_sequences, np.arange(windows.num_sequences)
    assert windows._rests and windows._blocks % best_fit.GROUP_BLOCKS
    assert count == sum(n // (SEQUENCE * span) * span for n in windows.store.shard_tokens)
    orders = [windows.ordered(places, keyed(epoch, places * 0)) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(count)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist() != orders[2].tolist()
    groups = orders[0].reshape(-1, span)
    assert (groups % span == np.arange(span)).all() and (np.diff(groups // span) == 0).all()
    # One place alone has the number that it has among all.
    assert all(
        windows.ordered(places[i : i + 1], keyed(0, places[:1] * 0))[0] == orders[0][i]
        for i in range(0, count, 17)
    )


def test_a_group_is_few_blocks_and_the_smaller_ones_are_spread(folder):
    windows = BestFitWindows(Dataset(folder).store(), SEQUENCE)
    order = windows.ordered(places := np.arange(windows.num_sequences), keyed(0, places * 0))
    is_rest = order >= windows._blocks * 8
    assert np.diff(np.flatnonzero(is_rest), prepend=-1).max() <= len(order) // is_rest.sum() + 1
    blocks = (order[~is_rest] // 8).tolist()
    groups = [set(blocks[i : i + 24]) for i in range(0, len(blocks), 24)]
    assert all(len(group) == 3 for group in groups[:-1])
    assert sum(map(len, groups)) == windows._blocks


def test_order_is_stable(folder):
    """These numbers are part of every checkpoint: a release that changes them would resume runs
    on other data."""
    loader = open_loader(folder, SEQUENCE, 0, packing="best_fit")
    assert loader.windows(range(8)).tolist() == [291, 289, 172, 295, 173, 290, 288, 119]
    assert loader.batch([0]).document_ids_G.tolist() == [936, 939, 940, 944]


def test_each_token_comes_once_with_its_document(folder):
    """Against a plain loop over the documents of every shard."""
    dataset = Dataset(folder)
    windows = BestFitWindows(dataset.store(), SEQUENCE)
    rows = windows.rows(np.arange(windows.num_sequences))
    owners = np.repeat(rows.ids_G, rows.lengths_G)
    found = sorted(zip(owners.tolist(), rows.tokens_BS.reshape(-1).tolist(), strict=True))
    expected = []
    for shard, info in enumerate(dataset.shards["train"]):
        mapped, first = dataset.shard("train", shard), dataset.first_ids["train"][shard]
        used = info.tokens // SEQUENCE * SEQUENCE
        of_token = np.repeat(np.arange(info.documents) + first, np.diff(mapped.offsets))[:used]
        expected += zip(of_token.tolist(), mapped.tokens[:used].tolist(), strict=True)
    assert found == sorted(expected)
    # Inside of a document the tokens are those that follow one another.
    stream = {i: tokens for i, tokens, _ in dataset.documents("train")}
    ends = np.cumsum(rows.lengths_G).tolist()
    for document, length, end in zip(rows.ids_G.tolist(), rows.lengths_G, ends, strict=True):
        piece = rows.tokens_BS.reshape(-1)[end - length : end].tobytes()
        assert piece in stream[document].astype(np.int64).tobytes()


def test_sequences_of_a_span_are_packed_as_one(folder):
    store = Dataset(folder).store()
    narrow, wide = BestFitWindows(store, SEQUENCE, 3), BestFitWindows(store, 3 * SEQUENCE)
    assert narrow.num_sequences == 3 * wide.num_sequences
    numbers = np.arange(wide.num_sequences)[::-1]
    one = wide.rows(numbers)
    three = narrow.rows((numbers[:, None] * 3 + np.arange(3)).reshape(-1))
    assert one.tokens_BS.tobytes() == three.tokens_BS.tobytes()
    assert np.array_equal(
        np.repeat(one.ids_G, one.lengths_G), np.repeat(three.ids_G, three.lengths_G)
    )
    assert set(range(16, three.tokens_BS.size, 16)) <= set(np.cumsum(three.lengths_G).tolist())


def test_little_is_kept_and_threads_agree(folder, monkeypatch):
    windows = BestFitWindows(Dataset(folder).store(), SEQUENCE)
    numbers = np.arange(windows.num_sequences)
    right = windows.rows(numbers)
    monkeypatch.setattr(best_fit, "CACHE_BYTES", 2000)
    few, wrong = BestFitWindows(Dataset(folder).store(), SEQUENCE), []

    def read(seed):
        order = np.random.default_rng(seed).permutation(numbers)
        rows = few.rows(order)
        wrong.extend(np.flatnonzero((rows.tokens_BS != right.tokens_BS[order]).any(1)))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and few._cached_bytes <= 2000
    assert few._cached_bytes == sum(block.nbytes for block in few._cache.values())


def test_shares_against_a_count_of_documents(folder):
    dataset = Dataset(folder)
    for packing in ("concat", "best_fit"):
        shares = packing_shares(dataset.store(), SEQUENCE, packing)
        loader = open_loader(folder, SEQUENCE, 0, packing=packing)
        rows = loader.source.rows(np.arange(loader.num_sequences))
        whole, seen = 0, 0
        for shard, info in enumerate(dataset.shards["train"]):
            offsets = dataset.shard("train", shard).offsets
            used = info.tokens // SEQUENCE * SEQUENCE
            for row in range(info.documents):
                if offsets[row + 1] < used or offsets[row + 1] == used == info.tokens:
                    document = dataset.first_ids["train"][shard] + row
                    found = rows.lengths_G[rows.ids_G == document].tolist()
                    whole += found == [offsets[row + 1] - offsets[row]]
                    seen += 1
        assert shares["documents"] == seen and shares["one_pool"] == whole / seen
        assert shares["utilisation"] == 1 and shares["cut"] == 1 - whole / seen
        if packing == "concat":  # what `inspect` counts by the edges of documents alone
            edges = [
                offsets[offsets <= info.tokens // SEQUENCE * SEQUENCE]
                for shard, info in enumerate(dataset.shards["train"])
                if len(offsets := dataset.shard("train", shard).offsets)
            ]
            cuts = cuts_of([of for of in edges if len(of) > 1], SEQUENCE)
            assert cuts.cut == pytest.approx(shares["cut"])
    assert whole / seen > 0.9
    part = packing_shares(dataset.store(), SEQUENCE, "best_fit", most_tokens=500)
    assert part["sequences"] == 500 // SEQUENCE and 0.8 < part["one_pool"] < 1


FILTER = RepetitionFilterConfig(enabled=True, max_period=2, max_count=1, action="replace")
SOURCES = {
    "best_fit": {"packing": "best_fit"},
    "best_fit, filter": {"packing": "best_fit", "repetition_filter": FILTER},
    "concat, filter": {"repetition_filter": FILTER},
    "mixture, best_fit, filter": {"packing": "best_fit", "repetition_filter": FILTER},
    "mixture, best_fit, filter, span": {
        "packing": "best_fit",
        "repetition_filter": FILTER,
        "span": 2,
    },
}


def tokens_of(batches):
    """Tokens, targets and permanent documents of a step's micro-batches, in order."""
    return [
        torch.cat(parts)
        for parts in zip(
            *(
                (batch.tokens_BS, batch.targets_BS, batch.document_ids_G[batch.document_BS])
                for batch in batches
            ),
            strict=True,
        )
    ]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(name, marks=[] if name.startswith("mixture") else pytest.mark.long)
        for name in SOURCES
    ],
)
def test_the_same_order_on_every_layout_and_after_a_resume(folder, tmp_path, source):
    """1, 2, 3, 4 and 8 ranks, micro-batches of three sizes, another number of ranks each step."""

    make_dataset(tmp_path / "other", shards=(200, 90), valid=0, seed=1)
    (tmp_path / "mix.yaml").write_text(
        f"sources: {{one: {{path: {folder}, weight: 2}}, other: {{path: other, weight: 1}}}}"
    )

    def opened():
        if source.startswith("mixture"):
            return open_mixture(tmp_path / "mix.yaml", SEQUENCE, 5, **SOURCES[source])
        return open_loader(folder, SEQUENCE, 5, **SOURCES[source])

    span = SOURCES[source].get("span", 1)
    straight, steps = opened(), (0, 1, 3)  # an epoch has 1.2 steps
    expected = {step: tokens_of(straight.step(step, 288, 288)) for step in steps}
    for world_size in (1, 2, 3, 4, 8):
        for number, micro_batch in enumerate((span, 2 * span, 3 * span)):
            ranks = [opened() for _ in range(world_size)]  # nothing is carried over
            step = steps[number]
            found = [
                batch
                for rank, loader in enumerate(ranks)
                for batch in loader.step(step, 288, micro_batch, rank, world_size)
            ]
            assert all(map(torch.equal, tokens_of(found), expected[step]))


def test_pairs_of_prompts_and_answers_are_not_packed(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    config = config_from_dict(
        {"data": {"path": str(tmp_path / "pairs.jsonl"), "packing": "best_fit"}}
    )
    with pytest.raises(ValueError, match="data.packing=best_fit: .* remove data.packing"):
        build_loader(config)
