"""A prefix beside its baselines: the figures are right, and each has the right cause."""

from __future__ import annotations

import dataclasses
import json

import pytest

import demo
from prefix_store.artifact import decode, encode
from prefix_store.importers.native import native_artifact
from prefix_store.importers.recognition import Provenance, Recognition
from prefix_store.spec import digest_of
from server.engine.tokenizer import Tokenizer
from server.model.attention import make_attention_backend
from server.model.baker import Baker
from server.model.loader import LoadedModel
from tests.trainer.demo_data import END_OF_TEXT, bundled, held_out
from trainer.encoding import EncodedExample
from trainer.engine_in_process import EngineInProcess, own_attention
from trainer.errors import TrainerError
from trainer.evaluate import (
    EvaluationSettings,
    evaluate,
    generated_metrics,
    generated_scores,
)
from trainer.evaluation import NO_PREFIX, PREFIX, TEXT_PROMPT, Evaluation
from trainer.forgetting import GeneralText

GENERAL = GeneralText(demo.GENERAL_TEXT_FILE.read_text()[:8_000], "the demo's own corpus")
TEXT = "Lomu is a diner in the old town that serves Greek food."


def judged(
    engine: EngineInProcess, tokenizer: Tokenizer, task: str, **settings: object
) -> Evaluation:
    examples = held_out(tokenizer, task, 12)
    chosen = EvaluationSettings(**settings)  # type: ignore[arg-type]
    return evaluate(engine, tokenizer, bundled(task), examples, chosen)


@pytest.fixture(scope="module")
def evaluation(demo_engine: EngineInProcess, demo_tokenizer: Tokenizer) -> Evaluation:
    return judged(
        demo_engine,
        demo_tokenizer,
        "record-to-sentence",
        metrics=("exact_match", "bleu"),
        general_text=GENERAL,
    )


def baked(model: LoadedModel, engine: EngineInProcess, ids: tuple[int, ...]) -> bytes:
    """The prefix that is exactly these tokens."""
    with own_attention(model):
        bake = Baker(model, make_attention_backend("auto")).start(ids)
        while not bake.step():
            pass
        keys, values = bake.result()
    return native_artifact(engine.base, keys, values, Provenance("test", Recognition("a text")))


def test_a_trained_prefix_beats_both_baselines_on_the_same_examples(
    evaluation: Evaluation,
) -> None:
    scores = {name: condition.scores for name, condition in evaluation.conditions.items()}
    assert list(scores) == [PREFIX, NO_PREFIX, TEXT_PROMPT]
    assert scores[PREFIX]["exact_match"].value >= 90
    assert scores[NO_PREFIX]["exact_match"].value == 0
    assert scores[PREFIX]["loss"].value < 0.1 < scores[NO_PREFIX]["loss"].value
    assert scores[PREFIX]["perplexity"].value < scores[TEXT_PROMPT]["perplexity"].value
    assert evaluation.conditions[PREFIX].num_cut == 0 < evaluation.conditions[NO_PREFIX].num_cut


def test_gains_are_differences_with_the_error_of_the_pairs(evaluation: Evaluation) -> None:
    new = evaluation.conditions[PREFIX].scores
    for baseline, gains in evaluation.gains.items():
        old = evaluation.conditions[baseline].scores
        for name, gain in gains.items():
            assert gain.value == pytest.approx(new[name].value - old[name].value)
    assert evaluation.gains[NO_PREFIX]["bleu"].standard_error > 0


def test_the_text_prompt_is_what_the_prefix_says_it_began_as(evaluation: Evaluation) -> None:
    manifest = decode(bundled("record-to-sentence"), evaluation.digest).manifest
    assert evaluation.text_prompt == manifest.training["init_text"]


def test_a_prefix_of_a_text_scores_what_the_text_in_the_prompt_scores(
    demo_model: LoadedModel, demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    """The two conditions take different ways through the engine and must meet."""
    artifact = baked(demo_model, demo_engine, demo_tokenizer.encode(TEXT))
    examples = held_out(demo_tokenizer, "record-qa", 10)
    settings = EvaluationSettings(metrics=("token_f1",), text_prompt=TEXT)

    found = evaluate(demo_engine, demo_tokenizer, artifact, examples, settings)

    prefix, text = (found.conditions[name].scores for name in (PREFIX, TEXT_PROMPT))
    assert prefix["token_f1"] == text["token_f1"]
    assert prefix["loss"].value == pytest.approx(text["loss"].value, abs=1e-5)
    assert abs(found.gains[TEXT_PROMPT]["loss"].value) < 1e-5
    assert abs(found.gains[NO_PREFIX]["loss"].value) > 0.01


def test_forgetting_is_seen_where_there_is_some(evaluation: Evaluation) -> None:
    probe = evaluation.forgetting
    assert probe is not None
    assert probe.without.value < 4 < probe.with_prefix.value  # the base knows its own corpus
    assert probe.lost.value > 5 * probe.lost.standard_error > 0
    assert probe.source == "the demo's own corpus"


def test_a_prefix_that_is_a_whole_document_of_that_kind_makes_the_base_forget_little(
    demo_model: LoadedModel, demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    """In pretraining every document but the first of a row followed another one and an end of text."""
    document = (*demo_tokenizer.encode(GENERAL.text.split("\n\n")[0]), END_OF_TEXT)
    found = evaluate(
        demo_engine,
        demo_tokenizer,
        baked(demo_model, demo_engine, document),
        held_out(demo_tokenizer, "sentiment", 2),
        EvaluationSettings(general_text=GENERAL),
    )
    assert found.forgetting is not None
    assert abs(found.forgetting.lost.value) < 0.1


@pytest.mark.parametrize("record", [{}, {"init_text": "a long text that was cut sho..."}])
def test_what_could_not_be_measured_is_said(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer, record: dict[str, str]
) -> None:
    data = bundled("sentiment")
    prefix = decode(data, digest_of(data))
    silent = prefix.manifest.model_copy(update={"training": record})
    artifact = encode(silent, prefix.keys, prefix.values)
    examples = held_out(demo_tokenizer, "sentiment", 3)
    settings = EvaluationSettings(metrics=("bleu",))

    found = evaluate(demo_engine, demo_tokenizer, artifact, examples, settings)

    assert list(found.conditions) == [PREFIX, NO_PREFIX]
    assert found.forgetting is None
    notes = "\n".join(found.notes)
    assert all(said in notes for said in ("--text-prompt", "--forgetting-text", "four words"))


def test_examples_that_fill_the_model_are_judged_as_far_as_it_has_positions(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    """As long as training takes them: no room for more than the right answer, nor for a text longer than the prefix."""
    data = bundled("sentiment")
    prefix, limit = decode(data, digest_of(data)), demo_engine.base.position_limit
    assert limit is not None
    told = {"init_text": TEXT * 3}
    artifact = encode(
        prefix.manifest.model_copy(update={"training": told}), prefix.keys, prefix.values
    )
    answer = demo_tokenizer.encode(" positive")
    num_prompt_tokens = limit - prefix.manifest.num_virtual_tokens - len(answer)
    ids = demo_tokenizer.encode(GENERAL.text)[:num_prompt_tokens]
    example = EncodedExample(ids, answer, " positive")

    found = evaluate(demo_engine, demo_tokenizer, artifact, [example], EvaluationSettings())

    assert list(found.conditions) == [PREFIX, NO_PREFIX]
    assert f"and the model {limit} positions" in "\n".join(found.notes)
    asked_for = EvaluationSettings(text_prompt=TEXT * 3)
    with pytest.raises(TrainerError, match="prompt 3: "):
        evaluate(demo_engine, demo_tokenizer, artifact, [example], asked_for)


def test_the_result_is_json_without_numbers_that_are_none(evaluation: Evaluation) -> None:
    scores = evaluation.conditions[PREFIX].scores
    endless = dataclasses.replace(scores["loss"], value=float("inf"), standard_error=float("nan"))
    condition = dataclasses.replace(
        evaluation.conditions[PREFIX], scores={**scores, "perplexity": endless}
    )
    changed = dataclasses.replace(
        evaluation, conditions={**evaluation.conditions, PREFIX: condition}
    )

    value = json.loads(changed.as_json(), parse_constant=pytest.fail)

    assert value["conditions"]["prefix"]["scores"]["perplexity"]["value"] is None
    assert value["conditions"]["prefix"]["scores"]["bleu"]["value"] == scores["bleu"].value
    assert value["num_examples"] == 12


def test_evaluating_twice_gives_the_same(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    first = judged(demo_engine, demo_tokenizer, "record-qa")
    assert judged(demo_engine, demo_tokenizer, "record-qa") == first


def test_metrics_for_early_stopping_are_those_of_the_evaluation(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer, evaluation: Evaluation
) -> None:
    task, names = "record-to-sentence", ("exact_match", "bleu")
    examples = held_out(demo_tokenizer, task, 12)
    found = generated_metrics(demo_engine, bundled(task), examples, names)
    assert found == {name: evaluation.conditions[PREFIX].scores[name].value for name in names}
    with_errors = generated_scores(demo_engine, bundled(task), examples, names)
    assert with_errors == {name: evaluation.conditions[PREFIX].scores[name] for name in names}


def test_nothing_to_evaluate_on_is_refused(
    demo_engine: EngineInProcess, demo_tokenizer: Tokenizer
) -> None:
    with pytest.raises(TrainerError, match="no held-out examples"):
        evaluate(
            demo_engine,
            demo_tokenizer,
            bundled("sentiment"),
            list[EncodedExample](),
            EvaluationSettings(),
        )
