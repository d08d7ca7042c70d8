"""The words of a prefix: its shape contract, its manifest, and how versions are named.

Owns no state and runs on any thread. Knows nothing of torch: dtypes are strings, so that the scheduler
and the catalog can use these types without loading a tensor library.

The layout is `docs/prefix-format.md` in types: one K and one V tensor per layer, `[P, H_kv, D]`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, model_validator

from prefix_store.errors import InvalidTaskName, InvalidTenantName

FORMAT_VERSION: Final = 1
MANIFEST_KEY: Final = "prefixd"
DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_TENANT: Final = r"[a-z0-9][a-z0-9-]{0,30}"
_TENANT_NAME: Final = re.compile(_TENANT)
_TASK_NAME: Final = re.compile(rf"(?:{_TENANT}~)?[a-z0-9][a-z0-9._-]{{0,62}}")

OPERATOR: Final = ""
"""In place of a tenant's name: whoever runs the server. Operator's tasks have no tenant in their names."""


def check_task_name(name: str) -> str:
    """`name` itself; raises `InvalidTaskName` when it can not name a task."""
    if not _TASK_NAME.fullmatch(name) or ".." in name:
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise InvalidTaskName(
            f"task name {shown!r}: expected 1 to 63 of a-z 0-9 . _ - beginning with a letter or digit, "
            "perhaps with tenant~ before them"
        )
    return name


def check_tenant_name(name: str) -> str:
    """`name` itself; raises `InvalidTenantName` when it can not name a tenant."""
    if not _TENANT_NAME.fullmatch(name):
        raise InvalidTenantName(
            f"tenant name {name[:80]!r}: expected 1 to 31 of a-z 0-9 - beginning with a letter or digit"
        )
    return name


def full_name(tenant: str, task: str) -> str:
    """`tenant~task`: what the task that `tenant` calls `task` is called everywhere. A full name stays as it is."""
    return task if tenant == OPERATOR or "~" in task else f"{tenant}~{task}"


def tenant_of(task: str) -> str:
    """The tenant to whom a task belongs, by its full name; `OPERATOR` if there is none in it."""
    tenant, tilde, _ = task.partition("~")
    return tenant if tilde else OPERATOR


def digest_of(data: bytes | bytearray) -> str:
    """`sha256:<hex>` of an artifact's bytes: its identity, and the only key that caches may use."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def is_digest(text: str) -> bool:
    """Whether `text` has the form that `digest_of` gives; such a text is safe as part of a path."""
    return _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """K/V geometry of one attention layer. `window`: sliding-window length in tokens, None for full."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def elements_per_token(self) -> int:
        """K and V elements that one token occupies in this layer."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape contract between a model, its KV cache and its prefixes."""

    layers: tuple[LayerLayout, ...]
    dtype: str

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token's K and V take over all layers, in the serving dtype."""
        return sum(layer.elements_per_token for layer in self.layers) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LayerRotary:
    """How a layer's keys turn with their position: pair i of the first `2 * len(inverse_frequencies)`
    elements by `position * inverse_frequencies[i]`. Pairs are (i, i + n), or (2i, 2i + 1) if `interleaved`.
    """

    inverse_frequencies: tuple[float, ...]
    interleaved: bool


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """What the store must know of the resident model to judge a prefix.

    `position_limit`: how many positions the model has (None: no limit known).
    `fingerprint`, `config_fingerprint`, `tokenizer_fingerprint`: of the loaded weights, of the settings that
    change what they compute, and of the tokenizer (None: not known), all by `prefix_store.fingerprint`.
    `hidden_size`: width of its token embeddings, hence of soft prompts (None: not known).
    `rotary`: one entry per layer, where the rotation of its keys is known exactly.
    """

    model_id: str
    model_type: str
    layout: KVLayout
    position_limit: int | None
    position_scheme: Literal["rope", "learned", "none"]
    rope_theta: float | None
    vocab_size: int
    fingerprint: str
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    rotary: tuple[LayerRotary, ...] | None = None
    config_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None

    def as_ref(self) -> BaseModelRef:
        """How an artifact that was made on this very model names it."""
        return BaseModelRef(
            id=self.model_id,
            fingerprint=self.fingerprint,
            config_fingerprint=self.config_fingerprint,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            vocab_size=self.vocab_size,
        )


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_FINGERPRINT: Final = r"^sha256:[0-9a-f]{64}$"


class BaseModelRef(_Frozen):
    """Which base a prefix was trained on; `id` and `revision` are for people, the rest is checked."""

    id: str | None = None
    revision: str | None = None
    fingerprint: str | None = Field(default=None, pattern=_FINGERPRINT)
    config_fingerprint: str | None = Field(default=None, pattern=_FINGERPRINT)
    tokenizer_fingerprint: str | None = Field(default=None, pattern=_FINGERPRINT)
    vocab_size: int | None = Field(default=None, ge=1)


StopString = Annotated[str, Field(min_length=1, max_length=128)]


class GenerationDefaults(_Frozen):
    """Sampling values used where a request leaves them out; bounded as a request's own are."""

    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=1e-6, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    # Fail fast: a fault for each of twenty thousand entries is work, and tells nobody more than one.
    stop: Annotated[tuple[StopString, ...], FailFast()] = Field(default=(), max_length=4)


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
LogProb = Annotated[float, Field(le=0)]


class Probe(_Frozen):
    """One forward pass that the prefix must reproduce on the resident model.

    `input_ids` behind the prefix give, at the last of them, the log-probabilities `top_logprobs` of the
    tokens `top_ids`, which are the most probable ones. `tolerance`: how far each may be off, in nats; None
    leaves it to the server, which knows the dtype that it serves in. Log-probabilities and not logits: a
    model is free to add one number to all logits, and some have offsets far above what tells tokens apart.
    """

    input_ids: Annotated[tuple[TokenId, ...], FailFast()] = Field(min_length=1, max_length=64)
    top_ids: Annotated[tuple[TokenId, ...], FailFast()] = Field(min_length=1, max_length=32)
    top_logprobs: Annotated[tuple[LogProb, ...], FailFast()] = Field(min_length=1, max_length=32)
    tolerance: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _paired(self) -> Probe:
        if len(self.top_ids) != len(self.top_logprobs):
            raise ValueError(
                f"expected as many top_logprobs as top_ids, got {len(self.top_logprobs)} "
                f"and {len(self.top_ids)}"
            )
        if len(set(self.top_ids)) != len(self.top_ids):
            raise ValueError("top_ids: expected different tokens")
        return self


class PrefixManifest(_Frozen):
    """The JSON object under the metadata key `prefixd` of an artifact.

    `token_start`: position of the request's first token; None means P, right behind the prefix.
    `k_space`: whether K carries the rotary embedding ("post_rope") or the model has none ("none").
    `training`, `source`: free-form records for people; the server stores them and reads nothing there.
    """

    format_version: Literal[1] = FORMAT_VERSION
    num_virtual_tokens: int = Field(ge=1, le=1_000_000)
    token_start: int | None = Field(default=None, ge=0, le=10_000_000)
    k_space: Literal["post_rope", "none"]
    model_type: str = Field(min_length=1, max_length=64)
    rope_theta: float | None = Field(default=None, gt=0)
    base_model: BaseModelRef = BaseModelRef()
    generation: GenerationDefaults = GenerationDefaults()
    probe: Probe | None = None
    description: str | None = Field(default=None, max_length=1024)
    training: dict[str, JsonValue] = {}
    source: dict[str, JsonValue] = {}

    @property
    def first_position(self) -> int:
        """Position of the request's first own token."""
        return self.num_virtual_tokens if self.token_start is None else self.token_start


@dataclass(frozen=True, slots=True)
class PrefixVersion:
    """One immutable build of a task's prefix, as the catalog knows it.

    `digest` is `sha256:<hex>` of the artifact's bytes and the only key that caches may use.
    """

    task: str
    version: int
    digest: str
    size_bytes: int
    created_at: str
    manifest: PrefixManifest

    @property
    def ref(self) -> str:
        """`task@v3`: names this version and no later one."""
        return f"{self.task}@v{self.version}"


@dataclass(frozen=True, slots=True)
class Canary:
    """A version on trial: `weight`, 0 to 1, is the share of the bare name's requests that it takes."""

    version: PrefixVersion
    weight: float


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task with its versions, oldest first.

    `live`: what the bare name resolves to; None while every version was only stored. `previous`: what a
    rollback would make live. `grants`: the tenants that may use it beside its own, by name.
    """

    name: str
    live: PrefixVersion | None
    versions: tuple[PrefixVersion, ...]
    canary: Canary | None = None
    previous: PrefixVersion | None = None
    grants: tuple[str, ...] = ()


def split_ref(ref: str) -> tuple[str, str | None]:
    """`task@v3` -> (`task`, `v3`); a bare name has no selector. Raises `InvalidTaskName`."""
    task, at, selector = ref.partition("@")
    return check_task_name(task), selector if at else None
