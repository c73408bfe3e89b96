"""Proves of the prepared data set that reading gives back what was written, in place, and that
whatever was damaged, cut or forged on the disk is refused with one line instead of giving wrong
tokens or leaving the folder."""

import json

import numpy as np
import pyarrow as pa
import pytest

from emotrain.data import checks, formats
from emotrain.data.formats import Dataset
from emotrain.data.manifest import ShardInfo, token_dtype, write_manifest
from emotrain.data.shards import write_shard
from emotrain.files import sha256_of


def make_dataset(folder, vocab_size=50, shards=(7, 5), valid=4, seed=0):
    """Random documents of 1 to 9 tokens; returns {(split, shard, row): (tokens, domain)}."""
    rng, documents, splits = np.random.default_rng(seed), {}, {}
    for split, counts in (("train", shards), ("valid", (valid,) if valid else ())):
        (folder / split).mkdir(parents=True)
        infos, domains = [], {}
        for shard, count in enumerate(counts):
            lengths = rng.integers(1, 10, count)
            tokens = rng.integers(0, vocab_size, lengths.sum()).astype(token_dtype(vocab_size))
            names = [f"d{rng.integers(3)}" for _ in range(count)]
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            infos.append(
                write_shard(
                    folder / split / f"shard-{shard:05d}.arrow",
                    tokens,
                    offsets,
                    names,
                    [f"{split}-{shard}-{row}" for row in range(count)],
                )
            )
            for row, name in enumerate(names):
                documents[split, shard, row] = tokens[offsets[row] : offsets[row + 1]], name
                counted = domains.setdefault(name, {"documents": 0, "tokens": 0})
                counted["documents"] += 1
                counted["tokens"] += int(lengths[row])
        splits[split] = {"shards": infos, "domains": domains}
    write_manifest(
        folder,
        vocab_size=vocab_size,
        eos_id=0,
        eos_token="<eos>",
        splits=splits,
        skipped_documents={"empty": 0},
        settings={},
    )
    return documents


@pytest.fixture
def folder(tmp_path):
    make_dataset(tmp_path / "data")
    return tmp_path / "data"


def edit(folder, change):
    manifest = json.loads((folder / "dataset.json").read_text())
    change(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(50, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_round_trip(tmp_path, vocab_size, dtype):
    written = make_dataset(tmp_path / "data", vocab_size)
    dataset = Dataset(tmp_path / "data")
    dataset.verify()
    found = {}
    for split in ("train", "valid"):
        for document_id, tokens, domain in dataset.documents(split):
            found[dataset.locate(document_id)] = tokens, domain
            assert tokens.dtype == dtype and not tokens.flags.owndata and not tokens.flags.writeable
    assert found.keys() == written.keys()
    assert all(
        np.array_equal(found[key][0], written[key][0]) and found[key][1] == written[key][1]
        for key in written
    )
    assert [dataset.num_documents(split) for split in ("train", "valid")] == [12, 4]
    assert dataset.first_ids == {"train": [0, 7, 12], "valid": [12, 16]}


def test_documents_by_domain_and_limit(folder):
    dataset = Dataset(folder)
    everything = [(i, domain) for i, _, domain in dataset.documents("train")]
    domain = everything[0][1]
    of_domain = [item for item in everything if item[1] == domain]
    assert [(i, d) for i, _, d in dataset.documents("train", domain)] == of_domain
    assert [i for i, _, _ in dataset.documents("train", limit=9)] == list(range(9))
    assert [(i, d) for i, _, d in dataset.documents("train", domain, limit=2)] == of_domain[:2]
    with pytest.raises(
        ValueError, match="domain 'nothing' has no valid documents; choose one of d"
    ):
        next(dataset.documents("valid", "nothing"))
    with pytest.raises(ValueError, match="split='test' is not known; choose one of train, valid"):
        next(dataset.documents("test"))
    with pytest.raises(ValueError, match="document 16 is not in .*; its ids are 0 to 15"):
        dataset.locate(16)


def test_arrays_outlive_the_mapping_limit(folder, monkeypatch):
    monkeypatch.setattr(formats.Dataset, "most_open", 1)
    dataset = Dataset(folder)
    views = [(tokens, tokens.copy()) for _, tokens, _ in dataset.documents("train")]
    list(dataset.documents("valid"))
    assert len(dataset._open) == 1
    assert all(np.array_equal(view, copy) for view, copy in views)


def test_checksums_are_checked_once_a_shard(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        checks, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path)
    )
    monkeypatch.setattr(formats.Dataset, "most_open", 1)
    dataset = Dataset(folder)
    assert hashed == []
    for _ in range(3):
        list(dataset.documents("train"))
    assert hashed == ["shard-00000.arrow", "shard-00001.arrow"]


def test_every_flipped_byte_is_noticed(folder):
    path = folder / "train" / "shard-00001.arrow"
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        changed = r"its bytes have changed since .*sha256 .*copy it again"
        with pytest.raises(ValueError, match=changed):
            Dataset(folder).shard("train", 1)
        # Without checksums tokens may be wrong, but nothing may crash or point outside the file.
        try:
            shard = Dataset(folder, verify_checksums=False).shard("train", 1)
            assert shard.offsets[-1] == len(shard.tokens)
        except ValueError as error:
            assert "\n" not in str(error) and "shard-00001.arrow" in str(error)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_shard_is_refused_on_opening(folder, size):
    path = folder / "train" / "shard-00000.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(
        ValueError,
        match=f"has {len(whole[:size])} bytes, dataset.json says {len(whole)}; copy it again",
    ):
        Dataset(folder)
    edit(
        folder,
        lambda m: m["splits"]["train"]["shards"][0].update(
            bytes=max(1, len(whole[:size])), sha256=sha256_of(path)
        ),
    )
    if size:
        with pytest.raises(
            ValueError, match="is not a readable Arrow file .*; copy the shard again"
        ):
            Dataset(folder).shard("train", 0)


def replace_shard(folder, batches, schema=None):
    """Write other record batches under the name of the first shard, and make the manifest agree."""
    path = folder / "train" / "shard-00000.arrow"
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, schema or batches[0].schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
    edit(
        folder,
        lambda m: m["splits"]["train"]["shards"][0].update(
            bytes=path.stat().st_size, sha256=sha256_of(path)
        ),
    )


def test_forged_shards_are_refused(folder):
    good = pa.ipc.open_file(folder / "train" / "shard-00000.arrow").get_batch(0)
    tokens = good.column("tokens")

    def with_tokens(array):
        return pa.record_batch(
            [array, good.column("domain"), good.column("source")], names=good.schema.names
        )

    offsets = tokens.offsets.to_pylist()
    backwards = [offsets[0], offsets[3], *offsets[2:]]
    empty_document = [offsets[0], offsets[2], *offsets[2:]]
    too_large = pa.array(np.full(len(tokens.values), 50, dtype=np.uint16))
    for batches, message in [
        ([good, good], "has 2 record batches, a shard has one"),
        (
            [with_tokens(tokens.cast(pa.large_list(pa.uint32())))],
            "has columns .*uint32.*, not those of uint16 shards",
        ),
        ([with_tokens(tokens.cast(pa.list_(pa.uint16())))], "not those of uint16 shards"),
        ([good.slice(0, 3)], "holds 3 documents"),
        (
            [with_tokens(pa.LargeListArray.from_arrays(pa.array(backwards), tokens.values))],
            "non-monotonic offset",
        ),
        (
            [with_tokens(pa.LargeListArray.from_arrays(pa.array(empty_document), tokens.values))],
            "offsets that do not rise",
        ),
        (
            [with_tokens(pa.LargeListArray.from_arrays(pa.array(offsets), too_large))],
            "holds token id 50, vocab_size is 50",
        ),
    ]:
        replace_shard(folder, batches)
        with pytest.raises(ValueError, match=message) as caught:
            Dataset(folder).shard("train", 0)
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_data_set(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere: no such folder; make a data set with `emotrain prepare"
    ):
        Dataset(tmp_path / "nowhere")
    (folder / "train" / "shard-00001.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="shard-00001.arrow: shard is missing; restore it"):
        Dataset(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="has no dataset.json, so it is no data set, or half of one"
    ):
        Dataset(folder)


SHARD = ("splits", "train", "shards", 0)
BAD_MANIFESTS = [
    (("format",), "parquet", 'has no "format": "emotrain-dataset"'),
    (("format_version",), 2, "has format_version 2, this program reads 1"),
    (("vocab_size",), True, "has vocab_size=True, it must be a whole number of at least 1"),
    (("vocab_size",), 2**40, "more than 32-bit ids"),
    (("vocab_size",), 2**20, "has dtype 'uint16', a vocabulary of 1048576 is stored as uint32"),
    (("eos_id",), 50, "has an eos_id outside its vocabulary of 50"),
    (("eos_token",), None, "has eos_token=None, it must be text"),
    (("tokenizer",), "../../secret.json", "has tokenizer='../../secret.json'"),
    (("skipped_documents",), [], r"has skipped_documents=\[\], it must be an object"),
    (("skipped_documents", "empty"), -1, "has empty=-1"),
    (("splits", "valid"), None, "has valid=None, it must be an object"),
    (("splits", "train", "shards"), {}, "has train shards {}, they must be a list"),
    (SHARD, "train/shard-00000.arrow", "it must be an object"),
    (
        (*SHARD, "file"),
        "../elsewhere.arrow",
        "names shard '../elsewhere.arrow', which is no file in train/",
    ),
    ((*SHARD, "file"), "/etc/passwd", "names shard '/etc/passwd', which is no file in train/"),
    ((*SHARD, "file"), "train/..", "names shard 'train/..', which is no file in train/"),
    ((*SHARD, "file"), "train/../valid/shard-00000.arrow", "which is no file in train/"),
    ((*SHARD, "file"), "train/shard-00001.arrow", "names a train shard twice"),
    ((*SHARD, "file"), "train/\0", "which is no file in train/"),
    ((*SHARD, "file"), 7, "names shard 7"),
    ((*SHARD, "documents"), 8, "counts 12 train documents by domain and 13 by shard"),
    ((*SHARD, "tokens"), 1.5, "has tokens=1.5"),
    ((*SHARD, "bytes"), 10**9, "has .* bytes, dataset.json says 1000000000"),
    ((*SHARD, "sha256"), "abc", "has sha256='abc'"),
    (("splits", "train", "domains", "d0"), 3, "has d0=3, it must be an object"),
]


@pytest.mark.parametrize(("keys", "value", "message"), BAD_MANIFESTS)
def test_untrusted_manifests_are_refused(folder, keys, value, message):
    def change(manifest):
        *parents, leaf = keys
        for key in parents:
            manifest = manifest[key]
        manifest[leaf] = value

    edit(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        Dataset(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"format": "emotrain-dataset"}']
)
def test_malformed_manifests_are_refused(folder, text):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match="dataset.json: (is not JSON|has)"):
        Dataset(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    shard = folder / "train" / "shard-00000.arrow"
    shard.rename(tmp_path / "outside.arrow")
    shard.symlink_to(tmp_path / "outside.arrow")
    with pytest.raises(ValueError, match="leads out of the data set"):
        Dataset(folder)


def test_fingerprint_names_the_tokens(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_dataset(tmp_path / name, seed=seed)
    a, b, c = (Dataset(tmp_path / name) for name in "abc")
    assert (
        a.fingerprint() == b.fingerprint() != c.fingerprint()
        and a.fingerprint() != a.fingerprint("valid")
    )


def test_shard_info_is_what_the_manifest_holds(folder):
    info = Dataset(folder).shards["train"][0]
    assert info == ShardInfo(
        "train/shard-00000.arrow",
        7,
        info.tokens,
        (folder / info.file).stat().st_size,
        sha256_of(folder / info.file),
    )
