"""An uploaded file, whatever it is: native as it stands, native to be rebased, or PEFT.

Pure functions on any thread; called by `prefix_store.upload`. Only files that hold one of PEFT's tensors go
to its importer; everything else is read as an artifact, so that the strict reader's refusals stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prefix_store.errors import ImportRefused
from prefix_store.header import read_header
from prefix_store.importers import peft
from prefix_store.importers.recognition import ImportOptions, Recognition, recognition_of
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.rebase import rebased
from prefix_store.spec import MANIFEST_KEY, BaseSpec
from prefix_store.tensor_file import read_fields, read_tensor_file
from prefix_store.validation import Limits, accept, require_compatible


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a file became: the bytes of an artifact, or a soft prompt that must be baked first."""

    recognition: Recognition
    content: bytes | SoftPrompt


class ForeignFile(Protocol):
    """A file that must be changed before it can be stored."""

    @property
    def recognition(self) -> Recognition: ...

    def read(self, data: bytearray, digest: str) -> bytes | SoftPrompt:
        """The artifact to store, or what has to be baked first. Raises `PrefixRejected`."""
        ...


@dataclass(frozen=True, slots=True)
class RebasedFile:
    """A native artifact whose keys are to be moved."""

    base: BaseSpec
    limits: Limits
    recognition: Recognition

    def read(self, data: bytearray, digest: str) -> bytes:
        return rebased(accept(data, digest, self.base, self.limits), self.base)


def recognise(
    head: bytearray, total_bytes: int, base: BaseSpec, limits: Limits, options: ImportOptions
) -> ForeignFile | None:
    """What the first 64 KiB of a file show it to be; None: an artifact to be stored as it is.

    Raises `MalformedArtifact`, `IncompatiblePrefix`, `ImportRefused` or `AmbiguousFormat`.
    """
    fields, metadata, _ = read_fields(head, total_bytes)
    is_native = isinstance(metadata, dict) and MANIFEST_KEY in metadata
    if peft.KEYS & fields.keys() and not is_native:
        return peft.recognise(read_tensor_file(head, total_bytes), base, limits, options)
    for name, value in (("peft_type", options.peft_type), ("task_index", options.task_index)):
        if value is not None:
            raise ImportRefused.at(f"/{name}", f"{name}: the file holds no PEFT prompt")
    if not options.rebase:
        return None
    header = read_header(head, total_bytes)
    require_compatible(header, base, limits)
    manifest = header.manifest
    if manifest.first_position == manifest.num_virtual_tokens:
        return None
    delta = manifest.num_virtual_tokens - manifest.first_position
    found = recognition_of(manifest)
    moved = f"{found.recognised}, its keys rotated by {delta:+d} positions"
    return RebasedFile(base, limits, Recognition(moved, found.assumed, found.unverified))
