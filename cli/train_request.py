"""The request of a new run, from the options of `pyro-sbp train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pyro_sbp.architectures import ARCHITECTURES, find_architecture
from pyro_sbp.cli.common import check_device
from pyro_sbp.errors import RequestError, unknown
from pyro_sbp.recipes.method_recipes import METHODS
from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.overrides import assigned_setting, with_overrides
from pyro_sbp.recipes.recipe import TEMPERATURE, Recipe
from pyro_sbp.recipes.recipe_files import read_recipe
from pyro_sbp.recipes.request import PRECISIONS, PixelStatistics, Precision, Request
from pyro_sbp.training.processes import num_processes

__all__ = ["Options", "new_request"]

#: The options that are settings of the recipe of the same name.
OF_RECIPE = ("batch_size", "learning_rate", "macs_weight", "target_macs_ratio", "criterion")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a new run as click passes them; None or an empty tuple if not given."""

    arch: str | None
    dataset: str | None
    method: str | None
    recipe: str | None
    weights: Path | None
    teachers: tuple[Path, ...]
    image_size: int | None
    epochs: int | None
    batch_size: int | None
    learning_rate: float | None
    macs_weight: float | None
    target_macs_ratio: float | None
    criterion: str | None
    settings: tuple[str, ...]
    seed: int | None
    device: str | None
    devices: int | None
    precision: str | None
    channels_last: bool | None
    data_dir: Path | None
    output_dir: Path | None

    def of_recipe(self) -> dict[str, Any]:
        """The options that change the recipe, by the name of their setting, without `epochs`."""
        values = {name: getattr(self, name) for name in OF_RECIPE}
        return {name: value for name, value in values.items() if value is not None}

    def assigned(self) -> list[str]:
        """The names of the settings that --set assigns."""
        return [assigned_setting(assignment) for assignment in self.settings]


def new_request(options: Options) -> Request:
    """The request of a new run.

    Raises:
        RequestError: an option is missing or wrong, or two options contradict each other.
    """
    arch, dataset = _network_and_data(options)
    recipe = _recipe(options, arch, dataset)
    image_size, standardize_by = _preprocessing(options, arch)
    device = check_device(options.device or "auto")
    return Request(
        arch,
        dataset,
        recipe,
        _seed(options.seed),
        device,
        str(options.data_dir or "data"),
        weights=None if options.weights is None else str(options.weights),
        devices=_devices(options.devices, recipe),
        precision=cast(Precision, _precision(options.precision or "32-true", device)),
        channels_last=bool(options.channels_last),
        image_size=image_size,
        standardize_by=standardize_by,
        teachers=tuple(map(str, options.teachers)),
    )


def _network_and_data(options: Options) -> tuple[str, str]:
    arch = options.arch
    if arch is None:
        names = ", ".join(ARCHITECTURES)
        raise RequestError(
            f"--arch is missing; expected {names}, package.module:callable or timm:NAME"
        )
    architecture = find_architecture(arch)
    dataset = options.dataset or architecture.dataset
    if dataset is None:
        raise RequestError(f"--dataset is missing, and {arch} has no default data set")
    return arch, dataset


def _recipe(options: Options, arch: str, dataset: str) -> Recipe:
    """The recipe of a run, changed by the options."""
    method = options.method
    if method is not None and method not in METHODS:
        raise RequestError(unknown("method", method, METHODS))
    recipe = _named_recipe(options.recipe, arch, dataset, method)
    if method not in (None, recipe.method):
        raise RequestError(
            f"the recipe {recipe.name!r} is for {recipe.method}, and --method is {method}; "
            "leave out --method, or choose another recipe"
        )
    _check_contradictions(options)
    if options.epochs is not None:
        recipe = recipe.with_epochs(options.epochs)
    recipe = with_overrides(recipe, options.settings, **options.of_recipe())
    return _for_teachers(_for_weights(recipe, options), options)


def _named_recipe(name: str | None, arch: str, dataset: str, method: str | None) -> Recipe:
    if name is None:
        return default_recipe(arch, dataset, method or "sbp")
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".toml"):
        return read_recipe(Path(name), method)
    hint = f"; did you mean '{name}.toml'?" if Path(f"{name}.toml").is_file() else ""
    raise RequestError(unknown("recipe", name, RECIPES, " or a .toml file", hint))


def _check_contradictions(options: Options) -> None:
    """Raise RequestError if an option and --set give the same setting."""
    flags = {**options.of_recipe(), "epochs": options.epochs}
    for setting, assignment in zip(options.assigned(), options.settings, strict=True):
        if "=" in assignment and flags.get(setting) is not None:
            flag = setting.replace("_", "-")
            raise RequestError(f"--{flag} and --set {assignment} contradict each other; give one")


def _for_weights(recipe: Recipe, options: Options) -> Recipe:
    """The recipe without a dense phase, if the run starts from given weights."""
    if options.weights is None:
        return recipe
    if not options.weights.is_file():
        raise RequestError(f"--weights: there is no file {options.weights}")
    return recipe if "dense_epochs" in options.assigned() else recipe.replace(dense_epochs=0)


def _for_teachers(recipe: Recipe, options: Options) -> Recipe:
    """The recipe with a temperature of soft labels, if there are teachers."""
    if not options.teachers:
        return recipe
    if not recipe.finetune_epochs:
        raise RequestError(
            "--teacher sets the labels of fine-tuning, but finetune_epochs is 0; expected more"
        )
    if recipe.distill or "distill" in options.assigned():
        return recipe
    return recipe.replace(distill=TEMPERATURE)


def _preprocessing(options: Options, arch: str) -> tuple[int | None, PixelStatistics | None]:
    """The size of images, and the statistics by which they are standardized, that the network
    expects.
    """
    config = find_architecture(arch).data_config()
    if config is None:
        return options.image_size, None
    image_size = options.image_size or config.image_size
    if "standardize" in options.assigned():
        return image_size, None
    return image_size, {"mean": list(config.mean), "std": list(config.std)}


def _seed(seed: int | None) -> int:
    seed = 0 if seed is None else seed
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed is {seed}; expected an integer from 0 to 2^63 - 1")
    return seed


def _devices(devices: int | None, recipe: Recipe) -> int:
    devices = devices or num_processes() or 1
    if devices > 1 and recipe.batch_size < 2 * devices:
        raise RequestError(
            f"batch size is {recipe.batch_size}; expected at least two examples for each of "
            f"{devices} devices"
        )
    return devices


def _precision(name: str, device: str) -> str:
    """The precision of a name, which may be "auto"."""
    if name != "auto":
        if name not in PRECISIONS:
            raise RequestError(unknown("precision", name, (*PRECISIONS, "auto")))
        return name
    from pyro_sbp.training.devices import fastest_precision  # imports torch

    return fastest_precision(device)
