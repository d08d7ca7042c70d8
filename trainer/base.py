"""The frozen base model as training sees it: transformers' own attention, a prefix before every row.

Loaded and judged by the server's loader, so that what can be trained can be served. Main thread; called by
`session`, `initial`, `prefix_encoder` and `loop`. Its parameters are never changed and never get a gradient.

B = rows, T = tokens of a row, P = prefix tokens, N = predicted tokens, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import demo
from prefix_store.spec import BaseSpec
from server.engine.tokenizer import Tokenizer
from server.model.base_spec import base_spec
from server.model.device import pick_device
from server.model.loader import LoadedModel, load_model
from trainer.batches import Batch
from trainer.errors import BadSetting
from trainer.prefix_cache import KeyValues, noting_cache, prefix_cache

TRAINING_ATTENTION: Final = "sdpa"
_OTHER_ATTENTION: Final = "eager"  # models that sdpa can not express: attention sinks of GPT-OSS


@dataclass(frozen=True, slots=True)
class FrozenBase:
    """One base model, its tokenizer and what the store knows of it."""

    model: LoadedModel
    spec: BaseSpec
    tokenizer: Tokenizer

    @property
    def module(self) -> Any:
        """The transformers model."""
        return self.model.module

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the prefix inside a forward pass."""
        return next(self.model.module.parameters()).dtype

    def logits(self, prefix: KeyValues | None, batch: Batch) -> Tensor:
        """Logits [N, V] of the batch's targets, behind `prefix`. Gradients flow into the prefix alone.

        The output layer sees the N tokens that predict something and no others: for a large vocabulary the rest
        would be most of the memory.
        """
        start = 0 if prefix is None else prefix.num_virtual_tokens

        def only_predicting(_: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (hidden[0][batch.rows, batch.columns][None], *hidden[1:])  # [1, N, hidden]

        handle = self.module.get_output_embeddings().register_forward_pre_hook(only_predicting)
        try:
            output = self.module(
                input_ids=batch.token_ids,
                position_ids=self._positions(start, batch.token_ids.shape[1]),
                past_key_values=None if prefix is None else prefix_cache(prefix, self.dtype),
                use_cache=prefix is not None,
            )
        finally:
            handle.remove()
        logits: Tensor = output.logits
        assert logits.shape[:2] == (1, len(batch.targets)), "the output layer saw other tokens"
        return logits[0]

    def key_values(self, prompt: Tensor) -> KeyValues:
        """What token ids [P] or input embeddings [P, hidden] leave in the KV cache, at positions 0..P-1."""
        cache = noting_cache()  # transformers' own would note a layer that runs again twice
        name = "inputs_embeds" if prompt.is_floating_point() else "input_ids"
        self.module(
            **{name: prompt[None].to(self.device)},
            position_ids=self._positions(0, len(prompt)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # [H_kv, P, D]
        return KeyValues(
            tuple(keys.transpose(0, 1) for keys, _ in pairs),
            tuple(values.transpose(0, 1) for _, values in pairs),
        )

    def embeddings(self, token_ids: Tensor) -> Tensor:
        """Input embeddings [P, hidden] of token ids [P]."""
        found: Tensor = self.module.get_input_embeddings()(token_ids.to(self.device))
        return found.detach()

    def recompute_activations(self) -> None:
        """From now on each layer keeps its input only, and runs again in the backward pass.

        Transformers' own switch would drop the prefix from the pass, because its caches can not be read twice.
        """
        for layer in self.module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    @contextlib.contextmanager
    def attention_implementation(self, name: str) -> Iterator[None]:
        """Another attention of transformers, meanwhile."""
        before = self.module.config._attn_implementation
        self.module.set_attn_implementation(name)
        try:
            yield
        finally:
            self.module.set_attn_implementation(before)

    def _positions(self, start: int, count: int) -> Tensor:
        return torch.arange(start, start + count, device=self.device)[None]


def load_base(
    source: str | None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> FrozenBase:
    """The base model in a directory or of a hub id; None: the bundled demo model. Raises `ModelRefused`.

    `dtype` "auto": float32 on a CPU, where half precision is rarely faster; on a GPU bfloat16 for any checkpoint in
    half precision, because gradients in float16 vanish.
    """
    where: str | Path = demo.MODEL_DIR if source is None else Path(source).expanduser()
    if isinstance(where, Path) and not where.is_dir():
        if str(source).startswith(("/", ".", "~")):
            raise BadSetting(f"model: {source} is no folder")
        where = str(source)
    chosen = pick_device(device)
    if dtype == "auto":
        dtype = _training_dtype(where, revision, chosen)
    bundled = isinstance(where, Path) and where.resolve() == demo.MODEL_DIR.resolve()
    model_id = demo.BASE_MODEL_ID if bundled else None
    model = load_model(where, device=chosen, dtype=dtype, revision=revision, model_id=model_id)
    return adopt_base(model, Tokenizer.load(where, revision=revision))


def _training_dtype(source: str | Path, revision: str | None, device: torch.device) -> str:
    if device.type == "cpu":
        return "float32"
    config: Any = AutoConfig.from_pretrained(
        str(source), revision=revision, trust_remote_code=False
    )
    return "bfloat16" if config.dtype in (torch.float16, torch.bfloat16) else "float32"


def adopt_base(model: LoadedModel, tokenizer: Tokenizer) -> FrozenBase:
    """A model that the server's loader has frozen, given transformers' own attention."""
    spec = base_spec(model, tokenizer_fingerprint=tokenizer.fingerprint())
    module: Any = model.module
    fits = getattr(module, "_supports_sdpa", False)
    module.set_attn_implementation(TRAINING_ATTENTION if fits else _OTHER_ATTENTION)
    return FrozenBase(model, spec, tokenizer)
