"""The messages that cross threads: what is asked, how to sample, what comes back, what was counted.

All frozen. The event loop builds `GenerationRequest` and reads `RequestOutput`; the engine thread does the
reverse. Knows nothing of torch, HTTP or the store's files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from prefix_store.spec import PrefixVersion
from server.errors import InvalidParameter

MAX_STOP_STRINGS: Final = 16
MAX_STOP_TOKEN_IDS: Final = 16
MAX_TOKENS: Final = 1_000_000
MAX_N: Final = 4
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIAS: Final = 1024


class FinishReason(StrEnum):
    """Why a sequence ended. The last three carry an error text: the answer is not whole.

    DEADLINE: its request's time was over; what there was by then is the answer. ABORT: by whoever asked, or by the server going down. PREFIX_UNAVAILABLE: its prefix could not be loaded.
    """

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    ABORT = "abort"
    PREFIX_UNAVAILABLE = "prefix_unavailable"
    ERROR = "error"


class PrefixTier(StrEnum):
    """Where a request's prefix was found when the scheduler first looked."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token. Checked on construction; raises `InvalidParameter`.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. `max_tokens` counts
    generated tokens. `seed` makes a request repeatable whatever its batch mates are. `skip_special_tokens`:
    whether these have no text in the answer. `logit_bias`: token id and what is added to its logit. `logprobs`,
    `prompt_logprobs`: so many of the most probable tokens are told at each place; None: not even the token's own.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_k", self.top_k, 0, 1_000_000)
        _within("top_p", self.top_p, 1e-6, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("n", self.n, 1, MAX_N)
        for name in ("logprobs", "prompt_logprobs"):
            _within(name, getattr(self, name) or 0, 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidParameter(
                f"logit_bias: expected at most {MAX_LOGIT_BIAS} tokens", param="logit_bias"
            )
        for _, bias in self.logit_bias:
            _within("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**64 - 1)
        if len(self.stop) > MAX_STOP_STRINGS or any(not s or len(s) > 128 for s in self.stop):
            raise InvalidParameter(
                f"stop: expected at most {MAX_STOP_STRINGS} strings of 1 to 128 characters",
                param="stop",
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidParameter(
                f"stop_token_ids: expected at most {MAX_STOP_TOKEN_IDS}, got {len(self.stop_token_ids)}",
                param="stop_token_ids",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the next token depends on which tokens there were, beyond what the model makes of them."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _within(name: str, value: float, low: float, high: float) -> None:
    # `not (low <= value)` also refuses NaN, which `value < low` would let through.
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidParameter(f"{name}: expected {low} to {high}, got {value}", param=name)


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token by itself. `text`: as text shows it, where it is half a character as `bytes:\\xe2\\x80`. `raw`: its
    bytes, None where the tokenizer does not tell. `special`: one that an answer leaves out.
    """

    text: str
    raw: bytes | None
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a client needs to do the tokenizer's work itself; None for what it does not have."""

    name: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class PrefixRef:
    """All that the engine needs to know of a prefix before its tensors arrive.

    `digest` is the only cache key. `task` and `version` label metrics and answers. `first_position` is the
    position of the request's first own token.
    """

    task: str
    version: int
    digest: str
    num_virtual_tokens: int
    first_position: int


def prefix_ref(version: PrefixVersion) -> PrefixRef:
    """A stored version as the engine names it."""
    return PrefixRef(
        task=version.task,
        version=version.version,
        digest=version.digest,
        num_virtual_tokens=version.manifest.num_virtual_tokens,
        first_position=version.manifest.first_position,
    )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one task (`prefix` None: the bare base model). `request_id` is ours, never a client's.

    `version_role`: live or canary, for metrics; empty for a request that names a version, or no task.
    `cache_salt`: only requests of one salt share blocks of the prompt cache; the tenant is in it. `tenant`: who asks,
    empty for the operator; `tenant_weight`: its share of the work, beside others'.
    `deadline`: monotonic seconds when it ends, whatever it has by then. `endpoint`: empty for requests of our own, which are
    in no statistics.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    prefix: PrefixRef | None = None
    endpoint: str = "completions"
    version_role: str = ""
    cache_salt: str = ""
    tenant: str = ""
    tenant_weight: float = 1.0
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Seconds since the request was submitted; None while it has not happened."""

    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    finished_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable the model found a token, before bias, penalties and temperature. `top`: the most probable
    tokens with theirs, best first. Natural logarithms, finite.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one choice of a request gained: `text` and `token_ids` are increments, counts are totals.

    `stop_reason`: the stop string or stop token id that ended it. `error`: a sentence, when
    `finish_reason` is ERROR. The last output of each choice carries `finish_reason`. `num_cached_tokens`:
    of the prompt, that were in the prompt cache. `logprobs`: of `token_ids`, if they were asked for.
    `prompt_logprobs`: of all tokens of the prompt but the first, with a choice's first output.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    num_output_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prefix_tier: PrefixTier = PrefixTier.NONE
    timings: RequestTimings = RequestTimings()
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def followed_by(self, later: RequestOutput) -> RequestOutput:
        """This increment and a later one of the same choice, as one."""
        return replace(
            later,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class PinState:
    """What came of an order to pin: `refusal` is a sentence, None if it was carried out."""

    refusal: str | None
    num_pinned_blocks: int
    budget_blocks: int


@dataclass(frozen=True, slots=True)
class Resident:
    """One prefix on the device. `pin_seconds_left`: None if it is not pinned, or for ever."""

    ref: PrefixRef
    num_blocks: int
    num_leases: int
    pinned: bool
    pin_seconds_left: float | None


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """The device tier at one moment, least recently used first. `block_bytes`: of one block, over all layers."""

    num_blocks: int
    num_blocks_used: int
    num_pinned_blocks: int
    pin_budget_blocks: int
    residents: tuple[Resident, ...]
    block_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PrefixEvent:
    """A change of residency, for metrics. `kind`: load | load_failed | evict; tier it concerns."""

    kind: str
    tier: PrefixTier
    task: str
    digest: str
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did, and the state it left. Gauges are values after the step.

    Tokens, requests and seconds are of the step that ended in it; where steps overlap, that is the one launched before.

    `num_prompt_cache_blocks`: those held; `num_idle_prompt_blocks`: those of them that nobody reads.
    `num_asked_tokens`: of prompts that began to run; `num_hit_tokens`: of these, found in the prompt cache.
    """

    duration_seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_scheduled_requests: int
    num_distinct_tasks: int
    num_preemptions: int
    num_running: int
    num_waiting: int
    num_waiting_for_prefix: int
    num_kv_blocks: int
    num_kv_blocks_used: int
    num_prefix_blocks: int
    num_prompt_cache_blocks: int
    num_idle_prompt_blocks: int
    num_asked_tokens: int
    num_hit_tokens: int
    device_prefix_bytes: int
    resident_tasks: tuple[str, ...]
    events: tuple[PrefixEvent, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One finished request (all its choices), for metrics. Seconds are monotonic differences."""

    task: str
    endpoint: str
    outcome: str
    prefix_tier: PrefixTier
    num_prompt_tokens: int
    num_output_tokens: int
    timings: RequestTimings
    inter_token_seconds: tuple[float, ...] = ()
    version_role: str = ""
