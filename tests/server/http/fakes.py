"""An engine that says what a test tells it to, and an app around it with a real store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI

from prefix_store.artifact import Prefix
from prefix_store.backends.memory import MemoryBackend
from prefix_store.importers.native import native_artifact
from prefix_store.importers.recognition import Provenance
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.proof import Proof
from prefix_store.store import PrefixStore
from prefix_store.validation import Limits
from server.engine.intake import Intake
from server.errors import InvalidParameter, PinRefused
from server.http.app import Services, create_app
from server.http.visible_store import VisibleStore
from server.metrics import Metrics
from server.types import (
    DeviceReport,
    FinishReason,
    GenerationRequest,
    PinState,
    PrefixRef,
    PrefixTier,
    RequestOutput,
    RequestTimings,
    Resident,
    TokenizerFacts,
    TokenText,
)
from tests.prefix_store.builders import TINY_BASE, make_artifact, random_kv

ADMIN_KEY = "the-admin-key"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}

VOCAB_SIZE = 94
Script = Callable[[GenerationRequest], Sequence[RequestOutput | Exception]]


def words(request: GenerationRequest, *texts: str) -> list[RequestOutput]:
    """One token per text for every choice, then the end: by length, as `max_tokens` was reached."""
    outputs = []
    for index in range(request.sampling.n):
        for count, text in enumerate(texts, start=1):
            last = count == len(texts)
            outputs.append(
                RequestOutput(
                    request_id=request.request_id,
                    index=index,
                    text=text,
                    token_ids=(40 + count,),
                    num_output_tokens=count,
                    finish_reason=FinishReason.LENGTH if last else None,
                    prefix_tier=PrefixTier.DEVICE if request.prefix else PrefixTier.NONE,
                    timings=RequestTimings(0.001, 0.002, 0.003 if last else None),
                )
            )
    return outputs


def failed(request: GenerationRequest, error: str) -> RequestOutput:
    """The last output of a request that the engine could not finish."""
    return RequestOutput(
        request.request_id, 0, "", (), 0, finish_reason=FinishReason.ERROR, error=error
    )


class FakeStream:
    """Gives out a script; after its end, or in a script that has none, waits for ever."""

    def __init__(self, outputs: Sequence[RequestOutput | Exception]) -> None:
        self._outputs = list(outputs)
        self._ends = any(
            isinstance(o, RequestOutput) and o.finish_reason is not None for o in outputs
        )
        self.closed = False

    async def __anext__(self) -> RequestOutput:
        await asyncio.sleep(0)
        if self._outputs:
            output = self._outputs.pop(0)
            if isinstance(output, Exception):
                raise output
            return output
        if self._ends:
            raise StopAsyncIteration
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class FakeHealth:
    """What the probes see."""

    alive: bool = True
    heartbeat_age_seconds: float = 0.1
    num_running: int = 2
    num_waiting: int = 1


@dataclass
class FakeEngine:
    """Records what it is asked; `script` decides what comes back, `refusal` what `submit` raises."""

    script: Script = field(default=lambda request: words(request, "a", "b", "c"))
    refusal: Exception | None = None
    max_model_len: int = 128
    health: FakeHealth = field(default_factory=FakeHealth)
    requests: list[GenerationRequest] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    warmed: list[str] = field(default_factory=list)
    pins: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    pin_refusal: str | None = None
    has_no_chat_template: bool = False
    tokenizer_hangs: bool = False
    num_tokenizing: int = 0
    special_tokens: list[bool] = field(default_factory=list)

    def room(self, prefix: PrefixRef | None, num_prompt_tokens: int) -> int:
        return self.max_model_len - (prefix.num_virtual_tokens if prefix else 0) - num_prompt_tokens

    async def tokenize(self, prompt: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        self.special_tokens.append(special_tokens)
        if self.tokenizer_hangs:
            self.num_tokenizing += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.num_tokenizing -= 1
        return tuple(1 + ord(char) % 90 for char in prompt)

    async def tokenize_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> tuple[int, ...]:
        if self.has_no_chat_template:
            raise InvalidParameter("messages: no chat template", param="messages")
        text = "".join(f"{m['role']}:{m['content']}" for m in messages)
        return await self.tokenize(text + "!" * add_generation_prompt)

    async def detokenize(self, token_ids: Sequence[int], param: str) -> str:
        if any(token >= VOCAB_SIZE for token in token_ids):
            raise InvalidParameter(f"{param}: no such token", param=param)
        return "".join(self.token_text(token).text for token in token_ids)

    def token_text(self, token_id: int) -> TokenText:
        """Letters; 0 is special, 1 is half a character."""
        if token_id < 2:
            return (TokenText("</s>", b"</s>", True), TokenText("bytes:\\xe2", b"\xe2", False))[
                token_id
            ]
        text = chr(ord("!") + token_id)
        return TokenText(text, text.encode(), False)

    def tokenizer_facts(self) -> TokenizerFacts:
        template = None if self.has_no_chat_template else "{{ messages }}"
        return TokenizerFacts("Fake", None, "</s>", None, None, VOCAB_SIZE, template)

    def submit(self, request: GenerationRequest) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        if not request.prompt_token_ids:
            raise InvalidParameter("prompt: expected at least one token", param="prompt")
        self.requests.append(request)
        self.streams.append(FakeStream(self.script(request)))
        return self.streams[-1]

    def warm(self, ref: PrefixRef) -> None:
        self.warmed.append(ref.digest)

    def evict(self, digest: str) -> None:
        self.evicted.append(digest)

    async def pin(self, ref: PrefixRef, ttl_seconds: float | None = None) -> PinState:
        if self.pin_refusal is not None:
            raise PinRefused(self.pin_refusal)
        self.pins[ref.task] = (ref.digest, ttl_seconds)
        return PinState(None, len(self.pins), 10)

    async def follow_pin(self, ref: PrefixRef) -> str | None:
        if ref.task in self.pins:
            self.pins[ref.task] = (ref.digest, self.pins[ref.task][1])
            return self.pin_refusal
        return None

    def unpin(self, task: str) -> None:
        self.pins.pop(task, None)

    async def device_report(self) -> DeviceReport:
        ref = PrefixRef("poet", 2, "sha256:" + "e" * 64, 3, 3)
        return DeviceReport(100, 7, 1, 50, (Resident(ref, 1, 2, True, 60.0),), 8)

    def status(self) -> FakeHealth:
        return self.health


class FakeCompiler:
    """Bakes to random tensors of the right shape, one seed per prompt."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...] | SoftPrompt] = []

    async def bake(self, soft: SoftPrompt) -> bytes:
        self.prompts.append(soft)
        keys, values = random_kv(TINY_BASE, soft.num_virtual_tokens)
        return native_artifact(TINY_BASE, keys, values, soft.provenance)

    async def compile(self, token_ids: tuple[int, ...], provenance: Provenance) -> bytes:
        self.prompts.append(token_ids)
        keys, values = random_kv(TINY_BASE, len(token_ids), seed=sum(token_ids))
        return native_artifact(TINY_BASE, keys, values, provenance, base_is_known=True)


@dataclass
class FakeProver:
    """Finds every prefix as good as `proof` says, or raises `refusal`."""

    proof: Proof = field(default_factory=Proof)
    refusal: Exception | None = None
    tried: list[str] = field(default_factory=list)

    def prepare(self, prefix: Prefix) -> FakeProver:
        self.tried.append(prefix.digest)
        return self

    def smoke(self) -> None:
        pass

    def probe(self) -> Proof:
        if self.refusal is not None:
            raise self.refusal
        return self.proof


async def run_here(function: Callable[[], Any]) -> Any:
    """Stands in for the engine thread."""
    return function()


def store_with_tasks() -> PrefixStore:
    """A store in memory with the operator's tasks `poet` (two versions) and `clerk`."""
    store = PrefixStore(
        MemoryBackend(), TINY_BASE, Limits(max_num_virtual_tokens=16), host_cache_bytes=0
    )
    store.put("clerk", make_artifact(seed=3, num_virtual_tokens=5))
    store.put("poet", make_artifact(seed=1))
    generation = {"temperature": 0.5, "max_tokens": 7, "stop": ["END"]}
    store.put("poet", make_artifact(seed=2, generation=generation))
    return store


def make_services(
    engine: FakeEngine, *, prover: FakeProver | None = None, **changes: Any
) -> Services:
    """Services around `engine`; over `store`, if there is one in `changes`, else over `store_with_tasks`."""
    store = changes.pop("store", None) or store_with_tasks()
    services = Services(
        engine=engine,
        store=VisibleStore(store),
        intake=Intake(store, FakeCompiler(), prover or FakeProver(), run_here),
        metrics=Metrics(max_tasks=10),
        model_id="org/tiny",
        base_fingerprint=TINY_BASE.fingerprint,
        admin_key=ADMIN_KEY,
        version="9.9.9",
    )
    return replace(services, **changes)


def make_app(engine: FakeEngine, **changes: Any) -> FastAPI:
    """The app around `make_services`."""
    return create_app(make_services(engine, **changes))
