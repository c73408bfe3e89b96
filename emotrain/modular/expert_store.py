"""Experts in files, and as many of them in memory as a limit allows: the least recently used goes
first.

An expert is read into a slot of memory that was set aside for all of them, once for as long as it
stays, and the pages of the file that the system kept of that read are given back: there is one
copy of it. A memory map would have none of our own, but a file that is cut short under a map kills
the process, and pages of a map count as the process's whatever is evicted. An expert that is in
memory needs its file no more.

Files stay open, so that one that is removed can be read to the end. One that was cut short or
written to since it was opened is refused, by its size and time of change: checksums of checkpoints
are of whole files, which whoever opens the store has checked before.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emotrain.errors import RunError, UserError


class ExpertReadError(RunError, OSError):
    """An expert that a step needs cannot be read. The step has failed for the tokens that need it;
    the store is sound, and experts in memory go on."""

    def __init__(self, message: str, expert: int = -1):
        super().__init__(message)
        self.expert = expert
        """Its number in its bank."""
        self.tokens: tuple[int, ...] = ()
        """Rows of the layer's input [T, D] that need it, once a layer was asked for them."""


class WeightFile:
    """A file of weights, open for reading."""

    def __init__(self, path: Path):
        """
        Raises:
            RunError: it cannot be opened.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"{path}: cannot be opened ({error.strerror or error})") from error
        self._state = self._now()
        # What lies beside an expert is not read ahead with it.
        self._advise(0, 0, "POSIX_FADV_RANDOM")

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def read(self, offset: int, target: Tensor) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on.

        Raises:
            ExpertReadError: the file has changed, or cannot be read.
        """
        buffer = target.view(-1).view(torch.uint8).numpy().data
        position = offset
        try:
            while buffer and (count := os.preadv(self._descriptor, [buffer], position)):
                position, buffer = position + count, buffer[count:]
            # After the read: it then holds for what was read.
            changed = bool(buffer) or self._now() != self._state
        except OSError as error:
            raise ExpertReadError(
                f"{self.path} ({error.strerror or error}); copy the checkpoint again"
            ) from error
        if changed:
            raise ExpertReadError(
                f"{self.path} was changed or cut short since it was opened; copy the checkpoint "
                f"again and start anew"
            )
        self._advise(offset, position - offset, "POSIX_FADV_DONTNEED")

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _advise(self, offset: int, length: int, advice: str) -> None:
        """Of whole pages; where the system takes advice."""
        if hasattr(os, "posix_fadvise"):
            start = offset - offset % mmap.PAGESIZE
            end = -(-(offset + length) // mmap.PAGESIZE) * mmap.PAGESIZE
            os.posix_fadvise(self._descriptor, start, end - start, getattr(os, advice))


@dataclass(frozen=True)
class Piece:
    """A box of one of an expert's two matrices, and where its bytes lie, row after row."""

    file: WeightFile
    offset: int
    """Of its first byte."""
    dtype: torch.dtype
    """On disk."""
    matrix: int
    """0: gate and up rows [F, D]; 1: down [H, D]."""
    start: tuple[int, int]
    """Of the box in the matrix."""
    shape: tuple[int, int]
    """Of the box in the matrix."""
    transposed: bool = False
    """Whether it lies column after column."""


@dataclass
class ExpertCounters:
    """What has come and gone since the store was opened."""

    hits: int = 0
    """Experts that a step needed and found."""
    misses: int = 0
    """Experts that a step needed and that were read."""
    evictions: int = 0
    bytes_read: int = 0
    """From files; more than what is resident where it is converted."""
    read_seconds: float = 0.0


class ExpertStore:
    """Experts of all layers behind one limit. A key is (bank, expert): whoever asks for one, in
    whatever subset, gets the same copy.

    Threads take turns: one holds experts at a time.
    """

    def __init__(
        self,
        pieces: Callable[[int, int], Sequence[Piece]],
        num_experts: int,
        hidden: int,
        width: int,
        memory: int,
        dtype: torch.dtype = torch.float32,
    ):
        """
        Args:
            pieces: what makes up an expert, by bank (its first layer) and number; they fill it.
            num_experts: of all banks.
            memory: bytes that experts may take.
            dtype: that they are kept in; what is on disk is converted.
        Raises:
            UserError: not even one expert fits.
        """
        self.expert_bytes = 3 * hidden * width * dtype.itemsize
        self.slots = min(memory // self.expert_bytes, num_experts)
        """Experts that are in memory at most."""
        if self.slots < 1:
            raise UserError(
                f"{max(memory, 0):,} bytes hold no expert; one takes {self.expert_bytes:,}"
            )
        # Memory that no expert has come to takes none yet.
        self.gate_up_XFD = torch.empty(self.slots, 2 * hidden, width, dtype=dtype)
        self.down_XHD = torch.empty(self.slots, hidden, width, dtype=dtype)
        self.counters = ExpertCounters()
        self._pieces = pieces
        self._slot_of: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._free = list(reversed(range(self.slots)))
        self._lock = threading.Lock()

    @property
    def resident_bytes(self) -> int:
        """Of the experts in memory."""
        return len(self._slot_of) * self.expert_bytes

    def resident(self) -> list[tuple[int, int]]:
        """The experts in memory, the least recently used first."""
        return list(self._slot_of)

    @contextmanager
    def hold(self, bank: int, experts: Sequence[int]) -> Iterator[dict[int, int]]:
        """The slots of some experts, at most `slots`, in their order: read where they are not in
        memory. None of them is evicted before the context ends.

        Raises:
            ExpertReadError: one cannot be read.
        """
        keys = [(bank, expert) for expert in experts]
        assert len(set(keys)) == len(keys) <= self.slots
        with self._lock:
            here = [key in self._slot_of for key in keys]
            # First of all: what is needed now is never what goes.
            for key, is_here in zip(keys, here, strict=True):
                if is_here:
                    self._slot_of.move_to_end(key)
                    self.counters.hits += 1
            for key, is_here in zip(keys, here, strict=True):
                if not is_here:
                    self._bring(key)
            yield {expert: self._slot_of[bank, expert] for expert in experts}

    def _bring(self, key: tuple[int, int]) -> None:
        """Read an expert into a free slot, or into that of the least recently used."""
        if not self._free:
            self._free.append(self._slot_of.popitem(last=False)[1])
            self.counters.evictions += 1
        self._read(key, self._free[-1])
        self._slot_of[key] = self._free.pop()
        self.counters.misses += 1

    def _read(self, key: tuple[int, int], slot: int) -> None:
        started = time.perf_counter()
        matrices = self.gate_up_XFD[slot], self.down_XHD[slot]
        try:
            for piece in self._pieces(*key):
                (row, column), (rows, columns) = piece.start, piece.shape
                box = matrices[piece.matrix][row : row + rows, column : column + columns]
                target = box
                if piece.transposed or piece.dtype != box.dtype or not box.is_contiguous():
                    shape = (columns, rows) if piece.transposed else (rows, columns)
                    target = torch.empty(shape, dtype=piece.dtype)
                piece.file.read(piece.offset, target)
                self.counters.bytes_read += target.nbytes
                if target is not box:
                    box.copy_(target.t() if piece.transposed else target)
        except ExpertReadError as error:
            raise ExpertReadError(
                f"expert {key[1]} of layer {key[0]} cannot be read: {error}", key[1]
            ) from error
        finally:
            self.counters.read_seconds += time.perf_counter() - started
