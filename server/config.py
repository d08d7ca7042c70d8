"""Every setting of the server, in one frozen class; the only file that reads the environment.

Each field of `ServeConfig` is a flag (`--max-num-seqs`), a variable (`PREFIXD_MAX_NUM_SEQS`) and a key of
the TOML file that `--config` or `PREFIXD_CONFIG` names; the earlier of these three wins. Built once by
`server.cli` on the main thread, then read by `server.bootstrap`, which hands out single values. The floor
below knows nothing of it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import secrets
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from cyclopts import Group, Parameter
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from prefix_store.errors import InvalidTaskName
from prefix_store.spec import check_task_name
from server.config_errors import describe
from server.config_file import TomlFile, read_toml
from server.errors import ConfigError

ENV_PREFIX: Final = "PREFIXD_"
MIN_KEY_LENGTH: Final = 8
_SECRETS: Final = frozenset({"admin_key", "api_key"})

_MODEL: Final = Group.create_ordered("Model")
_NETWORK: Final = Group.create_ordered("Network and access")
_STORE: Final = Group.create_ordered("Store and prefixes")
_ENGINE: Final = Group.create_ordered("Engine and memory")
_LOGS: Final = Group.create_ordered("Logs and metrics")


def _split_commas(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _task_name(value: str) -> str:
    try:
        return check_task_name(value)
    except InvalidTaskName as error:
        raise ValueError(str(error)) from None


def _usable_key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if len(text) < MIN_KEY_LENGTH or not all("!" <= char <= "~" for char in text):
        raise ValueError(f"expected {MIN_KEY_LENGTH} or more printable ASCII characters, no spaces")
    return value


def _human(value: ByteSize) -> str:
    return value.human_readable()


_Key: TypeAlias = Annotated[SecretStr, AfterValidator(_usable_key)]
_Bytes: TypeAlias = Annotated[ByteSize, Parameter(metavar="BYTES", show_default=_human)]
_TaskNames: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_task_name)], ...],
    NoDecode,
    BeforeValidator(_split_commas),
    Parameter(group=_STORE, negative=(), metavar="TASK", show_default=False),
]


@Parameter(name="*")
class ServeConfig(BaseSettings):
    """The settings of `prefixd serve`. Raises `ConfigError`, never pydantic's error."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,  # compose files write VAR= for "not set"; it must not become a key
        allow_inf_nan=False,
    )

    config: Annotated[Path | None, Parameter(group=_NETWORK)] = Field(
        default=None, description="TOML file with any of these settings"
    )

    model: Annotated[str | None, Parameter(group=_MODEL)] = Field(
        default=None, description="Hugging Face id or folder; the bundled demo model if left out"
    )
    served_model_name: Annotated[str | None, Parameter(group=_MODEL)] = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$",
        description="The base model's id in the API; its hub id or folder name if left out",
    )
    chat_template: Annotated[Path | None, Parameter(group=_MODEL)] = Field(
        default=None, description="Jinja file that conversations are written in; the model's own"
    )
    revision: Annotated[str | None, Parameter(group=_MODEL)] = Field(
        default=None, description="Branch, tag or commit of the model"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Parameter(group=_MODEL)] = (
        Field(default="auto", description="Number format of weights and KV cache")
    )
    device: Annotated[str, Parameter(group=_MODEL)] = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,2})?)$",
        description="auto, cpu, cuda or cuda:N",
    )
    attention: Annotated[str, Parameter(group=_MODEL)] = Field(
        default="auto", description="Attention backend; auto takes the fastest that runs here"
    )
    cuda_graphs: Annotated[bool, Parameter(group=_MODEL)] = Field(
        default=True,
        description="On a GPU, record decode steps at start and replay them; without it steps take longer",
    )
    overlap: Annotated[bool, Parameter(group=_MODEL)] = Field(
        default=True,
        description="On a GPU, plan and launch a step while the one before runs; without it the GPU waits in between",
    )
    compile: Annotated[bool, Parameter(group=_MODEL, negative=(), show_default=False)] = Field(
        default=False, description="Compile the model's layers at start; on a CPU needs g++"
    )
    num_threads: Annotated[int | None, Parameter(group=_MODEL)] = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads for the model; torch's choice if left out",
    )
    seed: Annotated[int | None, Parameter(group=_MODEL)] = Field(
        default=None, ge=0, lt=2**63, description="Makes requests without a seed repeatable too"
    )

    host: Annotated[str, Parameter(group=_NETWORK)] = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on"
    )
    port: Annotated[int, Parameter(group=_NETWORK)] = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one"
    )
    admin_key: Annotated[_Key | None, Parameter(group=_NETWORK, metavar="KEY")] = Field(
        default=None, description="Bearer key of /admin; made at start and printed if left out"
    )
    api_key: Annotated[_Key | None, Parameter(group=_NETWORK, metavar="KEY")] = Field(
        default=None, description="Bearer key of inference; inference is open if left out"
    )
    insecure: Annotated[bool, Parameter(group=_NETWORK, negative=(), show_default=False)] = Field(
        default=False, description="Allow an address other than loopback without both keys"
    )
    max_body_bytes: Annotated[_Bytes, Parameter(group=_NETWORK)] = Field(
        default=ByteSize(2**20), ge=1024, le=2**26, description="Largest JSON body"
    )
    max_request_seconds: Annotated[float, Parameter(group=_NETWORK)] = Field(
        default=3600, gt=0, le=10**6, description="Longest that a request may take, from arrival on"
    )
    drain_seconds: Annotated[float, Parameter(group=_NETWORK)] = Field(
        default=30, ge=0, le=3600, description="What running requests get to finish after SIGTERM"
    )

    store: Annotated[Path | None, Parameter(group=_STORE)] = Field(
        default=None, description="Folder of the prefix store; per user and model if left out"
    )
    host_cache_bytes: Annotated[_Bytes, Parameter(group=_STORE)] = Field(
        default=ByteSize(2**30), ge=0, description="Host memory for prefixes that left the device"
    )
    max_num_virtual_tokens: Annotated[int, Parameter(group=_STORE)] = Field(
        default=4096, ge=1, le=1_000_000, description="Longest prefix that may be uploaded"
    )
    pin: _TaskNames = Field(default=(), description="Tasks kept resident; repeat, or use commas")
    pin_budget: Annotated[float, Parameter(group=_STORE)] = Field(
        default=0.5, ge=0, le=1, description="Share of the KV blocks that pinned tasks may take"
    )

    max_num_seqs: Annotated[int, Parameter(group=_ENGINE)] = Field(
        default=64, ge=1, le=4096, description="Sequences that decode together"
    )
    max_num_batched_tokens: Annotated[int, Parameter(group=_ENGINE)] = Field(
        default=512, ge=1, le=2**20, description="Tokens of one step; long prompts are cut to it"
    )
    max_num_queued: Annotated[int, Parameter(group=_ENGINE)] = Field(
        default=1024, ge=1, le=2**20, description="Waiting sequences before requests are refused"
    )
    max_num_queued_tokens: Annotated[int, Parameter(group=_ENGINE)] = Field(
        default=2**20,
        ge=1,
        le=2**30,
        description="Prompt tokens before their first answer, likewise",
    )
    hang_seconds: Annotated[float, Parameter(group=_ENGINE)] = Field(
        default=300,
        gt=0,
        le=86_400,
        description="A longer step is a hang: the process ends with code 75",
    )
    max_model_len: Annotated[int | None, Parameter(group=_ENGINE)] = Field(
        default=None,
        ge=1,
        description="Longest prefix + prompt + output; the model's limit if left out",
    )
    block_size: Annotated[int, Parameter(group=_ENGINE)] = Field(
        default=16, ge=1, le=1024, description="Tokens per KV block"
    )
    gpu_memory_utilization: Annotated[float, Parameter(group=_ENGINE)] = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the GPU's memory for weights, steps and KV pool; not on a CPU",
    )
    prompt_cache: Annotated[bool, Parameter(group=_ENGINE)] = Field(
        default=True, description="Compute the same beginning of prompts once, while there is room"
    )
    kv_cache_bytes: Annotated[ByteSize | None, Parameter(group=_ENGINE, metavar="BYTES")] = Field(
        default=None, ge=1, description="Memory for the KV pool (2GiB); measured if left out"
    )
    num_kv_blocks: Annotated[int | None, Parameter(group=_ENGINE)] = Field(
        default=None, ge=2, description="Blocks of the KV pool, instead of --kv-cache-bytes"
    )

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(group=_LOGS)] = (
        Field(default="info", description="Least severe record to print")
    )
    log_format: Annotated[Literal["auto", "text", "json"], Parameter(group=_LOGS)] = Field(
        default="auto", description="auto: text on a terminal, JSON lines elsewhere"
    )
    metrics_max_tasks: Annotated[int, Parameter(group=_LOGS)] = Field(
        default=200,
        ge=0,
        le=10_000,
        description="Tasks with series of their own; the rest is _other",
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(describe(error, ENV_PREFIX, _SECRETS)) from None
        self._origins.update(_origins_of(values))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or environment("CONFIG")
        return (init_settings, env_settings, TomlFile(settings_cls, path))

    @property
    def origins(self) -> dict[str, str]:
        """Where each setting that is not at its default came from."""
        return dict(self._origins)

    @property
    def store_dir(self) -> Path:
        """`store`, or a folder of the user's state directory that belongs to this model alone."""
        if self.store is not None:
            return self.store.expanduser()
        if self.model is None:
            return _state_dir() / "demo"
        # A folder path is made absolute, so that the same model has one store from wherever it is started.
        folder = Path(self.model)
        identity = str(folder.resolve()) if folder.is_dir() else self.model
        return _state_dir() / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def with_generated_admin_key(self) -> ServeConfig:
        """This configuration, with a fresh admin key when none is set."""
        if self.admin_key is not None:
            return self
        key = SecretStr(f"pfx_admin_{secrets.token_urlsafe(32)}")
        changed = self.model_copy(update={"admin_key": key})
        changed._origins = {**self._origins, "admin_key": "generated at start"}
        return changed


def _origins_of(given: dict[str, Any]) -> dict[str, str]:
    path = given.get("config") or environment("CONFIG")
    in_file = {} if path is None else read_toml(Path(path), ServeConfig.model_fields)
    origins = {}
    for name in ServeConfig.model_fields:
        if name in given:
            origins[name] = f"flag --{name.replace('_', '-')}"
        elif environment(name.upper()):
            origins[name] = f"variable {ENV_PREFIX}{name.upper()}"
        elif name in in_file:
            origins[name] = f"file {path}"
    return origins


def _state_dir() -> Path:
    base = _variable("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "prefixd"


def environment(name: str) -> str | None:
    """`PREFIXD_<name>`, also for the client commands, which have no `ServeConfig`; empty is none."""
    return _variable(f"{ENV_PREFIX}{name}")


def _variable(name: str) -> str | None:
    return os.environ.get(name) or None  # noqa: TID251 - this is the one reader


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(config: ServeConfig, *, keys_made: bool = False) -> None:
    """Raises `ConfigError` when the network could reach the server without a key.

    `keys_made`: the store has keys of tenants, so that inference asks for one also without an API key.
    """
    if config.insecure or is_loopback(config.host):
        return
    needed = ("admin_key",) if keys_made else ("admin_key", "api_key")
    missing = [name for name in needed if getattr(config, name) is None]
    if missing:
        variables = " and ".join(f"{ENV_PREFIX}{name.upper()}" for name in missing)
        raise ConfigError(
            f"--host {config.host} can be reached from the network: set {variables}, "
            "or pass --insecure to serve without"
        )
