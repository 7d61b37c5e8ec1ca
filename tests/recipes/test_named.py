"""The recipes that have a name, and the default of each network."""

from pyro_sbp.recipes import (
    METHODS,
    RECIPES,
    SBPRecipe,
    default_recipe,
)


def test_every_arch_has_a_default_recipe():
    assert default_recipe("lenet5", "mnist", "sbp").name == "lenet5"
    assert default_recipe("lenet5", "digits", "sbp").name == "lenet5-digits"
    assert default_recipe("a.b:c", "digits", "sbp").name == "digits"
    assert default_recipe("vgg-like", "cifar10", "sbp").name == "vgg"
    assert default_recipe("a.b:c", "cifar10", "sbp") == SBPRecipe()
    # Where a method has no recipe, the next that fits is used.
    assert default_recipe("lenet5", "digits", "sparse-vd").name == "sparse-digits"
    assert default_recipe("vgg-like", "cifar10", "sparse-vd").name == "sparse"
    for method in METHODS:
        for arch in ("lenet5", "lenet-300-100", "vgg-like", "a.b:c"):
            for dataset in ("mnist", "digits", "cifar10"):
                assert default_recipe(arch, dataset, method).method == method


def test_recursive_pruning_has_default_recipes_of_its_own():
    assert default_recipe("lenet5", "mnist", "rbp").name == "rbp-lenet5"
    assert default_recipe("lenet-500-300", "mnist", "rbp").name == "rbp-lenet-dense"
    assert default_recipe("vgg-like", "cifar10", "rbp").name == "rbp-vgg"
    assert default_recipe("a.b:c", "digits", "rbp").name == "rbp-digits"
    assert default_recipe("a.b:c", "cifar10", "rbp").name == "rbp"
    # It sees the data as often as SBP does, so that they can be compared.
    for name in ("lenet5-plain", "lenet-dense-plain", "digits"):
        recursive = RECIPES[f"rbp-{name.removesuffix('-plain')}"]
        for what in ("dense_epochs", "epochs", "finetune_epochs", "batch_size"):
            assert getattr(RECIPES[name], what) == getattr(recursive, what)
