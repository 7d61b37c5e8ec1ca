"""The words of error messages."""

import json
import pickle

import pytest

from pyro_sbp.errors import damage, unknown


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "it is empty"),
        ('{"a": 1', "it is cut off"),
        ("{a}", "not JSON: "),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_damaged_json_is_described_in_plain_words(content, words):
    with pytest.raises((ValueError, RecursionError)) as caught:
        json.loads(content)
    assert damage(caught.value).startswith(words)


def test_an_error_without_a_message_is_described():
    assert damage(EOFError()) == "it is empty or cut off"
    with pytest.raises(EOFError) as caught:
        pickle.loads(b"")
    assert damage(caught.value) == "it is empty or cut off"


def test_an_unknown_name_is_answered_with_the_hint_first():
    assert unknown("colour", "gren", ["red", "green"]) == (
        "unknown colour 'gren'; did you mean 'green'? expected red, green"
    )
    assert unknown("colour", "x", ["red"], " or a number") == (
        "unknown colour 'x'; expected red or a number"
    )
