"""`prefixd convert`: starts the converter, which may read pickled files, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

convert_app = App(
    name="convert", help="Turn a prefix of another program into an artifact that can be uploaded."
)


@convert_app.default
def convert(
    src: Annotated[Path, Parameter(help="A directory or file of PEFT, Cartridges, ...")],
    dst: Annotated[Path, Parameter(help="The safetensors file to write")],
    *,
    base: Annotated[
        Path | None, Parameter(help="Directory of the model that the prefix was trained on")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, Parameter(help="As it comes if left out")
    ] = None,
    rebase: Annotated[
        bool,
        Parameter(negative=(), help="Rotate the keys so that requests start behind the prefix"),
    ] = False,
    peft_type: Annotated[str | None, Parameter(help="Where a PEFT file fits several")] = None,
    task_index: Annotated[int | None, Parameter(help="Which task of a multitask file")] = None,
) -> int:
    """Read SRC, write DST, and print what was recognised and assumed."""
    given = {
        "--base": base,
        "--dtype": dtype,
        "--peft-type": peft_type,
        "--task-index": task_index,
    }
    flags = [
        text for name, value in given.items() if value is not None for text in (name, str(value))
    ]
    flags += ["--rebase"] * rebase
    # -P: a directory that happens to be called "converter" where the user stands is not ours.
    command = [sys.executable, "-P", "-m", "converter", *flags, "--", str(src), str(dst)]
    return subprocess.run(command, check=False).returncode  # noqa: S603 - a list, no shell
