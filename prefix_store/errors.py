"""What can go wrong in the store, as named exceptions.

    PrefixStoreError
     |-- PrefixRejected          an artifact that must not be stored; lists every problem found
     |    |-- MalformedArtifact       the bytes are not a well-formed artifact
     |    |-- IncompatiblePrefix      well-formed, but not for the resident model, or unsafe to serve
     |    |-- ImportRefused           a foreign format, known or not, that can not become a prefix
     |    |    `-- AmbiguousFormat         it can be read in two ways; the caller must say which
     |    |-- ProofFailed             the resident model, run with it, does not do what it should
     |    |-- RebaseRefused           its keys can not be moved to other positions exactly
     |    `-- DigestMismatch          the bytes are not those that the caller announced
     |-- ArtifactTooLarge        more bytes than any prefix for this model can have
     |-- InvalidTaskName         not a name that a task can have
     |-- InvalidTenantName       not a name that a tenant can have
     |-- UnknownTask             no such task, or it was deleted
     |-- UnknownVersion          the task exists, that version of it does not
     |-- NoSuchMove              an alias can not be moved so: nothing to roll back to, a canary that is live
     |-- PreconditionFailed      If-Match / If-None-Match did not hold
     |-- PrefixUnavailable       stored, but its bytes can not be read back intact
     |-- UnknownKey              no API key has this id
     |-- KeyNotIssued            a key can not be made as asked: scopes or times that it may not have
     |-- AuditDamaged            the audit log is not what was written to it
     |-- KeysDamaged             the records of API keys are not what was written
     |-- StoreFull               no room left on the device
     |-- StoreFailed             the file system refused an operation; nothing was changed
     `-- StoreLocked             another process owns this store directory

Raised by `prefix_store`, on whichever thread called it. `server.http.errors` maps each to a status.
Messages name what was expected and what came; they never hold a path or tensor values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_PROBLEMS: Final = 256
"""A hostile header can hold thousands of faults; answers stay small."""


class PrefixStoreError(Exception):
    """Root of everything the store raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of an artifact: where (`/tensors/dec_self.007.k/shape`) and what was wrong there."""

    pointer: str
    detail: str


class PrefixRejected(PrefixStoreError):
    """An artifact was refused. `problems` lists the faults found (up to 256), not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        assert problems, "a rejection names at least one problem"
        self.problems = tuple(problems[:MAX_PROBLEMS])
        if len(problems) > MAX_PROBLEMS:
            more = f"and {len(problems) - MAX_PROBLEMS} more problems"
            self.problems = (*self.problems, Problem("", more))
        super().__init__("; ".join(p.detail for p in self.problems))


class MalformedArtifact(PrefixRejected):
    """The bytes do not follow `docs/prefix-format.md`."""

    @classmethod
    def at(cls, pointer: str, detail: str) -> MalformedArtifact:
        """A rejection for one fault, for parsers that can not go on after it."""
        return cls([Problem(pointer, detail)])


class IncompatiblePrefix(PrefixRejected):
    """The artifact is well-formed, but the resident model can not (safely) serve it."""


class ImportRefused(PrefixRejected):
    """A file of a foreign format that can not become a prefix for the resident model."""

    @classmethod
    def at(cls, pointer: str, detail: str) -> ImportRefused:
        """A refusal for one fault."""
        return cls([Problem(pointer, detail)])


class AmbiguousFormat(ImportRefused):
    """Two formats fit the file; a wrong guess would serve nonsense."""


class ProofFailed(PrefixRejected):
    """The resident model was run with the prefix, and did not do what it should."""

    @classmethod
    def at(cls, pointer: str, detail: str) -> ProofFailed:
        """A refusal for one fault."""
        return cls([Problem(pointer, detail)])


class RebaseRefused(PrefixRejected):
    """The model's positions are not a rotation of its keys that is known exactly."""


class DigestMismatch(PrefixRejected):
    """The content digest that the caller announced is not that of the bytes received."""


class ArtifactTooLarge(PrefixStoreError):
    """More bytes than the largest prefix that the resident model could use."""


class InvalidTaskName(PrefixStoreError):
    """Task names are 1 to 63 of `a-z 0-9 . _ -` and begin with a letter or digit."""


class InvalidTenantName(PrefixStoreError):
    """Tenant names are 1 to 31 of `a-z 0-9 -` and begin with a letter or digit."""


class UnknownTask(PrefixStoreError):
    """No task of this name has a live version."""


class UnknownVersion(PrefixStoreError):
    """The task exists; the version or alias asked for does not."""


class NoSuchMove(PrefixStoreError):
    """An alias can not be moved as asked, given where the aliases of the task stand."""


class PreconditionFailed(PrefixStoreError):
    """A conditional write found another state than the caller expected."""


class PrefixUnavailable(PrefixStoreError):
    """An acknowledged version whose bytes can not be read back intact."""


class UnknownKey(PrefixStoreError):
    """No API key was ever made with this id."""


class KeyNotIssued(PrefixStoreError):
    """A key was asked for that no rule allows; the message says which."""


class KeysDamaged(PrefixStoreError):
    """The records of API keys were changed by something else than this program; none of them is trusted."""


class AuditDamaged(PrefixStoreError):
    """The end of the audit log was changed by something else than this program."""


class StoreFull(PrefixStoreError):
    """The file system has no room for the artifact."""


class StoreFailed(PrefixStoreError):
    """The file system failed (an I/O error, a missing permission); the store is as it was before."""


class StoreLocked(PrefixStoreError):
    """Another process has this store open."""
