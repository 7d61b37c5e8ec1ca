"""Recipes: values, files, and what is out of range."""

import json

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.recipes.settings import METHODS, Recipe, read_recipe


def test_a_file_sets_what_it_names(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 3\n[kl_scale]\nconv1 = 160\n")
    assert read_recipe(path) == Recipe(name="mine", epochs=3, kl_scale={"conv1": 160})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = 0", "epochs is 0; expected an integer >= 1"),
        ("epochs = 2.5", "epochs is 2.5; expected an integer"),
        ("epoch = 3", "sets 'epoch', which no recipe has; did you mean 'epochs'"),
        ("batch_size = -1", "batch_size is -1"),
        ("learning_rate = 0", "learning_rate is 0; expected a number > 0 and <= 1"),
        ("noise_learning_rate = nan", "noise_learning_rate is nan"),
        ("weight_decay = inf", "weight_decay is inf"),
        ("macs_weight = -0.5", "macs_weight is -0.5; expected a number >= 0"),
        ("decay = 1.5", "decay is 1.5"),
        ("threshold = true", "threshold is True"),
        ("prior_scale = 0", "prior_scale is 0; expected a number > 0"),
        ("order = 'random'", "order is 'random'; expected forward, reversed, together"),
        ("noise_per = 'unit'", "noise_per is 'unit'; expected 'batch' or 'example'"),
        ("standardize = 1", "standardize is 1; expected true or false"),
        ("flip = 'yes'", "flip is 'yes'; expected true or false"),
        ("crop = -1", "crop is -1; expected an integer >= 0"),
        ("crop = 1.5", "crop is 1.5; expected an integer >= 0"),
        ("crop = true", "crop is True; expected an integer >= 0"),
        ("kl_scale = -1", "kl_scale is -1; expected a number >= 0"),
        ("nothing = 1", "sets 'nothing', which no recipe has; a recipe has name, dense_epochs, "),
        ("kl_scale = [1, 2]", "kl_scale is .1, 2.; expected a number, or numbers by gate"),
        ("kl_scale = {conv1 = 'x'}", "kl_scale conv1 is 'x'; expected a number"),
        ("epochs = ", "is no TOML"),
    ],
)
def test_wrong_values_are_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=words) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")


def test_a_request_survives_json():
    request = Request("lenet5", "mnist", RECIPES["lenet5"], seed=3)
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_every_arch_has_a_default_recipe():
    assert default_recipe("lenet5", "mnist", "sbp").name == "lenet5"
    assert default_recipe("lenet5", "digits", "sbp").name == "lenet5-digits"
    assert default_recipe("a.b:c", "digits", "sbp").name == "digits"
    assert default_recipe("vgg-like", "cifar10", "sbp").name == "vgg"
    assert default_recipe("a.b:c", "cifar10", "sbp") == Recipe()
    # Of what a method has no recipe for, it takes the next that fits.
    assert default_recipe("lenet5", "digits", "sparse-vd").name == "sparse-digits"
    assert default_recipe("vgg-like", "cifar10", "sparse-vd").name == "sparse"


def test_recursive_pruning_has_default_recipes_of_its_own():
    assert default_recipe("lenet5", "mnist", "rbp").name == "rbp-lenet5"
    assert default_recipe("lenet-500-300", "mnist", "rbp").name == "rbp-lenet-dense"
    assert default_recipe("vgg-like", "cifar10", "rbp").name == "rbp-vgg"
    assert default_recipe("a.b:c", "digits", "rbp").name == "rbp-digits"
    assert default_recipe("a.b:c", "cifar10", "rbp").name == "rbp"
    # Sees the data as often as SBP does, to compare with.
    for name in ("lenet5-plain", "lenet-dense-plain", "lenet5-digits", "digits"):
        recursive = RECIPES[f"rbp-{name.removesuffix('-plain')}"]
        for what in ("dense_epochs", "epochs", "finetune_epochs", "batch_size"):
            assert getattr(RECIPES[name], what) == getattr(recursive, what)


@pytest.mark.parametrize(
    ("method", "setting", "value", "words"),
    [
        ("sbp", "order", "together", "sbp has no order: all gates have their noise at once"),
        ("sbp", "exact_kl", True, "sbp has no exact_kl: its KL is exact"),
        ("rbp", "exact_kl", True, "rbp has no exact_kl: its KL is exact"),
        ("rbp", "kl_free_epochs", 1, "rbp has no kl_free_epochs: the KL of a gate counts in full"),
        ("rbp", "kl_rising_epochs", 1, "rbp has no kl_rising_epochs: the KL of a gate counts in"),
        ("sparse-vd", "order", "reversed", "sparse-vd has no order: all weights have their noise"),
        ("sparse-vd", "prior_scale", 3.0, "sparse-vd has no prior_scale: its prior is the log-uni"),
        ("sparse-vd", "macs_weight", 1.0, "sparse-vd has no macs_weight: its noise is on weights"),
        ("sparse-vd", "noise_per", "example", "sparse-vd has no noise_per: its noise is drawn for"),
        ("sparse-vd", "init_loc", 0.1, "sparse-vd has no init_loc: its means are the network's"),
    ],
)
def test_what_a_method_does_not_have_is_refused(method, setting, value, words):
    recipe = Recipe(**{setting: value})
    for other in METHODS:
        if other != method and setting not in ("exact_kl", "order"):
            recipe.check_method(other)
    with pytest.raises(RequestError, match=words):
        recipe.check_method(method)
    Recipe().check_method(method)


def test_the_named_recipes_are_those_of_their_methods():
    for name, recipe in RECIPES.items():
        prefix = name.partition("-")[0]
        recipe.check_method({"rbp": "rbp", "sparse": "sparse-vd"}.get(prefix, "sbp"))
