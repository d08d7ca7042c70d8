"""The bodies that clients send, as pydantic models; nothing pydantic goes further down.

Null means absent everywhere: LangChain and vllm bench send nulls. Unknown fields are ignored, as OpenAI
does, but a field whose effect we know and do not offer is refused: an answer that silently lacks it (no
JSON schema applied, no log-probabilities) would be worse than an error. Ranges are checked once, by
`server.types.SamplingParams`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from server.errors import InvalidParameter

MAX_PROMPTS: Final = 64

# Bounds that no valid value reaches, so that arithmetic further down can not overflow.
_Int: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**64)]
_TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds: TypeAlias = list[_TokenId]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class SamplingFields(_Body):
    """The fields that become `SamplingParams`, by its names; None: the task's default, else ours."""

    max_tokens: _Int | None = None
    min_tokens: _Int | None = None
    temperature: float | None = None
    top_k: _Int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: _Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_TokenId] | None = None
    ignore_eos: bool | None = None
    n: _Int | None = None

    user: str | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = Field(
        default=None, description="Only requests with the same salt share cached prompts"
    )
    stream: bool | None = None
    return_token_ids: bool | None = None


class GenerateRequest(SamplingFields):
    """`POST /generate`: one prompt for one task."""

    task: str | None = Field(default=None, description="A task, task@v3, or the base model's id")
    prompt: str | TokenIds | None = Field(default=None, description="Text, or token ids")


class StreamOptions(_Body):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# Inline: a reference would point out of the body's schema in the OpenAPI document.
_INLINE: Final = WithJsonSchema(StreamOptions.model_json_schema())


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`, as OpenAI defines it, with vLLM's extra fields."""

    model: str | None = Field(default=None, description="A task, task@v3, or the base model's id")
    prompt: str | list[str] | TokenIds | list[TokenIds] | None = None
    stream_options: Annotated[StreamOptions | None, _INLINE] = None

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


class AliasRequest(_Body):
    """`PUT .../aliases/{alias}`: where it points. `weight`: the canary's share, 0 if left out."""

    version: Annotated[int, Field(ge=1, lt=10**9)]
    weight: Annotated[float, Field(ge=0, le=1)] | None = None


class PinRequest(_Body):
    """`POST .../pin`; without a TTL the pin stays until it is lifted or the server restarts."""

    ttl_seconds: Annotated[float, Field(gt=0, le=366 * 86_400)] | None = None


class WarmRequest(_Body):
    """`POST .../warm`; the live version if none is named."""

    version: Annotated[int, Field(ge=1, lt=10**9)] | None = None


# Field -> the values that ask for nothing. Compared with type, because 0 == False.
_NOT_OFFERED: Final[dict[str, tuple[Any, ...]]] = {
    "allowed_token_ids": ([],),
    "add_special_tokens": (True,),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprobs": (False,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Raises `InvalidParameter` for a field whose effect this server does not have."""
    for name, neutral in _NOT_OFFERED.items():
        value = body.get(name)
        if value is None or any(type(value) is type(v) and value == v for v in neutral):
            continue
        if name == "best_of" and value == body.get("n"):
            continue  # as many tries as answers: nothing to choose from
        raise InvalidParameter(f"{name}: not supported by this server; leave it out", param=name)
