"""Asynchronous data-parallel training on MPI: Accumulated Gradient Normalization.

``hvd_agn.torch.AGNOptimizer`` wraps a PyTorch optimizer; ``hvd_agn.Center`` is the same without a framework.
"""

import importlib.util

try:
    from . import _core  # noqa: F401 (first, to say what is wrong)
except ImportError as error:
    if importlib.util.find_spec(f"{__name__}._core") is None:
        raise ImportError(
            f"the native core of hvd_agn is not in {__path__[0]}. This is a source tree: install it with "
            "`pip install -e .`, or run from another directory."
        ) from None
    raise ImportError(
        f"the native core of hvd_agn cannot be loaded: {error}. It needs the MPI library that it was built with, and "
        "no other in the process: load that MPI (its module, its environment), or build hvd_agn again with the MPI "
        "that you launch with first on PATH: `pip install --force-reinstall --no-deps .` in its sources."
    ) from error

from . import errors, mpi, presets, rules
from .center import Center
from .client import Client, Stats

mpi.prepare()

__version__ = "0.1.0"
__all__ = ["Center", "Client", "Stats", "__version__", "errors", "presets", "rules"]
