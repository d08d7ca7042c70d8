"""The way of a prefix into the store, up to the moment before it has a name: recognised, made, judged, tried.

Runs on the event loop; files are read and judged in worker threads, the model's work is done on the engine
thread in short calls. Made by `server.bootstrap`; called by the admin routes and by `prefixd verify`, so that
a dry run, a verification and an upload can not come to different ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from prefix_store.artifact import Prefix
from prefix_store.importers.recognition import (
    ImportOptions,
    Provenance,
    Recognition,
    recognition_of,
)
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.proof import Proof
from prefix_store.spec import PrefixManifest
from prefix_store.store import PrefixStore
from prefix_store.upload import Upload
from server.engine.prefix_compiler import RunOnEngine

MAX_PROVING: Final = 2
"""Prefixes made or proved at a time: each is held in memory as a whole meanwhile."""


class Compiler(Protocol):
    """`server.engine.prefix_compiler.PrefixCompiler`."""

    async def bake(self, soft: SoftPrompt) -> bytes: ...

    async def compile(self, token_ids: tuple[int, ...], provenance: Provenance) -> bytes: ...


class Trial(Protocol):
    """`server.model.prover.Trial`; on the engine thread."""

    def smoke(self) -> None: ...

    def probe(self) -> Proof: ...


class Prover(Protocol):
    """`server.model.prover.Prover`."""

    def prepare(self, prefix: Prefix) -> Trial: ...


@dataclass(frozen=True, slots=True)
class Examined:
    """A prefix that may be stored: `upload` holds its bytes and waits for `commit`.

    `made_here`: of a text, on this very model, so there was no other place where it did something.
    """

    upload: Upload
    manifest: PrefixManifest
    recognition: Recognition
    proof: Proof
    warnings: tuple[str, ...]
    made_here: bool = False

    def report(self) -> dict[str, Any]:
        """What was found, as an upload, a dry run and `prefixd verify` tell it."""
        unproved = () if self.made_here else self.proof.unverified
        return {
            "recognised": self.recognition.recognised,
            "assumed": list(self.recognition.assumed),
            "unverified": [*self.recognition.unverified, *unproved],
            "proof": self.proof.as_answer(),
            "warnings": list(self.warnings),
        }


class Intake:
    """Examines prefixes for one store and one resident model."""

    def __init__(
        self, store: PrefixStore, compiler: Compiler, prover: Prover, run: RunOnEngine
    ) -> None:
        self._store = store
        self._compiler = compiler
        self._prover = prover
        self._run = run

    @contextlib.asynccontextmanager
    async def upload(self) -> AsyncIterator[Upload]:
        """A new upload, dropped on leaving unless it was committed. Raises `StoreFull`, `StoreFailed`."""
        upload = await asyncio.to_thread(self._store.begin_upload)
        try:
            yield upload
        finally:
            await asyncio.to_thread(upload.abort)

    @contextlib.asynccontextmanager
    async def examined(
        self, upload: Upload, options: ImportOptions, *, expected_sha256: str | None = None
    ) -> AsyncIterator[Examined]:
        """What the received bytes become, examined. Raises `PrefixRejected`, `EngineOverloaded`, ..."""
        translate = functools.partial(upload.translate, options, expected_sha256=expected_sha256)
        incoming = await asyncio.to_thread(translate)
        if incoming is None:
            prefix = await asyncio.to_thread(
                functools.partial(upload.judge, expected_sha256=expected_sha256)
            )
            yield await self._tried(upload, prefix, recognition_of(prefix.manifest))
            return
        content = incoming.content
        if isinstance(content, SoftPrompt):
            content = await self._compiler.bake(content)
        async with self._made(content, incoming.recognition) as examined:
            yield examined

    @contextlib.asynccontextmanager
    async def compiled(
        self, token_ids: tuple[int, ...], provenance: Provenance
    ) -> AsyncIterator[Examined]:
        """The prefix that is exactly these tokens. Raises as `PrefixCompiler.compile` does."""
        artifact = await self._compiler.compile(token_ids, provenance)
        async with self._made(artifact, provenance.recognition) as examined:
            yield replace(examined, made_here=True)

    @contextlib.asynccontextmanager
    async def _made(self, artifact: bytes, recognition: Recognition) -> AsyncIterator[Examined]:
        """An artifact that was made here, examined like one that came."""
        async with self.upload() as upload:
            await asyncio.to_thread(upload.write, artifact)
            prefix = await asyncio.to_thread(upload.judge)
            yield await self._tried(upload, prefix, recognition)

    async def _tried(self, upload: Upload, prefix: Prefix, recognition: Recognition) -> Examined:
        trial = await asyncio.to_thread(self._prover.prepare, prefix)
        await self._run(trial.smoke)
        proof: Proof = await self._run(trial.probe)
        return Examined(upload, prefix.manifest, recognition, proof, upload.warnings)
