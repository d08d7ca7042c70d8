"""`prefixd verify`: would a server take this file? All that an upload goes through, without a server or a store.

Runs on the main thread: loads the base model as `prefixd serve` does, and tries the prefix on it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from server.cli_report import lines_of
from server.config import ServeConfig
from server.errors import PrefixdError
from server.log import set_up_logging

if TYPE_CHECKING:
    from prefix_store.importers.recognition import ImportOptions
    from server.bootstrap import ServingEngine

verify_app = App(name="verify", help="Prove a prefix file against a base model, storing nothing.")


class VerifyFailed(PrefixdError):
    """The file can not be read; the message says why."""


@verify_app.default
def verify(
    file: Path,
    *,
    rebase: Annotated[bool, Parameter(negative=(), help="As in an upload")] = False,
    peft_type: Annotated[str | None, Parameter(help="Where a PEFT file fits several")] = None,
    task_index: Annotated[int | None, Parameter(help="Which task of a multitask file")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=(), help="For programmes")] = False,
    config: ServeConfig | None = None,
) -> str:
    """Say what FILE is, and whether the base model (--model) does with it what it should."""
    from prefix_store.importers.recognition import ImportOptions

    config = config or ServeConfig()
    set_up_logging("warning", config.log_format)
    _check_readable(file)  # before a model is loaded for it
    options = ImportOptions(peft_type, task_index, rebase)
    with tempfile.TemporaryDirectory() as directory:
        report = _report(config, Path(directory), file, options)
    return (
        json.dumps(report, indent=2)
        if as_json
        else "\n".join([f"model:      {report['model']}, in {report['dtype']}", *lines_of(report)])
    )


def _check_readable(file: Path) -> None:
    try:
        if file.exists() and not file.is_file():
            raise VerifyFailed(f"{file}: expected a regular file")
        with file.open("rb") as body:
            body.read(1)
    except OSError as error:
        raise VerifyFailed(f"{file}: {error.strerror}") from None


def _report(
    config: ServeConfig, directory: Path, file: Path, options: ImportOptions
) -> dict[str, Any]:
    from server import bootstrap
    from server.metrics import Metrics

    # A store of its own: that of a running server is locked, and nothing is to be stored.
    alone = config.model_copy(update={"store": directory / "store", "pin": ()})
    serving = bootstrap.build_engine(alone, Metrics())
    return asyncio.run(_examine(serving, file, options))


async def _examine(serving: ServingEngine, file: Path, options: ImportOptions) -> dict[str, Any]:
    await serving.start()
    try:
        async with serving.intake.upload() as upload:
            with file.open("rb") as body:
                while piece := body.read(2**20):
                    upload.write(piece)
            async with serving.intake.examined(upload, options) as examined:
                return {
                    "model": serving.model.model_id,
                    "dtype": serving.model.layout.dtype,
                    "digest": examined.upload.digest,
                    "size": examined.upload.num_bytes,
                    "num_virtual_tokens": examined.manifest.num_virtual_tokens,
                    **examined.report(),
                }
    finally:
        await serving.stop()
