"""Prompts to native artifacts: soft prompts that came as files, and texts that people write.

Runs on the event loop; the model's work goes to the engine thread chunk by chunk, the rest to a worker
thread. Called by the admin routes, made by `server.bootstrap`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from prefix_store.importers.native import LayerTensors, native_artifact
from prefix_store.importers.recognition import Provenance
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.spec import BaseSpec
from prefix_store.validation import Limits
from server.errors import ContextTooLong, InvalidParameter


class Bake(Protocol):
    """`server.model.baker.Bake`; all of it on the engine thread."""

    def step(self) -> bool: ...

    def result(self) -> LayerTensors: ...


class Baker(Protocol):
    """`server.model.baker.Baker`."""

    def start(self, prompt: SoftPrompt | tuple[int, ...]) -> Bake: ...


class RunOnEngine(Protocol):
    """`AsyncEngine.run`."""

    def __call__(self, function: Callable[[], Any], /) -> Awaitable[Any]: ...


class PrefixCompiler:
    """Bakes prompts for one base model."""

    def __init__(self, run: RunOnEngine, baker: Baker, base: BaseSpec, limits: Limits) -> None:
        self._run = run
        self._baker = baker
        self._base = base
        self._limits = limits

    async def bake(self, soft: SoftPrompt) -> bytes:
        """The artifact that does what `soft` does in the place of a request's first embeddings."""
        self._check_length(soft.num_virtual_tokens)
        return await self._artifact(soft, soft.provenance, base_is_known=False)

    async def compile(self, token_ids: tuple[int, ...], provenance: Provenance) -> bytes:
        """The artifact that is exactly these tokens. Raises `InvalidParameter`, `ContextTooLong`."""
        if not token_ids:
            raise InvalidParameter("prompt: expected at least one token", param="prompt")
        if not all(0 <= token_id < self._base.vocab_size for token_id in token_ids):
            allowed = f"expected token ids 0 to {self._base.vocab_size - 1}"
            raise InvalidParameter(f"prompt: {allowed}", param="prompt")
        self._check_length(len(token_ids))
        return await self._artifact(token_ids, provenance, base_is_known=True)

    async def _artifact(
        self, prompt: SoftPrompt | tuple[int, ...], provenance: Provenance, *, base_is_known: bool
    ) -> bytes:
        bake: Bake = await self._run(lambda: self._baker.start(prompt))
        while not await self._run(bake.step):
            pass
        keys, values = await self._run(bake.result)
        return await asyncio.to_thread(
            native_artifact, self._base, keys, values, provenance, base_is_known=base_is_known
        )

    def _check_length(self, num_tokens: int) -> None:
        allowed = self._limits.max_num_virtual_tokens
        if self._base.position_limit is not None:
            allowed = min(allowed, self._base.position_limit - 1)
        if num_tokens > allowed:
            raise ContextTooLong(
                f"prompt: {num_tokens} tokens; a prefix of this server's model has at most {allowed}",
                param="prompt",
            )
