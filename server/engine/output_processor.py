"""From sampled tokens to what a client reads: text increments, stop strings, times.

Runs on the event loop, one `OutputProcessor` per request; called by `AsyncEngine` for each increment. It
may end a choice that the engine still runs (a stop string was completed); the caller then aborts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.messages import SequenceOutput
from server.engine.tokenizer import Detokenizer, Tokenizer
from server.types import (
    FinishReason,
    GenerationRequest,
    PrefixTier,
    RequestOutput,
    RequestStats,
    RequestTimings,
)


class StopStringMatcher:
    """Holds back text that may turn out to be the start of a stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text now safe to give out, and the stop string if one was completed (text then ends before it)."""
        text = self._held + text
        matches = [(text.find(s), s) for s in self._stop if s in text]
        if matches:
            position, stop = min(matches)
            self._held = ""
            return text[:position], stop
        keep = self._partial_match_len(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _partial_match_len(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max((len(s) for s in self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0


@dataclass(slots=True)
class _Choice:
    """One choice on its way to the client."""

    detokenizer: Detokenizer
    stops: StopStringMatcher
    num_output_tokens: int = 0
    finished: bool = False


@dataclass(slots=True)
class OutputProcessor:
    """All choices of one request. `submitted` and the `now` of `process` are monotonic seconds."""

    request: GenerationRequest
    tokenizer: Tokenizer
    submitted: float
    timings: RequestTimings = field(default_factory=RequestTimings)
    num_output_tokens: int = 0
    inter_token_seconds: list[float] = field(default_factory=list)
    prefix_tier: PrefixTier = PrefixTier.NONE
    _choices: list[_Choice] = field(default_factory=list)
    _last_token: list[float | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        for _ in range(sampling.n):
            self._choices.append(
                _Choice(
                    Detokenizer(
                        self.tokenizer,
                        self.request.prompt_token_ids,
                        special_tokens=not sampling.skip_special_tokens,
                    ),
                    StopStringMatcher(sampling.stop),
                )
            )
            self._last_token.append(None)

    @property
    def finished(self) -> bool:
        return all(choice.finished for choice in self._choices)

    def process(self, output: SequenceOutput, now: float) -> RequestOutput | None:
        """The increment for the client; None when the choice had already ended here."""
        choice = self._choices[output.index]
        if choice.finished:
            return None
        self._take_times(output, now)
        self.prefix_tier = output.prefix_tier
        text, stop = self._text(choice, output)
        if output.token_id is not None:
            choice.num_output_tokens += 1
            self.num_output_tokens += 1
        reason = FinishReason.STOP if stop is not None else output.finish_reason
        choice.finished = reason is not None
        return RequestOutput(
            request_id=output.request_id,
            index=output.index,
            text=text,
            token_ids=() if output.token_id is None else (output.token_id,),
            num_output_tokens=choice.num_output_tokens,
            finish_reason=reason,
            stop_reason=stop if stop is not None else self._stop_token(output),
            error=output.error,
            prefix_tier=output.prefix_tier,
            timings=self.timings,
            num_cached_tokens=output.num_cached_tokens,
            logprobs=() if output.logprob is None else (output.logprob,),
            prompt_logprobs=output.prompt_logprobs,
        )

    def fail(self, error: str, reason: FinishReason) -> list[RequestOutput]:
        """Ends every choice that has not ended, with an error text."""
        outputs = []
        for index, choice in enumerate(self._choices):
            if not choice.finished:
                choice.finished = True
                outputs.append(
                    RequestOutput(
                        request_id=self.request.request_id,
                        index=index,
                        text="",
                        token_ids=(),
                        num_output_tokens=choice.num_output_tokens,
                        finish_reason=reason,
                        error=error,
                        prefix_tier=self.prefix_tier,
                        timings=self.timings,
                    )
                )
        return outputs

    def cut(self, reason: FinishReason) -> list[RequestOutput]:
        """Ends every choice that has not ended with the text that it has, also what was held back."""
        outputs = []
        for index, choice in enumerate(self._choices):
            if not choice.finished:
                choice.finished = True
                text, stop = choice.stops.push(choice.detokenizer.flush())
                outputs.append(
                    RequestOutput(
                        request_id=self.request.request_id,
                        index=index,
                        text=text if stop else text + choice.stops.flush(),
                        token_ids=(),
                        num_output_tokens=choice.num_output_tokens,
                        finish_reason=FinishReason.STOP if stop else reason,
                        stop_reason=stop,
                        prefix_tier=self.prefix_tier,
                        timings=self.timings,
                    )
                )
        return outputs

    def stats(self, outcome: str, timings: RequestTimings | None = None) -> RequestStats:
        """The figures of the request, now that it has ended; `timings`: of its last increment, if it had one."""
        prefix = self.request.prefix
        return RequestStats(
            task=prefix.task if prefix else "",
            endpoint=self.request.endpoint,
            outcome=outcome,
            prefix_tier=self.prefix_tier,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=self.num_output_tokens,
            timings=timings or self.timings,
            inter_token_seconds=tuple(self.inter_token_seconds),
            version_role=self.request.version_role,
        )

    def _text(self, choice: _Choice, output: SequenceOutput) -> tuple[str, str | None]:
        """Text to give out now, and the stop string that ended it. A stop token has no text."""
        text = ""
        if output.token_id is not None and output.stop_token_id is None:
            text = choice.detokenizer.push([output.token_id])
        if output.finish_reason is not None:
            text += choice.detokenizer.flush()
        stop = None
        if choice.num_output_tokens >= self.request.sampling.min_tokens:
            text, stop = choice.stops.push(text)
        if output.finish_reason is not None and stop is None:
            text += choice.stops.flush()
        return text, stop

    def _stop_token(self, output: SequenceOutput) -> int | None:
        """The stop token id to report: one that the request named, not the model's own end of text."""
        token = output.stop_token_id
        return token if token in self.request.sampling.stop_token_ids else None

    def _take_times(self, output: SequenceOutput, now: float) -> None:
        since = now - self.submitted
        first = self.timings.first_token_seconds
        if output.token_id is not None:
            last = self._last_token[output.index]
            if last is not None:
                self.inter_token_seconds.append(now - last)
            self._last_token[output.index] = now
            first = since if first is None else first
        self.timings = RequestTimings(output.queue_seconds, first, since)
