import pytest

from dagman.errors import duration


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (600, "10 min"), (90 * 60, "90 min"), (36000, "10 h"), (86400 * 30, "30 days")]
)
def test_durations_are_for_people(seconds: float, words: str) -> None:
    assert duration(float(seconds)) == words
