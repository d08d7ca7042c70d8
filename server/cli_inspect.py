"""`prefixd inspect`: what is in a prefix file, drawn for a terminal. Runs on the main thread, without a server."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import App, Parameter

from prefix_store.errors import MalformedArtifact
from server.cli_report import shown
from server.config import ServeConfig
from server.errors import PrefixdError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from prefix_store.artifact import Prefix
    from prefix_store.norms import LayerNorms
    from prefix_store.tensor_file import TensorFile

inspect_app = App(name="inspect", help="Show what is in a prefix file.")

_BAR: Final = 16  # characters
_MODEL: Final = "Directory or hub id of the base model, to compare with its own keys and values"


class InspectFailed(PrefixdError):
    """The file can not be read; the message says why."""


@inspect_app.default
def inspect(
    file: Path,
    *,
    model: Annotated[str | None, Parameter(help=_MODEL)] = None,
    width: Annotated[int | None, Parameter(help="Columns; the terminal's if left out")] = None,
) -> None:
    """Draw FILE: sizes, positions, origin, and the norms of every layer's keys and values."""
    from rich.console import Console, Group

    try:
        if not file.is_file():  # a device or a pipe may never end
            raise InspectFailed(f"{file}: expected a regular file")
        drawn = _drawn(file, model)
    except OSError as error:
        raise InspectFailed(f"{file}: {error.strerror}") from None
    Console(width=width, highlight=False, markup=False).print(Group(*drawn))


def _drawn(file: Path, model: str | None) -> list[RenderableType]:
    from prefix_store.artifact import decode
    from prefix_store.header import LENGTH_BYTES, MAX_HEADER_BYTES, read_header
    from prefix_store.tensor_file import read_tensor_file

    num_bytes = file.stat().st_size
    with file.open("rb") as content:
        digest = f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"
        content.seek(0)
        head = content.read(LENGTH_BYTES + MAX_HEADER_BYTES)
    title = f"{shown(file.name)}  {num_bytes:,} bytes  {digest}"
    try:
        read_header(head, num_bytes)
    except MalformedArtifact as reason:
        # Another format may still be a safetensors file; one that is not even that is refused here.
        return [title, *_foreign(read_tensor_file(head, num_bytes), reason)]
    prefix = decode(bytearray(file.read_bytes()), digest)
    natural = None if model is None else _natural(model, prefix)
    return [title, _facts(prefix), _layers(prefix, natural)]


def _facts(prefix: Prefix) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(prefix):
        table.add_row(Text(shown(name)), Text(shown(value)))
    return table


def _rows(prefix: Prefix) -> list[tuple[str, str]]:
    manifest = prefix.manifest
    first = prefix.keys[0]
    shapes = {
        (key.shape[1:], value.shape[1:])
        for key, value in zip(prefix.keys, prefix.values, strict=True)
    }
    heads = (
        f"{first.shape[1]} kv heads of {first.shape[2]}"
        if len(shapes) == 1
        else "heads that differ by layer"
    )
    per_token = prefix.num_bytes // manifest.num_virtual_tokens
    rows = [
        (
            "tokens",
            f"{manifest.num_virtual_tokens}; requests start at position {manifest.first_position}",
        ),
        (
            "tensors",
            f"{len(prefix.keys)} layers, {heads}, {str(first.dtype).removeprefix('torch.')}",
        ),
        ("size", f"{prefix.num_bytes:,} bytes of keys and values, {per_token:,} a token"),
        ("base model", _base(prefix)),
        (
            "keys",
            {
                "post_rope": f"rotated, theta {manifest.rope_theta}",
                "none": "without rotary embedding",
            }[manifest.k_space],
        ),
        ("probe", _probe(prefix)),
    ]
    rows += [("description", manifest.description)] if manifest.description else []
    generation = manifest.generation.model_dump(exclude_none=True, exclude_defaults=True)
    return (
        rows
        + _flat("generation", generation)
        + _flat("training", manifest.training)
        + _flat("source", manifest.source)
    )


def _base(prefix: Prefix) -> str:
    ref = prefix.manifest.base_model
    known = [
        name
        for name, value in (
            ("weights", ref.fingerprint),
            ("config", ref.config_fingerprint),
            ("tokenizer", ref.tokenizer_fingerprint),
        )
        if value
    ]
    fingerprints = (
        f"fingerprint of {', '.join(known)}"
        if known
        else "no fingerprint: any base of the same shape would load it"
    )
    return f"{ref.id or 'not named'} ({prefix.manifest.model_type}); {fingerprints}"


def _probe(prefix: Prefix) -> str:
    probe = prefix.manifest.probe
    if probe is None:
        return "none"
    return f"{len(probe.input_ids)} tokens, the {len(probe.top_ids)} most probable next ones"


def _flat(name: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """`training.mlp.hidden` and the like, a row each."""
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            rows += _flat(f"{name}.{key}", value)
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{name}.{key}", shown))
    return rows


def _layers(prefix: Prefix, natural: Sequence[LayerNorms] | None) -> RenderableType:
    """One line per layer: the mean norm of its keys and values, as bars, beside the model's own."""
    from rich.table import Table

    from prefix_store.norms import layer_norms

    norms = layer_norms(prefix.keys, prefix.values)
    table = Table(
        title="mean norm of a head's vector", title_justify="left", box=None, pad_edge=False
    )
    part_columns = ("", "ratio") if natural is not None else ("",)
    for header in ("layer", "keys", *part_columns, "values", *part_columns, "largest"):
        bar = header in ("keys", "values")
        table.add_column(header, justify="left" if bar else "right", no_wrap=True)
    everything = (*norms, *(natural or ()))
    tops = _top(n.key for n in everything), _top(n.value for n in everything)
    for index, own in enumerate(norms):
        model = None if natural is None else natural[index]
        keys = _part(own.key, tops[0], None if model is None else model.key)
        values = _part(own.value, tops[1], None if model is None else model.value)
        table.add_row(str(index), *keys, *values, f"{own.largest:.3g}")
    if natural is not None:
        table.caption = "| and ratio: against the model's own keys and values on ordinary text"
        table.caption_justify = "left"
    return table


def _part(value: float, top: float, natural: float | None) -> list[str]:
    """A bar, the norm, and its ratio to the model's own where that is known."""
    ratio = [] if natural is None else [f"{value / natural:.2f}" if natural else "-"]
    return [_bar(value, top, natural), f"{value:.3g}", *ratio]


def _top(norms: Iterable[float]) -> float:
    """The longest bar: the largest norm that is a number."""
    return max((norm for norm in norms if math.isfinite(norm)), default=0.0)


def _bar(value: float, top: float, natural: float | None) -> str:
    """A bar of blocks, with a mark where the model's own would end."""
    if not math.isfinite(value):  # the figure beside it says so
        return "?" * _BAR
    cells = ["█"] * round(_BAR * value / top) if top else []
    cells += [" "] * (_BAR - len(cells))
    if natural is not None and top:
        cells[min(round(_BAR * natural / top), _BAR - 1)] = "|"
    return "".join(cells)


def _natural(source: str, prefix: Prefix) -> tuple[LayerNorms, ...]:
    from server.engine.tokenizer import Tokenizer
    from server.model.attention import make_attention_backend
    from server.model.device import pick_device
    from server.model.loader import load_model
    from server.model.natural_kv import TEXT, natural_norms

    config = ServeConfig()
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
        raise InspectFailed(f"--model {source}: there is no such folder")
    model = load_model(source, device=pick_device(config.device), dtype=config.dtype)
    expected = [(x.num_kv_heads, x.key_dim, x.value_dim) for x in model.layout.layers]
    got = [
        (k.shape[1], k.shape[2], v.shape[2])
        for k, v in zip(prefix.keys, prefix.values, strict=True)
    ]
    if got != expected:
        raise InspectFailed(
            f"the prefix is for another model: it has {len(got)} layers, the first of (heads, key, value) "
            f"{got[0]}; {model.model_id} has {len(expected)}, the first of {expected[0]}"
        )
    token_ids = Tokenizer.load(source).encode(TEXT)
    return natural_norms(model, make_attention_backend(config.attention, model.device), token_ids)


def _foreign(file: TensorFile, reason: MalformedArtifact) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for header in ("tensor", "dtype", "shape"):
        table.add_column(header)
    for entry in file.tensors.values():
        table.add_row(Text(shown(entry.name)), file.dtype, str(list(entry.shape)))
    why = shown(reason.problems[0].detail)
    rows: list[RenderableType] = [f"not a native artifact: {why}", table]
    if file.metadata:
        rows.append(shown(f"metadata: {json.dumps(file.metadata, ensure_ascii=False)[:500]}"))
    rows.append("an upload, or `prefixd verify`, says what a server takes it for")
    return rows
