"""`prefixd keys`: makes, lists, rotates and revokes API keys in a store, beside a running server or without one.

Runs on the main thread. A running server finds what changed within a second. Over the network there is the admin API.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import App, Parameter

from prefix_store.key_store import DEFAULT_OVERLAP_SECONDS, KeyStore
from prefix_store.keys import Key, KeyScope
from prefix_store.spec import OPERATOR, check_tenant_name
from server.cli_report import show_note
from server.config import ServeConfig
from server.errors import PrefixdError

keys_app = App(name="keys", help="Make, list, rotate and revoke the API keys of a store.")

Store: TypeAlias = Annotated[Path | None, Parameter(help="The store; as in serve if left out")]
KeyId: TypeAlias = Annotated[str, Parameter(help="As list shows it")]

_HOUR_SECONDS = 3600.0
_DAY_SECONDS = 86_400.0


class NoSuchStore(PrefixdError):
    """There are no keys where they were looked for."""


class NotTheOwner(PrefixdError):
    """What is written here, the server could not read."""


@keys_app.command
def create(
    *,
    tenant: Annotated[str | None, Parameter(help="Whose it is; the operator's if left out")] = None,
    scope: Annotated[
        tuple[KeyScope, ...], Parameter(negative=(), help="What it opens; repeat for several")
    ] = (KeyScope.INFER,),
    expires_days: Annotated[float | None, Parameter(help="Never if left out")] = None,
    note: Annotated[str, Parameter(help="What it is for")] = "",
    store: Store = None,
) -> str:
    """Make a key and print it: this once."""
    if tenant is not None:
        check_tenant_name(tenant)  # of an empty variable in a script too: it is not the operator
    seconds = None if expires_days is None else expires_days * _DAY_SECONDS
    new = _keys(store, make=True).create(
        tenant or OPERATOR, frozenset(scope), expires_in_seconds=seconds, note=note
    )
    show_note(f"key {_line(new.key)}; its text is not shown again")
    return new.text


@keys_app.command(name="list")
def list_keys(
    *,
    tenant: Annotated[str | None, Parameter(help="Only the keys of one")] = None,
    store: Store = None,
) -> str:
    """List the keys; nothing in the list opens anything."""
    found = _keys(store).listed(tenant)
    return "\n".join(_line(key) for key in found) or "no keys"


@keys_app.command
def rotate(
    key_id: KeyId,
    *,
    overlap_hours: Annotated[
        float, Parameter(help="How long the old key goes on to work")
    ] = DEFAULT_OVERLAP_SECONDS / _HOUR_SECONDS,
    store: Store = None,
) -> str:
    """Make the key that takes the place of another, and print it: this once."""
    keys = _keys(store)
    new = keys.rotate(key_id, overlap_seconds=overlap_hours * _HOUR_SECONDS)
    old = keys.find(key_id)
    assert old is not None, "it was rotated"
    show_note(f"key {_line(new.key)}; its text is not shown again")
    show_note(f"key {_line(old)}")
    return new.text


@keys_app.command
def revoke(key_id: KeyId, *, store: Store = None) -> str:
    """End a key: the next request with it is refused."""
    return _line(_keys(store).revoke(key_id))


def _keys(store: Path | None, *, make: bool = False) -> KeyStore:
    place = ServeConfig().store_dir if store is None else store.expanduser()
    directory = place / "keys"
    if not make and not directory.is_dir():
        raise NoSuchStore(f"{place}: no key was made in this store")
    if place.is_dir() and place.stat().st_uid != os.geteuid():
        # A server that can not read a record would go on to let in the key that it revokes.
        raise NotTheOwner(f"{place}: run this as the user who owns it, as the server does")
    return KeyStore(directory)


def _line(key: Key) -> str:
    owner = key.tenant or "the operator"
    state = key.state(datetime.now(UTC))
    ends = "" if key.expires_at is None else f", expires {_minute(key.expires_at)}"
    after = "" if key.replaced_by is None else f", replaced by {key.replaced_by}"
    note = f"  {key.note}" if key.note else ""
    return (
        f"{key.id}  {owner:<16}  {','.join(sorted(key.scopes)):<19}  {state}, "
        f"made {_minute(key.created_at)}{ends}{after}{note}"
    )


def _minute(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
