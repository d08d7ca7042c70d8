"""Each failure mode is named in records that show it, and in no others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.synthetic_run import SyntheticRun, settling
from trainer.doctor import Failure, Finding, Severity, diagnose

SANE = SyntheticRun()


def found(run: SyntheticRun, records: list[dict[str, Any]] | None = None) -> list[Finding]:
    return diagnose(run.records() if records is None else records, run.config)


def names(run: SyntheticRun, records: list[dict[str, Any]] | None = None) -> list[Failure]:
    return [finding.name for finding in found(run, records)]


# ---- sane runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        SANE,
        replace(SANE, noise=0.4),
        replace(SANE, train=settling(3.0, 2.1), held=settling(3.1, 2.3)),
        replace(SANE, num_virtual_tokens=1),
        replace(SANE, gap=None, base_loss=None),
        replace(SANE, attention=(0.5, 0.95), sink=(0.75, 0.85)),
        replace(SANE, num_steps=10),
        replace(
            SANE, warnings=("separator", "joined_otherwise", "chat_and_begin_token", "too_long")
        ),
        replace(SANE, metrics={"exact_match": 55.0}),
        replace(SANE, train=lambda _: 0.05, held=lambda _: 0.06, moved=0.001),
        replace(SANE, key_start=0.4, key_growth=1.9),
    ],
    ids=[
        "solved",
        "noisy batches",
        "an open task that ends at two nats",
        "one token is enough",
        "little is known",
        "the base rests on its first token",
        "too few steps to judge",
        "harmless notes",
        "as many exact matches as the loss promises",
        "good from the start",
        "small norms that grew",
    ],
)
def test_a_sane_run_draws_no_alarm(run: SyntheticRun) -> None:
    assert found(run) == []


def test_a_run_without_records_draws_no_alarm() -> None:
    assert diagnose([], {}) == []


def test_a_hard_batch_is_no_spike() -> None:
    records = SANE.records()
    step = next(r for r in records if r["kind"] == "step" and r["step"] == 120)
    step["loss"] = 7.0
    assert names(SANE, records) == []


def test_early_stopping_soon_after_the_best_is_no_overfitting() -> None:
    def held(done: float) -> float:
        return settling(7.8, 0.30)(done) + 0.01 * max(done - 0.8, 0.0)

    assert names(replace(SANE, train=settling(8.0, 0.2), held=held, end="no improvement")) == []


# ---- no improvement --------------------------------------------------------------------------------


def test_a_prefix_that_hardly_moved_had_too_low_a_learning_rate() -> None:
    run = replace(SANE, train=lambda _: 8.0, held=lambda done: 7.8 - 0.01 * done, moved=2e-4)
    [finding] = found(run)
    assert finding.name is Failure.LEARNING_RATE_TOO_LOW
    assert finding.severity is Severity.ERROR
    assert "moved by 0.02 % of its own norm" in finding.evidence
    assert "(0.005)" in finding.change


def test_a_loss_that_still_falls_on_a_straight_line_had_too_low_a_learning_rate() -> None:
    run = replace(SANE, train=lambda d: 8 - 2 * d, held=lambda d: 7.8 - 2 * d, moved=0.05)
    [finding] = found(run)
    assert (finding.name, finding.severity) == (Failure.LEARNING_RATE_TOO_LOW, Severity.WARNING)


def test_a_training_loss_that_rises_had_too_high_a_learning_rate() -> None:
    run = replace(SANE, train=lambda d: 4 + 2 * d, held=lambda d: 4 + 2 * d)
    assert names(run)[0] is Failure.LEARNING_RATE_TOO_HIGH
    assert "training loss rose from 4.19 to 5.8 nats" in found(run)[0].evidence


def test_a_prefix_that_grew_until_prompts_no_longer_counted_had_too_high_a_learning_rate() -> None:
    run = replace(SANE, gap=(3.5, 0.06), key_growth=2.5, attention=(0.15, 0.6))
    run = replace(run, train=settling(8, 3.2), held=settling(7.8, 3.2))
    [finding] = found(run)
    assert finding.name is Failure.LEARNING_RATE_TOO_HIGH
    assert "3.5 nats" in finding.evidence
    assert "0.06" in finding.evidence


def test_a_short_prefix_that_grew_to_be_heard_drowns_nothing() -> None:
    run = replace(SANE, gap=(3.5, 0.3), key_growth=2.5, attention=(0.01, 0.2), num_virtual_tokens=2)
    assert names(run) == []


def test_few_tokens_that_fit_neither_data_are_too_few() -> None:
    run = replace(SANE, train=settling(8, 5.2), held=settling(7.8, 5.2), num_virtual_tokens=1)
    [finding] = found(run)
    assert (finding.name, finding.severity) == (Failure.PREFIX_TOO_SHORT, Severity.WARNING)
    assert "10 tokens" in finding.change


def test_many_tokens_that_fit_neither_data_are_not_too_few() -> None:
    assert names(replace(SANE, train=settling(8, 5.2), held=settling(7.8, 5.2))) == []


def test_completions_that_never_depended_on_their_prompts_are_a_task_mismatch() -> None:
    run = replace(SANE, train=settling(11, 3.2), held=settling(11, 3.6), gap=(-0.3, -0.2))
    [finding] = found(run)
    assert (finding.name, finding.severity) == (Failure.TASK_MISMATCH, Severity.ERROR)
    assert "3.62 nats a token, and at 3.42" in finding.evidence


@pytest.mark.parametrize(("error", "named"), [(0.3, True), (0.05, False)])
def test_prompts_that_matter_no_more_than_chance_explains_do_not_matter(
    error: float, named: bool
) -> None:
    flat = settling(8, 3.2)
    run = replace(SANE, train=flat, held=flat, gap=(0.1, 0.4), gap_error=error)
    assert ("task_mismatch" in names(run)) == named


def test_data_with_a_single_prompt_is_no_task_mismatch() -> None:
    run = replace(SANE, train=settling(8, 3.2), held=settling(8, 3.2), gap=(0.0, 0.0))
    records = run.records()
    records[0]["num_prompts"] = 1
    assert names(run, records) == []


def test_a_prefix_that_moved_and_is_no_better_than_the_bare_base_is_a_task_mismatch() -> None:
    run = replace(SANE, train=lambda _: 7.8, held=lambda _: 7.8, gap=None, base_loss=7.8)
    [finding] = found(run)
    assert finding.name is Failure.TASK_MISMATCH
    assert "7.8 without a prefix" in finding.evidence


def test_a_failure_that_no_rule_explains_is_still_told() -> None:
    run = replace(SANE, train=lambda _: 7.8, held=lambda _: 7.8, base_loss=None)
    assert [(f.name, f.severity) for f in found(run)] == [(Failure.NO_IMPROVEMENT, Severity.ERROR)]


def test_a_warning_of_another_template_is_a_template_mismatch() -> None:
    [finding] = found(replace(SANE, warnings=("other_template",)))
    assert (finding.name, finding.severity) == (Failure.TEMPLATE_MISMATCH, Severity.WARNING)
    assert "about other_template" in finding.evidence


def test_answers_far_worse_than_the_loss_promises_are_a_template_mismatch() -> None:
    [finding] = found(replace(SANE, metrics={"exact_match": 2.0}))
    assert (finding.name, finding.severity) == (Failure.TEMPLATE_MISMATCH, Severity.ERROR)
    assert "has 2 %" in finding.evidence


# ---- overfitting and instability -------------------------------------------------------------------


def test_a_held_out_loss_that_rises_while_the_training_loss_falls_is_overfitting() -> None:
    def held(done: float) -> float:
        return settling(7.8, 2.3)(done) + max(done - 0.4, 0.0)

    [finding] = found(replace(SANE, train=settling(8, 0.03), held=held))
    assert (finding.name, finding.severity) == (Failure.OVERFITTING, Severity.WARNING)
    assert "18,432 parameters learn from 10,000 completion tokens" in finding.evidence


def test_a_training_loss_far_below_a_held_out_loss_that_stays_is_overfitting() -> None:
    assert names(replace(SANE, held=settling(7.8, 0.6))) == [Failure.OVERFITTING]


def test_a_held_out_loss_that_still_falls_is_not_overfitting_yet() -> None:
    assert names(replace(SANE, train=settling(8, 0.05, 20), held=settling(7.8, 0.6, 1.5))) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_no_number_is_named_with_its_step(loss: float | None) -> None:
    records = SANE.records()
    for record in records:
        if record["kind"] == "step" and record["step"] >= 150:
            record["loss"] = loss
    finding = found(SANE, records)[0]
    assert (finding.name, finding.severity) == (Failure.NOT_A_NUMBER, Severity.ERROR)
    assert "since step 150" in finding.evidence


def test_a_run_that_ended_by_divergence_had_a_loss_that_is_no_number() -> None:
    assert Failure.NOT_A_NUMBER in names(replace(SANE, end="diverged"))


def test_jumps_that_last_are_spikes() -> None:
    records = SANE.records()
    for record in records:
        if record["kind"] == "step" and record["step"] in (100, 101, 102, 150, 151):
            record["loss"] = 6.0
    [finding] = found(SANE, records)
    assert (finding.name, finding.severity) == (Failure.LOSS_SPIKES, Severity.WARNING)
    assert "jumped 2 times; at step" in finding.evidence


def test_a_spike_is_named_by_its_own_step_whatever_losses_are_missing() -> None:
    records = SANE.records()
    for record in records:
        if record["kind"] == "step" and record["step"] in range(3, 9):
            record["loss"] = None
        elif record["kind"] == "step" and record["step"] in (100, 101, 102):
            record["loss"] = 6.0
    [finding] = [f for f in found(SANE, records) if f.name is Failure.LOSS_SPIKES]
    assert "jumped 1 time; at step 100 from" in finding.evidence


def test_a_jump_that_is_worked_off_slowly_is_a_spike() -> None:
    records = SANE.records()
    for record in records:
        if record["kind"] == "step" and record["step"] in (120, 121, 122):
            record["loss"] = {120: 5.0, 121: 0.9, 122: 0.5}[record["step"]]
    assert names(SANE, records) == [Failure.LOSS_SPIKES]


def test_norms_that_training_blew_up_are_named_with_the_learning_rate() -> None:
    found_here = found(replace(SANE, key_growth=5.0, gap=(3.5, 3.5)))
    assert [f.name for f in found_here] == [Failure.EXPLODING_NORMS]
    assert "5.0 times as long" in found_here[0].evidence
    assert "Lower the learning rate" in found_here[0].change


def test_norms_that_were_large_from_the_start_blame_the_start() -> None:
    [finding] = found(replace(SANE, key_start=6.0, key_growth=1.0))
    assert finding.name is Failure.EXPLODING_NORMS
    assert finding.change.startswith("They began so")


# ---- attention -------------------------------------------------------------------------------------


def test_a_prefix_that_nobody_looks_at_is_dead() -> None:
    run = replace(SANE, train=lambda _: 7.8, held=lambda _: 7.7, attention=(0.2, 0.0005))
    finding = found(run)[0]
    assert (finding.name, finding.severity) == (Failure.DEAD_PREFIX, Severity.ERROR)
    assert "at first it was 20 %" in finding.evidence


def test_a_short_prefix_with_little_attention_that_helps_is_not_dead() -> None:
    run = replace(SANE, held=settling(7.8, 0.4), train=settling(8, 0.4), attention=(0.01, 0.012))
    assert names(run) == []


def test_little_attention_on_a_prefix_before_long_prompts_is_not_too_little() -> None:
    run = replace(SANE, train=lambda _: 7.8, held=lambda _: 7.7, attention=(0.01, 0.004), gap=None)
    records = run.records()
    assert Failure.DEAD_PREFIX in names(run, records)
    records[0]["training_tokens"]["prompt"]["median"] = 2_000
    assert Failure.DEAD_PREFIX not in names(run, records)


def test_one_token_that_grew_to_be_heard_is_too_short_and_has_not_exploded() -> None:
    run = replace(
        SANE, train=settling(8, 3), held=settling(7.8, 3), key_growth=4.0, num_virtual_tokens=1
    )
    assert names(replace(run, attention=(0.01, 0.2))) == [Failure.PREFIX_TOO_SHORT]
    assert names(replace(run, attention=(0.01, 0.9))) == [Failure.EXPLODING_NORMS]


def test_a_first_row_that_took_all_attention_is_captured() -> None:
    run = replace(
        SANE, held=settling(7.8, 2), train=settling(8, 2), attention=(0.3, 0.99), sink=(0.02, 0.97)
    )
    [finding] = found(run)
    assert (finding.name, finding.severity) == (Failure.SINK_CAPTURED, Severity.ERROR)
    assert "in 4 of 4 layers" in finding.evidence


def test_a_first_row_that_hides_the_prompt_is_captured_although_it_began_so() -> None:
    run = replace(
        SANE,
        held=settling(6, 4),
        train=settling(6, 4),
        attention=(0.99, 0.99),
        sink=(0.95, 0.95),
        gap=(0, 0),
    )
    assert names(run) == [Failure.SINK_CAPTURED]


def test_the_worst_finding_comes_first() -> None:
    run = replace(SANE, warnings=("other_template",), attention=(0.3, 0.99), sink=(0.02, 0.97))
    severities = [finding.severity for finding in found(run)]
    assert severities == sorted(severities, reverse=True)
    assert len(severities) == 2
