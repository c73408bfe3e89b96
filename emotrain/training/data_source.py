"""The data of a run, as its configuration names them."""

from __future__ import annotations

import logging

from emotrain.config import Config
from emotrain.data.answers import AnswerLoader, is_answers
from emotrain.data.opening import open_loader
from emotrain.data.source import DataSource
from emotrain.errors import UserError

log = logging.getLogger("emotrain")


def build_loader(config: Config) -> DataSource:
    """Sequences of a prepared data set, of files of tokens or text as others write them, of one of
    their domains, or of a file of prompts and answers.

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
        seed = config.training.seed
        return AnswerLoader(setup.path, setup.tokenizer, setup.sequence_length, seed, setup.domain)
    loader = open_loader(
        setup.path,
        setup.sequence_length,
        config.training.seed,
        cross_document_targets=setup.cross_document_targets,
        repetition_filter=setup.repetition_filter,
        verify_checksums=setup.verify_checksums,
        domain=setup.domain,
        span=config.model.router.pool.across_windows,
        tokenizer=setup.tokenizer,
        raw=setup.raw,
    )
    if not loader.tokenizer_file.is_file():
        log.warning(
            "%s: nobody knows its tokenizer, so checkpoints get none, and cannot generate text; "
            "give data.tokenizer=FILE",
            setup.path,
        )
    left_out = 1 - loader.num_sequences * loader.sequence_length / loader.num_tokens
    if left_out > 0.05:
        log.warning(
            "data.sequence_length=%d leaves out %.0f %% of the tokens of %s: what is left at the "
            "end of each shard fills no sequence; take a shorter one, or larger shards",
            loader.sequence_length,
            100 * left_out,
            setup.path,
        )
    return loader
