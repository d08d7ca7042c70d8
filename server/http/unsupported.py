"""Fields whose effect we know and do not offer: refused, because an answer that silently lacks it would be worse.

Pure; called by the generation routes on the body as it came, before it is validated. Fields that nobody knows
are ignored, as OpenAI does. What is refused is a 400: OpenAI's client repeats a 501.
"""

from __future__ import annotations

from typing import Any, Final

from server.errors import InvalidParameter

# Field -> the values that ask for nothing. Compared with type, because 0 == False.
_NOT_OFFERED: Final[dict[str, tuple[Any, ...]]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

NOT_IN_COMPLETIONS: Final[dict[str, tuple[Any, ...]]] = {
    "top_logprobs": (0,),
}

NOT_IN_CHAT: Final[dict[str, tuple[Any, ...]]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    # A template is a program: only the operator's runs.
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}

NOT_IN_GENERATE: Final[dict[str, tuple[Any, ...]]] = NOT_IN_COMPLETIONS | {
    "echo": (False,),
    "logprobs": (False,),
}


def refuse_unsupported(body: dict[str, Any], more: dict[str, tuple[Any, ...]]) -> None:
    """Raises `InvalidParameter` for a field whose effect this server, or this route (`more`), does not have."""
    for name, neutral in (_NOT_OFFERED | more).items():
        value = body.get(name)
        if value is None or any(type(value) is type(v) and value == v for v in neutral):
            continue
        if name == "best_of" and value == body.get("n"):
            continue  # as many tries as answers: nothing to choose from
        raise InvalidParameter(f"{name}: not supported by this server; leave it out", param=name)
