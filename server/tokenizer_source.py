"""The tokenizer that the configuration asks for. Called by `server.bootstrap` on the main thread at start."""

from __future__ import annotations

from pathlib import Path

from server.config import ServeConfig
from server.engine.tokenizer import Tokenizer
from server.errors import ConfigError, InvalidParameter


def load_tokenizer(config: ServeConfig, source: str | Path) -> Tokenizer:
    """Of a model directory or hub id. Raises `ConfigError` for a chat template that can not write a conversation."""
    if config.chat_template is None:
        return Tokenizer.load(source, revision=config.revision)
    try:
        template = config.chat_template.expanduser().read_text("utf-8")
        tokenizer = Tokenizer.load(source, revision=config.revision, chat_template=template)
        tokenizer.encode_chat([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except (OSError, UnicodeError, InvalidParameter) as error:
        raise ConfigError(f"--chat-template {config.chat_template}: {error}") from None
    return tokenizer
