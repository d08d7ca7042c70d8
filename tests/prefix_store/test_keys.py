"""Keys as values: their texts, when they end, and which may be made at all."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from prefix_store.errors import InvalidTenantName, KeyNotIssued
from prefix_store.keys import (
    Key,
    KeyScope,
    KeyState,
    NewKey,
    check_issue,
    described_key,
    hash_of,
    id_in,
    is_key,
    new_text,
)

NOW = datetime(2026, 5, 1, tzinfo=UTC)
INFER = frozenset({KeyScope.INFER})


def a_key(**changes: object) -> Key:
    return replace(Key("0123abcd", hash_of("x"), "acme", INFER, NOW), **changes)  # type: ignore[arg-type] # whatever the test changes


def test_a_text_holds_its_id_and_256_random_bits() -> None:
    key_id, text = new_text()

    assert id_in(text) == key_id
    assert text.startswith(f"pfx_{key_id}_")
    assert len(text.removeprefix(f"pfx_{key_id}_")) == 43
    assert len({new_text()[1] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "text",
    ["", "pfx_", "pfx_0123abcd_", "pfx_0123abcd_" + "a" * 42, "pfx_0123ABCD_" + "a" * 43,
     "pfx_admin_" + "a" * 43, " pfx_0123abcd_" + "a" * 43, "pfx_0123abcd_" + "a" * 43 + "\n",
     "pfx_0123abcd_" + "é" * 43, "pfx_" + "0" * 10**6],
)  # fmt: skip
def test_what_is_no_text_of_ours_has_no_id(text: str) -> None:
    assert id_in(text) is None


def test_only_the_same_text_is_the_key() -> None:
    _, text = new_text()

    assert is_key(hash_of(text), hash_of(text))
    assert not is_key(hash_of(text + "x"), hash_of(text))


def test_a_key_ends_at_its_time_and_not_before() -> None:
    key = a_key(expires_at=NOW + timedelta(seconds=10))

    assert key.state(NOW + timedelta(seconds=9.999)) is KeyState.ACTIVE
    assert key.state(NOW + timedelta(seconds=10)) is KeyState.EXPIRED
    assert a_key().state(NOW + timedelta(days=36_500)) is KeyState.ACTIVE


def test_a_revoked_key_is_revoked_also_when_its_time_is_over() -> None:
    key = a_key(expires_at=NOW, revoked_at=NOW)

    assert key.state(NOW + timedelta(days=1)) is KeyState.REVOKED


@pytest.mark.parametrize("tenant", ["Acme", "a~b", "a/b", "-a", "a" * 32, "a.b", "a_b", " "])
def test_a_tenant_has_a_plain_name(tenant: str) -> None:
    with pytest.raises(InvalidTenantName):
        check_issue(tenant, INFER, "")


@pytest.mark.parametrize(
    ("tenant", "scopes", "note", "word"),
    [
        ("acme", frozenset[KeyScope](), "", "scopes"),
        ("acme", frozenset(KeyScope), "", "metrics"),
        ("acme", INFER, "x" * 201, "note"),
        ("acme", INFER, "a\nb", "note"),
    ],
)
def test_a_key_that_no_rule_allows_is_not_made(
    tenant: str, scopes: frozenset[KeyScope], note: str, word: str
) -> None:
    with pytest.raises(KeyNotIssued, match=word):
        check_issue(tenant, scopes, note)


def test_only_the_operators_keys_may_read_metrics() -> None:
    check_issue("", frozenset(KeyScope), "Prometheus")
    check_issue("acme", frozenset({KeyScope.INFER, KeyScope.ADMIN}), "")


def test_neither_what_is_shown_nor_what_is_printed_opens_anything() -> None:
    key_id, text = new_text()
    key = a_key(id=key_id, sha256=hash_of(text))

    shown = str(described_key(key)) + repr(NewKey(key, text))
    assert text not in shown
    assert hash_of(text) not in shown
    assert key_id in shown
