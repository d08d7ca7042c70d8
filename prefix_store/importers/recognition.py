"""What an importer found and what it could only assume: for the answer, and for the artifact's `source`.

Frozen values without torch, made on any thread; called by the importers, `server.http` and `converter`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from pydantic import JsonValue

from prefix_store.spec import PrefixManifest

IMPORTER_VERSION: Final = 1
"""Goes into `source`: an importer that is found to be wrong must leave a trail."""

UNKNOWN_BASE: Final = (
    "base model: the file names none, and any model of the same shape would load it"
)


@dataclass(frozen=True, slots=True)
class Recognition:
    """`recognised`: what the file is, by what. `assumed`: what had to be supposed to serve it.
    `unverified`: what could not be checked.
    """

    recognised: str
    assumed: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the caller says beside the bytes.

    `peft_type`: PEFT's word ("PREFIX_TUNING"), where a file fits several. `task_index`: which task of a
    multitask file. `rebase`: move the keys so that requests start right behind the prefix.
    """

    peft_type: str | None = None
    task_index: int | None = None
    rebase: bool = False


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an artifact's tensors come from. `sha256`: digest of the bytes that came in, if any did."""

    format: str
    recognition: Recognition
    sha256: str | None = None
    details: dict[str, JsonValue] = field(default_factory=dict)

    def as_source(self) -> dict[str, JsonValue]:
        """The manifest's `source`."""
        source: dict[str, JsonValue] = {
            "format": self.format,
            "importer": IMPORTER_VERSION,
            "recognised": self.recognition.recognised,
            "assumed": list(self.recognition.assumed),
            "unverified": list(self.recognition.unverified),
        }
        if self.sha256 is not None:
            source["sha256"] = self.sha256
        return source | self.details


def recognition_of(manifest: PrefixManifest) -> Recognition:
    """What there is to say of a native artifact."""
    unverified = () if manifest.base_model.fingerprint else (UNKNOWN_BASE,)
    return Recognition(f"native artifact, format version {manifest.format_version}", (), unverified)
