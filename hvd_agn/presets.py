"""The algorithms around AGN as arguments: ``AGNOptimizer(optimizer, 10, **presets.easgd(workers=4))``."""

from typing import Any

from . import rules


def agn() -> dict[str, Any]:
    """Accumulated Gradient Normalization: the mean update is added (Hermans et al., ACML 2017). The default."""
    return {"rule": rules.Add()}


def downpour() -> dict[str, Any]:
    """DOWNPOUR: the sum of the updates is added (Dean et al., NIPS 2012, section 4.1)."""
    return {"rule": rules.Add(), "normalize": False}


def easgd(workers: int) -> dict[str, Any]:
    """Elastic averaging, with the paper's 0.9 shared by the workers (Zhang et al., NeurIPS 2015, arXiv 1412.6651)."""
    return {"rule": rules.Elastic(0.9 / rules.whole("workers", workers, "workers"))}


def dynsgd() -> dict[str, Any]:
    """DynSGD: a sum of updates counts the less the staler it is (Jiang et al., SIGMOD 2017, section 4)."""
    return {"rule": rules.Add(staleness="inverse"), "normalize": False}


def diloco_async(workers: int) -> dict[str, Any]:
    """DiLoCo without rounds: delayed Nesterov momentum on the sum of updates (Liu et al. 2024, arXiv 2401.09135)."""
    every = rules.whole("workers", workers, "workers")
    return {"rule": rules.DelayedNesterov(lr=0.7, momentum=0.9, every=every), "normalize": False}
