"""Continuous batching: sequences come and go at any step, and each step runs all that are there.

    engine = Engine(model, EngineLimits(), tokenizer)
    generation = engine.submit(GenerationRequest(tokens))
    while engine.busy:
        for delta in engine.step():
            print(delta.text, end="")

A step reads one new token of every sequence that is being generated and pieces of the prompts of
those that are not yet. Each sequence is a document of its own, with its own experts. One thread at
a time may use an engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from emotrain.errors import RunError, UserError
from emotrain.generation.cache import PAGE, KVCache, pages_of
from emotrain.generation.forward import CachedModel
from emotrain.generation.ragged import Part, RaggedBatch
from emotrain.generation.request import GenerationRequest
from emotrain.generation.sampling import choose_tokens, log_probabilities
from emotrain.generation.seats import Seats
from emotrain.generation.sequence import (
    CANCELLED,
    ERROR,
    LENGTH,
    STOP,
    Delta,
    Generation,
    Prompt,
    Running,
    TextCoder,
)
from emotrain.model.transformer import Transformer

DECODED = 1 << 15
"""Texts of a few tokens that are remembered."""
FEW = 64
"""Most tokens of a piece that the kernel for few tokens reads."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine holds at once."""

    sequences: int = 32
    """Most sequences that run; others wait."""
    cache_tokens: int = 32768
    """Most tokens of all running sequences, prompts and what they may grow by."""
    sequence_tokens: int = 4096
    """Most tokens of one sequence."""
    step_tokens: int = 512
    """Tokens after which a prompt is cut, and after which a step takes no further piece, so that a
    long prompt does not hold up the others. The prompt of a sequence with a pool is read whole,
    because all of it chooses the pool."""

    def __post_init__(self) -> None:
        for name, least in (
            ("sequences", 1),
            ("cache_tokens", PAGE),
            ("sequence_tokens", 1),
            ("step_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} cannot be; give {least} or more")


class Engine:
    """A model that generates for many sequences at once."""

    def __init__(
        self,
        model: Transformer,
        limits: EngineLimits | None = None,
        tokenizer: TextCoder | None = None,
    ):
        """
        Args:
            model: on any device; its weights stay as they are.
            tokenizer: for texts, stop texts and the end of a document; without one, generations are
                tokens alone and end by their number.
        """
        self.model, self.limits = model, limits or EngineLimits()
        self.tokenizer = tokenizer
        self._decode = None
        if tokenizer is not None:
            # A sequence decodes every token twice, alone and with the one before it.
            self._decode = lru_cache(DECODED)(tokenizer.decode)
        weight = model.embedding.weight
        self.cache = KVCache(model.config, self.limits.cache_tokens, weight.device, weight.dtype)
        seats = Seats(model.config, self.limits.sequences, weight.device)
        self._cached = CachedModel(model, self.cache, seats, self.limits.sequence_tokens)
        self._seats = seats
        self._free_seats = list(reversed(range(self.limits.sequences)))
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._ids = iter(range(1 << 62))
        vocab_size = model.config.vocab_size
        self.num_tokens = min(vocab_size, tokenizer.vocab_size) if tokenizer else vocab_size
        """Ids that are tokens: an embedding may have more rows."""

    # ---- what users call

    def submit(self, request: GenerationRequest) -> Generation:
        """Take a request; it runs in the next steps.

        Raises:
            UserError: a prompt without tokens, of unknown ones or too long ones, or what cannot be.
        """
        return self.submit_several(request, 1)[0]

    def submit_several(self, request: GenerationRequest, count: int) -> list[Generation]:
        """Take a request as `count` sequences with seeds that follow one another. Each is what it
        would be alone, but the prompt is read once for all of them that run while one has it.

        Raises:
            UserError: as `submit`.
        """
        self._check(request)
        prompt, found = Prompt(count > 1), []
        for index in range(count):
            seed = request.sampling.seed + index
            own = replace(request, sampling=replace(request.sampling, seed=seed))
            found.append(Generation(next(self._ids), own))
            self._waiting.append(Running(found[-1], prompt, self._decode))
        return found

    def cancel(self, generation: Generation) -> bool:
        """End a generation and free what it holds; False where it has ended already."""
        for queue in (self._waiting, self._running):
            for sequence in queue:
                if sequence.generation is generation:
                    queue.remove(sequence)
                    self._leave(sequence, CANCELLED)
                    return True
        return False

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Read the next tokens of the running sequences, and choose one for each that has been read
        to its end. A sequence whose experts cannot be read ends with an error, and the others go
        on."""
        self._admit()
        ready: list[tuple[list[Running], Tensor]] = []
        deltas: list[Delta] = []
        for batch in self._batches(list(self._next_parts())):
            try:
                ready.append(self._run(batch))
            except (OSError, RunError, UserError):
                # Alone, each shows whether it was the one.
                for one in batch:
                    try:
                        ready.append(self._run([one]))
                    except (OSError, RunError, UserError) as error:
                        deltas.append(self._fail(one[0], error))
        ready += self._share_prompts()
        return deltas + self._go_on([of for of in ready if of[0]])

    # ---- who runs

    def _check(self, request: GenerationRequest) -> None:
        tokens, sampling = request.tokens, request.sampling
        if not len(tokens):
            raise UserError("the prompt has no tokens; give a text")
        if min(tokens) < 0 or max(tokens) >= self.model.config.vocab_size:
            raise UserError(
                f"the prompt has token ids {min(tokens)} to {max(tokens)}, the model has 0 to "
                f"{self.model.config.vocab_size - 1}; encode it with the model's own tokenizer"
            )
        most = min(self.limits.sequence_tokens, self.cache.limit_pages * PAGE)
        if len(tokens) + sampling.max_tokens > most:
            raise UserError(
                f"the prompt has {len(tokens)} tokens and max_tokens={sampling.max_tokens}, "
                f"together more than the {most} of a sequence; shorten one of them"
            )
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer; put the model's tokenizer.json beside it")
        config = self.model.config
        counts = [config.routed_in_layer(layer) for layer in range(config.num_layers)]
        if request.subset is not None and (
            [len(mask_N) for mask_N in request.subset] != counts
            or not all(bool(mask_N.any()) for mask_N in request.subset if len(mask_N))
        ):
            raise UserError(
                f"a subset names experts of each layer, at least one of {counts}; select it of "
                f"this model"
            )
        if request.pool is not None and len(request.pool.sizes) != len(counts):
            raise UserError(
                f"the pool has {len(request.pool.sizes)} sizes for {len(counts)} layers; give one "
                f"a layer"
            )

    def _admit(self) -> None:
        """First come, first served: a long sequence that waits for room lets none overtake."""
        while self._waiting and self._free_seats:
            sequence = self._waiting[0]
            if not self.cache.promise(sequence.most_tokens):
                return
            self._waiting.popleft()
            sequence.seat = self._free_seats.pop()
            request = sequence.generation.request
            sizes = request.pool.sizes if request.pool is not None else None
            self._seats.take(sequence.seat, request.subset, sizes)
            self._running.append(sequence)
            sequence.prompt.holders.append(sequence)

    def _next_parts(self) -> Iterator[tuple[Running, Part]]:
        """What the running sequences bring to this step, single tokens first."""
        room = self.limits.step_tokens
        reading = []
        for sequence in self._running:
            if sequence.waits:
                continue
            if sequence.pending == 1:
                room -= 1
                yield sequence, self._part(sequence, 1)
            else:
                reading.append(sequence)
        for sequence in reading:
            if room <= 0:
                return
            # Where a prompt is cut depends on nothing else: its pieces are the same in every batch.
            count = min(sequence.pending, self.limits.step_tokens)
            if sequence.seat in self._seats.choosing:
                count = sequence.pending
            room -= count
            yield sequence, self._part(sequence, count)

    def _batches(self, work: list[tuple[Running, Part]]) -> Iterator[list[tuple[Running, Part]]]:
        """What runs together. Where the kernel makes a token the same in every batch, few tokens
        are together and a long piece is alone, in torch: no sequence has a part in another's
        rounding."""
        if not self._cached.has_rows:
            few, long = work, []
        else:
            few = [one for one in work if len(one[1].tokens) <= FEW]
            long = [one for one in work if len(one[1].tokens) > FEW]
        if few:
            yield few
        for one in long:
            yield [one]

    def _part(self, sequence: Running, count: int) -> Part:
        read = sequence.read
        self.cache.extend(sequence.pages, read + count)
        return Part(
            sequence.known[read : read + count],
            read,
            sequence.seat,
            sequence.pages,
            sequence.generation.request.sampling.prompt_logprobs
            and read < len(sequence.generation.request.tokens),
        )

    def _leave(self, sequence: Running, reason: str) -> None:
        sequence.generation.finish_reason = reason
        if sequence.seat < 0:
            return
        sequence.prompt.holders.remove(sequence)
        if sequence.seat in self._seats.restricted:
            sequence.generation.experts_kept = self._seats.kept(sequence.seat)
        self.cache.release(sequence.pages, sequence.most_tokens)
        self._seats.leave(sequence.seat)
        self._free_seats.append(sequence.seat)
        sequence.seat = -1

    # ---- a step

    def _run(self, batch: list[tuple[Running, Part]]) -> tuple[list[Running], Tensor]:
        """The sequences that have been read to their end, and the logits of what comes next."""
        parts = [part for _, part in batch]
        seats = [part.seat for part in parts]
        ragged = RaggedBatch.of(parts, self._cached.device, self._cached.dtype)
        step = self._seats.step(seats, [len(part.tokens) for part in parts], ragged.seats_T)
        rows = self._cached.has_rows and len(parts[-1].tokens) <= FEW
        logits_XV = self._cached.logits(self._cached.hidden(ragged, step, rows), rows)
        self._seats.commit(seats)
        ready: list[Running] = []
        last, first = [], 0
        for sequence, part in batch:
            outputs = len(part.tokens) if part.all_outputs else 1
            if part.all_outputs:
                self._prompt_logprobs(sequence, part, logits_XV[first : first + outputs])
            sequence.read += len(part.tokens)
            first += outputs
            if not sequence.pending:
                ready.append(sequence)
                last.append(first - 1)
                if sequence.prompt.several and not sequence.generation.tokens:
                    sequence.prompt.logits_1V = logits_XV[first - 1 : first].clone()
                    sequence.prompt.pool = self._seats.pool_of(sequence.seat)
        return ready, logits_XV if len(last) == logits_XV.shape[0] else logits_XV[last]

    def _fail(self, sequence: Running, error: Exception) -> Delta:
        self._running.remove(sequence)
        sequence.generation.error = error
        self._leave(sequence, ERROR)
        return Delta(sequence.generation, (), "", ERROR)

    def _share_prompts(self) -> list[tuple[list[Running], Tensor]]:
        """Sequences whose prompt another one has read: they have read it now. What `_run` says."""
        ready, logits, sources, targets = [], [], [], []
        for sequence in self._running:
            if not (sequence.waits and sequence.prompt.holders[0].has_prompt):
                continue
            reader, prompt = sequence.prompt.holders[0], sequence.prompt
            assert prompt.logits_1V is not None
            sequence.read = len(sequence.known)
            self.cache.extend(sequence.pages, sequence.read)
            sources += reader.pages[: len(sequence.pages)]
            targets += sequence.pages
            if prompt.pool is not None:
                self._seats.take_pool(sequence.seat, prompt.pool)
            sequence.generation.prompt_logprobs += reader.generation.prompt_logprobs
            ready.append(sequence)
            logits.append(prompt.logits_1V)
        if not ready:
            return []
        self.cache.copy(sources, targets)
        return [(ready, torch.cat(logits))]

    def _go_on(self, read: list[tuple[list[Running], Tensor]]) -> list[Delta]:
        """Choose the next token of sequences that have been read to their end."""
        if not read:
            return []
        ready = [sequence for of, _ in read for sequence in of]
        logits_BV = read[0][1] if len(read) == 1 else torch.cat([of_BV for _, of_BV in read])
        sampling = [one.generation.request.sampling for one in ready]
        chosen = choose_tokens(
            logits_BV[:, : self.num_tokens], sampling, [len(one.known) for one in ready]
        )
        # Rows of a call are asked for as many alternatives: which of equal ones come depends on it.
        for count in {one.logprobs for one in sampling if one.logprobs is not None}:
            rows = [row for row, one in enumerate(sampling) if one.logprobs == count]
            tokens = [chosen[row] for row in rows]
            found = log_probabilities(logits_BV[rows], tokens, count, self.num_tokens)
            for row, entry in zip(rows, found, strict=True):
                if sampling[row].max_tokens:
                    ready[row].generation.logprobs.append(entry)
        return [
            self._append(sequence, token)
            if of_sequence.max_tokens
            else self._end(sequence, (), "", LENGTH)
            for sequence, token, of_sequence in zip(ready, chosen, sampling, strict=True)
        ]

    def _append(self, sequence: Running, token: int) -> Delta:
        generation = sequence.generation
        sampling, pool = generation.request.sampling, generation.request.pool
        sequence.known.append(token)
        generation.tokens.append(token)
        text, reason = "", None
        if self.tokenizer is not None and token == self.tokenizer.eos_id:
            reason = None if sampling.ignore_end else STOP
        if sequence.detokenizer is not None:
            text = sequence.stops.add(sequence.detokenizer.add(token))
            if sequence.stops.stopped:
                reason = STOP
        count = len(generation.tokens)
        if reason is None and count == sampling.max_tokens:
            reason = LENGTH
        if reason is not None:
            return self._end(sequence, (token,), text, reason)
        if pool is not None and pool.renew_every and count % pool.renew_every == 0:
            sequence.switched += self._seats.renew(sequence.seat)
            generation.pool_renewals += 1
            generation.switch_rate = sequence.switched / generation.pool_renewals
        generation.text += text
        return Delta(generation, (token,), text, None)

    def _end(self, sequence: Running, tokens: tuple[int, ...], text: str, reason: str) -> Delta:
        if sequence.detokenizer is not None and not sequence.stops.stopped:
            text += sequence.stops.add(sequence.detokenizer.end())
            if sequence.stops.stopped:
                reason = STOP
            text += sequence.stops.end()
        sequence.generation.text += text
        self._running.remove(sequence)
        self._leave(sequence, reason)
        return Delta(sequence.generation, tokens, text, reason)

    def _prompt_logprobs(self, sequence: Running, part: Part, logits_tV: Tensor) -> None:
        """Of the prompt's tokens that these logits predict."""
        generation = sequence.generation
        prompt = generation.request.tokens
        if part.start == 0:
            generation.prompt_logprobs.append(None)
        predicted = list(prompt[part.start + 1 : part.start + 1 + len(part.tokens)])
        if predicted:
            generation.prompt_logprobs += log_probabilities(
                logits_tV[: len(predicted)],
                predicted,
                generation.request.sampling.logprobs or 0,
                self.num_tokens,
            )


def cache_tokens_needed(lengths: Sequence[int]) -> int:
    """Tokens of a cache in which sequences of these lengths run at once."""
    return sum(pages_of(length) for length in lengths) * PAGE
