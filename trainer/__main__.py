"""`python -m trainer`: what `prefixd train`, `sweep`, `distill`, `evaluate`, `hand-over` and `doctor` become."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from cyclopts import App, CycloptsError

from prefix_store.errors import PrefixStoreError
from server.cli_report import show_error
from server.errors import ConfigError, PrefixdError
from trainer.cli_distill import distill
from trainer.cli_doctor import doctor
from trainer.cli_evaluate import evaluate, hand_over
from trainer.cli_sweep import sweep
from trainer.cli_train import train
from trainer.errors import BadSetting

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130

app = App(name="prefixd", help="Learn prefixes, and judge them.", version_flags=())
app.command(train)
app.command(sweep)
app.command(distill)
app.command(evaluate)
app.command(hand_over)
app.command(doctor)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 done, 1 it failed, 2 it was asked for wrongly, 3 a prefix was not promoted, 130 it was asked to
    stop and can go on.
    """
    tokens = sys.argv[1:] if arguments is None else arguments
    try:
        app(tokens, exit_on_error=False, print_error=True, result_action="print_non_int_sys_exit")
    except CycloptsError:  # already shown
        sys.exit(USAGE_ERROR)
    except (ConfigError, BadSetting) as error:
        show_error(error)
        sys.exit(USAGE_ERROR)
    except (PrefixdError, PrefixStoreError) as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)


if __name__ == "__main__":
    main()
