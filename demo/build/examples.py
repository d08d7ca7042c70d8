"""`python -m demo.build.examples TASK COUNT [SEED] [SPLIT]`: examples of a task as JSONL, for `prefixd train`.

The split is `train` or `test`; only `test` has the names that no training text holds.
"""

import json
import sys
from typing import Final, cast

from demo.build.tasks import TASKS, examples
from demo.build.vocabulary import Split

USAGE: Final = 2
DEFAULT_SEED: Final = 41


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3, 4) or arguments[0] not in TASKS:
        print(f"expected TASK COUNT [SEED] [SPLIT]; tasks: {', '.join(TASKS)}", file=sys.stderr)
        return USAGE
    task, count, *rest = arguments
    seed = int(rest[0]) if rest else DEFAULT_SEED
    split = cast("Split", rest[1] if len(rest) > 1 else "train")
    for item in examples(TASKS[task], seed, int(count), split):
        line = {"prompt": item.prompt, "completion": item.answer}
        print(json.dumps(line, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
