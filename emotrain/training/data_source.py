"""The data of a run, as its configuration names them."""

from __future__ import annotations

import logging
from typing import Any

from emotrain.config import Config
from emotrain.data.answers import AnswerLoader, is_answers
from emotrain.data.loader import Loader
from emotrain.data.mixture import Mixture
from emotrain.data.mixture_file import is_mixture, open_mixture
from emotrain.data.opening import open_loader
from emotrain.data.source import DataSource
from emotrain.errors import UserError

log = logging.getLogger("emotrain")


def build_loader(config: Config) -> DataSource:
    """Sequences of a prepared data set, of files of tokens or text as others write them, of one of
    their domains, of a mixture of all these, or of a file of prompts and answers.

    Raises:
        UserError: data that cannot be used, or tokens that the model does not have.
    """
    source = _source(config)
    if source.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the "
            f"{source.vocab_size} tokens of {config.data.path}; raise it to at least that"
        )
    return source


def _source(config: Config) -> DataSource:
    setup = config.data
    if is_answers(setup.path):
        if setup.domain and setup.domain not in dict(config.model.experts.exclusive):
            raise UserError(
                f"data.domain={setup.domain}: {setup.path} is a file of prompts and answers, which "
                f"has no domains, and the model no exclusive experts for it; remove data.domain"
            )
        if setup.packing != "concat":
            raise UserError(
                f"data.packing={setup.packing}: {setup.path} is a file of prompts and answers, "
                f"whose sequences are a pair each; remove data.packing"
            )
        seed = config.training.seed
        return AnswerLoader(setup.path, setup.tokenizer, setup.sequence_length, seed, setup.domain)
    if is_mixture(setup.path):
        return _mixture(config)
    length, seed = setup.sequence_length, config.training.seed
    loader = open_loader(setup.path, length, seed, domain=setup.domain, **_options(config))
    _say_left_out(loader, setup.path)
    _say_untold(loader, setup.path)
    return loader


def _options(config: Config) -> dict[str, Any]:
    """What `open_loader` is told of every source alike."""
    setup = config.data
    return {
        "cross_document_targets": setup.cross_document_targets,
        "repetition_filter": setup.repetition_filter,
        "verify_checksums": setup.verify_checksums,
        "span": config.model.router.pool.across_windows,
        "tokenizer": setup.tokenizer,
        "raw": setup.raw,
        "packing": setup.packing,
        "on_bad_data": setup.on_bad_data,
    }


def open_sources(config: Config) -> Mixture:
    """The mixture that `data.path` names, with the settings of `data`.

    Raises:
        UserError: a file or a source that cannot be used.
    """
    setup = config.data
    if setup.domain:
        raise UserError(
            f"data.domain={setup.domain}: {setup.path} is a mixture, whose sources have domains of "
            f"their own; name it there and remove data.domain"
        )
    return open_mixture(setup.path, setup.sequence_length, config.training.seed, **_options(config))


def _mixture(config: Config) -> Mixture:
    setup, mixture = config.data, open_sources(config)
    domains = {source.loader.domain for source in mixture.sources}
    if len(domains) > 1 and (own := domains & dict(config.model.experts.exclusive).keys()):
        raise UserError(
            f"{setup.path}: the model has exclusive experts for {', '.join(sorted(own))}, which a "
            f"batch of one domain uses, and its sources have several; train on one of them"
        )
    for source in mixture.sources:
        _say_left_out(source.loader, source.name)
    _say_untold(mixture, setup.path)
    return mixture


def _say_untold(source: DataSource, path: str) -> None:
    if not source.tokenizer_file.is_file():
        log.warning(
            "%s: nobody knows its tokenizer, so checkpoints get none, and cannot generate text; "
            "give data.tokenizer=FILE",
            path,
        )


def _say_left_out(loader: Loader, name: str) -> None:
    left_out = 1 - loader.num_sequences * loader.sequence_length / loader.num_tokens
    if left_out > 0.05:
        log.warning(
            "data.sequence_length=%d leaves out %.0f %% of the tokens of %s: what is left at the "
            "end of each shard fills no sequence; take a shorter one, or larger shards",
            loader.sequence_length,
            100 * left_out,
            name,
        )
