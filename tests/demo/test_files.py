"""What the wheel ships: complete, small enough, and with scores that meet the targets."""

import json
import re
from typing import Any

import pytest
from safetensors import safe_open

from demo import DEMO_DIR, MODEL_DIR, PREFIXES_DIR, SCORES_FILE, load_samples
from demo.build.tables import tables
from demo.build.targets import mean_match, missed

MAX_BYTES = 16 * 2**20
TASK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
ARTIFACTS = sorted(PREFIXES_DIR.glob("*.safetensors"))


@pytest.fixture
def scores() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(SCORES_FILE.read_text())
    return report


def test_model_files_are_there() -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert (MODEL_DIR / name).is_file()


def test_shipped_files_are_small() -> None:
    files = [path for path in DEMO_DIR.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= MAX_BYTES


def test_weights_are_bf16() -> None:
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_model_knows_its_end_of_text() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    generation = json.loads((MODEL_DIR / "generation_config.json").read_text())
    assert config["eos_token_id"] is not None
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_there_are_tasks_with_valid_names() -> None:
    assert len(ARTIFACTS) >= 5
    assert all(TASK_NAME.fullmatch(path.stem) for path in ARTIFACTS)


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_artifact_has_the_shape_of_the_model(path: Any) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    with safe_open(path, "pt") as artifact:
        manifest = json.loads(artifact.metadata()["prefixd"])
        names = list(artifact.keys())
        shapes = {tuple(artifact.get_slice(name).get_shape()) for name in names}
    kinds = [
        f"dec_self.{n:03d}.{kind}" for n in range(config["num_hidden_layers"]) for kind in "kv"
    ]
    assert sorted(names) == sorted(kinds)
    length = manifest["num_virtual_tokens"]
    assert shapes == {(length, config["num_key_value_heads"], config["head_dim"])}
    assert manifest["token_start"] is None, "requests begin right behind the prefix"
    assert manifest["base_model"]["fingerprint"].startswith("sha256:")


def test_every_task_has_a_sample_and_a_score(scores: dict[str, Any]) -> None:
    tasks = {path.stem for path in ARTIFACTS}
    assert {sample.task for sample in load_samples()} == tasks
    assert set(scores["tasks"]) == tasks


def test_base_copies_every_field(scores: dict[str, Any]) -> None:
    assert min(scores["base"]["copying_accuracy"].values()) >= 0.95


def test_scores_meet_every_target(scores: dict[str, Any]) -> None:
    assert missed(scores) == []


def test_the_readme_shows_the_scores(scores: dict[str, Any]) -> None:
    assert tables(scores) in (DEMO_DIR / "README.md").read_text(encoding="utf-8")


def test_the_first_page_shows_the_same_figures(scores: dict[str, Any]) -> None:
    page = (DEMO_DIR.parent / "README.md").read_text(encoding="utf-8")
    for name, row in scores["tasks"].items():
        [line] = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        base = row["base"]["exact_match"]
        assert line.endswith(f"| {base} % | **{mean_match(row):.1f} %** |")
