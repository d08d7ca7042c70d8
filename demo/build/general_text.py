"""Text of the demo's world that belongs to no task: on it one sees what a prefix makes the base forget.

``python -m demo.build.general_text`` writes the shipped file; a test compares the two. The documents are made as
those of pretraining are, from a seed that pretraining does not reach, and with held-out names.
"""

from itertools import islice
from typing import Final

from demo import GENERAL_TEXT_FILE
from demo.build.corpus import documents

SEED: Final = 7_201
NUM_DOCUMENTS: Final = 160


def general_text() -> str:
    """Documents with a blank line between them."""
    return "\n\n".join(islice(documents(SEED, "test"), NUM_DOCUMENTS)) + "\n"


if __name__ == "__main__":
    GENERAL_TEXT_FILE.write_text(general_text(), encoding="utf-8")
