"""The networks with BatchNorm and biases that the release regime trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from know_cli.evaluation.tasks.classification import Network
from know_cli.evaluation.tasks.networks import seeded
from know_cli.lab.zoo.blocks import HE, convolution, global_pooling, initialise, named
from know_cli.lab.zoo.resnet import BasicBlock


@dataclass(frozen=True)
class SmallResNet(Network):
    """A ResNet of three blocks whose convolutions have biases, as those of the release have.

    Attributes:
        width: channels of its first stage, doubled in each of the two that follow.
    """

    architecture: str = "small-resnet"
    width: int = 8

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """The network for images of a shape, with initial weights from a seed."""
        return seeded(lambda: _construct(shape[0], self.width, classes), seed)


@dataclass(frozen=True)
class ReleaseResNet18(Network):
    """The release's ResNet18: a 7×7 convolution without a stride, and biases everywhere.

    Attributes:
        width: channels of its first stage, doubled in each of the three that follow.
    """

    architecture: str = "release-resnet18"
    width: int = 64

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """The network for images of a shape, with initial weights from a seed."""
        return seeded(lambda: _construct_18(shape[0], self.width, classes), seed)


#: Of each stage the width, as a multiple of the first one's, and the stride.
_STAGES = ((1, 1), (2, 1), (4, 2), (8, 2))


def _construct_18(channels: int, width: int, classes: int) -> nn.Module:
    block = partial(BasicBlock, activation="relu", norm="batch", bias=True)
    layers: dict[str, nn.Module] = {
        "conv1": convolution(channels, width, 7, bias=True),
        "bn1": nn.BatchNorm2d(width),
        "act1": nn.ReLU(),
    }
    inputs = width
    for number, (factor, stride) in enumerate(_STAGES, 1):
        outputs = factor * width
        first = block(inputs, outputs, stride)
        if isinstance(first.downsample, nn.Sequential):
            first.downsample[0] = convolution(inputs, outputs, 1, stride, bias=True)
        layers[f"layer{number}"] = nn.Sequential(first, block(outputs, outputs, 1))
        inputs = outputs
    layers["pool"] = global_pooling("average")
    layers["head"] = nn.Linear(inputs, classes)
    model = named(**layers)
    initialise(model, HE[0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as Keras has them
            module.eps, module.momentum = 1e-3, 0.01
    return model


def _construct(channels: int, width: int, classes: int) -> nn.Module:
    block = partial(BasicBlock, activation="relu", norm="batch", bias=True)
    model = named(
        conv1=convolution(channels, width, 3, 2, bias=True),
        bn1=nn.BatchNorm2d(width),
        act1=nn.ReLU(),
        layer1=block(width, width, 1),
        layer2=block(width, 2 * width, 2),
        layer3=block(2 * width, 4 * width, 2),
        pool=global_pooling("average"),
        head=nn.Linear(4 * width, classes),
    )
    initialise(model, HE[0])
    return model
