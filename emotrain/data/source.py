"""What training asks of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from emotrain.batch import PackedBatch


class DataSource(Protocol):
    """Sequences in a fixed order, position after position, without end. `Loader` is the one of a
    prepared data set; whatever else can answer this can be trained on."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the data, with those that no sequence holds."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of these tokens; a checkpoint takes a copy of it."""

    @property
    def fingerprint(self) -> str:
        """Text that changes when any position holds another sequence: a run goes on with the same
        one. The seed of the order is not part of it."""

    def step(
        self,
        step_index: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[PackedBatch]:
        """This rank's micro-batches of a step, in order. Step s of all ranks is positions
        [s * global_batch, (s + 1) * global_batch): nothing but the number of a step is needed to
        go on, on any number of ranks.

        Raises:
            UserError: sizes that do not divide, or numbers out of range.
        """
