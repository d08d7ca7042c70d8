"""The bodies that clients send, as pydantic models; nothing pydantic goes further down.

Null means absent everywhere: LangChain and vllm bench send nulls. Unknown fields are ignored, as OpenAI
does; `server.http.unsupported` has those that are not. Ranges are checked once, by `server.types.SamplingParams`.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from server.errors import InvalidParameter

MAX_PROMPTS: Final = 64

# Bounds that no valid value reaches, so that arithmetic further down can not overflow.
Int: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**64)]
_TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds: TypeAlias = list[_TokenId]


class Body(BaseModel):
    """Null is absent, what is not known is ignored, and nothing is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class SamplingFields(Body):
    """The fields that become `SamplingParams`, by its names; None: the task's default, else ours."""

    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_k: Int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    n: Int | None = None
    logit_bias: dict[str, float] | None = Field(
        default=None, description="Token id -> what is added to its logit, -100 to 100"
    )

    user: str | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = Field(
        default=None, description="Only requests with the same salt share cached prompts"
    )
    stream: bool | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Whether the tokenizer adds its own (BOS) to a text; it does"
    )


class GenerateRequest(SamplingFields):
    """`POST /generate`: one prompt for one task."""

    task: str | None = Field(default=None, description="A task, task@v3, or the base model's id")
    prompt: str | TokenIds | None = Field(default=None, description="Text, or token ids")


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIFields(SamplingFields):
    """What OpenAI's requests for completions and chats have in common."""

    model: str | None = Field(default=None, description="A task, task@v3, or the base model's id")
    stream_options: StreamOptions | None = None


class CompletionRequest(OpenAIFields):
    """`POST /v1/completions`, as OpenAI defines it, with vLLM's extra fields."""

    prompt: str | list[str] | TokenIds | list[TokenIds] | None = None
    echo: bool | None = Field(default=None, description="Begin the answer with the prompt")
    logprobs: Int | None = Field(
        default=None, description="So many of the most probable tokens at each place; 0 for none"
    )

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt, as text or as token ids. Raises `InvalidParameter`."""
        given = self.prompt
        if not given:
            raise InvalidParameter("prompt: required, and not empty", param="prompt")
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [tuple(token for token in given if isinstance(token, int))]
        if len(given) > MAX_PROMPTS:
            raise InvalidParameter(
                f"prompt: expected at most {MAX_PROMPTS} prompts, got {len(given)}", param="prompt"
            )
        return [item if isinstance(item, str) else _tokens(item) for item in given]


def _tokens(item: int | TokenIds) -> tuple[int, ...]:
    assert isinstance(item, list), "pydantic let no mixed list through"
    return tuple(item)


class AliasRequest(Body):
    """`PUT .../aliases/{alias}`: where it points. `weight`: the canary's share, 0 if left out."""

    version: Annotated[int, Field(ge=1, lt=10**9)]
    weight: Annotated[float, Field(ge=0, le=1)] | None = None


class PinRequest(Body):
    """`POST .../pin`; without a TTL the pin stays until it is lifted or the server restarts."""

    ttl_seconds: Annotated[float, Field(gt=0, le=366 * 86_400)] | None = None


class WarmRequest(Body):
    """`POST .../warm`; the live version if none is named."""

    version: Annotated[int, Field(ge=1, lt=10**9)] | None = None
