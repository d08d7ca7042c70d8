"""The words of TGI's answers, whole and streamed, with the fields that LoRAX added.

Runs on the event loop; made by `server.http.tgi` for each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import DeadlineExceeded
from server.http.generation import Choice, Generation
from server.http.services import Engine
from server.http.sse import Events, event
from server.http.tgi_schemas import TgiParameters
from server.types import RequestOutput, TokenLogprob


@dataclass(frozen=True, slots=True)
class TgiAnswer:
    """`before`: what stands before the generated text, the prompt if it is to be returned."""

    engine: Engine
    parameters: TgiParameters
    before: str

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        (choice,) = generation.choices
        answer: dict[str, Any] = {"generated_text": self.before + choice.text}
        if self.parameters.details or self.parameters.decoder_input_details:
            answer["details"] = {
                **self._summary(generation, choice),
                "prefill": self._prefill(generation, choice),
                "tokens": self._tokens(choice.token_ids, choice.logprobs),
            }
            if self.parameters.top_n_tokens:
                answer["details"]["top_tokens"] = [self._top(e) for e in choice.logprobs]
        return answer

    async def events(self, generation: Generation) -> Events:
        """An event per token; the last one has the whole text and the summary. Raises `DeadlineExceeded`, `outputs`' errors."""
        async for choice, output in generation.outputs():
            if choice.finish_reason is not None and not output.token_ids:
                # An event is of a token, and there is none for the summary to come with.
                raise DeadlineExceeded("the request's time was over; the text so far is not whole")
            yield b"".join(self._event(generation, choice, output, i) for i in _places(output))

    def _event(
        self, generation: Generation, choice: Choice, output: RequestOutput, place: int
    ) -> bytes:
        last = choice.finish_reason is not None and place == len(output.token_ids) - 1
        token_id = output.token_ids[place]
        entry = output.logprobs[place] if output.logprobs else None
        # Joined, the texts of the tokens are the text: what is held back comes with a later one.
        text = output.text if place == len(output.token_ids) - 1 else ""
        token = self._token(token_id, entry, text)
        value = {
            "index": choice.num_output_tokens - len(output.token_ids) + place + 1,
            # What was held back may come with the end: clients leave out the text of a special token.
            "token": token | {"special": token["special"] and not text},
            "generated_text": self.before + choice.text if last else None,
            "details": self._summary(generation, choice) if last else None,
        }
        if self.parameters.top_n_tokens and entry is not None:
            value["top_tokens"] = self._top(entry)
        return event(value)

    def _summary(self, generation: Generation, choice: Choice) -> dict[str, Any]:
        return {
            "finish_reason": _finish_reason(choice),
            "generated_tokens": choice.num_output_tokens,
            "input_length": generation.num_prompt_tokens,
            "prompt_tokens": generation.num_prompt_tokens,
            "skipped_tokens": 0,
            "seed": self.parameters.seed,
        }

    def _prefill(self, generation: Generation, choice: Choice) -> list[dict[str, Any]]:
        """The prompt's tokens; nothing stands before the first that could make it probable."""
        if not self.parameters.decoder_input_details:
            return []
        (prompt,) = generation.prompts
        entries: list[TokenLogprob | None] = [None, *choice.prompt_logprobs]
        return [
            {
                "id": token_id,
                "text": self.engine.token_text(token_id).text,
                "logprob": entry.logprob if entry else None,
            }
            for token_id, entry in zip(prompt, entries, strict=False)
        ]

    def _tokens(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprob]
    ) -> list[dict[str, Any]]:
        known: Sequence[TokenLogprob | None] = entries or [None] * len(token_ids)
        return [
            self._token(token_id, entry, self.engine.token_text(token_id).text)
            for token_id, entry in zip(token_ids, known, strict=True)
        ]

    def _token(self, token_id: int, entry: TokenLogprob | None, text: str) -> dict[str, Any]:
        return {
            "id": token_id,
            "text": text,
            "logprob": entry.logprob if entry else None,
            "special": self.engine.token_text(token_id).special,
            "skipped": False,
        }

    def _top(self, entry: TokenLogprob) -> list[dict[str, Any]]:
        return [
            self._token(
                token_id, TokenLogprob(token_id, logprob), self.engine.token_text(token_id).text
            )
            for token_id, logprob in entry.top
        ]


def _places(output: RequestOutput) -> range:
    return range(len(output.token_ids))


def _finish_reason(choice: Choice) -> str | None:
    if choice.finish_reason == "stop":
        return "stop_sequence" if isinstance(choice.stop_reason, str) else "eos_token"
    return choice.finish_reason
