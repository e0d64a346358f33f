import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "examples" / "demo.py")))


def test_differences_are_marked_and_counted(demo: SimpleNamespace) -> None:
    shown, share = demo.marked("The mill was built in 1731.", "The mill was built in 1713.")
    assert shown.strip() == "The mill was built in [-1731.-] {+1713.+}"
    assert share == pytest.approx(5 / 6)
    assert demo.marked("All of it.", "All of it.") == ("All of it.", 1.0)
    assert demo.marked("All.\n\nOf it.", "All.\nOf it.") == ("All.\n\nOf it.", 1.0)


def test_its_questions_can_be_answered_from_its_document(demo: SimpleNamespace) -> None:
    text = demo.DOCUMENT.read_text()
    assert all(answer in text for answer in ("Bazalgette", "318 million", "sixteen years", "curtains"))
    assert len(demo.QUESTIONS) == 4
