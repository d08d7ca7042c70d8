"""The server says that it generates after it has generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from server.engine.proof_of_life import ProofOfLife
from server.errors import GenerationFailed
from server.types import FinishReason, GenerationRequest, RequestOutput


@dataclass
class Engine:
    max_model_len: int = 100
    token: int = 5
    error: str | None = None
    silent: bool = False
    requests: list[GenerationRequest] = field(default_factory=list)

    def submit(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]:
        self.requests.append(request)
        return self._outputs(request)

    async def _outputs(self, request: GenerationRequest) -> AsyncIterator[RequestOutput]:
        for count in range(0 if self.silent else request.sampling.max_tokens):
            yield RequestOutput(request.request_id, 0, "x", (self.token,), count + 1)
        if not self.silent:
            reason = FinishReason.ERROR if self.error else FinishReason.LENGTH
            yield RequestOutput(request.request_id, 0, "", (), 4, reason, error=self.error)


def prove(life: ProofOfLife) -> None:
    asyncio.run(life.prove())


def test_each_proof_is_computed_anew_and_is_in_no_statistics() -> None:
    engine = Engine()
    life = ProofOfLife(engine, repeatable=True)
    prove(life)
    prove(life)

    first, second = engine.requests
    assert first.request_id != second.request_id
    assert first.cache_salt != second.cache_salt
    assert (first.prompt_token_ids, first.sampling) == (second.prompt_token_ids, second.sampling)
    assert {first.endpoint, second.endpoint} == {""}


@pytest.mark.parametrize("engine", [Engine(error="non-finite logits"), Engine(silent=True)])
def test_a_model_that_does_not_generate_is_found(engine: Engine) -> None:
    with pytest.raises(GenerationFailed, match="does not generate"):
        prove(ProofOfLife(engine, repeatable=True))


@pytest.mark.parametrize("repeatable", [True, False])
def test_other_tokens_than_at_first_are_a_failure_where_bits_do_not_depend_on_luck(
    repeatable: bool,
) -> None:
    engine = Engine()
    life = ProofOfLife(engine, repeatable=repeatable)
    prove(life)
    engine.token = 6

    if repeatable:
        with pytest.raises(GenerationFailed, match="no longer"):
            prove(life)
    else:
        prove(life)


@pytest.mark.parametrize("max_model_len", [2, 4, 5, 7])
def test_it_fits_the_shortest_models(max_model_len: int) -> None:
    engine = Engine(max_model_len=max_model_len)
    prove(ProofOfLife(engine, repeatable=True))

    [request] = engine.requests
    assert len(request.prompt_token_ids) + request.sampling.max_tokens <= max_model_len
