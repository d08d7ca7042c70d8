"""Publishes versions without end and acknowledges each on stdout; run by `test_durability` to be killed.

For every line on stdin it forks a child that opens the store and writes until it is killed; so a cycle
costs no start of Python. Works below `PrefixStore`, on the backend and the catalog: they are the durable
path, and load no torch, which makes the fork safe.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.catalog import Catalog
from prefix_store.spec import PrefixManifest


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write, so that lines are whole whenever the kill comes


def write_until_killed(root: Path, cycle: int) -> None:
    catalog = Catalog(backend := FilesystemBackend(root))
    manifest = PrefixManifest(num_virtual_tokens=3, k_space="none", model_type="gpt2")
    for number in range(1_000_000):
        staged = backend.stage()
        staged.write(f"{cycle}-{number}-".encode() * 1000)
        staged.publish()
        version = catalog.publish("task", staged.digest, staged.num_bytes, manifest).version
        say(f"acknowledged {version.version} {version.digest}")
        staged.discard()


def main(root: Path) -> None:
    for cycle, _ in enumerate(sys.stdin):
        child = os.fork()
        if not child:
            write_until_killed(root, cycle)
        say(f"started {child}")
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
