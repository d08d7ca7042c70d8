"""The hand-over to a real server process: promoted if better, left if not, never over another's promotion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefix_store.spec import digest_of
from server.cli_client import CommandFailed
from server.engine.tokenizer import Tokenizer
from server.types import SamplingParams
from tests.e2e.live_server import ADMIN, ADMIN_KEY, LiveServer, live_server
from tests.trainer.demo_data import bundled, held_out, write_jsonl
from trainer.__main__ import main
from trainer.encoding import EncodedExample
from trainer.engine_in_process import EngineInProcess, Prompt
from trainer.errors import BadSetting, TrainerError
from trainer.evaluate import max_tokens_for
from trainer.handover import NOT_PROMOTED, PROMOTED, HandOver, ServerAccess, hand_over
from trainer.metrics import METRICS
from trainer.promotion_rule import parse_rule

GOOD, BAD = "record-qa", "sentiment"  # judged on the examples of the first
NUM_EXAMPLES = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("server")
    with live_server(directory, "--store", str(directory / "store")) as running:
        yield running


@pytest.fixture(scope="module")
def examples(demo_tokenizer: Tokenizer) -> list[EncodedExample]:
    return held_out(demo_tokenizer, GOOD, NUM_EXAMPLES)


@pytest.fixture
def access(server: LiveServer) -> ServerAccess:
    return ServerAccess(server.url, ADMIN_KEY)


def upload(server: LiveServer, task: str, artifact: bytes) -> None:
    """Makes an artifact the live version of a task."""
    with server.client() as client:
        answer = client.put(f"/admin/v1/tasks/{task}", content=artifact, headers=ADMIN)
    assert answer.is_success, answer.text


def live_digest(server: LiveServer, task: str) -> Any:
    with server.client() as client:
        answer = client.get(f"/admin/v1/tasks/{task}/aliases/live", headers=ADMIN)
    return answer.json().get("digest")


def versions(server: LiveServer, task: str) -> list[list[str]]:
    """The aliases of each version, newest first."""
    with server.client() as client:
        answer = client.get(f"/admin/v1/tasks/{task}", headers=ADMIN).json()
    return [version["aliases"] for version in answer["versions"]]


def test_a_better_prefix_is_promoted(
    server: LiveServer, access: ServerAccess, examples: list[EncodedExample]
) -> None:
    upload(server, "better", bundled(BAD))
    rule = parse_rule("exact_match >= live + 0.5")

    found = hand_over(access, bundled(GOOD), "better", rule, examples, metrics=["token_f1"])

    assert (found.promoted, found.exit_code) == (True, PROMOTED)
    assert live_digest(server, "better") == found.candidate.digest == digest_of(bundled(GOOD))
    assert found.live is not None
    assert found.live.digest == digest_of(bundled(BAD))
    assert found.gain["exact_match"].value >= 90
    assert "exact_match" in found.reason
    assert list(found.candidate_scores) == ["exact_match", "token_f1"]


def test_a_worse_prefix_is_stored_and_the_live_one_stays(
    server: LiveServer, access: ServerAccess, examples: list[EncodedExample]
) -> None:
    upload(server, "worse", bundled(GOOD))

    found = hand_over(access, bundled(BAD), "worse", parse_rule("token_f1 >= live"), examples)

    assert (found.promoted, found.exit_code) == (False, NOT_PROMOTED)
    assert live_digest(server, "worse") == digest_of(bundled(GOOD))
    assert versions(server, "worse") == [[], ["live"]]
    assert "asked for >=" in found.reason


def test_a_live_version_that_moved_meanwhile_is_not_overwritten(
    server: LiveServer, access: ServerAccess, examples: list[EncodedExample]
) -> None:
    upload(server, "moved", bundled(BAD))
    third = bundled("casual-rewrite")

    def someone_else_promotes(done: int, total: int) -> None:
        if done == total:
            upload(server, "moved", third)

    found = hand_over(
        access,
        bundled(GOOD),
        "moved",
        parse_rule("exact_match > live"),
        examples,
        on_progress=someone_else_promotes,
    )

    assert (found.promoted, found.exit_code) == (False, NOT_PROMOTED)
    assert found.gain["exact_match"].value >= 90  # the rule itself held
    assert live_digest(server, "moved") == digest_of(third)
    assert "moved from moved@v1 to moved@v3 meanwhile" in found.reason


def test_a_first_version_made_live_meanwhile_is_not_overwritten(
    server: LiveServer, access: ServerAccess, examples: list[EncodedExample]
) -> None:
    def someone_else_promotes(done: int, total: int) -> None:
        if done == total:
            upload(server, "raced", bundled(BAD))

    found = hand_over(
        access,
        bundled(GOOD),
        "raced",
        parse_rule("exact_match >= 90"),
        examples,
        on_progress=someone_else_promotes,
    )

    assert not found.promoted
    assert "raced@v2 was made live meanwhile" in found.reason
    assert live_digest(server, "raced") == digest_of(bundled(BAD))


def test_a_first_version_is_promoted_by_a_rule_that_needs_no_live_one(
    server: LiveServer, access: ServerAccess, examples: list[EncodedExample]
) -> None:
    compared = parse_rule("exact_match >= live + 0.5")

    first = hand_over(access, bundled(GOOD), "fresh", compared, examples)
    assert (first.promoted, first.live, first.live_scores) == (False, None, {})
    assert "no live version" in first.reason
    assert live_digest(server, "fresh") is None

    second = hand_over(access, bundled(GOOD), "fresh", parse_rule("exact_match >= 90"), examples)
    assert second.promoted
    assert second.candidate == first.candidate  # the same bytes are the same version
    assert live_digest(server, "fresh") == digest_of(bundled(GOOD))


def test_bytes_that_are_live_already_need_no_promotion(
    server: LiveServer, access: ServerAccess, examples: list[EncodedExample]
) -> None:
    upload(server, "same", bundled(GOOD))

    found = hand_over(access, bundled(GOOD), "same", parse_rule("token_f1 > live"), examples)

    assert found.exit_code == PROMOTED
    assert "live already" in found.reason
    assert versions(server, "same") == [["live"]]


def test_examples_that_fill_the_model_are_judged_as_far_as_it_has_positions(
    access: ServerAccess, demo_tokenizer: Tokenizer, demo_engine: EngineInProcess
) -> None:
    limit, longest_prefix = demo_engine.base.position_limit, 32
    assert limit is not None
    answer = demo_tokenizer.encode(" positive")
    ids = demo_tokenizer.encode("Lomu is a diner in the old town. " * 100)
    full = EncodedExample(ids[: limit - longest_prefix - len(answer)], answer, " positive")
    rule = parse_rule("exact_match >= 0")

    assert hand_over(access, bundled(GOOD), "full", rule, [full]).promoted
    with pytest.raises(CommandFailed, match="expected at most"):
        hand_over(access, bundled(GOOD), "full", rule, [full], max_tokens=len(answer) + 1)


def test_the_server_scores_what_the_engine_in_process_scores(
    server: LiveServer,
    access: ServerAccess,
    examples: list[EncodedExample],
    demo_engine: EngineInProcess,
) -> None:
    found = hand_over(access, bundled(GOOD), "alike", parse_rule("token_f1 >= 0"), examples)

    prompts = [Prompt(example.prompt_token_ids, bundled(GOOD)) for example in examples]
    greedy = SamplingParams(max_tokens=max_tokens_for(examples), temperature=0.0)
    texts = [completion.text for completion in demo_engine.generate(prompts, greedy)]
    expected = METRICS["token_f1"](texts, [example.reference for example in examples])
    assert found.candidate_scores["token_f1"].value == expected


def test_a_prefix_that_does_not_fit_is_refused_and_nothing_is_judged(
    access: ServerAccess, examples: list[EncodedExample]
) -> None:
    with pytest.raises(CommandFailed) as caught:
        hand_over(access, b"no artifact", "broken", parse_rule("token_f1 >= 0"), examples)
    assert caught.value.status == 400


def test_nothing_is_uploaded_without_examples(server: LiveServer, access: ServerAccess) -> None:
    with pytest.raises(TrainerError, match="no held-out examples"):
        hand_over(access, bundled(GOOD), "unjudged", parse_rule("token_f1 >= 0"), [])
    with server.client() as client:
        assert client.get("/admin/v1/tasks/unjudged", headers=ADMIN).status_code == 404


def test_a_rule_whose_metric_can_not_judge_the_answers_promotes_nothing(
    server: LiveServer, access: ServerAccess, demo_tokenizer: Tokenizer
) -> None:
    """BLEU is 0 for every right answer of one word, so `bleu >= live` would hold for anything."""
    labels = held_out(demo_tokenizer, BAD, NUM_EXAMPLES)

    with pytest.raises(BadSetting, match="--promote-if: bleu says nothing here: no reference"):
        hand_over(access, bundled(BAD), "unseen", parse_rule("bleu >= live"), labels)
    with server.client() as client:
        assert client.get("/admin/v1/tasks/unseen", headers=ADMIN).status_code == 404


@pytest.mark.parametrize(
    ("task", "rule", "code", "said"),
    [
        ("left", "exact_match >= live", NOT_PROMOTED, "left@v1 not promoted: task 'left' has no"),
        ("taken", "exact_match >= 90", 0, "taken@v1 promoted: exact_match"),
        ("misread", "exactly", 2, "expected a metric"),
        ("No Task", "exact_match >= 0", 1, "task name"),
    ],
)
def test_the_command_says_what_came_of_it(
    server: LiveServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    rule: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    artifact = tmp_path / "prefix.safetensors"
    artifact.write_bytes(bundled(GOOD))
    data = write_jsonl(tmp_path / "data.jsonl", GOOD, NUM_EXAMPLES)
    command = ["hand-over", str(artifact), "--data", str(data), "--promote-if", rule]
    access = ["--task", task, "--push", server.url, "--admin-key", ADMIN_KEY]

    with pytest.raises(SystemExit) as caught:
        main([*command, *access])

    out, err = capsys.readouterr()
    assert caught.value.code == code, out + err
    assert said in out + err


def test_a_table_without_a_live_version_has_no_column_for_it(
    access: ServerAccess, examples: list[EncodedExample]
) -> None:
    rule = parse_rule("token_f1 >= live")
    found: HandOver = hand_over(access, bundled(GOOD), "tabled", rule, examples)
    assert [column.header for column in found.as_table().columns] == ["metric", "tabled@v1"]
