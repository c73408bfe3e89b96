"""What a launcher (torchrun, deepspeed, srun with the right variables) tells each process. Without
its variables a process trains alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from emotrain.errors import UserError


@dataclass(frozen=True)
class Launch:
    """A process among those of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on its machine."""
    local_world_size: int = 0
    """Processes that the launcher started on this machine; 0 where it does not say."""

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Launch:
        """Read and check the launcher's variables.

        Raises:
            UserError: a variable is missing, no number, or out of range.
        """
        _refuse_tasks_apart(environ)
        world_size = _number(environ, "WORLD_SIZE", 1, least=1)
        rank = _number(environ, "RANK", 0)
        if world_size > 1:
            for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
                if not environ.get(name):
                    raise UserError(
                        f"WORLD_SIZE={world_size} without {name}; start the run with a launcher "
                        f"that sets both, such as torchrun, or unset WORLD_SIZE"
                    )
            if _number(environ, "MASTER_PORT", 0) > 65535:
                raise UserError(f"MASTER_PORT={environ['MASTER_PORT']} is above 65535; lower it")
        if rank >= world_size:
            raise UserError(
                f"RANK={rank} is not below WORLD_SIZE={world_size}; start the run with one launcher"
            )
        local_rank = _number(environ, "LOCAL_RANK", 0)
        return cls(rank, world_size, local_rank, _number(environ, "LOCAL_WORLD_SIZE", 0))

    def gpu(self, num_gpus: int) -> int:
        """Which of the GPUs that this process sees is its own.

        Raises:
            UserError: fewer GPUs than processes, which NCCL refuses.
        """
        # Some schedulers show each process its own GPU alone; torchrun shows all of them.
        if self.local_world_size > num_gpus or self.local_rank >= num_gpus > 1:
            processes = max(self.local_world_size, self.local_rank + 1)
            raise UserError(
                f"{processes} processes on a machine with {num_gpus} GPU{'s' * (num_gpus != 1)}: "
                f"each needs its own; start {num_gpus}, or train with training.device=cpu"
            )
        return self.local_rank if num_gpus > 1 else 0


def _number(environ: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{name}={text!r} must be a whole number of at least {least}; a launcher sets it, "
            f"or unset it to train in one process"
        )
    return int(text)


def _refuse_tasks_apart(environ: Mapping[str, str]) -> None:
    """Refuse one of several tasks of srun or mpirun that do not know of each other."""
    if "WORLD_SIZE" in environ:
        return
    for tasks, marker in (
        ("SLURM_NTASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("PMI_SIZE", "PMI_RANK"),
    ):
        number = environ.get(tasks, "1")
        if number.isdecimal() and int(number) > 1 and marker in environ:
            raise UserError(
                f"{tasks}={number}: this is one of {number} tasks, and WORLD_SIZE does not say so: "
                f"each would train alone; start with torchrun or launch/slurm.sbatch, or set "
                f"WORLD_SIZE=1 to train in one"
            )
