"""Settings: where they come from, which of them wins, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from server.config import ServeConfig, check_exposure, is_loopback
from server.errors import ConfigError

KEY = "a-long-enough-key"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "prefixd.toml"
    path.write_text('port = 1\nmax_num_seqs = 1\nblock_size = 1\npin = ["a", "b"]\n')
    return path


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXD_MAX_NUM_SEQS", "2")
    monkeypatch.setenv("PREFIXD_PORT", "2")

    config = ServeConfig(config=toml, port=3)

    assert (config.port, config.max_num_seqs, config.block_size) == (3, 2, 1)
    assert config.max_num_queued == 1024
    assert config.origins == {
        "config": "flag --config",
        "port": "flag --port",
        "max_num_seqs": "variable PREFIXD_MAX_NUM_SEQS",
        "block_size": f"file {toml}",
        "pin": f"file {toml}",
    }


def test_the_file_can_be_named_by_a_variable(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_CONFIG", str(toml))

    assert ServeConfig().pin == ("a", "b")


def test_every_setting_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "model": "m", "served_model_name": "house", "chat_template": "chat.jinja", "revision": "r", "dtype": "float32", "device": "cuda:1", "attention": "sdpa", "cuda_graphs": "false", "overlap": "false",
        "compile": "true", "num_threads": "2", "seed": "3", "host": "::1", "port": "4", "admin_key": KEY,
        "api_key": KEY, "insecure": "true", "max_body_bytes": "2MiB", "store": "/s",
        "host_cache_bytes": "3GiB", "max_num_virtual_tokens": "5", "pin": "a, b", "pin_budget": "0.2",
        "max_num_seqs": "6", "max_num_batched_tokens": "7", "max_num_queued": "8",
        "max_model_len": "9", "block_size": "10", "prompt_cache": "false", "kv_cache_bytes": "1GiB", "num_kv_blocks": "11",
        "gpu_memory_utilization": "0.5", "max_num_queued_tokens": "13", "max_request_seconds": "14", "drain_seconds": "15",
        "hang_seconds": "16", "log_level": "debug", "log_format": "json", "metrics_max_tasks": "12",
    }  # fmt: skip
    for name, text in values.items():
        monkeypatch.setenv(f"PREFIXD_{name.upper()}", text)

    config = ServeConfig()

    assert set(values) == ServeConfig.model_fields.keys() - {"config"}
    assert config.origins.keys() == values.keys()
    assert (config.pin, config.kv_cache_bytes, config.insecure) == (("a", "b"), 2**30, True)


def test_an_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files write `PREFIXD_API_KEY=` for a key that is not set; it must not become one."""
    for name in ("API_KEY", "PORT", "CONFIG"):
        monkeypatch.setenv(f"PREFIXD_{name}", "")

    config = ServeConfig()

    assert (config.api_key, config.port, config.origins) == (None, 8000, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown setting 'prot'. Did you mean port?"),
        ("max-num-seqs = 1", "Did you mean max_num_seqs?"),
        ("config = 'x'", "unknown setting 'config'"),
        ("[server]\nport = 1", "unknown setting 'server'"),
        ("port = ", "Invalid value"),
        ("port = 'x'", "--port / PREFIXD_PORT"),
    ],
)
def test_a_bad_file_is_refused_with_a_hint(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=re.escape(message)):
        ServeConfig(config=path)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ServeConfig(config="/nowhere/c.toml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("port", "x"),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("max_num_seqs", 0),
        ("kv_cache_bytes", "many"),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("pin", "Bad Name"),
        ("log_level", "loud"),
        ("host", ""),
    ],
)
def test_a_bad_value_is_named_as_flag_and_as_variable(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(**{name: value})

    assert str(caught.value).startswith(f"--{name.replace('_', '-')} / PREFIXD_{name.upper()}: ")


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(port=-1, block_size=0)

    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("key", ["short", "with a space in it", "héhéhéhéhé", "tab\tinside-it"])
def test_an_unusable_key_is_refused_and_never_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(admin_key=key)

    assert key not in str(caught.value)


def test_a_port_from_kubernetes_service_links_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_PORT", "tcp://10.0.0.1:8000")

    with pytest.raises(ConfigError, match="enableServiceLinks"):
        ServeConfig()


def test_secrets_do_not_show_in_the_representation() -> None:
    assert KEY not in repr(ServeConfig(admin_key=KEY, api_key=KEY))


def test_a_configuration_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ServeConfig().port = 1  # type: ignore[misc]


def test_an_admin_key_is_made_only_when_none_is_set() -> None:
    given = ServeConfig(admin_key=KEY)
    first, second = (ServeConfig().with_generated_admin_key() for _ in range(2))

    assert given.with_generated_admin_key() is given
    assert isinstance(first.admin_key, SecretStr)
    assert len(first.admin_key.get_secret_value()) > 40
    assert first.admin_key != second.admin_key
    assert first.origins["admin_key"] == "generated at start"


def test_each_model_has_a_store_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)

    models = [None, "org/a", "org/b", "m"]
    folders = {ServeConfig(model=model).store_dir for model in models}

    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "prefixd"}
    assert ServeConfig(model=str(tmp_path / "m")).store_dir == ServeConfig(model="m").store_dir
    assert ServeConfig(store="/x", model="org/a").store_dir == Path("/x")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    check_exposure(ServeConfig(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.evil"])
def test_the_network_needs_both_keys_or_a_decision(host: str) -> None:
    for keys in ({}, {"admin_key": KEY}, {"api_key": KEY}):
        with pytest.raises(ConfigError, match="--insecure"):
            check_exposure(ServeConfig(host=host, **keys))

    check_exposure(ServeConfig(host=host, admin_key=KEY, api_key=KEY))
    check_exposure(ServeConfig(host=host, insecure=True))
