"""`prefixd keys` beside a store, and `prefixd tasks grant` against a server."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from prefix_store.key_store import KeyStore
from prefix_store.keys import KeyScope, KeyState, hash_of
from server.cli import main
from server.config import ServeConfig, check_exposure
from server.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `prefixd keys` in this process, on a store that is not there yet: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PREFIXD_STORE", str(tmp_path / "store"))

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["keys", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return call


def made(answer: tuple[int, str, str]) -> tuple[str, str]:
    """The key that was printed, alone on the standard output, and its id."""
    code, out, err = answer
    assert code == 0, err
    match = re.fullmatch(r"(pfx_([0-9a-f]{8})_[A-Za-z0-9_-]{43})\n", out)
    assert match is not None, out
    assert match[1] not in err
    return match[1], match[2]


def test_a_key_is_made_listed_rotated_and_revoked(run: Run, tmp_path: Path) -> None:
    scopes = ("--scope", "infer", "--scope", "admin")
    text, key_id = made(
        run("create", "--tenant", "acme", *scopes, "--expires-days", 30, "--note", "CI")
    )
    new_text, new_id = made(run("rotate", key_id, "--overlap-hours", 1))
    code, out, _ = run("revoke", key_id)
    assert (code, f"{key_id}  acme" in out, "revoked" in out) == (0, True, True)

    code, out, _ = run("list")
    lines = out.splitlines()
    assert code == 0
    assert [line[:8] for line in lines] == [key_id, new_id]
    assert f"replaced by {new_id}" in lines[0]
    assert all(word in lines[1] for word in ("acme", "admin,infer", "active", "expires", "CI"))
    assert text not in out
    assert new_text not in out
    found = KeyStore(tmp_path / "store" / "keys").find(new_id)
    assert found is not None
    assert (found.sha256, found.scopes) == (
        hash_of(new_text),
        frozenset({KeyScope.INFER, KeyScope.ADMIN}),
    )


def test_by_default_a_key_infers_for_the_operator_and_does_not_end(
    run: Run, tmp_path: Path
) -> None:
    _, key_id = made(run("create"))

    key = KeyStore(tmp_path / "store" / "keys").find(key_id)
    assert key is not None
    assert (key.tenant, key.scopes, key.expires_at) == ("", frozenset({KeyScope.INFER}), None)
    assert "the operator" in run("list")[1]
    assert run("list", "--tenant", "acme")[1] == "no keys\n"


def test_a_server_that_runs_finds_what_the_command_did(run: Run, tmp_path: Path) -> None:
    server = KeyStore(tmp_path / "store" / "keys")
    _, key_id = made(run("create", "--tenant", "acme"))
    run("revoke", key_id)

    server._looked_at -= 1  # a second later
    server.refresh()
    key = server.find(key_id)
    assert key is not None
    assert key.revoked_at is not None
    assert key.state(key.revoked_at) is KeyState.REVOKED


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("list",), 1, "no key was made"),
        (("revoke", "00000000"), 1, "no key was made"),
        (("create", "--tenant", "No"), 1, "tenant name"),
        (("create", "--tenant", ""), 1, "tenant name"),
        (("create", "--tenant", "acme", "--scope", "metrics"), 1, "metrics"),
        (("create", "--scope", "root"), 2, "root"),
        (("create", "--expires-days", "-1"), 1, "seconds"),
    ],
)
def test_a_wrong_call_is_explained_and_makes_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, word: str
) -> None:
    found, out, err = run(*arguments)

    assert found == code
    assert word in out + err
    assert not KeyStore.has_keys(tmp_path / "store" / "keys")


def test_only_the_owner_of_the_store_changes_its_keys(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root's records would be unreadable for a server that is not: a revocation would not be seen."""
    _, key_id = made(run("create"))
    owner = os.geteuid()

    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    for call in (("create",), ("revoke", key_id), ("rotate", key_id)):
        code, _, err = run(*call)
        assert code == 1
        assert "the user who owns it" in err


def test_with_keys_of_tenants_no_api_key_is_needed_on_the_network() -> None:
    open_to_all = ServeConfig(host="0.0.0.0", admin_key="x" * 8)

    check_exposure(open_to_all, keys_made=True)
    with pytest.raises(ConfigError, match="PREFIXD_API_KEY"):
        check_exposure(open_to_all)
    with pytest.raises(ConfigError, match="PREFIXD_ADMIN_KEY"):
        check_exposure(ServeConfig(host="0.0.0.0"), keys_made=True)
