"""Proves of a mixture that each row of its batches is its source's own, that ranks, micro-batches
and resumes change nothing, what its file may say, and that sources of other tokens are refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_batch, tiny_model, write
from test_data_formats import make_dataset

from emotrain.batch import SOURCE_BITS
from emotrain.config import RepetitionFilterConfig
from emotrain.data.mixture import Mixture, picked, together
from emotrain.data.mixture_changes import difference
from emotrain.data.mixture_file import is_mixture, open_mixture, own_tokens, read_mixture
from emotrain.data.mixture_order import source_seed
from emotrain.data.opening import open_loader
from emotrain.errors import UserError
from emotrain.model.losses import language_model_sums
from emotrain.model.source_losses import source_of_rows

SEQUENCE = 8
WEIGHTS = "web: {path: web, weight: 0.6}, code: {path: code, weight: 0.3}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, web of 86 sequences and code of 16; one with other tokens; and two of few
    tokens, which repeat themselves."""
    path = tmp_path_factory.mktemp("mixture")
    make_dataset(path / "web", shards=(60, 80), valid=0, seed=1)
    make_dataset(path / "code", shards=(30,), valid=2, seed=2)
    make_dataset(path / "other", vocab_size=60, shards=(9,))
    for seed, name in enumerate(("few", "less")):
        make_dataset(path / name, vocab_size=6, shards=(60,), seed=seed)
    return path


def mixed(folder: Path, text: str, seed: int = 3, **options) -> Mixture:
    return open_mixture(write(folder / "mix.yaml", text), SEQUENCE, seed, **options)


def sources_of(text: str) -> str:
    return f"sources: {{{text}}}\n"


# ---- batches


def test_each_row_is_its_source_s_own(folder: Path) -> None:
    """In its own order, whose seed is of its name, over several passes of the small one."""
    mixture = mixed(folder, sources_of(WEIGHTS))
    batch = mixture.batch(range(80))
    source_B, place_B = mixture.order.locate(range(80))
    assert 15 < (source_B == 1).sum() < 40 and batch.num_sources == 2 and not batch.has_padding
    for row, (source, place) in enumerate(zip(source_B.tolist(), place_B.tolist(), strict=True)):
        name = mixture.names[source]
        alone = open_loader(folder / name, SEQUENCE, source_seed(3, name)).batch([place])
        assert torch.equal(batch.tokens_BS[row], alone.tokens_BS[0])
        assert torch.equal(batch.targets_BS[row], alone.targets_BS[0])
        ids_S = batch.document_ids_G[batch.document_BS[row]]
        assert torch.equal(ids_S - source * 2**48, alone.document_ids_G[alone.document_BS[0]])
    document_T = batch.document_T
    assert (document_T.diff() >= 0).all() and int(document_T.max()) + 1 == batch.num_documents
    assert torch.equal(source_of_rows(batch), torch.from_numpy(source_B))


def test_options_are_those_of_every_source(folder: Path) -> None:
    repetitive = RepetitionFilterConfig(enabled=True)
    options = {"repetition_filter": repetitive, "cross_document_targets": False}
    mixture = mixed(folder, sources_of(WEIGHTS), **options)
    assert [source.loader.repetition_filter for source in mixture.sources] == [repetitive] * 2
    lost = [
        int((m.batch(range(40)).targets_BS < 0).sum())
        for m in (mixture, mixed(folder, sources_of(WEIGHTS)))
    ]
    assert lost[0] > lost[1] == 40, "the last position of each row has none"


STAGED = (
    "sources: {web: {path: web}, code: {path: code}}\n"
    f"stages: [{{until_tokens: {8 * 130}, weights: {{web: 3, code: 1}}}}, "
    "{weights: {web: 1, code: 1}}]"
)
PACKED = {
    "packing": "best_fit",
    "on_bad_data": "replace",
    "repetition_filter": RepetitionFilterConfig(enabled=True, max_count=3, action="replace"),
}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (STAGED, {}),
        (sources_of("few: {path: few, weight: 2}, less: {path: less, weight: 1}"), PACKED),
        (sources_of(WEIGHTS.replace("weight", "epochs")), {"span": 4}),
    ],
    ids=["stages", "best fit, replaced", "span"],
)
def test_ranks_and_micro_batches_do_not_change_a_step(folder: Path, text, options) -> None:
    """Nor does what was read before."""
    span = options.get("span", 1)
    layouts = ((1, 4), (2, 12), (3, 8), (6, 4), *[(8, 3), (4, 1)] * (span == 1))
    for world_size, micro_batch in layouts:
        mixture, other = (mixed(folder, text, **options) for _ in range(2))
        for step in (5, 0, 10**11):
            whole = other.batch(range(step * 24, step * 24 + 24))
            parts = [
                batch
                for rank in range(world_size)
                for batch in mixture.step(step, 24, micro_batch, rank, world_size)
            ]
            for name in ("tokens_BS", "targets_BS"):
                together = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(together, getattr(whole, name))
            ids = [part.document_ids_G[part.document_BS] for part in parts]
            assert torch.equal(torch.cat(ids), whole.document_ids_G[whole.document_BS])
        if "packing" in options:
            assert sum(source.loader.replaced for source in mixture.sources)
        rows_per_group = source_of_rows(whole).reshape(-1, span)
        assert (rows_per_group == rows_per_group[:, :1]).all()


def test_rows_with_padding_are_put_in_order() -> None:
    one, two = tiny_batch(((5, 3), (2, 6)), padded=True), tiny_batch(((4, 4), (8,)), seed=1)
    both = together([one, two])
    batch = picked(both, np.array([2, 0, 3, 1]))
    assert batch.document_BS[:, 0].tolist() == [0, 2, 4, 5] and batch.has_padding
    assert batch.document_ids_G.tolist() == [100, 101, 100, 101, 102, 102, -1]
    assert torch.equal(batch.tokens_BS, torch.cat([one.tokens_BS, two.tokens_BS])[[2, 0, 3, 1]])
    assert torch.equal(batch.targets_BS[3], one.targets_BS[1])
    assert not picked(both, np.array([2, 0])).has_padding and together([one]) is one


def test_a_batch_of_padding_has_no_source(folder: Path) -> None:
    ids_G = torch.tensor([(5 << SOURCE_BITS) + 7, -1])
    batch = tiny_batch(((3, 5),), padded=True)
    assert source_of_rows(batch).tolist() == [0]
    object.__setattr__(batch, "document_ids_G", ids_G)
    assert source_of_rows(batch).tolist() == [5]


# ---- losses


def test_the_loss_of_each_source_is_that_of_its_rows() -> None:
    model = tiny_model().double()
    batch = tiny_batch(((5, 7, 4), (9, 7), (16,), (8, 8)), padded=True)
    without = language_model_sums(model(batch), model.head, batch, 0.0)
    assert without.by_source is None
    source_B = torch.tensor([2, 0, 2, 0])
    shift_G = source_B[[0, 0, 0, 1, 1, 2, 3, 3]] << SOURCE_BITS
    ids_G = torch.where(batch.document_ids_G < 0, -1, batch.document_ids_G + shift_G)
    object.__setattr__(batch, "document_ids_G", ids_G)
    object.__setattr__(batch, "num_sources", 3)
    sums = language_model_sums(model(batch), model.head, batch, 0.0)
    logits = model(batch).hidden_TD @ model.head.weight.T
    for source in range(3):
        rows = torch.where((source_B == source)[:, None], batch.targets_BS, -100).reshape(-1)
        wanted = torch.nn.functional.cross_entropy(logits, rows, reduction="sum")
        assert sums.by_source[source, 0].item() == pytest.approx(wanted.item(), rel=1e-12)
        assert sums.by_source[source, 1] == (rows >= 0).sum()
    assert sums.by_source[:, 0].sum().item() == pytest.approx(without.cross_entropy.item())


# ---- lengths of runs


def test_a_run_that_repeats_a_source_too_often_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixture = mixed(folder, sources_of(WEIGHTS.replace("0.3", "0.3, max_epochs: 3.5")))
    end = next(n for n in range(400) if mixture.epochs(n)[1] > 3.5)
    mixture.check_length(end - 1)
    with pytest.raises(UserError, match=r"code of .*mix.yaml: 3\.\d+ passes over its 1\d\d tokens"):
        mixture.check_length(end)
    open_ended = mixed(folder, sources_of(WEIGHTS))
    open_ended.check_length(100)
    assert not caplog.text
    open_ended.check_length(900)
    assert "code of" in caplog.text and "repeated so often" in caplog.text
    assert open_ended.epochs(1024)[1] == pytest.approx(
        1024 / 3 / open_ended.sources[1].loader.num_sequences, abs=0.1
    )


# ---- files


def test_shares_by_weight_passes_and_tokens(folder: Path) -> None:
    def weights(text: str) -> list[Fraction]:
        return list(mixed(folder, sources_of(text)).order.stages[0].weights)

    thirds = [Fraction(2, 3), Fraction(1, 3)]
    assert weights(WEIGHTS) == thirds, "0.6 and 0.3, exactly"
    assert weights("web: {path: web, tokens: 2e3}, code: {path: code, tokens: 1000}") == thirds
    by_passes = mixed(
        folder, sources_of("web: {path: web, epochs: 1}, code: {path: code, epochs: 2.5}")
    )
    web, code = (source.loader.num_sequences for source in by_passes.sources)
    assert by_passes.order.stages[0].weights[1] == Fraction(5 * code, 2 * web + 5 * code)
    file = read_mixture(folder / "mix.yaml")
    assert own_tokens(file, by_passes) == round((web + 2.5 * code) * SEQUENCE)
    assert (
        own_tokens(read_mixture(write(folder / "w.yaml", sources_of(WEIGHTS))), by_passes) is None
    )


def test_stages_end_where_the_file_says(folder: Path) -> None:
    text = (
        "sources: {web: {path: web}, code: {path: code}}\n"
        "stages: [{until_tokens: 1.6e2, weights: {web: 1}}, {weights: {web: 1, code: 0.5}}]"
    )
    assert [s.start for s in mixed(folder, text).order.stages] == [0, 20]
    assert [s.start for s in mixed(folder, text, span=4).order.stages] == [0, 5]
    mixture = mixed(folder, text)
    assert mixture.order.counts(20) == [20, 0] and mixture.order.counts(100)[1] > 10
    with pytest.raises(UserError, match="stage 1: until_tokens=7 is not above 0"):
        mixed(folder, text.replace("1.6e2", "7"))


def test_the_paths_are_relative_to_the_file_and_data_may_be_of_a_domain(folder: Path) -> None:
    text = sources_of("a: {path: ../web, domain: d1, weight: 1}, b: {path: ../web, weight: 1}")
    (folder / "deeper").mkdir()
    path = write(folder / "deeper/mix.yml", text)
    mixture = open_mixture(path, SEQUENCE, 0)
    assert is_mixture(path) and not is_mixture(folder / "web")
    assert mixture.sources[0].loader.domain == "d1" and mixture.domain == ""
    assert mixture.described()["b"]["sequences"] > mixture.described()["a"]["sequences"]
    one = sources_of(
        "a: {path: web, domain: d1, weight: 1}, b: {path: code, domain: d1, weight: 1}"
    )
    assert mixed(folder, one).batch([0]).domain == "d1"


WEB = "web: {path: web, weight: 1}"
STAGE = "sources: {web: {path: web}}\nstages: "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: {}", "has no sources; give at least one"),
        ("data: {}", "data is not known; choose one of sources, stages"),
        ("- web", "settings, not a list"),
        ("sources: [web]", "has no sources"),
        ("sources: {web: data}", "source web: has no path"),
        ("sources: {web: {path: web, wieght: 1}}", "wieght is not known; did you mean weight?"),
        ("sources: {web: {path: web}}", "source web: has none of weight, epochs, tokens"),
        ("sources: {web: {path: web, weight: 1, tokens: 2}}", "has weight and tokens of"),
        (
            sources_of(f"{WEB}, code: {{path: code, epochs: 1}}"),
            "web has weight and source code epo",
        ),
        ("sources: {web: {path: web, weight: 0}}", "source web: weight=0 is no positive number"),
        ("sources: {web: {path: web, weight: .nan}}", "weight=nan is no positive number"),
        ("sources: {web: {path: web, weight: yes}}", "weight=True is no positive number"),
        ("sources: {web: {path: web, weight: 1, max_epochs: -1}}", "max_epochs=-1 is no positive"),
        ("sources: {web: {path: web, weight: 1, domain: 3}}", "domain=3 is no text"),
        ("sources: {a b: {path: web, weight: 1}}", "source a b: a name has letters"),
        (f"sources:\n  {WEB}\n  {WEB}\n", "duplicate key"),
        ("sources: {web: {path: nowhere, weight: 1}}", "source web: "),
        (sources_of(f"{WEB}, o: {{path: other, weight: 1}}"), "source o has tokens 60, web has 50"),
        (STAGE + "{}", "stages is no list"),
        (STAGE + "[{weights: {web: 1}, until_tokens: 9}]", "the last stage has no until_tokens"),
        (STAGE + "[{weights: {web: 1}}, {weights: {web: 1}}]", "stage 1: has no until_tokens"),
        (STAGE + "[{until_tokens: 9}]", "stage 1: has no weights"),
        (STAGE + "[{weights: {wob: 1}}]", "stage 1: weights: wob is not known; did you mean web?"),
        (STAGE + "[{weights: {web: 0}}]", "stage 1: no source has a weight above 0"),
        (STAGE + "[{weights: {web: no}}]", "web=False is no positive number"),
        (f"sources: {{{WEB}}}\nstages: [{{weights: {{web: 1}}}}]", "give none, the weights are in"),
        (
            "sources: {web: {path: web}, code: {path: code}}\nstages: [{weights: {web: 1}}]",
            "no stage has a weight for code",
        ),
    ],
)
def test_what_is_no_mixture_is_said_in_one_line(folder: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        mixed(folder, text)
    line = str(caught.value)
    assert said in line and "mix.yaml" in line and "\n" not in line


def test_a_mixture_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mix.yaml: no such file; a mixture names"):
        read_mixture(tmp_path / "mix.yaml")


def test_sources_of_another_tokenizer_or_eos_are_named(folder: Path) -> None:
    for name in ("a", "b", "c"):
        make_dataset(folder / name, shards=(30,), seed=5)
    text = sources_of(", ".join(f"{name}: {{path: {name}, weight: 1}}" for name in "abc"))
    for name, content in (("b", "1"), ("c", "1")):  # nobody knows the tokenizer of a
        (folder / name / "tokenizer.json").write_text(content)
    assert mixed(folder, text).tokenizer_file == folder / "b/tokenizer.json"
    (folder / "c/tokenizer.json").write_text("2")
    with pytest.raises(UserError, match="source c has tokenizer [0-9a-f]{12}, b has [0-9a-f]{12}"):
        mixed(folder, text)
    manifest = folder / "c/dataset.json"
    manifest.write_text(manifest.read_text().replace('"eos_id": 0', '"eos_id": 1'))
    with pytest.raises(UserError, match="source c has EOS 1, a has 0"):
        mixed(folder, text)


# ---- changes between runs


def test_what_has_changed_up_to_a_position(folder: Path) -> None:
    def prints(*stages: str, names: str = "web code") -> str:
        listed = ", ".join(f"{name}: {{path: {name[:4]}}}" for name in names.split())
        text = f"sources: {{{listed}}}\nstages: [{', '.join(f'{{{stage}}}' for stage in stages)}]"
        return mixed(folder, text).fingerprint

    first = "until_tokens: 800, weights: {web: 2, code: 1}"
    then = prints(first, "weights: {web: 1, code: 1}")
    assert then == prints(first, "weights: {web: 2, code: 2}")
    later = prints(first, "weights: {web: 9, code: 1}")
    assert not difference(then, later, 100)
    assert difference(then, later, 101) == (
        "web had weight 0.5, here 0.9, code had weight 0.5, here 0.1"
    )
    one = prints("weights: {web: 2, code: 1}")
    assert not difference(one, then, 100) and not difference(then, one, 100)
    assert difference(one, then, 101) == "a stage begins at sequence 100, and there none did"
    assert difference(then, one, 101) == "a stage begins at sequence 100, and here none does"
    third = prints(first, "weights: {web: 1, code: 1, code2: 1}", names="web code code2")
    assert not difference(then, third, 100)
    assert "code2 had weight 0, here 0.333333" in difference(then, third, 101)
    swapped = prints(first, "weights: {web: 1, code: 1}", names="code web")
    assert difference(then, swapped, 1) == "the sources were in the order web, code"
    other = prints("weights: {web: 2, code: 1}").replace(one.split('"')[9], "0" * 16)
    assert difference(one, other, 1) == "source code has other data or another sequence length"
    grouped = mixed(folder, sources_of(WEIGHTS), span=4).fingerprint
    assert difference(one, grouped, 1) == "with groups of 1 sequences, here of 4"
    assert difference("abc", one, 1) == "fingerprint abc, here a mixture of web, code"
    assert difference("abc", "abd", 0) == "fingerprint abc, here abd" and not difference(
        "a", "a", 9
    )


def test_a_stage_may_be_added_where_a_run_stands_and_nothing_before_changes(folder: Path) -> None:
    """At any position, also in the middle of a block."""
    plain = mixed(folder, sources_of(WEIGHTS))
    text = (
        "sources: {web: {path: web}, code: {path: code}}\nstages: [{until_tokens: 2960, weights: "
    )
    staged = mixed(folder, text + "{web: 0.6, code: 0.3}}, {weights: {web: 1, code: 5}}]")
    assert not difference(plain.fingerprint, staged.fingerprint, 370)
    assert difference(plain.fingerprint, staged.fingerprint, 371)
    for before, after in zip(
        plain.order.locate(range(370)), staged.order.locate(range(370)), strict=True
    ):
        assert np.array_equal(before, after)
    assert (
        plain.order.locate([370, 371, 372, 373])[0].tolist()
        != staged.order.locate(range(370, 374))[0].tolist()
    )
