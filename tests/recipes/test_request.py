"""Requests: written to JSON, read, and refused."""

import json

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes import (
    RECIPES,
    Request,
)


@pytest.mark.parametrize("name", ["lenet5", "rbp-lenet5", "sparse-digits"])
def test_a_request_survives_json(name):
    request = Request("lenet5", "mnist", RECIPES[name], seed=3)
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "sdp"}, "method is 'sdp'; expected sbp"),
        ({"method": None}, "method is None"),
        ({"recipe": 3}, "recipe is 3; expected settings by name"),
        ({"seed": "x"}, "seed is 'x'; expected an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"precision": float("nan")}, "precision is nan; expected '32-true'"),
        ({"precision": True}, "precision is True; expected '32-true'"),
        ({"data_dir": ["data"]}, r"data_dir is \['data'\]; expected a string"),
        ({"devices": 0}, "devices is 0"),
    ],
)
def test_a_damaged_request_is_refused_in_one_line(changes, words):
    values = {**Request("lenet5", "mnist", RECIPES["lenet5"]).to_dict(), **changes}
    with pytest.raises(RequestError, match=words) as caught:
        Request.from_dict(values)
    assert "\n" not in str(caught.value)
