"""The score tables of ``demo/README.md``, made of ``scores.json``: what is read there is what was measured.

Called by ``export`` after measuring; a test holds the two together.
"""

from pathlib import Path
from typing import Any, Final

from demo.build.targets import mean_match

BEGIN: Final = "<!-- tables: written by python -m demo.build scores -->"
END: Final = "<!-- end of tables -->"


def insert_tables(readme: Path, report: dict[str, Any]) -> None:
    """Replaces what stands between the two marks."""
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{tables(report)}{END}{rest.split(END)[1]}", encoding="utf-8")


def tables(report: dict[str, Any]) -> str:
    """All of them, as Markdown."""
    return "\n".join([_scores(report), _precision(report), _wrong_task(report), _base(report)])


def _scores(report: dict[str, Any]) -> str:
    lines = [
        f"Exact match in percent, greedy, {report['num_test']} test items a task (seed {report['seeds']['test']}), names that occur in no",
        f"training text, measured on {report['date']}. Prefix: mean of {len(report['seeds']['training'])} training seeds, and the least and the most.",
        "",
        "| task | P, steps | base alone | 3 solved examples in the prompt | **prefix** | full fine-tuning | slot recall: base / prefix | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["tasks"].items():
        tests = [seed["test"] for seed in row["seeds"].values()]
        matches = [test["exact_match"] for test in tests]
        recall = sum(test["slot_recall"] for test in tests) / len(tests)
        loss = max(seed["test_loss"] for seed in row["seeds"].values())
        lines.append(
            f"| {name} | {row['num_virtual_tokens']}, {row['steps']} | {row['base']['exact_match']} | {row['base_few_shot']['exact_match']} "
            f"| **{mean_match(row):.1f}** ({min(matches)} to {max(matches)}) "
            f"| {row['full_fine_tuning']['test']['exact_match']} "
            f"| {row['base']['slot_recall']} / {recall:.1f} | {loss:.3f} |"
        )
    lines += ["", "Loss: teacher-forced, nats a token, of the worst seed.", ""]
    return "\n".join(lines)


def _precision(report: dict[str, Any]) -> str:
    lines = [
        "The shipped prefix of each task is the seed that answers most of the validation set. Its exact match:",
        "",
        "| task | seed | in float32 | stored in bf16, served in float32 | stored and served in bf16 |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["tasks"].items():
        one = row["shipped"]
        lines.append(
            f"| {name} | {one['seed']} | {one['float32']} | {one['stored_bf16']} | {one['served_bf16']} |"
        )
    return "\n".join([*lines, ""])


def _wrong_task(report: dict[str, Any]) -> str:
    matrix = report["wrong_task_exact_match"]
    lines = [
        f"Exact match of every shipped prefix on every task's items ({report['num_wrong_task']} each):",
        "",
        "| prefix of \\ items of | " + " | ".join(matrix) + " |",
        "|---" * (len(matrix) + 1) + "|",
    ]
    lines += [
        f"| {used} | " + " | ".join(str(row[asked]) for asked in matrix) + " |"
        for used, row in matrix.items()
    ]
    return "\n".join([*lines, ""])


def _base(report: dict[str, Any]) -> str:
    base = report["base"]
    worst = min(base["copying_accuracy"].values())
    return (
        f"The base has seen {base['tokens'] / 1e6:.1f} M tokens in {base['minutes']} minutes on two shared CPU cores, validation loss "
        f"{base['validation_loss']};\nit copies every field of every domain in at least {100 * worst:.1f} % of the probes "
        "(the gate is 95 %).\n"
    )
