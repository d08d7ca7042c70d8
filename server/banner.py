"""What a person reads once the server is up: what is served, what fits, where to look, what to try.

Called by `server.cli` on the main thread.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Final

import demo
from prefix_store import PrefixVersion
from prefix_store.key_store import KeyStore
from server import __version__
from server.bootstrap import Application, ServingEngine
from server.kvcache.pool_plan import PoolPlan

_SHOWN_PREFIX_LEN: Final = 32  # virtual tokens of an ordinary prefix


def start_up_summary(application: Application, url: str) -> str:
    """The banner; `url` is where the server listens."""
    serving = application.serving
    model, pool, config = serving.model, serving.pool, serving.config
    live = [info.live for info in serving.store.tasks() if info.live]
    rows = [
        (
            "model",
            f"{model.model_id} ({model.model_type}), weights {_megabytes(model.weight_bytes)}",
        ),
        ("device", f"{model.device}, {model.layout.dtype}"),
        *_memory(pool),
        ("tasks", _tasks(live, serving)),
        ("prefixes", _residency(live, serving)),
        ("API", f"{url}/generate  {url}/v1/completions  {url}/openapi.json"),
        ("health", f"{url}/healthz  {url}/readyz  {url}/metrics"),
        ("store", str(config.store_dir)),
        ("admin key", _admin_key(serving)),
        ("inference", "asks for a key" if _asks_for_key(application) else "open, without a key"),
        ("loaded in", f"{application.start_seconds:.1f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    first = first_request(serving, url, with_key=_asks_for_key(application))
    return "\n".join([f"prefixd {__version__}", *lines, "", "Try:", first])


def _memory(pool: PoolPlan) -> list[tuple[str, str]]:
    """Where the memory goes, a term a line, and what the rest of it comes to."""
    lines = [] if pool.account is None else pool.account.lines()
    names = ["memory"] + [""] * (len(lines) - 1)
    return [
        *zip(names, lines, strict=False),
        (
            "KV blocks",
            f"{pool.usable_blocks} of {pool.block_size} tokens, {_megabytes(pool.pool_bytes)} -> "
            f"{pool.num_tokens} tokens -> fits {pool.num_full_requests()} requests of {pool.max_model_len} tokens, "
            f"or {pool.num_prefixes(_SHOWN_PREFIX_LEN)} prefixes of {_SHOWN_PREFIX_LEN}",
        ),
    ]


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _tasks(live: Sequence[PrefixVersion], serving: ServingEngine) -> str:
    broken = serving.store.num_broken_tasks
    damage = f"; {broken} with a damaged version log" if broken else ""
    if not live:
        return f"none yet; upload one: prefixd tasks push FILE --task NAME{damage}"
    names = ", ".join(v.task for v in live[:6]) + (", ..." if len(live) > 6 else "")
    ours = (None, serving.base.fingerprint)
    foreign = sum(v.manifest.base_model.fingerprint not in ours for v in live)
    other_base = f"; {foreign} made for another base" if foreign else ""
    return f"{len(live)} ({names}){other_base}{damage}"


def _residency(live: Sequence[PrefixVersion], serving: ServingEngine) -> str:
    """What is on the device from the start, and how many prefixes of this size it could hold."""
    resident = len(live) if serving.is_demo else len(serving.config.pin)
    blocks = [-(-v.manifest.num_virtual_tokens // serving.pool.block_size) for v in live]
    room = serving.pool.usable_blocks * len(blocks) // sum(blocks) if blocks else 0
    others = ", the rest on first use" if resident < len(live) else ""
    return f"{resident} resident at start{others}" + (
        f"; the KV blocks could hold about {room} of their size" if blocks else ""
    )


def _admin_key(serving: ServingEngine) -> str:
    """Shown only when it was made for this run: nobody could know it otherwise."""
    key = serving.config.admin_key
    if key is not None and serving.config.origins.get("admin_key") == "generated at start":
        return f"{key.get_secret_value()}  (made for this run; set PREFIXD_ADMIN_KEY for your own)"
    return "as configured"


def _asks_for_key(application: Application) -> bool:
    """Whether inference is for those alone who have a key."""
    made = KeyStore.has_keys(application.serving.config.store_dir / "keys")
    return made or application.serving.config.api_key is not None


def first_request(serving: ServingEngine, url: str, *, with_key: bool) -> str:
    """A `curl` command that works as it stands, but for the key, if one is needed."""
    samples = demo.load_samples() if serving.is_demo else []
    tasks = serving.store.tasks()
    name = samples[0].task if samples else tasks[0].name if tasks else serving.model.model_id
    prompt = samples[0].prompt if samples else "Once upon a time"
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 64, "temperature": 0})
    key = "-H 'Authorization: Bearer $PREFIXD_API_KEY' " if with_key else ""
    header = "-H 'Content-Type: application/json' "
    return (
        f"  curl {url}/v1/completions {key.replace(chr(39), chr(34))}{header}-d {shlex.quote(body)}"
    )
