"""What an optimizer and a model have besides what is exchanged, in words and checksums, see :mod:`hvd_agn.alike`."""

from typing import Any

import torch

from .. import alike

_NOT_COMPARED = ("params", "param_names", "foreach", "fused", "capturable")  # the last three change no result


def settings(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The hyper-parameters of each parameter group, and how many parameters it has."""
    groups = list(enumerate(optimizer.param_groups))
    sizes = {f"the number of parameters in param_groups[{g}]": str(len(group["params"])) for g, group in groups}
    return sizes | {
        f"param_groups[{g}][{key!r}]": _text(value)
        for g, group in groups
        for key, value in group.items()
        if key not in _NOT_COMPARED
    }


def _text(value: Any) -> str:
    try:
        text = repr(value.tolist() if isinstance(value, torch.Tensor) and not value.is_meta else value)
    except Exception:  # what cannot be put into words is not compared
        return type(value).__qualname__
    return type(value).__qualname__ if " at 0x" in text else text[:200]  # an address is of one process


def checksum(tensor: torch.Tensor) -> str | None:
    """Of a tensor's values; None of one that has none, or not in plain memory."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return None
    try:
        with torch.no_grad():
            data = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        return alike.checksum(data.numpy(), f"{tensor.dtype}{list(tensor.shape)}")
    except Exception:  # of a class of its own: quantized weights, a part of a distributed tensor
        return None
