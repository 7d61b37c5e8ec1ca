"""Named recipes: the defaults, and the settings of the papers."""

from __future__ import annotations

from typing import Any

from pyro_sbp.recipes.method_recipes import (
    ORDERS,
    RECIPE_CLASSES,
    RBPRecipe,
    SBPRecipe,
    SparseVDRecipe,
)
from pyro_sbp.recipes.recipe import Recipe

__all__ = ["RECIPES", "default_recipe"]

#: Chosen on 10,000 held-out training images of MNIST.
_LENET: dict[str, Any] = {
    "finetune_epochs": 10,
    "noise_learning_rate": 3e-2,
    "finetune_learning_rate": 1e-3,
    "distill": 4.0,
}
#: Images shifted at random by at most one pixel. Chosen on 5,000 held-out training images of MNIST.
_SHIFTED: dict[str, Any] = {
    "noise_learning_rate": 2e-2,
    "finetune_learning_rate": 3e-3,
    "average": 0.999,
    "crop": 1,
}
_SHIFTED_DENSE: dict[str, Any] = {
    "dense_epochs": 30,
    "epochs": 60,
    "finetune_epochs": 60,
    "kl_scale": 10.0,
    "cut_every": 10,
    **_SHIFTED,
}
_SHIFTED_LENET5: dict[str, Any] = {
    "dense_epochs": 15,
    "epochs": 30,
    "finetune_epochs": 30,
    "macs_weight": 12.0,
    "cut_every": 5,
    **_SHIFTED,
}
_LENET5: dict[str, Any] = {"dense_epochs": 8, "epochs": 22, **_LENET}
_LENET_DENSE: dict[str, Any] = {"dense_epochs": 10, "epochs": 40, **_LENET}

#: Residual networks for 32x32 images, trained on 45,000 of them as in He et al. 2016.
_RESNET: dict[str, Any] = {
    "dense_epochs": 40,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "schedule": "one-cycle",
    "holdout": 5_000,
    "standardize": True,
    "flip": True,
    "crop": 4,
}

_VGG: dict[str, Any] = {
    "dense_epochs": 100,
    "epochs": 150,
    "finetune_epochs": 30,
    "gated_learning_rate": 1e-4,
    "distill": 4.0,
    "standardize": True,
    "flip": True,
    "crop": 4,
}

#: Recipes for a fifth of CIFAR-10's training images, on a machine without a GPU.
_VGG_SUBSET: dict[str, Any] = {
    "dense_epochs": 15,
    "finetune_epochs": 6,
    "batch_size": 32,
    "macs_weight": 2.0,
    "finetune_learning_rate": 1e-3,
    "distill": 4.0,
    "holdout": 40_000,
    "standardize": True,
    "flip": True,
    "crop": 4,
}

#: The paper keeps weights with log alpha < 3, which is an SNR over 0.22. On MNIST, a higher SNR
#: threshold increases the error only a little, and fine-tuning reduces it again.
_SPARSE: dict[str, Any] = {"threshold": 0.8, "finetune_learning_rate": 1e-3}

_ALL: tuple[Recipe, ...] = (
    SBPRecipe(),
    SBPRecipe(name="lenet5", macs_weight=3.0, **_LENET5),
    SBPRecipe(name="lenet5-small", macs_weight=8.0, **_LENET5),
    SBPRecipe(name="lenet5-smallest", macs_weight=12.0, **_LENET5),
    # A noise learning rate of 1e-2 gives a lower error than 3e-2, and removes fewer units.
    SBPRecipe(
        name="lenet-dense",
        kl_scale=3.0,
        **{**_LENET_DENSE, "noise_learning_rate": 1e-2, "finetune_epochs": 20},
    ),
    SBPRecipe(name="lenet-dense-small", kl_scale=4.5, **_LENET_DENSE),
    SBPRecipe(name="lenet-dense-smallest", kl_scale=7.5, **{**_LENET_DENSE, "finetune_epochs": 20}),
    *(
        SBPRecipe(name=f"{arch}-{ratio}x", target_macs_ratio=float(ratio), **settings)
        for arch, ratio, settings in (
            ("lenet-300-100", 28, _SHIFTED_DENSE),
            ("lenet-300-100", 40, _SHIFTED_DENSE),
            ("lenet-500-300", 31, _SHIFTED_DENSE),
            ("lenet-500-300", 45, _SHIFTED_DENSE),
            ("lenet5", 35, _SHIFTED_LENET5),
            ("lenet5", 50, _SHIFTED_LENET5),
        )
    ),
    # Without fine-tuning, or with the labels of the data, for the comparison with RBP.
    SBPRecipe(
        name="lenet5-plain",
        dense_epochs=8,
        epochs=22,
        finetune_epochs=0,
        kl_scale={"conv1": 100.0, "conv2": 40.0, "fc1_input": 3.0, "fc1": 3.0},
    ),
    SBPRecipe(
        name="lenet-dense-plain", dense_epochs=10, epochs=40, finetune_epochs=10, kl_scale=3.0
    ),
    # The data set digits has 1,438 training images, a fortieth of those of MNIST. In the mean loss
    # per example, the KL divergence therefore has forty times the weight. With shifted images
    # (crop), pruning hardly increases the error. Chosen on 300 held-out images.
    SBPRecipe(
        name="lenet5-digits",
        dense_epochs=15,
        epochs=50,
        finetune_epochs=40,
        batch_size=32,
        finetune_learning_rate=1e-3,
        cut_every=10,
        crop=2,
        kl_scale={"conv1": 8.0, "conv2": 4.0, "fc1_input": 0.5, "fc1": 0.5},
    ),
    SBPRecipe(name="digits", dense_epochs=15, epochs=50, finetune_epochs=15, batch_size=32),
    SparseVDRecipe(name="sparse", kl_rising_epochs=10, finetune_learning_rate=1e-3),
    SparseVDRecipe(
        name="sparse-lenet5",
        dense_epochs=0,
        epochs=75,
        kl_free_epochs=3,
        kl_rising_epochs=12,
        finetune_epochs=20,
        noise_learning_rate=1e-2,
        decay=0.6,
        **{**_SPARSE, "threshold": 1.03},
    ),
    SparseVDRecipe(
        name="sparse-lenet-dense",
        dense_epochs=0,
        epochs=60,
        kl_free_epochs=3,
        kl_rising_epochs=7,
        finetune_epochs=10,
        noise_learning_rate=3e-3,
        decay=0.8,
        **_SPARSE,
    ),
    # Shifted images, more epochs than above, and a threshold that keeps about one weight in 100.
    SparseVDRecipe(
        name="sparse-lenet-300-100-100x",
        dense_epochs=0,
        epochs=100,
        kl_free_epochs=5,
        kl_rising_epochs=11,
        finetune_epochs=60,
        decay=0.8,
        threshold=1.1,
        **{**_SHIFTED, "noise_learning_rate": 3e-3},
    ),
    SparseVDRecipe(
        name="sparse-digits",
        dense_epochs=0,
        epochs=100,
        kl_free_epochs=10,
        kl_rising_epochs=30,
        finetune_epochs=15,
        batch_size=32,
        learning_rate=2e-3,
        noise_learning_rate=2e-2,
        finetune_learning_rate=1e-3,
    ),
    SparseVDRecipe(
        name="sparse-random-labels",
        dense_epochs=0,
        epochs=15,
        finetune_epochs=0,
        noise_learning_rate=2e-2,
        random_labels=True,
    ),
    # SBP from untrained weights, and a network with dropout (`experiments.dropout`), of which only
    # the dense phase is used. Training uses 5,000 images; memorising 15,000 takes several times as
    # many steps.
    *(
        SBPRecipe(
            name=f"random-labels{of}{counterpart}",
            dense_epochs=dense_epochs,
            epochs=epochs,
            finetune_epochs=0,
            noise_learning_rate=2e-2,
            random_labels=True,
            holdout=holdout,
        )
        for of, holdout, until in (("", 55_000, 250), ("-cifar", 45_000, 100))
        for counterpart, dense_epochs, epochs in (("", 0, 40), ("-dense", until, 1))
    ),
    # As many epochs with noise as SBP has for the same network, divided among the gates.
    RBPRecipe(name="rbp"),
    RBPRecipe(
        name="rbp-lenet5",
        dense_epochs=8,
        epochs=22,
        finetune_epochs=0,
        kl_scale={"conv1": 40.0, "conv2": 10.0},
    ),
    RBPRecipe(
        name="rbp-lenet5-small",
        dense_epochs=8,
        epochs=22,
        finetune_epochs=0,
        macs_weight=6.0,
    ),
    *(
        RBPRecipe(
            name=f"rbp-lenet-dense{'' if order == 'forward' else f'-{order}'}",
            dense_epochs=10,
            epochs=40,
            finetune_epochs=10,
            order=order,
            prior_scale=5.0,
        )
        for order in ORDERS
    ),
    SBPRecipe(
        name="resnet",
        target_macs_ratio=2.5,
        epochs=20,
        finetune_epochs=20,
        gated_learning_rate=1e-2,
        finetune_learning_rate=5e-2,
        recalibrate=True,
        distill=4.0,
        **_RESNET,
    ),
    # Dense training. The run ends with one epoch with noise, because every recipe needs one.
    SBPRecipe(
        name="resnet-dense", epochs=1, finetune_epochs=0, gated_learning_rate=1e-4, **_RESNET
    ),
    # For a machine with a GPU: the paper's rows SBP and SBPa of VGG-like, and RBP.
    SBPRecipe(name="vgg", **_VGG),
    SBPRecipe(name="vgg-small", macs_weight=2.0, **_VGG),
    RBPRecipe(
        name="rbp-vgg",
        kl_scale=0.5,
        macs_weight=2.0,
        **{**_VGG, "distill": 0.0, "finetune_learning_rate": 1e-3},
    ),
    SBPRecipe(name="vgg-subset", epochs=20, noise_learning_rate=3e-2, **_VGG_SUBSET),
    RBPRecipe(
        name="rbp-vgg-subset",
        epochs=28,
        kl_scale=2.0,
        noise_learning_rate=0.1,
        # Before its last cut, the network of RBP has already lost too many units to be a teacher.
        **{**_VGG_SUBSET, "distill": 0.0},
    ),
    RBPRecipe(
        name="rbp-lenet5-digits",
        dense_epochs=15,
        epochs=50,
        finetune_epochs=15,
        batch_size=32,
        kl_scale={"conv1": 4.0},
        prior_scale=10.0,
        noise_learning_rate=3e-2,
    ),
    RBPRecipe(
        name="rbp-digits",
        dense_epochs=15,
        epochs=50,
        finetune_epochs=15,
        batch_size=32,
        prior_scale=10.0,
        noise_learning_rate=3e-2,
    ),
)

RECIPES = {recipe.name: recipe for recipe in _ALL}

#: The default recipes by architecture and data set. The first one that matches and that is for the
#: method is used. "" matches all.
_DEFAULTS = {
    ("lenet5", "digits"): "lenet5-digits",
    ("", "digits"): "digits",
    ("lenet5", ""): "lenet5",
    ("lenet-500-300", ""): "lenet-dense",
    ("lenet-300-100", ""): "lenet-dense",
    ("vgg-like", ""): "vgg",
}


def default_recipe(arch: str, dataset: str, method: str) -> Recipe:
    """The default recipe, for a request that does not name one."""
    prefix = RECIPE_CLASSES[method].prefix
    for (for_arch, for_dataset), name in _DEFAULTS.items():
        found = RECIPES.get(prefix + name)
        if found and for_arch in ("", arch) and for_dataset in ("", dataset):
            return found
    return RECIPES[prefix.removesuffix("-") or "default"]
