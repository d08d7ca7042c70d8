"""A directory that PEFT wrote, or its bare file: any prompt-learning method, for a decoder-only base.

The tensors go through the server's own importer, so that a directory and an upload can not differ.
"""

from __future__ import annotations

from typing import Any, Final

from safetensors.torch import save

from converter.checkpoints import tensors_of
from converter.converted import Converted
from converter.errors import ConversionRefused
from converter.source import Source
from prefix_store.importers import peft
from prefix_store.importers.geometry import PEFT_TYPES
from prefix_store.importers.recognition import ImportOptions
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.spec import BaseSpec
from prefix_store.tensor_file import read_tensor_file
from prefix_store.validation import Limits

ANY_LENGTH: Final = Limits(max_num_virtual_tokens=1_000_000)


def read_peft(source: Source, base: BaseSpec, options: ImportOptions) -> Converted:
    """Prefixes as tensors, soft prompts as they are. Raises `ConversionRefused` or `ImportRefused`."""
    config = source.config
    peft_type = options.peft_type or config.get("peft_type")
    if peft_type is not None and peft_type not in PEFT_TYPES:
        expected = ", ".join(PEFT_TYPES)
        raise ConversionRefused(f"peft_type {peft_type!r}: expected one of {expected}")
    data = bytearray(save(tensors_of(source.state, source.weights.name)))
    file = read_tensor_file(data, len(data))
    settled = ImportOptions(peft_type, options.task_index)
    found = peft.recognise(file, base, ANY_LENGTH, settled)
    _check_heads(config, base)
    details: dict[str, Any] = {
        name: config[name]
        for name in ("peft_type", "peft_version", "base_model_name_or_path", "revision")
        if isinstance(config.get(name), str)
    }
    content = found.read_tensors(data, source.sha256)
    return Converted(
        format="peft",
        recognised=found.recognition.recognised,
        blocks={} if isinstance(content, SoftPrompt) else {"dec_self": content},
        soft=content if isinstance(content, SoftPrompt) else None,
        assumed=found.recognition.assumed,
        details=details,
    )


def _check_heads(config: dict[str, Any], base: BaseSpec) -> None:
    """Two head counts can give one width; PEFT's own is in the config."""
    heads, layers = config.get("num_attention_heads"), base.layout.layers
    if config.get("peft_type") not in ("PREFIX_TUNING", "CARTRIDGE") or heads is None:
        return
    widest = max(layers, key=lambda layer: (layer.key_dim, layer.num_kv_heads))
    if heads != widest.num_kv_heads:
        raise ConversionRefused(
            f"adapter_config.json: num_attention_heads is {heads}, the base has {widest.num_kv_heads} "
            "key/value heads"
        )
