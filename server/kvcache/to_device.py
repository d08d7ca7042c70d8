"""How what the host has worked out for a step gets to the device that performs it.

Called on the engine thread, for every step, by the pool and by all that lays a step out as tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for the steps that a GPU still has before it.

    A plain copy would: it reads memory that the host may change as soon as the call returns. Pinned memory is torch's to
    give away, and it does so only when the copy was made.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
