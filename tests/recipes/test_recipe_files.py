"""Recipes in TOML files, and values that are out of their bounds."""

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes import RBPRecipe, SBPRecipe, read_recipe


def test_a_file_sets_what_it_names(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 3\n[kl_scale]\nconv1 = 160\n")
    assert read_recipe(path) == SBPRecipe(name="mine", epochs=3, kl_scale={"conv1": 160})
    assert read_recipe(path, "rbp") == RBPRecipe(name="mine", epochs=3, kl_scale={"conv1": 160})


def test_a_file_may_name_its_method(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("method = 'rbp'\norder = 'reversed'\n")
    assert read_recipe(path) == read_recipe(path, "rbp") == RBPRecipe(name="mine", order="reversed")
    with pytest.raises(
        RequestError, match=r"mine.toml is for rbp, and --method is sbp; leave out --method"
    ):
        read_recipe(path, "sbp")
    path.write_text("method = 'rpb'\n")
    with pytest.raises(RequestError, match=r"method is 'rpb'; expected sbp, .*mean 'rbp'"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = 0", "epochs is 0; expected an integer >= 1"),
        ("epochs = 2.5", "epochs is 2.5; expected an integer"),
        ("epoch = 3", "there is no setting 'epoch'; did you mean 'epochs'"),
        ("batch_size = -1", "batch_size is -1"),
        ("learning_rate = 0", "learning_rate is 0; expected a number > 0"),
        ("noise_learning_rate = nan", "noise_learning_rate is nan; expected a finite number"),
        ("weight_decay = inf", "weight_decay is inf"),
        ("macs_weight = -0.5", "macs_weight is -0.5; expected a number >= 0"),
        ("macs_weight = 1e30", r"macs_weight is 1e\+30; expected a number <= "),
        ("kl_scale = 1e30", r"kl_scale is 1e\+30; expected numbers from 0 to 1e6"),
        ("distill = 1e9", r"distill is 1000000000.0; expected a number <= "),
        (
            "threshold = 1e9",
            r"threshold is .*; expected a number <= .*, the largest signal-to-noise",
        ),
        ("decay = 1.5", "decay is 1.5"),
        ("threshold = true", "threshold is True; expected a number"),
        ("prior_scale = 0", "prior_scale is 0; expected a number > 0"),
        ("noise_per = 'unit'", "noise_per is 'unit'; expected 'batch' or 'example'"),
        ("standardize = 1", "standardize is 1; expected true or false"),
        ("flip = 'yes'", "flip is 'yes'; expected true or false"),
        ("crop = -1", "crop is -1; expected an integer >= 0"),
        ("crop = 1.5", "crop is 1.5; expected an integer"),
        ("crop = true", "crop is True; expected an integer"),
        ("kl_scale = -1", "kl_scale is -1; expected numbers from 0 to 1e6"),
        ("nothing = 1", "there is no setting 'nothing'; the settings are name, dense_epochs"),
        ("kl_scale = [1, 2]", "kl_scale is .1, 2.; expected a number, or numbers by gate"),
        ("kl_scale = {conv1 = 'x'}", "kl_scale is .*; expected a number, or numbers by gate; for"),
        ("epochs = ", "is not TOML"),
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


def test_none_in_a_file_is_no_value(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('prior_scale = "none"\n')
    assert read_recipe(path, "rbp").prior_scale is None
    path.write_text('epochs = "none"\n')
    with pytest.raises(RequestError, match="epochs is 'none'; expected an integer"):
        read_recipe(path)
