"""The text on which one sees what a prefix makes the base forget."""

from demo import GENERAL_TEXT_FILE
from demo.build.general_text import general_text


def test_the_shipped_text_is_what_its_script_makes() -> None:
    assert GENERAL_TEXT_FILE.read_text(encoding="utf-8") == general_text()
