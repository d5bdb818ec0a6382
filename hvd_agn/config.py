"""The one table of defaults and the one reader of environment variables.

The native core reads no environment: what it needs is handed to it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ConfigError

COMMUNICATION_PERIOD = 10
"""Local steps between two exchanges."""

ON_NONFINITE = ("skip", "raise")
"""What happens to a delta with a NaN or an Inf; the first is the default."""

STALENESS_LIMIT = 2.0
"""Workers per period above which AGN with the add rule is known to be at risk (Hermans et al. 2017, section 4)."""


@dataclass(frozen=True)
class Variable:
    """An environment variable: its name, default, the text of its choices, and how its text becomes a value."""

    name: str
    default: float
    choices: str
    convert: Callable[[str], float]
    accept: Callable[[float], bool]

    def read(self) -> float:
        """The value in the environment, or the default.

        Raises:
            ConfigError: the text is not one of the choices.
        """
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            value = self.convert(text)
        except ValueError:
            value = None
        if value is None or not self.accept(value):
            raise ConfigError(f"{self.name}={text!r}: give {self.choices} (default {self.default}).")
        return value


_ALIGNMENT = 64  # of the arrays in a block, in bytes

BLOCK_BYTES = Variable(
    "HVD_AGN_BLOCK_BYTES",
    256 * 1024,
    f"a whole number of bytes, a multiple of {_ALIGNMENT} below 2^31",
    int,
    lambda value: 0 < value < 2**31 and value % _ALIGNMENT == 0,
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

VARIABLES = (BLOCK_BYTES, STALL_SECONDS, STALL_ABORT_SECONDS)

RANK_COUNT_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Set by launchers to the number of processes they started."""


def check_environment() -> None:
    """Reject variables that begin with ``HVD_AGN_`` and are not in the table: a misspelt one would do nothing.

    Raises:
        ConfigError: names the variable and those that exist.
    """
    known = [variable.name for variable in VARIABLES]
    for name in os.environ:
        if name.startswith("HVD_AGN_") and name not in known:
            raise ConfigError(f"{name} is not a variable of hvd_agn. There are: {', '.join(known)}.")
