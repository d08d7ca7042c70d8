"""The bundled demo: a small trained base model and the prefixes of its tasks.

`make demo` and the tests serve ``MODEL_DIR`` with the artifacts in ``PREFIXES_DIR``. Importing this
package loads no tensor library. How the files were made: ``demo/README.md`` and ``demo.build``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEMO_DIR: Final = Path(__file__).parent
MODEL_DIR: Final = DEMO_DIR / "model"
PREFIXES_DIR: Final = DEMO_DIR / "prefixes"
SAMPLES_FILE: Final = DEMO_DIR / "samples.json"
SCORES_FILE: Final = DEMO_DIR / "scores.json"
GENERAL_TEXT_FILE: Final = DEMO_DIR / "general_text.txt"
"""Text like the base's pretraining text, of no task: what a prefix must not make it forget."""
BASE_MODEL_ID: Final = "prefixd-demo-base"
"""How the bundled prefixes name their base; which release of it, their fingerprint says."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt of a task and the text that greedy decoding gives for it (fp32, CPU).

    ``completion`` is what the tokenizer decodes from the new tokens: it begins with a space.
    """

    task: str
    prompt: str
    completion: str
    max_tokens: int


def load_samples() -> list[Sample]:
    """One sample per task, in the order of ``samples.json``."""
    return [Sample(**entry) for entry in json.loads(SAMPLES_FILE.read_text(encoding="utf-8"))]
