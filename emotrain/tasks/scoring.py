"""How probable a text is after another one: log p(continuation | context), for many pairs at once.

Each pair is a document of its own, packed with others into rows, so that next to no position is
padding. The rules are those of EleutherAI's harness, so that numbers can be compared:

- **The border.** The tokens of a continuation are those that the tokens of context and continuation
  together have beyond the number that the context has alone (`encode_pair`). Spaces at the end of a
  context belong to the continuation.
- **Too long.** What does not fit is cut from the start of the context.
- **The first token** of a text without a context is predicted from an end-of-document token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.batch import IGNORE, PackedBatch
from emotrain.data.tokenizer import TextTokenizer
from emotrain.distributed.ranks import Ranks
from emotrain.distributed.shares import ALONE, share
from emotrain.errors import UserError
from emotrain.evaluation.perplexity import autocast, logit_blocks, pack
from emotrain.model.router import RoutingRequest
from emotrain.model.transformer import Transformer
from emotrain.modular.select import Subsets, group_of_documents
from emotrain.progress import Track, untracked

ENCODED_AT_ONCE = 1024
"""Texts that the tokenizer gets together: enough for its threads."""


@dataclass(frozen=True)
class Pair:
    """Token ids of a context, at least one, and of what follows it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def encode_texts(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of texts that go on: without an end-of-document token."""
    found: list[tuple[int, ...]] = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        ids = tokenizer.encode_batch(texts[start : start + ENCODED_AT_ONCE])
        found += [tuple(one[:-1].tolist()) for one in ids]
    return found


def encode_pairs(tokenizer: TextTokenizer, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Pairs of texts as token ids; no context may be blank."""
    texts: dict[str, int] = {}
    for context, continuation in pairs:
        for text in (context.rstrip(), context + continuation):
            texts.setdefault(text, len(texts))
    ids = encode_texts(tokenizer, list(texts))
    found = []
    for context, continuation in pairs:
        before, whole = ids[texts[context.rstrip()]], ids[texts[context + continuation]]
        found.append(Pair(before, whole[len(before) :]))
    return found


def windows(ids: Sequence[int], eos_id: int, most_tokens: int) -> list[Pair]:
    """A text as pairs in which each of its tokens is predicted once, as many together as fit, and
    the last of them with as much context as fits."""
    pairs = []
    for start in range(0, len(ids), most_tokens):
        end = min(start + most_tokens, len(ids))
        context = ids[end - most_tokens - 1 : start] if start else [eos_id]
        pairs.append(Pair(tuple(context), tuple(ids[start:end])))
    return pairs


def fit(pair: Pair, most_tokens: int) -> Pair:
    """A pair without the start of its context that does not fit: a model reads all but the last
    token.

    Raises:
        UserError: the continuation alone does not fit, or it has no token.
    """
    if not pair.continuation:
        raise UserError(
            "an answer adds no token to what comes before it, and so has no probability; put a "
            "space between them"
        )
    room = most_tokens + 1 - len(pair.continuation)
    if room < 1:
        raise UserError(
            f"an answer has {len(pair.continuation)} tokens, the model reads {most_tokens}; "
            f"leave it out, or use a model with a longer data.sequence_length"
        )
    return Pair(pair.context[-room:], pair.continuation)


def log_probabilities(
    model: Transformer,
    pairs: Sequence[Pair],
    most_tokens: int,
    rows_per_batch: int,
    subsets: Subsets | None = None,
    group_of_pair: Sequence[int] | None = None,
    track: Track[PackedBatch] = untracked,
    description: str = "scoring",
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """Log probability of each continuation in nats, float64 [U], and whether each of its tokens is
    the most probable one, bool [U]; U counts the pairs.

    Equal pairs are scored once, so that their numbers are equal to the bit.

    Args:
        most_tokens: of a row, and so of a pair without its last token.
        subsets: for each layer, the routed experts that each group keeps; None keeps all.
        group_of_pair: the group of each pair; all are of group 0 by default.
        track, description: show progress.
        precision: run under autocast in this dtype; None means in the model's own.
        ranks: those that have the model between them. Each runs a share of the batches; all get
            the numbers of all pairs.
    Raises:
        UserError: see `fit`.
    """
    groups = group_of_pair or [0] * len(pairs)
    numbers: dict[tuple[Pair, int], int] = {}
    number_of_pair = [
        numbers.setdefault((fit(pair, most_tokens), group), len(numbers))
        for pair, group in zip(pairs, groups, strict=True)
    ]
    # Log probabilities, and tokens that are not the most probable ones.
    sums_U2 = torch.zeros(len(numbers), 2, dtype=torch.float64, device=model.head.weight.device)
    if numbers:
        of, group_of = [pair for pair, _ in numbers], [group for _, group in numbers]
        batches = pack_pairs(of, most_tokens, rows_per_batch, model.config.attention.document_mask)
        batches = list(track(share(batches, ranks), description))
        for pair_t, found_t2 in _run(model, batches, subsets, group_of, precision, _scores):
            sums_U2.index_add_(0, pair_t, found_t2)
    sums_U2 = ranks.sum(sums_U2).cpu()[number_of_pair]
    return sums_U2[:, 0], sums_U2[:, 1] == 0


def next_tokens(
    model: Transformer,
    contexts: Sequence[tuple[int, ...]],
    most_tokens: int,
    rows_per_batch: int,
    subsets: Subsets | None,
    group_of_context: Sequence[int],
    num_tokens: int,
    precision: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> list[int]:
    """The most probable of the first `num_tokens` tokens after each context, which has at least
    one token and at most `most_tokens`; see `log_probabilities`."""
    found_U = torch.zeros(len(contexts), dtype=torch.int64, device=model.head.weight.device)
    pairs = [Pair(context, (0,)) for context in contexts]
    mask = model.config.attention.document_mask
    batches = share(pack_pairs(pairs, most_tokens, rows_per_batch, mask), ranks)
    use = partial(_likeliest, num_tokens=num_tokens)
    for pair_t, token_t in _run(model, batches, subsets, group_of_context, precision, use):
        found_U[pair_t] = token_t
    return ranks.sum(found_U).tolist()


@torch.no_grad()
def _run(
    model: Transformer,
    batches: Sequence[PackedBatch],
    subsets: Subsets | None,
    group_of_pair: Sequence[int],
    precision: torch.dtype | None,
    use: Callable[..., Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `pack_pairs` through the model -> of each the pair of each target, int64 [t], and
    what `use(hidden_tD, head_VD, target_t=target_t)` makes of them."""
    device = model.head.weight.device
    group_U = torch.tensor(group_of_pair, device=device)
    subsets = None if subsets is None else tuple(mask_JN.to(device) for mask_JN in subsets)
    for batch in batches:
        # Found on the host, so that a GPU is not waited for.
        position_t = (batch.targets_BS.reshape(-1) != IGNORE).nonzero()[:, 0]
        batch, position_t = batch.to(device), position_t.to(device, non_blocking=True)
        kept = None
        if subsets is not None:
            group_G = group_of_documents(batch, group_U)
            kept = [mask_JN[group_G] for mask_JN in subsets]
        pair_t = batch.document_ids_G[batch.document_T[position_t]]
        target_t = batch.targets_BS.reshape(-1)[position_t]
        with autocast(device, precision):
            hidden_tD = model(batch, RoutingRequest(kept=kept)).hidden_TD[position_t]
            yield pair_t, model.head(hidden_tD, partial(use, target_t=target_t))


def _scores(hidden_tD: Tensor, head_VD: Tensor, target_t: Tensor) -> Tensor:
    """Log probability of each target, and 1 where another token is likelier, float64 [t, 2]."""
    found = [hidden_tD.new_zeros(0, 2, dtype=torch.float64)]  # a share may have no target
    for logits_tV, block_t in logit_blocks(hidden_tD, head_VD, target_t):
        logprob_t = -F.cross_entropy(logits_tV, block_t, reduction="none")
        missed_t = logits_tV.argmax(1) != block_t
        found.append(torch.stack([logprob_t.double(), missed_t.double()], 1))
    return torch.cat(found)


def _likeliest(hidden_tD: Tensor, head_VD: Tensor, target_t: Tensor, num_tokens: int) -> Tensor:
    """The most probable of the first tokens at each position, int64 [t]."""
    blocks = logit_blocks(hidden_tD, head_VD[:num_tokens], target_t)
    return torch.cat([target_t[:0], *(logits_tV.argmax(1) for logits_tV, _ in blocks)])


def pack_pairs(
    pairs: Sequence[Pair], most_tokens: int, rows_per_batch: int, document_mask: bool = True
) -> list[PackedBatch]:
    """Pairs that fit as batches with targets on continuations alone, the longest first.
    `document_ids_G` counts the pairs from 0; no pair is cut."""
    order = sorted(range(len(pairs)), key=lambda i: -_read(pairs[i]))
    batches: list[PackedBatch] = []
    # Where tokens see other documents of their row, each has a row of its own: those of a batch
    # are of about one length.
    at_once = len(order) if document_mask else rows_per_batch
    for start in range(0, len(order), at_once):
        numbers = order[start : start + at_once]
        chosen = [pairs[i] for i in numbers]
        read = [np.array(pair.context + pair.continuation)[:-1] for pair in chosen]
        width = min(most_tokens, sum(map(len, read))) if document_mask else len(read[0])
        targets = _Targets.of(chosen, numbers)
        batches += [
            targets.put_into(batch) for batch in pack(read, width, rows_per_batch, document_mask)
        ]
    return batches


def _read(pair: Pair) -> int:
    """Tokens that a model reads to predict all of a continuation."""
    return len(pair.context) + len(pair.continuation) - 1


@dataclass(frozen=True)
class _Targets:
    """What each token of some pairs predicts, one pair after the other."""

    target_Y: Tensor
    """int64; nothing inside of a context."""
    start_U: Tensor
    """int64: where each pair begins."""
    number_U: Tensor
    """int64: the number of each pair."""

    @classmethod
    def of(cls, pairs: Sequence[Pair], numbers: Sequence[int]) -> _Targets:
        targets = [
            np.array((IGNORE,) * (len(pair.context) - 1) + pair.continuation) for pair in pairs
        ]
        starts = np.cumsum([0, *map(len, targets)])[:-1]
        return cls(*map(torch.from_numpy, (np.concatenate(targets), starts, np.array(numbers))))

    def put_into(self, batch: PackedBatch) -> PackedBatch:
        """A batch of `pack`, whose documents are these pairs without their last tokens, with their
        targets, and their numbers as ids."""
        document_T, pair_G = batch.document_T, batch.document_ids_G
        valid_T, pair_G = (pair_G >= 0)[document_T], pair_G.clamp(min=0)
        # Documents follow one another, so that each begins where its number first stands.
        begin_G = torch.searchsorted(document_T, torch.arange(batch.num_documents))
        place_T = (
            torch.arange(len(document_T)) - begin_G[document_T] + self.start_U[pair_G][document_T]
        )
        target_T = torch.where(valid_T, self.target_Y[torch.where(valid_T, place_T, 0)], IGNORE)
        return replace(
            batch,
            targets_BS=target_T.reshape(batch.tokens_BS.shape),
            document_ids_G=torch.where(
                batch.document_ids_G < 0, batch.document_ids_G, self.number_U[pair_G]
            ),
        )
