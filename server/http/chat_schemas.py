"""The body of a chat, and its turns as a chat template reads them. Pure; called by `server.http.chat` and `/tokenize`.

Tools, images and audio are refused where they are asked for. `developer` is what OpenAI calls `system` since 2024;
templates know the older name.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, WithJsonSchema

from server.errors import InvalidParameter
from server.http.schemas import Body, Int, OpenAIFields
from server.http.tokenizing import Conversation

MAX_MESSAGES: Final = 1024
"""A template's work can grow with the square of them."""

_TEXT: Final = {"type": "string"}
_PART: Final = {"type": "object", "properties": {"type": {"const": "text"}, "text": _TEXT}}
_CONTENT: Final = {"anyOf": [_TEXT, {"type": "array", "items": _PART}, {"type": "null"}]}


class ChatTurn(Body):
    """One message. `content`: a text, or a list of text parts; only an assistant's may be null."""

    role: Literal["developer", "system", "user", "assistant"]
    # Any, because the faults of a union of a text and parts of texts are not fit to be read.
    content: Annotated[Any, WithJsonSchema(_CONTENT)] = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatRequest(OpenAIFields):
    """`POST /v1/chat/completions`, as OpenAI defines it, with vLLM's extra fields."""

    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Int | None = None

    def num_logprobs(self) -> int | None:
        """So many of the most probable tokens at each place; None: no probabilities at all. Raises `InvalidParameter`."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidParameter("top_logprobs: needs logprobs: true", param="top_logprobs")
        return None


def conversation_of(turns: list[ChatTurn], *, add_generation_prompt: bool = True) -> Conversation:
    """The turns as plain texts. Raises `InvalidParameter` that names the turn at fault."""
    messages = tuple(
        {"role": _role(turn.role), "content": _text(turn, f"messages.{number}")}
        for number, turn in enumerate(turns)
    )
    return Conversation(messages, add_generation_prompt)


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _text(turn: ChatTurn, where: str) -> str:
    if turn.tool_calls or turn.function_call is not None:
        raise InvalidParameter(
            f"{where}.tool_calls: tools are not supported by this server", param="messages"
        )
    content = turn.content
    if content is None and turn.role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidParameter(
            f"{where}.content: expected a string or a list of text parts", param="messages"
        )
    return "\n".join(_part(part, f"{where}.content.{i}") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise InvalidParameter(
                f"{where}.type: only parts of type 'text' are supported by this server",
                param="messages",
            )
    raise InvalidParameter(
        f"{where}: expected an object with type 'text' and a text", param="messages"
    )
