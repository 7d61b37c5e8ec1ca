"""Single settings of a recipe, as --set gives them."""

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes import (
    RECIPES,
    RBPRecipe,
    SBPRecipe,
)
from pyro_sbp.recipes.overrides import with_overrides


def test_single_settings_are_written_as_in_a_file():
    recipe = with_overrides(
        RBPRecipe(),
        ["epochs=3", "prior-scale=none", "order=together", "flip = true", "kl_scale.conv1=15",
         "kl_scale.fc1=2", "learning_rate=1e-2"],
    )  # fmt: skip
    assert recipe == RBPRecipe(
        epochs=3, prior_scale=None, order="together", flip=True,
        kl_scale={"conv1": 15, "fc1": 2}, learning_rate=1e-2,
    )  # fmt: skip
    before = SBPRecipe(kl_scale={"conv1": 3.0})
    assert with_overrides(before, ["kl_scale.fc1=2"]).kl_scale == {"conv1": 3.0, "fc1": 2}
    assert with_overrides(before, ["kl_scale=2"]).kl_scale == 2
    for wrong, words in (
        ("epochs", "'epochs' is not an assignment; expected NAME=VALUE"),
        ("=3", "is not an assignment"),
        ("epochs=", "epochs is ''; expected an integer"),
        ("epoch=3", "did you mean 'epochs'"),
        ("order=together", "'order' is a setting of rbp, not of sbp"),
        ("method=rbp", "use --method"),
        ("criterion=[1]", r"unknown criterion '\[1\]'; expected snr, bmrs-n, bmrs-u"),
    ):
        with pytest.raises(RequestError, match=words):
            with_overrides(before, [wrong])


def test_a_weight_for_one_gate_does_not_change_those_of_the_others():
    with pytest.raises(RequestError, match=r"kl_scale is 3.0 for all gates, and would become 1"):
        with_overrides(RECIPES["lenet-dense"], ["kl_scale.fc1=5"])
    with pytest.raises(RequestError, match=r"kl_scale is many for all gates, and would become 1"):
        with_overrides(RECIPES["lenet-dense"], ['kl_scale="many"', "kl_scale.fc1=5"])


def test_epochs_by_name_are_those_of_the_flag():
    recipe = RECIPES["sparse-digits"]
    assert with_overrides(recipe, ["epochs=5"]) == recipe.with_epochs(5)
