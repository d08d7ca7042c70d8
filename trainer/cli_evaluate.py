"""`evaluate` and `hand-over`: judge a prefix here, or at a running server that takes it if it is better.

Commands of `python -m trainer`, on the main thread. Heavy libraries are imported when a command runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter
from rich.console import Console

import demo
from server.cli_client import AdminKey, Url
from trainer.errors import TrainerError
from trainer.promotion_rule import parse_rule

if TYPE_CHECKING:
    from server.engine.tokenizer import Tokenizer
    from trainer.data import Fields
    from trainer.encoding import EncodedExample
    from trainer.engine_in_process import Progress
    from trainer.forgetting import GeneralText
    from trainer.held_out import Joint

Model: TypeAlias = Annotated[
    str | None, Parameter(help="Folder or hub id of the base; the bundled demo model if left out")
]
Data: TypeAlias = Annotated[Path, Parameter(help="Held-out examples: JSONL, CSV or TSV")]
PromptField: TypeAlias = Annotated[str, Parameter(help="Key or column of the prompts")]
CompletionField: TypeAlias = Annotated[str, Parameter(help="Key or column of the completions")]
Separator: TypeAlias = Annotated[
    str | None,
    Parameter(
        help="Put before each completion, as in training; what the artifact says if left out"
    ),
]
Metrics: TypeAlias = Annotated[
    tuple[str, ...],
    Parameter(
        name="--metric",
        negative=(),
        help="exact_match, accuracy, token_f1, bleu or rouge_l; may be repeated",
    ),
]
MaxTokens: TypeAlias = Annotated[
    int | None, Parameter(help="Longest completion; by the longest reference if left out")
]
AsJson: TypeAlias = Annotated[bool, Parameter(name="--json", negative=(), help="Print JSON")]


def evaluate(
    prefix: Annotated[Path, Parameter(help="The artifact to judge")],
    *,
    data: Data,
    prompt_field: PromptField = "prompt",
    completion_field: CompletionField = "completion",
    separator: Separator = None,
    model: Model = None,
    metric: Metrics = ("exact_match", "token_f1"),
    text_prompt: Annotated[
        str | None,
        Parameter(help="Text of that baseline; what the prefix began as, if left out"),
    ] = None,
    forgetting_text: Annotated[
        Path | None, Parameter(help="General text, for the perplexity behind the prefix")
    ] = None,
    max_tokens: MaxTokens = None,
    device: Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Parameter(help="Of the base")
    ] = "auto",
    num_threads: Annotated[
        int | None, Parameter(help="CPU threads for the model; torch's choice if left out")
    ] = None,
    json: AsJson = False,
) -> None:
    """Judge PREFIX on held-out examples, beside the bare base model and a text prompt."""
    import torch

    from trainer.base import load_base
    from trainer.data import Fields
    from trainer.engine_in_process import EngineInProcess
    from trainer.evaluate import EvaluationSettings
    from trainer.evaluate import evaluate as judge

    fields = Fields(prompt_field, completion_field)
    settings = EvaluationSettings(
        metrics=metric,
        text_prompt=text_prompt,
        max_tokens=max_tokens,
        general_text=general_text(model, forgetting_text),
    )
    artifact = read_bytes(prefix)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    base = load_base(model, device=device, dtype=dtype)
    joint = _joint(artifact, separator)
    examples = _examples(data, base.tokenizer, base.model.eos_token_ids, fields, joint)
    engine = EngineInProcess(base.model, base.tokenizer, base=base.spec)
    with progress_bar("evaluate") as on_progress:
        found = judge(engine, base.tokenizer, artifact, examples, settings, on_progress)
    if json:
        sys.stdout.write(found.as_json() + "\n")
    else:
        Console().print(found.as_table())


def hand_over(
    prefix: Annotated[Path, Parameter(help="The artifact to hand over")],
    *,
    data: Data,
    promote_if: Annotated[
        str, Parameter(help="The rule, as 'bleu >= live + 0.5' or 'exact_match >= 95'")
    ],
    prompt_field: PromptField = "prompt",
    completion_field: CompletionField = "completion",
    separator: Separator = None,
    task: Annotated[str | None, Parameter(help="The file's name if left out")] = None,
    model: Model = None,
    metric: Metrics = (),
    max_tokens: MaxTokens = None,
    url: Annotated[Url, Parameter(name=("--push", "--url"))] = None,
    admin_key: AdminKey = None,
) -> int:
    """Upload PREFIX, judge it at the server beside the live version, and promote it if the rule holds.

    The exit code is 0 when it is live in the end and 3 when it is not. Of MODEL only the tokenizer is read.
    """
    rule = parse_rule(promote_if)  # before anything is loaded or sent
    from trainer.data import Fields
    from trainer.handover import ServerAccess
    from trainer.handover import hand_over as give
    from trainer.metrics import require_known

    require_known(metric)
    artifact = read_bytes(prefix)
    tokenizer, end = load_tokenizer(model)
    fields = Fields(prompt_field, completion_field)
    examples = _examples(data, tokenizer, end, fields, _joint(artifact, separator))
    server = ServerAccess(url, admin_key)
    with progress_bar("judge") as on_progress:
        found = give(
            server,
            artifact,
            task or prefix.stem,
            rule,
            examples,
            metrics=metric,
            max_tokens=max_tokens,
            on_progress=on_progress,
        )
    console = Console()
    console.print(found.as_table())
    state = "promoted" if found.promoted else "not promoted"
    console.print(f"{found.candidate.ref} {state}: {found.reason}", markup=False)
    return found.exit_code


# ---- what both read ------------------------------------------------------------------------------


def source_of(model: str | None) -> str:
    """The base's folder or hub id; the bundled demo model's for None."""
    return str(demo.MODEL_DIR) if model is None else str(Path(model).expanduser())


def load_tokenizer(model: str | None) -> tuple[Tokenizer, frozenset[int]]:
    """The tokenizer, and the ids that end a text, without the weights."""
    from transformers import GenerationConfig

    from server.engine.tokenizer import Tokenizer

    source = source_of(model)
    ids: Any = GenerationConfig.from_pretrained(source).eos_token_id
    end = frozenset([ids] if isinstance(ids, int) else ids or ())
    return Tokenizer.load(source), end


def general_text(model: str | None, given: Path | None) -> GeneralText | None:
    """The user's text; for the demo model the bundled one; else none, and the evaluation will say so."""
    from trainer.forgetting import GeneralText

    if given is not None:
        return GeneralText(read_bytes(given).decode("utf-8", errors="replace"), str(given))
    if Path(source_of(model)).resolve() != demo.MODEL_DIR.resolve():
        return None
    text = demo.GENERAL_TEXT_FILE.read_text(encoding="utf-8")
    return GeneralText(text, "the demo's own corpus")


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises `TrainerError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainerError(f"{path}: {error.strerror}") from None


def _joint(artifact: bytes, separator: str | None) -> Joint:
    """The artifact's own, but with the user's separator if there is one."""
    from trainer.held_out import joint_of

    joint = joint_of(artifact)
    return joint if separator is None else joint._replace(separator=separator)


def _examples(
    path: Path, tokenizer: Tokenizer, end: frozenset[int], fields: Fields, joint: Joint
) -> list[EncodedExample]:
    """The examples; what is worth knowing of them goes to the standard error."""
    from trainer.held_out import read_held_out

    examples, notices = read_held_out(path, tokenizer, end, fields, joint)
    for notice in notices:
        Console(stderr=True).print(f"note: {notice.message}", markup=False)
    return examples


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress | None]:
    """A bar on a terminal, on the standard error; else nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)
