"""Examples from files, bad lines by their numbers, and a split that does not leak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data import Example, Fields, Message, num_shared_prompts, read_examples, split
from trainer.errors import BadData


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_gives_prompts_and_completions_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        '{"prompt": "a", "completion": "b", "source": "x"}\n\n{"prompt": "c", "completion": "d"}',
    )

    assert read_examples(path) == [Example("a", "b", 1), Example("c", "d", 3)]


def test_messages_end_with_the_answer(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so"},
    ]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": turns}))

    (example,) = read_examples(path)

    assert example.prompt == (Message("system", "be brief"), Message("user", "why?"))
    assert example.completion == "so"


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_columns_are_found_by_name(tmp_path: Path, name: str, mark: str) -> None:
    rows = [["id", "text", "label"], ["1", '"two\nlines"', "x"], ["2", "plain", "y"]]
    path = write(tmp_path / name, "\n".join(mark.join(row) for row in rows) + "\n")

    found = read_examples(path, Fields("text", "label"))

    assert found == [Example("two\nlines", "x", 2), Example("plain", "y", 4)]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufeffprompt,completion\na,b\n")

    assert read_examples(path) == [Example("a", "b", 2)]


def test_every_bad_line_is_named_with_its_fault(tmp_path: Path) -> None:
    good = '{"prompt": "a", "completion": "b"}'
    bad = [
        "{",
        "[]",
        '{"prompt": "a"}',
        '{"prompt": "a", "completion": " "}',
        '{"prompt": 3, "completion": "b"}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "chief", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": ["a", "b"]}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join([good, *bad, good]))

    with pytest.raises(BadData) as caught:
        read_examples(path)

    message = str(caught.value)
    assert f"{len(bad)} bad lines" in message
    for number in range(2, 2 + len(bad)):
        assert f"line {number}: " in message
    assert "line 1:" not in message
    for told in ("not JSON", "expected a JSON object", "completion: expected", "prompt: expected"):
        assert told in message
    assert "the last must be the assistant's" in message


def test_of_many_bad_lines_some_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{\n" * 300)

    with pytest.raises(BadData, match="300 bad lines") as caught:
        read_examples(path)

    assert "and 290 more" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", "", "holds no example"),
        ("a.txt", "x", "expected a file that ends in"),
        ("a.csv", "question,answer\nx,y\n", "no column 'prompt'; .*'question', 'answer'"),
    ],
)
def test_a_file_without_examples_says_what_was_expected(
    tmp_path: Path, name: str, content: str, told: str
) -> None:
    with pytest.raises(BadData, match=told):
        read_examples(write(tmp_path / name, content))


def test_a_file_that_is_not_there_or_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="No such file"):
        read_examples(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(BadData, match="expected UTF-8"):
        read_examples(tmp_path / "b.jsonl")


GOOD_LINE = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "\\ud800", "completion": "b"}',
        '{"prompt": "a", "completion": "b\\udfff"}',
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
    ],
)
def test_half_of_a_surrogate_pair_is_a_bad_line_because_no_tokenizer_takes_it(
    tmp_path: Path, line: str
) -> None:
    with pytest.raises(BadData, match=r"line 2: .*surrogate"):
        read_examples(write(tmp_path / "a.jsonl", f"{GOOD_LINE}\n{line}\n"))


def test_json_that_is_nested_without_end_is_a_bad_line(tmp_path: Path) -> None:
    deep = '{"prompt": "a", "completion": "b", "more": ' + "[" * 100_000

    with pytest.raises(BadData, match=r"line 2: not JSON: nested too deeply"):
        read_examples(write(tmp_path / "a.jsonl", f"{GOOD_LINE}\n{deep}\n"))


def test_a_row_with_a_comma_that_is_not_quoted_is_refused_and_not_cut(tmp_path: Path) -> None:
    """`hello, world,positive` would be learned as ' world' behind 'hello'."""
    text = "prompt,completion\nbye,negative\nhello, world,positive\n"

    with pytest.raises(BadData, match="line 3: 3 columns, but the header line has 2"):
        read_examples(write(tmp_path / "a.csv", text))


def test_a_comma_at_the_end_of_a_row_is_no_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,completion\na,b,\nc,d,,\n")

    assert read_examples(path) == [Example("a", "b", 2), Example("c", "d", 3)]


def test_two_columns_of_the_same_name_are_refused_if_it_is_one_that_is_read(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="2 columns 'completion'"):
        read_examples(write(tmp_path / "a.csv", "prompt,completion,completion\na,b,c\n"))

    path = write(tmp_path / "b.csv", "prompt,note,note,completion\na,x,y,b\n")
    assert read_examples(path) == [Example("a", "b", 2)]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ('a,b\n"c,d\n', "line 3: .*end of data"),
        ('a,b\n"c"c,d\n', "line 3: .*expected after"),
        ("a,b\n" + "c" * 200_000 + ",d\n", "line 3: field larger"),
    ],
)
def test_a_csv_that_can_not_be_read_says_in_which_line(
    tmp_path: Path, rows: str, told: str
) -> None:
    with pytest.raises(BadData, match=told):
        read_examples(write(tmp_path / "a.csv", f"prompt,completion\n{rows}"))


def test_bytes_that_are_not_utf_8_are_found_by_their_line(tmp_path: Path) -> None:
    """The decoder counts from the start of its own buffer, which says nothing to anyone."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n" + b"abc,def\n" * 5_000 + b"caf\xe9,b\n")

    with pytest.raises(BadData, match="line 5002: expected UTF-8, got byte 0xe9"):
        read_examples(path)


def test_an_ending_in_capitals_is_the_same_ending(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "A.CSV", "prompt,completion\na,b\n")) == [
        Example("a", "b", 2)
    ]


def examples(prompts: list[str]) -> list[Example]:
    return [Example(prompt, "x", line) for line, prompt in enumerate(prompts, 1)]


def test_the_split_has_the_asked_size_and_keeps_the_order() -> None:
    given = examples([f"p{i}" for i in range(1000)])

    training, held_out = split(given, 0.1, seed=0)

    assert (len(training), len(held_out)) == (900, 100)
    assert sorted([*training, *held_out], key=lambda e: e.line) == given
    assert training == sorted(training, key=lambda e: e.line)
    assert split(given, 0.1, seed=0) == (training, held_out)
    assert split(given, 0.1, seed=1)[1] != held_out


def test_equal_prompts_are_on_the_same_side() -> None:
    training, held_out = split(examples([f"p{i % 30}" for i in range(300)]), 0.2, seed=0)

    assert num_shared_prompts(training, held_out) == 0
    assert 40 <= len(held_out) <= 80


@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_that_comes_again_and_again_does_not_take_the_training_examples_away(
    seed: int,
) -> None:
    given = examples(["often"] * 60 + [f"p{i}" for i in range(40)])

    training, held_out = split(given, 0.1, seed=seed)

    assert len(held_out) == 10
    assert num_shared_prompts(training, held_out) == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_group_is_held_out_where_all_are_large(seed: int) -> None:
    given = examples(["a"] * 50 + ["b"] * 30 + ["c"] * 40)

    training, held_out = split(given, 0.1, seed=seed)

    assert {e.prompt for e in held_out} == {"b"}
    assert len(training) == 90


def test_an_example_keeps_its_side_when_others_are_added() -> None:
    before = split(examples([f"p{i}" for i in range(400)]), 0.25, seed=0)[1]
    after = split(examples([f"p{i}" for i in range(440)]), 0.25, seed=0)[1]

    prompts = {e.prompt for e in after}
    assert sum(e.prompt in prompts for e in before) >= 90


def test_two_examples_give_one_each_and_one_prompt_can_not_be_split() -> None:
    training, held_out = split(examples(["a", "b"]), 0.1, seed=0)
    assert (len(training), len(held_out)) == (1, 1)

    with pytest.raises(BadData, match="same prompt"):
        split(examples(["a", "a", "a"]), 0.1, seed=0)


def test_shared_prompts_are_counted() -> None:
    assert num_shared_prompts(examples(["a", "b"]), examples(["b", "c", "b"])) == 2
