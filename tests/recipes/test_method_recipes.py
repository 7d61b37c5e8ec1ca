"""The settings of each method: which there are, and how they depend on each other."""

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes import METHODS, RBPRecipe, Recipe, SBPRecipe, SparseVDRecipe
from pyro_sbp.recipes.gated_recipe import GatedRecipe
from pyro_sbp.recipes.method_recipes import RECIPE_CLASSES
from pyro_sbp.recipes.recipe import setting_names


@pytest.mark.parametrize(
    ("method", "setting", "value", "words"),
    [
        ("sbp", "order", "together", "'order' is a setting of rbp, not of sbp"),
        ("sbp", "exact_kl", True, "is a setting of sparse-vd, not of sbp"),
        ("rbp", "exact_kl", True, "is a setting of sparse-vd, not of rbp"),
        ("rbp", "kl_free_epochs", 1, "is a setting of sbp and sparse-vd, not of rbp"),
        ("sparse-vd", "order", "reversed", "not of sparse-vd"),
        ("sparse-vd", "prior_scale", 3.0, "is a setting of sbp and rbp, not of sparse-vd"),
        ("sparse-vd", "macs_weight", 1.0, "not of sparse-vd"),
        ("sparse-vd", "noise_per", "example", "not of sparse-vd"),
        ("sparse-vd", "init_loc", 0.1, "not of sparse-vd"),
    ],
)
def test_a_setting_of_another_method_is_refused(method, setting, value, words):
    cls = RECIPE_CLASSES[method]
    with pytest.raises(RequestError, match=f"mine.toml: .*{words}"):
        cls.from_dict({setting: value}, "mine.toml")
    with pytest.raises(RequestError, match=words):
        cls().replace(**{setting: value})
    with pytest.raises(RequestError, match=f"there is no setting '{setting}'"):
        cls(**{setting: value})


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (
            SBPRecipe,
            {"current_costs": True, "macs_weight": 2.0, "criterion": "bmrs-n"},
            "current_costs is true, which needs signal-to-noise ratios .* criterion is bmrs-n",
        ),
        (
            SBPRecipe,
            {"current_costs": True, "macs_weight": 2.0, "threshold": 0.0},
            "and a threshold > 0; threshold is 0.0",
        ),
        (
            SBPRecipe,
            {"cost_batch_size": 64},
            "cost_batch_size applies to latencies only; cost is macs",
        ),
        (
            RBPRecipe,
            {"target_macs_ratio": 5.0},
            "needs noise on all gates at once; order is forward",
        ),
        (
            SBPRecipe,
            {"finetune_epochs": 0, "distill": 4.0},
            "set finetune_epochs, or distill to 0",
        ),
    ],
)
def test_settings_that_have_no_effect_together_are_refused(cls, settings, words):
    with pytest.raises(RequestError, match=words):
        cls(**settings)


def test_values_can_be_taken_away():
    assert RBPRecipe(prior_scale=4.0).replace(prior_scale=None).prior_scale is None
    assert SBPRecipe(gated_learning_rate=0.1).replace(gated_learning_rate=None) == SBPRecipe()


def test_epochs_keep_the_shares_of_the_rising_kl():
    recipe = SparseVDRecipe(epochs=100, kl_free_epochs=10, kl_rising_epochs=30).with_epochs(50)
    assert (recipe.epochs, recipe.kl_free_epochs, recipe.kl_rising_epochs) == (50, 5, 15)
    assert RBPRecipe().with_epochs(7).epochs == 7
    recipe = SBPRecipe(epochs=50, cut_every=10)
    assert [recipe.with_epochs(epochs).cut_every for epochs in (100, 5, 1)] == [20, 1, 0]


@pytest.mark.parametrize("cls", [Recipe, GatedRecipe])
def test_settings_are_those_of_a_method(cls):
    with pytest.raises(RequestError, match="Recipe has no method; use SBPRecipe, RBPRecipe or"):
        cls()


def test_every_setting_has_a_description():
    for method in METHODS:
        fields = RECIPE_CLASSES[method].__pydantic_fields__
        assert tuple(fields) == setting_names(RECIPE_CLASSES[method])
        assert all(field.description.endswith((".", ")")) for field in fields.values())


def test_gates_share_the_epochs_of_rbp_only_if_they_take_turns():
    recipe = RECIPE_CLASSES["rbp"](epochs=25)
    assert recipe.epochs_per_gate(4) == 6
    assert recipe.replace(order="together").epochs_per_gate(4) == 25
    assert RECIPE_CLASSES["sbp"](epochs=25).epochs_per_gate(4) == 25
