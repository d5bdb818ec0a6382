"""Asynchronous data-parallel training on MPI: Accumulated Gradient Normalization.

``hvd_agn.torch.AGNOptimizer`` wraps a PyTorch optimizer; ``hvd_agn.Center`` is the same without a framework.
"""

try:
    from . import _core  # noqa: F401 (to say here what is wrong if it is missing)
except ModuleNotFoundError as error:
    if error.name != f"{__name__}._core":
        raise
    raise ImportError(
        f"the native core of hvd_agn is not in {__path__[0]}. This is a source tree: install it with "
        "`pip install -e .`, or run from another directory."
    ) from None

from . import errors, mpi, rules
from .center import Center, Client, Stats

mpi.prepare()

__version__ = "0.1.0"
__all__ = ["Center", "Client", "Stats", "__version__", "errors", "rules"]
