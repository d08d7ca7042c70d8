"""What the store makes of a file, by the path that an upload takes below HTTP, and whether that is right.

The oracle is safetensors' own library: whatever we accept it must accept, and what was stored must be what the
`twin` makes of its tensors. Where nothing but values changed, what can be served must be accepted. Called by
`fuzz` and by the tests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from prefix_store.backends.memory import MemoryBackend
from prefix_store.errors import ArtifactTooLarge, PrefixRejected, PrefixStoreError
from prefix_store.importers.soft_prompt import SoftPrompt
from prefix_store.spec import PrefixVersion
from prefix_store.store import PrefixStore
from tests.hostile.mutation import Mutant
from tests.hostile.originals import LIMITS, Original
from tests.hostile.twin import (
    is_servable,
    read_by_library,
    same_prefix,
    same_soft_prompt,
)

MAX_SECONDS: Final = 0.05
"""Of the thread's own CPU time: a busy machine can not make a mutant slow."""

Taken = PrefixVersion | SoftPrompt


@dataclass(frozen=True, slots=True)
class Judgement:
    """`outcome`: "accepted", or the class of the refusal. `faults`: what must never be, in sentences."""

    outcome: str
    seconds: float
    faults: tuple[str, ...]


def judged(mutant: Mutant) -> Judgement:
    """Uploads the mutant, times it, and compares with the oracle."""
    backend = MemoryBackend()
    found, seconds = timed(mutant, backend)
    for _ in range(2):
        if seconds > MAX_SECONDS:  # neighbours and cold caches only ever add: the least counts
            seconds = min(seconds, timed(mutant, MemoryBackend())[1])
    faults = [f"took {seconds * 1e3:.1f} ms of CPU time"] if seconds > MAX_SECONDS else []
    if isinstance(found, PrefixRejected | ArtifactTooLarge):
        faults += faults_of_refusal(found)
        if backend.blobs or backend.logs:
            faults.append("a refused file left something in the store")
        if is_only_data(mutant) and must_be_accepted(mutant):
            faults.append(f"a file with nothing wrong was refused: {found}")
    elif isinstance(found, Exception):
        faults.append(f"{type(found).__name__} escaped: {found}")
    else:
        faults += faults_of_acceptance(mutant, found, backend)
    outcome = type(found).__name__ if isinstance(found, Exception) else "accepted"
    return Judgement(outcome, seconds, tuple(faults))


def timed(mutant: Mutant, backend: MemoryBackend) -> tuple[Taken | Exception, float]:
    """What came of the upload, refusals and failures too, and the CPU seconds that it took."""
    found: Taken | Exception
    started = time.thread_time()
    try:
        found = taken(mutant.original, mutant.data, backend)
    except Exception as error:  # noqa: BLE001 - whatever escapes is what is looked for
        found = error
    return found, time.thread_time() - started


def taken(original: Original, data: bytes, backend: MemoryBackend) -> Taken:
    """What `data` becomes, step by step as in `server.http.admin_upload`; a soft prompt is not baked."""
    store = PrefixStore(backend, original.base, LIMITS, host_cache_bytes=0)
    with store.begin_upload() as upload:
        upload.write(data)
        incoming = upload.translate(original.options)
        if incoming is None:
            return upload.commit("task").version
        if isinstance(incoming.content, SoftPrompt):
            return incoming.content
        return store.put("task", incoming.content).version


def faults_of_refusal(error: PrefixStoreError) -> list[str]:
    """A refusal is shown to whoever sent the file: short, encodable, telling nothing of the server."""
    problems = error.problems if isinstance(error, PrefixRejected) else ()
    texts = [str(error), *(text for p in problems for text in (p.pointer, p.detail))]
    faults = []
    if len(str(error)) > 60_000 or any(len(text) > 400 for text in texts[1:]):
        faults.append("the refusal is too long to show")
    if isinstance(error, PrefixRejected) and not all(problem.detail for problem in problems):
        faults.append("the refusal says nothing")
    if any("/tmp/" in text or "/work" in text for text in texts):
        faults.append("the refusal names a path of the server")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        faults.append("the refusal can not be encoded")
    return faults


def faults_of_acceptance(mutant: Mutant, found: Taken, backend: MemoryBackend) -> list[str]:
    """Whether the library accepts the file too, and reads what can now be loaded from the store."""
    theirs = read_by_library(mutant.data)
    if theirs is None:
        return ["accepted what the safetensors library refuses"]
    try:
        if isinstance(found, PrefixVersion):
            store = PrefixStore(backend, mutant.original.base, LIMITS, host_cache_bytes=0)
            same = same_prefix(mutant, theirs, store.load(found.digest).prefix)
        else:
            same = same_soft_prompt(mutant.original, theirs, found)
    except (LookupError, RuntimeError, ValueError) as error:
        return [f"accepted, but the twin can not read it: {type(error).__name__}: {error}"]
    faults = [] if same else ["accepted, but what was stored is not what the library reads"]
    if not is_servable(mutant.original, theirs):
        faults.append("accepted values that can not be served")
    return faults


def is_only_data(mutant: Mutant) -> bool:
    """The header is as it was, and so is the length: only values can be wrong."""
    end, original = mutant.original.header_bytes, mutant.original.data
    return mutant.data[:end] == original[:end] and len(mutant.data) == len(original)


def must_be_accepted(mutant: Mutant) -> bool:
    """Whether values alone leave no reason for a refusal. Rotated keys may pass the limit, so not there."""
    theirs = read_by_library(mutant.data)
    rebased = mutant.original.options.rebase
    return theirs is not None and not rebased and is_servable(mutant.original, theirs)
