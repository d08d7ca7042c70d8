"""The server as a load generator sees it: its base, its tasks, its counters. Main thread, before and after the runs.

The counters may be read from a worker thread while a run goes on: a client of httpx2 may be used by several.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from loadtest.errors import BadLoad, LoadTestError
from loadtest.wire import Origin

if TYPE_CHECKING:
    import httpx2

_TIMEOUT_SECONDS: Final = 300.0  # an upload is proved and made durable before it is answered
_SERIES: Final = re.compile(r"(prefixd_\w+)(?:\{([^}]*)\})? ([0-9.eE+-]+)")
_COUNTERS: Final = (
    "prefixd_prefix_cache_lookups_total",
    "prefixd_prefix_cache_evictions_total",
    "prefixd_prefix_load_failures_total",
    "prefixd_preemptions_total",
    "prefixd_admission_rejections_total",
)


@dataclass(frozen=True, slots=True)
class ServedTask:
    """A name that requests can say. `max_model_len`: tokens of prompt and answer that fit behind its prefix."""

    name: str
    max_model_len: int
    num_virtual_tokens: int


@dataclass(frozen=True, slots=True)
class Served:
    """`tasks` by name; `base` is the bare model, which is no task."""

    base: ServedTask
    tasks: tuple[ServedTask, ...]
    vocab_size: int
    version: str


class ServerView:
    """A context manager. A key is None if nobody gave it."""

    def __init__(
        self,
        origin: Origin,
        api_key: str | None,
        admin_key: str | None,
        client: httpx2.Client | None = None,
    ) -> None:
        """`client`: who asks instead of a client of its own, which knows no proxy."""
        self.origin = origin
        self._given = client
        self._api_key = api_key or admin_key  # the admin key opens inference too
        self._admin_key = admin_key

    def __enter__(self) -> Self:
        import httpx2

        self._client = self._given or httpx2.Client(timeout=_TIMEOUT_SECONDS, trust_env=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    @property
    def infer_headers(self) -> dict[str, str]:
        """What a request for tokens carries."""
        return _bearer(self._api_key)

    def look(self) -> Served:
        """What can be asked for. Raises `LoadTestError`."""
        listing = self._expect("GET", "/v1/models", self.infer_headers).json()
        version = str(self._expect("GET", "/healthz", {}).json().get("version", ""))
        try:
            base, *tasks = listing["data"]
            vocab_size = int(base["prefixd"]["vocab_size"])
            return Served(_task(base), tuple(_task(task) for task in tasks), vocab_size, version)
        except (ValueError, KeyError, TypeError):
            raise LoadTestError(
                f"{self.origin.url}: expected the model list of this prefixd or a newer one, got {str(listing)[:200]}"
            ) from None

    def admin(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        """A call under `/admin/v1`, whatever is answered. Raises `LoadTestError` if nothing is, or without a key."""
        if self._admin_key is None:
            raise BadLoad("no admin key: pass --admin-key or set PREFIXD_ADMIN_KEY")
        headers = _bearer(self._admin_key) | arguments.pop("headers", {})
        return self._ask(method, f"/admin/v1{path}", headers, **arguments)

    def base(self) -> dict[str, Any]:
        """`GET /admin/v1/base`. Raises `LoadTestError`."""
        answer: dict[str, Any] = self._checked(self.admin("GET", "/base")).json()
        return answer

    def metrics_text(self) -> str | None:
        """The exposition; None where it is not given to us, which must not end a run."""
        try:
            response = self._ask("GET", "/metrics", self.infer_headers)
        except LoadTestError:
            return None
        return response.text if response.status_code == 200 else None

    def _expect(self, method: str, path: str, headers: dict[str, str]) -> httpx2.Response:
        return self._checked(self._ask(method, path, headers))

    def _checked(self, response: httpx2.Response) -> httpx2.Response:
        if response.status_code == 200:
            return response
        if response.status_code == 401:
            raise LoadTestError(
                f"{response.url}: the server wants another key: --api-key or PREFIXD_API_KEY, "
                "for its admin API --admin-key or PREFIXD_ADMIN_KEY"
            )
        raise LoadTestError(
            f"{response.url}: expected 200, got {response.status_code} {response.text[:200]}; is it a prefixd server?"
        )

    def _ask(
        self, method: str, path: str, headers: dict[str, str], **arguments: Any
    ) -> httpx2.Response:
        import httpx2

        try:
            return self._client.request(
                method, self.origin.url + path, headers=headers, **arguments
            )
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise LoadTestError(
                f"can not reach {self.origin.url}: {error}; is the server running?"
            ) from None


def counters(text: str | None) -> dict[str, float] | None:
    """The counters of prefix cache and admission in an exposition, by series."""
    if text is None:
        return None
    return {
        f"{name.removeprefix('prefixd_')}{{{labels}}}"
        if labels
        else name.removeprefix("prefixd_"): float(value)
        for name, labels, value in _SERIES.findall(text)
        if name in _COUNTERS
    }


def difference(before: str | None, after: str | None) -> dict[str, float] | None:
    """How far each counter went between two expositions; None without both."""
    first, last = counters(before), counters(after)
    if first is None or last is None:
        return None
    return {name: value - first.get(name, 0.0) for name, value in sorted(last.items())}


def _task(card: dict[str, Any]) -> ServedTask:
    return ServedTask(
        str(card["id"]),
        int(card["max_model_len"]),
        int(card["prefixd"].get("num_virtual_tokens", 0)),
    )


def _bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}
