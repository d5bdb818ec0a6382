"""The one table of defaults and the one reader of environment variables.

The native core reads no environment: what it needs is handed to it.
"""

import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")

COMMUNICATION_PERIOD = 10
"""Local steps between two exchanges."""

ON_NONFINITE = ("skip", "raise")
"""What happens to a delta with a NaN or an Inf, or above ``max_norm``; the first is the default."""

TRANSPORTS = ("auto", "direct", "mailbox")
"""How ranks reach a shard: shared memory on its node and mailboxes elsewhere, or only one of them."""

WIRES = (None, "bf16", "fp16", "int8")
"""What travels between nodes; None is the center's own type."""

ACCUMULATE = ("updates", "gradients")
"""What a worker pushes the mean of; the first is the default."""

MAX_NORM: float | None = None
"""Euclidean norm of a delta above which it is refused; None: any finite one is taken."""

PUSH_ON_ERROR = False
"""Whether a rank that ends with an error pushes its unfinished period."""

CENTER_RANKS = (0,)
"""Ranks that host the center's shards."""

STALENESS_LIMIT = 2.0
"""Workers per period above which AGN with the add rule is known to be at risk (Hermans et al. 2017, section 4)."""


@dataclass(frozen=True)
class Variable(Generic[T]):
    """An environment variable: its name, default, the text of its choices, and how its text becomes a value."""

    name: str
    default: T
    choices: str
    convert: Callable[[str], T]
    accept: Callable[[T], bool]

    def read(self) -> T:
        """The value in the environment, or the default.

        Raises:
            ConfigError: the text is not one of the choices.
        """
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            value = self.convert(text)
            accepted = self.accept(value)
        except ValueError:
            accepted = False
        if not accepted:
            raise ConfigError(f"{self.name}={text!r}: give {self.choices} (default {self.default}).")
        return value


_ALIGNMENT = 64  # of the arrays in a block, in bytes

BLOCK_BYTES = Variable(
    "HVD_AGN_BLOCK_BYTES",
    2 * 127 * 1024 - 64,  # two puts of the mailbox, whose message has a head
    f"a whole number of bytes, a multiple of {_ALIGNMENT} below 2^31",
    int,
    lambda value: 0 < value < 2**31 and value % _ALIGNMENT == 0,
)
RING_BLOCKS = Variable(
    "HVD_AGN_RING_BLOCKS",
    8,
    "a whole number of blocks, from 1 to 4096",
    int,
    lambda value: 1 <= value <= 4096,
)
TRANSPORT = Variable(
    "HVD_AGN_TRANSPORT",
    TRANSPORTS[0],
    f"one of {', '.join(TRANSPORTS)}",
    str,
    lambda value: value in TRANSPORTS,
)
STALL_SECONDS = Variable(
    "HVD_AGN_STALL_SECONDS",
    60.0,
    "a number of seconds; 0 switches the warning off",
    float,
    lambda value: 0 <= value < 1e9,
)
STALL_ABORT_SECONDS = Variable(
    "HVD_AGN_STALL_ABORT_SECONDS",
    0.0,
    "a number of seconds; 0 waits for ever",
    float,
    lambda value: 0 <= value < 1e9,
)

VARIABLES: tuple[Variable[int] | Variable[float] | Variable[str], ...] = (
    BLOCK_BYTES,
    RING_BLOCKS,
    TRANSPORT,
    STALL_SECONDS,
    STALL_ABORT_SECONDS,
)

MPI_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "a launcher with PMI",
    "MV2_COMM_WORLD_SIZE": "MVAPICH's mpirun",
}
"""Variables that MPI's launchers set to the number of processes they started."""

OTHER_LAUNCHERS = {
    "HOROVOD_SIZE": "horovodrun (with --gloo, or for another MPI)",
    "WORLD_SIZE": "torchrun, Accelerate, DeepSpeed, Lightning or the like",
    "SLURM_STEP_NUM_TASKS": "srun",
    "FLUX_JOB_SIZE": "flux run",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "TF_CONFIG": "something that makes a cluster of TensorFlow",
}
"""The same of launchers that do not start MPI, or may not have: then each process finds itself alone.

Slurm's variable is there in the tasks of a step only. ``SLURM_NTASKS`` says nothing: an allocation has it too.
"""


def choose(argument: str, value: T, choices: tuple[T, ...]) -> T:
    """The value, if it is one of the choices.

    Raises:
        ConfigError: it is not; names the argument.
    """
    if value not in choices:
        raise ConfigError(f"{argument}={value!r}: give one of {', '.join(map(str, choices))}.")
    return value


def check_max_norm(value: float | None) -> None:
    """Raise ConfigError unless it is None or a finite number above 0."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ConfigError(f"max_norm={value!r}: give a finite number above 0, or None.")


def check_environment() -> None:
    """Reject variables that begin with ``HVD_AGN_`` and are not in the table: a misspelt one would do nothing.

    Raises:
        ConfigError: names the variable and those that exist.
    """
    known = [variable.name for variable in VARIABLES]
    for name in os.environ:
        if name.startswith("HVD_AGN_") and name not in known:
            raise ConfigError(f"{name} is not a variable of hvd_agn. There are: {', '.join(known)}.")
