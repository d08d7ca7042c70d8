"""`python -m loadtest`: what `prefixd bench` becomes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final, NoReturn

from cyclopts import App, CycloptsError

from loadtest.cli_bench import bench
from loadtest.errors import BadLoad
from prefix_store.errors import PrefixStoreError
from server.cli_report import show_error
from server.errors import ConfigError, PrefixdError

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130

app = App(name="prefixd", help="Load a running server.", version_flags=())
app.command(bench)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 measured, 1 it could not be, 2 it was asked for wrongly, 130 it was interrupted."""
    tokens = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        app(tokens, exit_on_error=False, print_error=True, result_action="print_non_int_sys_exit")
    except CycloptsError:  # already shown
        sys.exit(USAGE_ERROR)
    except (ConfigError, BadLoad) as error:
        show_error(error)
        sys.exit(USAGE_ERROR)
    except (PrefixdError, PrefixStoreError) as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _as_interrupt(_: int, __: FrameType | None) -> None:
    """SIGTERM ends as Ctrl-C does: what was made is removed first."""
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
