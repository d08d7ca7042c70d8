"""Loads a transformers causal LM, frozen, with its attention handed to us; refuses what can not be exact.

Runs once at start, on the main thread; called by `server.bootstrap`. The model's own attention functions
are replaced through `transformers.AttentionInterface`, so that there is no code per architecture. What
that can not express is refused by name: here from the configuration, in `self_check` from the numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from prefix_store.spec import KVLayout, LayerLayout
from server.errors import ModelRefused
from server.model import opaque_ops
from server.model.pack_shape import AS_IT_IS, PackShape

ATTENTION_NAME: Final = "prefixd"
_SERVED_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}
_REFUSED_ROPE_TYPES: Final = {"dynamic", "longrope"}

AttentionFunction = Callable[..., tuple[Tensor, None]]


def _call_connected(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; `connect` has put the real function on the module."""
    if torch.compiler.is_compiling():
        return opaque_ops.attend(module, query, key, value, kwargs), None
    attention: AttentionFunction = module.prefixd_attention  # type: ignore[assignment]
    return attention(module, query, key, value, *args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _call_connected)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen causal LM and what the engine needs to know of it. `module` runs on the engine thread only."""

    module: nn.Module
    model_id: str
    model_type: str
    layout: KVLayout
    vocab_size: int
    eos_token_ids: frozenset[int]
    position_limit: int | None
    position_scheme: Literal["rope", "learned", "none"]
    rope_theta: float | None
    device: torch.device
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    weight_bytes: int = 0  # of all parameters as loaded, tied ones once
    pack_shape: PackShape = AS_IT_IS

    def logits(self, input_ids: Tensor, position_ids: Tensor, indices: Tensor) -> Tensor:
        """Logits [len(indices), V] at the given tokens of a pack: ids and positions are [1, T]."""
        output = self.module(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=indices,
        )
        logits: Tensor = output.logits[0]
        return logits

    def connect(self, attention: AttentionFunction) -> None:
        """Has every attention layer call `attention` from now on."""
        connect(self.module, attention)

    @contextlib.contextmanager
    def connected(self, attention: AttentionFunction) -> Iterator[None]:
        """Has every attention layer call `attention` meanwhile, and then what it called before."""
        before: AttentionFunction = self.module.prefixd_attention  # type: ignore[assignment]
        self.connect(attention)
        try:
            yield
        finally:
            self.connect(before)


def connect(module: nn.Module, attention: AttentionFunction) -> None:
    """Puts `attention` where `_call_connected` finds it, whichever submodule calls."""
    for submodule in module.modules():
        submodule.prefixd_attention = attention  # type: ignore[assignment]


def load_model(
    source: str | Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    revision: str | None = None,
    model_id: str | None = None,
) -> LoadedModel:
    """Loads a directory or hub id, safetensors only, no remote code. Raises `ModelRefused`.

    `model_id` None: the hub id, or the directory's name.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    config = _load_config(str(source), revision)
    check_config(config)
    module = AutoModelForCausalLM.from_pretrained(
        str(source),
        revision=revision,
        config=config,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=False,
    )
    return adopt_model(module.to(device), model_id=model_id or _model_id(source))


def _load_config(source: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelRefused(
            f"model {source!r}: its configuration can not be read: {error}"
        ) from error


def _model_id(source: str | Path) -> str:
    """A hub id as it is; a directory by its last name."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)


def check_config(config: Any) -> None:
    """Refuses, by name, the traits that the engine can not serve exactly."""
    name = config.model_type
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelRefused(f"{name} is an encoder-decoder; expected a decoder-only causal LM")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ModelRefused(
            f"{name} uses multi-head latent attention, which has no K/V heads to seed"
        )
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelRefused(
            f"{name} has layers that share the K/V of others; they can not be seeded"
        )
    unserved = sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    if unserved:
        raise ModelRefused(
            f"{name} has layers of type {', '.join(unserved)}; "
            f"expected only {', '.join(sorted(_SERVED_LAYER_TYPES))}"
        )
    for rope_type in _rope_types(text):
        if rope_type in _REFUSED_ROPE_TYPES:
            raise ModelRefused(
                f"{name} uses {rope_type} rotary scaling, whose angles depend on the longest sequence "
                "of the batch, so a request's tokens would depend on its batch mates"
            )


def _rope_parameters(text: Any) -> list[dict[str, Any]]:
    """The rotary settings: one dict, or one per layer type (Gemma 3), full attention first."""
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return []
    if "rope_type" in rope or "rope_theta" in rope:
        return [rope]
    return sorted(
        (r for r in rope.values() if r), key=lambda r: r is not rope.get("full_attention")
    )


def _rope_types(text: Any) -> list[str]:
    return [str(rope.get("rope_type", "default")) for rope in _rope_parameters(text)]


def adopt_model(module: nn.Module, *, model_id: str) -> LoadedModel:
    """Freezes a transformers causal LM, takes over its attention and learns its K/V layout."""
    config: Any = module.config
    check_config(config)
    if not getattr(type(module), "_supports_attention_backend", False):
        raise ModelRefused(f"{config.model_type} does not use transformers' AttentionInterface")
    module.eval().requires_grad_(False)
    module.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    text = config.get_text_config()
    ropes = _rope_parameters(text)
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return LoadedModel(
        module=module,
        model_id=model_id,
        model_type=config.model_type,
        layout=_probe_layout(module, text.num_hidden_layers),
        vocab_size=text.vocab_size,
        eos_token_ids=_eos_token_ids(module),
        position_limit=int(limit) if limit else None,
        position_scheme="rope" if ropes else "learned" if limit else "none",
        rope_theta=float(ropes[0]["rope_theta"]) if ropes and "rope_theta" in ropes[0] else None,
        device=next(module.parameters()).device,
        # The width of what goes in, which OPT's and others' hidden_size is not.
        hidden_size=getattr(module.get_input_embeddings(), "embedding_dim", None),  # type: ignore[operator]
        num_attention_heads=getattr(text, "num_attention_heads", None),
        weight_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
    )


def _eos_token_ids(module: nn.Module) -> frozenset[int]:
    """All ids that end a text: those of the generation config, else of the model config."""
    generation = getattr(module, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(module.config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


class _LayoutProbe:
    """Stands in for attention during one tiny forward pass and notes what each layer brings."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerLayout] = {}
        self.faults: set[str] = set()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None or position_bias is not None:
            self.faults.add("puts part of its attention into a mask or a bias")
        self.layers[int(module.layer_idx)] = LayerLayout(  # type: ignore[arg-type]
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            window=sliding_window,
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


@torch.inference_mode()
def _probe_layout(module: nn.Module, num_layers: int) -> KVLayout:
    """K/V shapes as the layers really produce them, read from a two-token forward pass."""
    probe = _LayoutProbe()
    connect(module, probe)
    parameter = next(module.parameters())
    ids = torch.zeros(1, 2, dtype=torch.int64, device=parameter.device)
    positions = torch.arange(2, device=parameter.device)[None]
    module(input_ids=ids, position_ids=positions, use_cache=False)
    model_type = module.config.model_type  # type: ignore[union-attr]
    for fault in sorted(probe.faults):
        raise ModelRefused(f"{model_type} {fault}, which packed attention would lose")
    if sorted(probe.layers) != list(range(num_layers)):
        raise ModelRefused(
            f"{model_type} has {num_layers} layers, {len(probe.layers)} of them with ordinary attention; "
            "a prefix needs K/V in every layer"
        )
    layers = tuple(probe.layers[i] for i in range(num_layers))
    return KVLayout(layers, str(parameter.dtype).removeprefix("torch."))
