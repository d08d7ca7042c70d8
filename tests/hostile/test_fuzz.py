"""The fuzzer finds nothing in 20,000 mutants, and finds whatever fault is planted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefix_store import artifact, header, manifest, tensor_file, upload, validation
from prefix_store.errors import MalformedArtifact
from tests.hostile import fuzz
from tests.hostile.mutation import mutant
from tests.hostile.originals import originals

ROOT = Path(__file__).parents[2]
FILES = originals()
SEED = 1000


def run_fuzzer(
    directory: Path, *arguments: str, plant: str = ""
) -> tuple[int, dict[str, Any], str]:
    """Exit status, closing line and complaints; `plant` is code that the judging processes run first."""
    program = directory / "planted.py"  # what spawns has a file, which what is spawned runs again
    program.write_text(
        f"import sys\n{plant}\nfrom tests.hostile import fuzz\n"
        "if __name__ == '__main__':\n    sys.exit(fuzz.main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(program), "--out", str(directory / "kept"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_twenty_thousand_mutants_do_no_harm(tmp_path: Path) -> None:
    """`make fuzz` is the same for a million."""
    status, found, complaints = run_fuzzer(tmp_path, "--mutants", "20000", "--seed", str(SEED))

    assert (status, found["faults"]) == (0, {}), complaints
    assert found["mutants"] == sum(found["outcomes"].values()) == 20_000
    assert found["outcomes"]["accepted"] > 1000, "too coarse to test anything"
    assert found["outcomes"].keys() == {
        *("accepted", "MalformedArtifact", "IncompatiblePrefix", "ImportRefused"),
        "ArtifactTooLarge",
    }
    assert found["cpu_ms"]["max"] <= 50
    assert 0 < found["traced_peak_kib"] <= 16 * 1024


def test_a_mutant_is_the_same_whenever_it_is_made() -> None:
    forwards = [mutant(number, SEED, FILES) for number in range(300)]
    backwards = [mutant(number, SEED, FILES) for number in reversed(range(300))]
    assert forwards == backwards[::-1]
    assert len({one.data for one in forwards}) > 290
    assert mutant(7, SEED, FILES).data != mutant(7 + len(FILES), SEED, FILES).data


# ---- planted faults ------------------------------------------------------------------------------

READ_FIELDS = "prefix_store.importers.incoming.read_fields"


def raises_key_error(patch: pytest.MonkeyPatch) -> None:
    def fragile(head: bytearray, total_bytes: int) -> Any:
        fields = tensor_file.read_fields(head, total_bytes)
        fields[0]["dec_self.000.k"]
        return fields

    patch.setattr(READ_FIELDS, fragile)


def ignores_offsets(patch: pytest.MonkeyPatch) -> None:
    for module in (tensor_file, header):
        patch.setattr(module, "check_data", lambda *_: [])


def swaps_keys_and_values(patch: pytest.MonkeyPatch) -> None:
    real = artifact._tensors
    patch.setattr(artifact, "_tensors", lambda *given: real(*given)[::-1])


def reads_another_manifest(patch: pytest.MonkeyPatch) -> None:
    def other(text: str) -> Any:
        return manifest.parse_manifest(text).model_copy(update={"description": "other"})

    patch.setattr("prefix_store.header.parse_manifest", other)


def looks_at_no_value(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(validation, "_value_fault", lambda *_: None)


def refuses_what_is_right(patch: pytest.MonkeyPatch) -> None:
    real = validation._value_fault
    patch.setattr(
        validation, "_value_fault", lambda x, d, _: real(x, d, 100.0) and real(x, d, 100.0)
    )


def publishes_before_proving(patch: pytest.MonkeyPatch) -> None:
    real = upload.Upload.judge

    def careless(self: upload.Upload, **given: Any) -> Any:
        self._staged.publish()
        return real(self, **given)

    patch.setattr(upload.Upload, "judge", careless)


def names_a_path(patch: pytest.MonkeyPatch) -> None:
    def telling(*_: object) -> Any:
        raise MalformedArtifact.at("/header", "can not read /tmp/upload-1")

    patch.setattr(READ_FIELDS, telling)


def takes_its_time(patch: pytest.MonkeyPatch) -> None:
    def slow(head: bytearray, total_bytes: int) -> Any:
        until = time.thread_time() + 0.06
        while time.thread_time() < until:
            pass
        return tensor_file.read_fields(head, total_bytes)

    patch.setattr(READ_FIELDS, slow)


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (raises_key_error, "KeyError escaped"),
    (ignores_offsets, "accepted what the safetensors library refuses"),
    (swaps_keys_and_values, "what was stored is not what the library reads"),
    (reads_another_manifest, "what was stored is not what the library reads"),
    (looks_at_no_value, "accepted values that can not be served"),
    (refuses_what_is_right, "a file with nothing wrong was refused"),
    (publishes_before_proving, "left something in the store"),
    (names_a_path, "names a path"),
    (takes_its_time, "ms of CPU time"),
]


@pytest.mark.parametrize(("plant", "fault"), PLANTED, ids=[p.__name__ for p, _ in PLANTED])
def test_a_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], fault: str
) -> None:
    numbers = range(5 if plant is takes_its_time else 500)
    plant(monkeypatch)
    found = [t for tally in fuzz.tallies(numbers, SEED, FILES) for t in tally.faults.values()]
    assert any(fault in text for texts in found for text in texts), found


PLANTED_IN_PROCESSES = """
import os, torch
from prefix_store.importers import peft
real, calls = peft.recognise, []
def planted(*given):
    calls.append(None)
    match len(calls) - 5:  # the valid files are 1 to 4
        case 0: bytearray(24 << 20)
        case 1: torch.ones(6 << 20)
        case 2: os.kill(os.getpid(), 11)
    return real(*given)
if __name__ != "__main__":
    peft.recognise = planted
"""


def test_what_takes_memory_or_kills_its_process_is_found_and_can_be_replayed(
    tmp_path: Path,
) -> None:
    arguments = ("--mutants", "200", "--seed", str(SEED), "--first", "50")

    status, found, complaints = run_fuzzer(tmp_path, *arguments, plant=PLANTED_IN_PROCESSES)

    assert status == 1
    texts = [text.partition(":")[0] for [text] in found["faults"].values()]
    assert texts == ["MemoryError escaped", "RuntimeError escaped", "ended its process"]
    kept = {path.name.split(".")[2]: path for path in (tmp_path / "kept").iterdir()}
    assert kept.keys() == found["faults"].keys()
    for number, path in kept.items():
        assert f"--replay {path}" in complaints
        assert path.read_bytes() == mutant(int(number), SEED, FILES).data
        assert fuzz.main(["--replay", str(path)]) == 0  # here nothing is planted


def test_a_kept_file_is_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = next(n for n in range(100) if FILES[n % len(FILES)].name == "native-f16")
    fuzz.report(number, SEED, ("for the test",), tmp_path)
    [kept] = tmp_path.iterdir()
    names_a_path(monkeypatch)

    assert fuzz.main(["--replay", str(kept)]) == 1
    assert "names a path" in json.loads(capsys.readouterr().out)["faults"][0]
