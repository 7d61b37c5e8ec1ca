"""The networks that a request can name. The module imports torch only when a network is built."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_sbp.errors import RequestError, did_you_mean, first_line, unknown

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ARCHITECTURES", "Architecture", "DataConfig", "find_architecture"]


class DataConfig(NamedTuple):
    """The images on which a pretrained model was trained.

    Attributes:
        image_size: their height and width, in pixels.
        mean, std: the mean and the standard deviation of each channel, for pixels in [0, 1], by
            which the images were standardized.
        fixed: whether the constructor needs the image size, if it differs from `image_size`.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed: bool = False


@dataclass(frozen=True)
class Architecture:
    """A network that a request can name.

    Attributes:
        constructor: ``module:callable``, or ``timm:NAME`` for a model of timm.
        dataset: the data set on which it is trained by default.
        image_size: the height and width of its images in pixels, or None for those of the data set.
        input_features: the dense layers whose input features are units.
        input_argument: the argument of the constructor for the number of channels or features.
    """

    constructor: str
    dataset: str | None = None
    image_size: int | None = None
    input_features: tuple[str, ...] = ()
    input_argument: str | None = None

    def data_config(self) -> DataConfig | None:
        """The images that the pretrained weights of a model of timm expect, or None for others.

        Raises:
            RequestError: timm has no such model.
        """
        module, _, name = self.constructor.partition(":")
        if module != "timm":
            return None
        self.resolve()
        config: Any = importlib.import_module("timm").get_pretrained_cfg(name)
        if config is None:
            return None
        fixed = bool(config.fixed_input_size)
        return DataConfig(config.input_size[-1], tuple(config.mean), tuple(config.std), fixed)

    def kwargs(
        self, channels: int, num_classes: int, image_size: int | None = None
    ) -> dict[str, int]:
        """The arguments of the constructor for a data set.

        Args:
            channels: the number of channels of the images.
            num_classes: the number of classes.
            image_size: the height and width of the images in pixels, or None for the default.

        Raises:
            RequestError: the constructor cannot be imported, or does not build networks.
        """
        kwargs = {}
        constructor = self.resolve()
        try:
            parameters = list(inspect.signature(constructor).parameters.values())
        except ValueError as error:
            raise RequestError(
                f"{self.constructor!r} of --arch does not build a network"
            ) from error
        if any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters):
            kwargs["num_classes"] = num_classes
        if self.input_argument in ("in_channels", "in_chans"):
            kwargs[self.input_argument] = channels
        elif self.input_argument == "in_features" and self.image_size:
            kwargs["in_features"] = channels * self.image_size**2
        config = self.data_config()
        if config is not None and config.fixed and image_size not in (None, config.image_size):
            kwargs["img_size"] = image_size
        return kwargs

    def name_to_save(self) -> str:
        """The constructor as ``module:callable``, which is stored with a saved network."""
        if not self.constructor.startswith("timm:"):
            return self.constructor
        constructor: Any = self.resolve()
        return f"{constructor.__module__}:{constructor.__qualname__}"

    def resolve(self) -> Callable[..., nn.Module]:
        """Import the constructor.

        Raises:
            RequestError: the module cannot be imported, or has no such callable.
        """
        module, _, name = self.constructor.partition(":")
        try:
            package = importlib.import_module(module)
        except Exception as error:  # the code of a network may raise any exception
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}, "
            raise RequestError(
                f"cannot import {module!r} of --arch: {kind}{first_line(error)}"
            ) from error
        if module == "timm":
            return _of_timm(package, name)
        try:
            found: Any = getattr(package, name)
        except AttributeError as error:
            close = did_you_mean(name, [n for n, o in vars(package).items() if callable(o)])
            raise RequestError(f"module {module!r} of --arch has no {name!r}{close}") from error
        if not callable(found):
            raise RequestError(f"{self.constructor!r} of --arch is not callable")
        return found


def _of_timm(timm: Any, name: str) -> Callable[..., nn.Module]:
    """The constructor of a model of timm, which creates it without pretrained weights."""
    if not timm.is_model(name):
        close = did_you_mean(name, timm.list_models())
        raise RequestError(f"timm has no model {name!r}{close}")
    found: Callable[..., nn.Module] = timm.model_entrypoint(name)
    return found


def _lenet(name: str, argument: str) -> Architecture:
    return Architecture(f"pyro_sbp.networks:{name}", "mnist", 28, ("fc1",), argument)


def _cifar(name: str) -> Architecture:
    return Architecture(f"pyro_sbp.networks:{name}", "cifar10", 32, input_argument="in_channels")


ARCHITECTURES = {
    "lenet-500-300": _lenet("LeNet500_300", "in_features"),
    "lenet-300-100": _lenet("LeNet300_100", "in_features"),
    "lenet5": _lenet("LeNet5", "in_channels"),
    "vgg-like": _cifar("VGGLike"),
    **{f"resnet{depth}": _cifar(f"resnet{depth}") for depth in (20, 32, 56, 110)},
}


def find_architecture(name: str) -> Architecture:
    """Find an architecture.

    Args:
        name: a key of `ARCHITECTURES`, ``package.module:callable``, or ``timm:NAME``.

    Raises:
        RequestError: the name is unknown, or there is no such module.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise RequestError(
            unknown("arch", name, ARCHITECTURES, ", package.module:callable or timm:NAME")
        )
    if module.endswith(".py"):
        right = ".".join(Path(module).with_suffix("").parts) + f":{attribute}"
        raise RequestError(f"--arch {name!r} names a file; expected a module, {right!r}")
    # Only the top-level package, because finding a submodule would import the package.
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None and module == "timm":
        raise RequestError(f"--arch {name!r} needs timm: pip install timm")
    if spec is None:
        raise RequestError(
            f"--arch {name!r}: there is no module {module!r} to import; "
            "expected one that is installed or in the current directory"
        )
    return Architecture(name, input_argument="in_chans" if module == "timm" else None)
