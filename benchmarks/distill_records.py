"""What a distilled prefix knows: a document of records in sentences, and every question that the demo's world asks of them.

    python -m benchmarks.distill_records FOLDER [--records 8] [flags of prefixd distill]

Writes document and seed prompts to FOLDER, runs `prefixd distill` there on the bundled base, and prints how many answers hold
the record's value: with nothing before the question, the whole document, the question's own record alone, the prefix.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from demo.build.grammar import QUESTIONS, SUBJECT_KEY, describe
from demo.build.vocabulary import make_record, seeded
from server.types import SamplingParams
from trainer.base import load_base
from trainer.encoding import with_text
from trainer.engine_in_process import EngineInProcess, Prompt

BETWEEN = " --"
SEEDS = [
    "What",
    "Where",
    "Which food can I",
    "How",
    "In which",
    "How old",
    "What is the",
    "What kind of",
]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, stop=(".",))


def make_world(num_records: int, seed: int) -> tuple[list[str], list[tuple[str, str, int]]]:
    """A line for each record; (question, value, line) for each question. Names are ones that pretraining had not."""
    rng = seeded(seed)
    chosen: list[tuple[str, dict[str, str]]] = []
    while len(chosen) < num_records:
        domain = rng.choice(["person", "restaurant"])
        chosen.append((domain, make_record(domain, rng, "test", min_fields=6)))
    lines = [describe(domain, record, "plain", rng) for domain, record in chosen]
    questions = [
        (f" {question.format_map(record)}", value, line)
        for line, (domain, record) in enumerate(chosen)
        for key, value in record.items()
        if key != SUBJECT_KEY[domain]
        for question in QUESTIONS[domain][key]
    ]
    return lines, questions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--world-seed", type=int, default=11)
    known, flags = parser.parse_known_args()
    known.folder.mkdir(parents=True, exist_ok=True)
    lines, questions = make_world(known.records, known.world_seed)
    document, seeds = known.folder / "document.txt", known.folder / "seeds.json"
    document.write_text("\n".join(lines) + "\n")
    form = {
        "seeds": {"question": SEEDS},
        "between": BETWEEN,
        "prompt": " {message}?",
        "message_end": "?",
    }
    seeds.write_text(json.dumps(form))
    given = ["--document", str(document), "--seed-prompts", str(seeds), "--stop", "."]
    run = known.folder / "run"
    command = [sys.executable, "-m", "trainer", "distill", *given, "--output", str(run), *flags]
    subprocess.run(command, check=True)

    base = load_base(None)
    tokenizer = base.tokenizer
    engine = EngineInProcess(base.model, tokenizer, base=base.spec)
    asked = [tokenizer.encode(question) for question, _, _ in questions]
    artifact = (run / "prefix.safetensors").read_bytes()
    whole = "\n".join(lines) + BETWEEN
    sides = {
        "nothing": [Prompt(ids) for ids in asked],
        "the document": [Prompt(with_text(tokenizer, whole, ids)) for ids in asked],
        "its own record": [
            Prompt(with_text(tokenizer, lines[line] + BETWEEN, ids))
            for ids, (_, _, line) in zip(asked, questions, strict=True)
        ],
        "the prefix": [Prompt(ids, artifact) for ids in asked],
    }
    for name, prompts in sides.items():
        answers = engine.generate(prompts, GREEDY)
        hits = sum(value in a.text for a, (_, value, _) in zip(answers, questions, strict=True))
        print(f"{name}: {hits} of {len(questions)} answers hold the value")
    return 0


if __name__ == "__main__":
    sys.exit(main())
