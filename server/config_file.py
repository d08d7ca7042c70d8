"""The TOML file of settings, as a source for `server.config`. Runs on the main thread at start."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from server.errors import ConfigError


class TomlFile(PydanticBaseSettingsSource):
    """The settings of one TOML file; none without a path. Raises `ConfigError`."""

    def __init__(self, settings_cls: type[BaseSettings], path: str | Path | None) -> None:
        super().__init__(settings_cls)
        known = [name for name in settings_cls.model_fields if name != "config"]
        self._values = {} if path is None else read_toml(Path(path), known)

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 - pydantic's signature
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def read_toml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The settings in `path`, all of them among `known`. Raises `ConfigError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except ValueError as error:  # bad TOML, or bytes that are not UTF-8
        raise ConfigError(f"config file {path}: {error}") from None
    names = list(known)
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"config file {path}: unknown setting {key!r}.{hint}")
    return values
