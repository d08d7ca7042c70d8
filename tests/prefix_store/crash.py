"""All crash points of all scenarios: `python -m tests.prefix_store.crash`, `make crash`.

The tests do the short scenarios with one further crash during the recovery; this also does the long one, and
`--recovery-crashes 2` lets the recovery from the second crash be hit too.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Final

import torch

from tests.prefix_store.crash_audit import AUDIT_SCENARIOS, AuditSubject, audit_points
from tests.prefix_store.crash_keys import KEY_SCENARIOS, KeySubject, key_points
from tests.prefix_store.crash_points import Explorer
from tests.prefix_store.crash_scenarios import STORE_SCENARIOS, StoreSubject, store_points

SCENARIOS: Final = (*STORE_SCENARIOS, *AUDIT_SCENARIOS, *KEY_SCENARIOS)


def explore(scenario: str, *, recovery_crashes: int = 1) -> Explorer:
    """Raises `CrashFault`, or what the store raised, at the first promise that a crash breaks."""
    if scenario in STORE_SCENARIOS:
        explorer = Explorer(StoreSubject(), recovery_crashes=recovery_crashes)
        explorer.explore(store_points(scenario))
    elif scenario in KEY_SCENARIOS:
        explorer = Explorer(KeySubject(), recovery_crashes=recovery_crashes)
        explorer.explore(key_points(scenario))
    else:
        explorer = Explorer(AuditSubject(), recovery_crashes=recovery_crashes)
        explorer.explore(audit_points(scenario))
    return explorer


def main() -> None:
    """A line per scenario, then one of JSON with the sums."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recovery-crashes", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, num_points, num_states = time.monotonic(), 0, 0
    for scenario in SCENARIOS:
        explorer = explore(scenario, recovery_crashes=arguments.recovery_crashes)
        num_points += explorer.num_points
        num_states += explorer.num_states
        print(
            f"{explorer.num_points:>6} points {explorer.num_states:>8} states  {scenario}",
            flush=True,
        )
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"points": num_points, "states": num_states, "faults": 0, "seconds": seconds}))


if __name__ == "__main__":
    main()
