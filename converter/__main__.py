"""`python -m converter SRC DST`: what `prefixd convert` runs in a process of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from converter.base import load_base
from converter.errors import ConversionRefused
from converter.recognise import read
from converter.source import open_source
from converter.write import Artifact, WriteOptions, write
from prefix_store.artifact import TORCH_DTYPES
from prefix_store.errors import PrefixRejected
from prefix_store.importers.recognition import ImportOptions
from prefix_store.spec import digest_of


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 with the reason on the standard error; nothing is written then."""
    given = _parser().parse_args(arguments)
    try:
        source = open_source(given.src)
        base = None if given.base is None else load_base(given.base)
        found = read(source, base, ImportOptions(given.peft_type, given.task_index))
        made = write(found, base, source.sha256, WriteOptions(given.dtype, given.rebase))
        given.dst.write_bytes(made.data)
    except ConversionRefused as refused:
        return _refuse(str(refused))
    except PrefixRejected as rejected:
        return _refuse("\n".join(problem.detail for problem in rejected.problems))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}")
    print("\n".join(report(made, given.dst)))
    return 0


def report(made: Artifact, destination: Path) -> list[str]:
    """What was recognised, supposed and written, line by line."""
    found = made.recognition
    lines = [f"recognised: {found.recognised}"]
    lines += [f"assumed:    {text}" for text in found.assumed]
    lines += [f"unverified: {text}" for text in found.unverified]
    lines += [f"warning:    {text}" for text in made.warnings]
    lines += [f"written:    {destination} ({len(made.data)} bytes, {digest_of(made.data)})"]
    return lines


def _refuse(reason: str) -> int:
    print(f"refused: {reason}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("prefixd convert", description=__doc__)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES))
    parser.add_argument("--rebase", action="store_true")
    parser.add_argument("--peft-type")
    parser.add_argument("--task-index", type=int)
    return parser


if __name__ == "__main__":
    sys.exit(main())
