"""Which format a source is in, told by its configuration and the names in it; and its reader."""

from __future__ import annotations

from collections.abc import Callable

from converter.base import Base
from converter.converted import Converted
from converter.errors import ConversionRefused
from converter.formats import past_key_values, ptuning_v2
from converter.formats.adapter_hub import is_adapter_hub, read_adapter_hub
from converter.formats.cartridges import read_cartridge
from converter.formats.li_liang import read_bart, read_gpt2
from converter.formats.peft_directory import read_peft
from converter.formats.peft_encoder_decoder import is_encoder_decoder, read_peft_encoder_decoder
from converter.source import Source
from prefix_store.importers.peft import KEYS as PEFT_KEYS
from prefix_store.importers.recognition import ImportOptions


def read(source: Source, base: Base | None, options: ImportOptions) -> Converted:
    """The prefix in `source`. Raises `ConversionRefused`, or what the importers raise."""
    names = [str(name) for name in source.state]
    if any(name.startswith("dec_self.") for name in names):
        raise ConversionRefused(
            "this is a native artifact already; upload it (rebase=true moves its keys)"
        )
    for belongs, reader in _formats(source, base, options, names):
        if belongs:
            return reader()
    shown = ", ".join(name[:48] for name in names[:4])
    raise ConversionRefused(
        f"{source.weights.name}: no known format has such tensors ({shown}, ...). Known: PEFT, "
        "Cartridges, Li & Liang (GPT-2, BART), P-tuning v2, adapter-hub, saved key/value caches"
    )


def _formats(
    source: Source, base: Base | None, options: ImportOptions, names: list[str]
) -> list[tuple[bool, Callable[[], Converted]]]:
    """(whether it is this one, how to read it), the most telling marks first."""
    config = source.config
    is_peft = "peft_type" in config or bool(PEFT_KEYS & set(names))
    return [
        (
            is_peft and is_encoder_decoder(config),
            lambda: read_peft_encoder_decoder(source, _required(base, "PEFT").config),
        ),
        (is_peft, lambda: read_peft(source, _required(base, "PEFT").decoder_only, options)),
        (
            is_adapter_hub(config),
            lambda: read_adapter_hub(source, _required(base, "adapter-hub").decoder_only),
        ),
        ("trainable_keys" in names, lambda: read_cartridge(source)),
        (
            any(ptuning_v2.MARK in name for name in names),
            lambda: ptuning_v2.read_ptuning_v2(source, None if base is None else base.spec),
        ),
        (_holds(names, "control_trans_enc"), lambda: read_bart(source)),
        (_holds(names, "control_trans"), lambda: read_gpt2(source)),
        (past_key_values.is_cache(names), lambda: past_key_values.read_past_key_values(source)),
    ]


def _holds(names: list[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


def _required(base: Base | None, what: str) -> Base:
    if base is None:
        raise ConversionRefused(
            f"{what} names no shapes: give the base model's directory with --base"
        )
    return base
