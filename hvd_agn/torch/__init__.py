"""AGN for PyTorch: :class:`AGNOptimizer` wraps any ``torch.optim.Optimizer``."""

from .optimizer import AGNOptimizer

__all__ = ["AGNOptimizer"]
