"""The command line: parse, configure, hand over. Runs on the main thread.

    prefixd serve | demo | generate | config show | version      here
    prefixd tasks ...                                            in `server.cli_tasks`
    prefixd keys ...                                             in `server.cli_keys`
    prefixd convert | inspect | verify | audit verify            in `server.cli_*` of that name
    prefixd train | sweep | doctor | evaluate | hand-over        in `server.cli_train`
    prefixd bench                                                in `server.cli_bench`

Heavy libraries are imported by the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

from cyclopts import App, CycloptsError, Parameter
from pydantic import SecretStr

from prefix_store.errors import PrefixStoreError
from prefix_store.key_store import KeyStore
from server import __version__
from server.cli_audit import audit_app
from server.cli_bench import bench_app
from server.cli_convert import convert_app
from server.cli_inspect import inspect_app
from server.cli_keys import keys_app
from server.cli_report import show_error
from server.cli_tasks import tasks_app
from server.cli_train import (
    distill_app,
    doctor_app,
    evaluate_app,
    hand_over_app,
    sweep_app,
    train_app,
)
from server.cli_verify import verify_app
from server.config import ServeConfig, check_exposure
from server.errors import ConfigError, GenerationFailed, PrefixdError
from server.log import set_up_logging

if TYPE_CHECKING:
    import uvicorn

    from prefix_store.spec import PrefixVersion
    from server.bootstrap import Application, ServingEngine
    from server.process import OnStarted
    from server.types import SamplingParams

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130
_HIDDEN: Final = "********"

app = App(
    name="prefixd",
    help="Serve many prefix-tuned tasks from one resident language model.",
    version=__version__,
)
config_app = App(name="config", help="Look at the configuration.")
app.command(tasks_app)
app.command(keys_app)
app.command(audit_app)
app.command(convert_app)
app.command(train_app)
app.command(sweep_app)
app.command(distill_app)
app.command(doctor_app)
app.command(inspect_app)
app.command(verify_app)
app.command(evaluate_app)
app.command(hand_over_app)
app.command(bench_app)
app.command(config_app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script. Exit codes: 1 what was asked for failed, 2 it was asked for wrongly."""
    tokens = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(tokens, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:  # already shown
        sys.exit(USAGE_ERROR)
    except ConfigError as error:
        show_error(error)
        sys.exit(USAGE_ERROR)
    except (PrefixdError, PrefixStoreError) as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    if isinstance(result, str):
        print(result)  # as it is: programmes read it, and a pipe has no width
    sys.exit(result if isinstance(result, int) else 0)


@app.command
def version() -> str:
    """Print the version."""
    return f"prefixd {__version__}"


@config_app.command
def show(*, config: ServeConfig | None = None) -> str:
    """Print every setting, its value, and where that came from."""
    config = config or ServeConfig()
    rows = []
    for name in ServeConfig.model_fields:
        value = getattr(config, name)
        shown = _HIDDEN if isinstance(value, SecretStr) else _plain(value)
        rows.append((name, shown, config.origins.get(name, "default")))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{n:<{widths[0]}}  {v:<{widths[1]}}  {o}" for n, v, o in rows)


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(value) or "-" if isinstance(value, tuple) else str(value)


# ---- serve -------------------------------------------------------------------------------------


@app.command
def serve(*, config: ServeConfig | None = None) -> int:
    """Load the model and serve until SIGTERM or Ctrl-C."""
    config = config or ServeConfig()
    set_up_logging(config.log_level, config.log_format)
    return _serve(config, _print_banner)


@app.command(name="demo")
def run_demo(
    *,
    once: Annotated[
        bool, Parameter(negative=(), help="Stop after the samples; 0 if they came out")
    ] = False,
    config: ServeConfig | None = None,
) -> int:
    """Serve the bundled model and show a sample of each of its tasks."""
    config = config or ServeConfig()
    if config.model is not None:
        raise ConfigError("prefixd demo serves the bundled model; for your own: prefixd serve")
    set_up_logging(_level(config, "warning"), config.log_format)
    came_out: list[bool] = []

    async def on_started(application: Application, server: uvicorn.Server, url: str) -> None:
        from server.cli_demo import show_samples

        try:
            await _print_banner(application, server, url)
            keys = application.serving.config
            came_out.append(await show_samples(url, keys.api_key or keys.admin_key))
        finally:
            server.should_exit = server.should_exit or once
        if not once:
            print("\nServing until Ctrl-C.", flush=True)

    status = _serve(config, on_started)
    return status if all(came_out) and came_out else 1


async def _print_banner(application: Application, _: uvicorn.Server, url: str) -> None:
    from server.banner import start_up_summary

    print(start_up_summary(application, url), flush=True)


def _serve(config: ServeConfig, on_started: OnStarted) -> int:
    """Runs the server, as `server.process.run` does."""
    check_exposure(config, keys_made=KeyStore.has_keys(config.store_dir / "keys"))
    # Before the model is loaded: a taken port should not cost a load.
    with _bind(config.host, config.port) as listener:
        from server import bootstrap, process

        application = bootstrap.build(config)
        return process.run(application, listener, _url(config.host, listener), on_started)


def _level(config: ServeConfig, otherwise: str) -> str:
    """The log level that was asked for, or a quieter one than the server's for commands that print."""
    return config.log_level if "log_level" in config.origins else otherwise


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: until the server is up, connections are refused."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"can not listen on {host} port {port}: {error.strerror}") from None
    return listener


def _url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


# ---- generate ----------------------------------------------------------------------------------


@app.command
def generate(
    prompt: str,
    *,
    task: Annotated[
        str | None, Parameter(help="Task, or task@v3; the base model if left out")
    ] = None,
    max_tokens: Annotated[int | None, Parameter(help="The task's default if left out")] = None,
    temperature: Annotated[float | None, Parameter(help="The task's default if left out")] = None,
    config: ServeConfig | None = None,
) -> None:
    """Continue PROMPT once, without a server."""
    config = config or ServeConfig()
    set_up_logging(_level(config, "warning"), config.log_format)
    from server import bootstrap
    from server.metrics import Metrics

    serving = bootstrap.build_engine(config, Metrics())
    asyncio.run(_generate(serving, prompt, task, max_tokens, temperature))


async def _generate(
    serving: ServingEngine,
    prompt: str,
    task: str | None,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    from server.types import GenerationRequest, prefix_ref

    found = serving.store.resolve(task) if task else None
    await serving.start()
    try:
        request = GenerationRequest(
            request_id="cli",
            prompt_token_ids=await serving.engine.tokenize(prompt),
            sampling=_sampling(found, max_tokens, temperature),
            prefix=prefix_ref(found) if found else None,
        )
        async for output in serving.engine.submit(request):
            print(output.text, end="", flush=True)
            if output.error is not None:
                raise GenerationFailed(output.error)
        print()
    finally:
        await serving.stop()


def _sampling(
    version: PrefixVersion | None, max_tokens: int | None, temperature: float | None
) -> SamplingParams:
    """The flags, over the task's defaults, over ours."""
    from server.types import SamplingParams

    given = {"max_tokens": max_tokens, "temperature": temperature}
    values = {} if version is None else version.manifest.generation.model_dump(exclude_none=True)
    values |= {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**values)
