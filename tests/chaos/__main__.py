"""`python -m tests.chaos [SCENARIO ...] [--scale 0.1]`: what may happen to a server, often, on real processes. `make chaos`.

One line for each scenario: its name, its figures as JSON, and what was wrong. Exit code 1 if anything was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.scenarios import SCENARIOS
from tests.tiny_model_dir import save_tiny_model


def main() -> int:
    """Runs the scenarios that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("scenario", nargs="*", help=f"{', '.join(SCENARIOS)}; all if left out")
    parser.add_argument("--scale", type=float, default=1.0, help="of how often it happens")
    given = parser.parse_args()
    if unknown := [name for name in given.scenario if name not in SCENARIOS]:
        parser.error(f"no such scenario: {', '.join(unknown)}")
    wrong = False
    for name in given.scenario or SCENARIOS:
        run, scale = SCENARIOS[name]
        with tempfile.TemporaryDirectory(prefix="prefixd-chaos-") as folder:
            save_tiny_model(Path(folder) / "model")
            started = time.monotonic()
            outcome = run(Path(folder), max(1, round(scale * given.scale)))
            seconds = round(time.monotonic() - started)
        wrong = wrong or bool(outcome.faults)
        verdict = "; ".join(outcome.faults) or "as it should be"
        print(f"{name}: {json.dumps(outcome.figures)} in {seconds} s: {verdict}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
