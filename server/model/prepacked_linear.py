"""Linear layers whose weights lie as the CPU's matrix kernels read them.

Called once at start by `server.bootstrap`, on the main thread, after the fingerprints were taken and before
the self-check. oneDNN reorders a weight for each product unless it is given one that was reordered before. That
is what costs a decode step most; and of several rows the prepacked kernel gives each the same bits however
many they are, which the plain one does not in float32.

Memory: a reordered weight is as large as the plain one, and replaces it, layer by layer. Only an embedding that
doubles as the output layer is kept beside its reordered copy, because rows are looked up in it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model import opaque_ops
from server.model.loader import LoadedModel
from server.model.merged_linear import MergedLinear
from server.model.pack_shape import PackShape

logger = logging.getLogger(__name__)

_DTYPES: Final = ("float32", "bfloat16")
# A product of one row has a kernel of its own, which sums in another order.
_MIN_ROWS: Final = 2
_ROWS_TO_EXPECT: Final = (
    16  # what oneDNN chooses its layout for; any other number of rows works too
)


class PrepackedLinear(nn.Module):
    """x W^T + b: [..., in] -> [..., out]. `weight` is in oneDNN's own layout: its dtype and device may be asked."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` [out, in]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_TO_EXPECT)
        self.bias = bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight; the bias is a few."""
        return self.in_features * self.out_features * self.weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        """Any number of rows, none too."""
        if torch.compiler.is_compiling():
            return opaque_ops.prepacked_linear(self, x, self.out_features)
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def can_prepack(model: LoadedModel) -> bool:
    """Whether the model runs on a CPU whose kernels take prepacked weights of its dtype."""
    if model.device.type != "cpu" or model.layout.dtype not in _DTYPES:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call] # torch has no types for it
        return False
    return model.layout.dtype == "float32" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def prepack(model: LoadedModel) -> LoadedModel:
    """The model with its linear layers replaced in place; as it was where that is not possible.

    Nothing can be trained through it afterwards, and its parameters no longer hold all its weights.
    """
    if not can_prepack(model):
        return model
    for parent in list(model.module.modules()):
        for name, child in list(parent.named_children()):
            if (weight := _plain_weight(child)) is not None:
                setattr(parent, name, PrepackedLinear(weight, child.bias))  # type: ignore[arg-type] # a module's attribute may be anything
    packed = [m for m in model.module.modules() if isinstance(m, PrepackedLinear)]
    num_bytes = sum(layer.weight_bytes for layer in packed)
    logger.info("prepacked %d linear layers, %d MB", len(packed), num_bytes // 10**6)
    shape = PackShape(_MIN_ROWS, _widths(model.module), torch.get_num_threads())
    return dataclasses.replace(model, pack_shape=shape)


def _widths(module: nn.Module) -> tuple[int, ...]:
    """Of the activations that linear layers give, but for the logits. Merged ones are activations one by one."""
    merged = [m for m in module.modules() if isinstance(m, MergedLinear)]
    head = module.get_output_embeddings()  # type: ignore[operator] # transformers' method
    no_activations = {head, *(m.linear for m in merged)}
    found = {width for m in merged for width in m.sizes}
    for layer in module.modules():
        if isinstance(layer, PrepackedLinear) and layer not in no_activations:
            found.add(layer.out_features)
    return tuple(sorted(found))


def _plain_weight(module: nn.Module) -> Tensor | None:
    """The weight [out, in] of an ordinary linear layer; a subclass may compute something else."""
    if type(module) is nn.Linear:
        return module.weight
    if type(module) is Conv1D:  # GPT-2's, stored the other way round
        stored: Tensor = module.weight  # type: ignore[assignment] # Conv1D has no types
        return stored.t().contiguous()
    return None
