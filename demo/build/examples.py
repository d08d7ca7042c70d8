"""`python -m demo.build.examples TASK COUNT [SEED] [SPLIT]`: examples of a task as JSONL, for `prefixd train`.

``as_jsonl`` is called by the build's own training and by benchmarks too. The split is `train` or `test`; only `test` has the names that no training text holds.
"""

import json
import sys
from collections.abc import Sequence
from typing import Final, cast

from demo.build.tasks import TASKS, Example, examples
from demo.build.vocabulary import Split

USAGE: Final = 2
DEFAULT_SEED: Final = 41


def as_jsonl(data: Sequence[Example]) -> str:
    """A line an example, as ``prefixd train`` reads them."""
    rows = ({"prompt": item.prompt, "completion": item.answer} for item in data)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3, 4) or arguments[0] not in TASKS:
        print(f"expected TASK COUNT [SEED] [SPLIT]; tasks: {', '.join(TASKS)}", file=sys.stderr)
        return USAGE
    task, count, *rest = arguments
    seed = int(rest[0]) if rest else DEFAULT_SEED
    split = cast("Split", rest[1] if len(rest) > 1 else "train")
    print(as_jsonl(examples(TASKS[task], seed, int(count), split)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
