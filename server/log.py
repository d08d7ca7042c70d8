"""Log records as text for people or JSON lines for machines, on stderr. Set up once, by `server.cli`.

Only chosen fields of a record are written: no prompt, no answer and no key is ever passed to a logger, and
a field that is not listed here does not get out.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final

_TEXT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_OF_A_REQUEST: Final = (
    "tenant", "key_id", "method", "route", "status", "seconds", "request_bytes", "response_bytes", "task", "version", "digest",
    "prompt_tokens", "output_tokens", "cached_tokens", "prefix_tier", "finish_reasons", "queue_seconds", "first_token_seconds",
)  # fmt: skip
_QUIET: Final = ("httpx2", "httpcore2", "filelock", "asyncio", "urllib3")


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, origin and message; of a request its id and, when it has ended, its figures."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", None)
        if request_id is not None:
            line["request_id"] = str(request_id)
        request = getattr(record, "request", {})
        line |= {name: request[name] for name in _OF_A_REQUEST if name in request}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging(level: str, format_name: str) -> None:
    """`format_name`: text, json, or auto: text on a terminal."""
    as_json = format_name == "json" or (format_name == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
