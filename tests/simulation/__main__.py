"""Runs the simulation for as long as you like: `python -m tests.simulation --steps 1000000 --seed 0`."""

from __future__ import annotations

import argparse
import time
from collections import Counter

from tests.simulation.world import run_episode


def main() -> None:
    """Episodes with seeds `seed`, `seed + 1`, ... until `steps` engine steps are done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_steps, seed, seen = 0, arguments.seed, Counter[str]()
    started = time.monotonic()
    while num_steps < arguments.steps:
        episode = run_episode(seed)
        num_steps += episode.num_steps
        seen += episode.seen
        seed += 1
    seconds = time.monotonic() - started
    for name, count in sorted(seen.items()):
        print(f"{count:>10}  {name}")
    print(
        f"{num_steps} steps, seeds {arguments.seed} to {seed - 1}, {num_steps / seconds:.0f} steps/s"
    )


main()
