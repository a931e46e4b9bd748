"""A real training function: small networks on scikit-learn's digits (1,797 images of 8×8).

The images are split once and for all into two halves. ``meta`` is what the bundled KNOWN is
trained on, ``demo`` is for demonstrations and tests, which KNOWN has thus never seen.

``know forget know_cli.forgetting.digits:train run`` records a trajectory of the ``meta`` half.
Whatever no option sets is drawn from the trajectory's seed: architecture (``cnn``,
``cnn-batchnorm``, ``mlp``), width, activation, classes, learning rate, optimiser and so on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.forgetting.fitting import accuracy, fit
from know_cli.forgetting.recorder import TrainingSession
from know_cli.forgetting.subsets import nested_subsets

Part = Literal["meta", "demo"]
CLASSES = 10
ARCHITECTURES = ("cnn", "cnn-batchnorm", "mlp")
_SPLIT_SEED = 1797
_TEST_SHARE = 0.2
# Mean and standard deviation of all pixels, which are integers from 0 to 16.
_MEAN, _DEVIATION = 4.884, 6.017
_PIXELS = 64


@cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UsageError(
            "the digits need scikit-learn: pip install 'know-predict[demo]'"
        ) from error
    images, labels = load(return_X_y=True)
    pixels = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8)
    return pixels, torch.from_numpy(labels.astype(np.int64))


def load_pixels(part: Part) -> tuple[Tensor, Tensor]:
    """Half of the digits as they are, stratified, by a fixed seed.

    Args:
        part: ``meta`` (KNOWN's training) or ``demo`` (never seen by KNOWN).

    Returns:
        Images ``[n, 1, 8, 8]`` uint8, 0 to 16, and labels ``[n]`` int64, 0 to 9; n is 898 and
        899.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    pixels, labels = _digits()
    everything, half = nested_subsets(len(labels), 0.5, 2, _SPLIT_SEED, labels.numpy())
    chosen = half if part == "meta" else np.setdiff1d(everything, half)
    return pixels[chosen], labels[chosen]


def split_test(labels: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the images to train on, and of a fifth that is only measured on."""
    everything, test = nested_subsets(len(labels), _TEST_SHARE, 2, _SPLIT_SEED, labels.numpy())
    return np.setdiff1d(everything, test), test


def load_digits(part: Part) -> tuple[Tensor, Tensor]:
    """:func:`load_pixels`, standardised: images ``[n, 1, 8, 8]`` float32, and labels."""
    pixels, labels = load_pixels(part)
    return (pixels.float() - _MEAN) / _DEVIATION, labels


class ConvolutionalNetwork(nn.Module):
    """Two 3×3 convolutions with pooling, a hidden layer and a head, for 8×8 images."""

    def __init__(
        self, classes: int, width: int, activation: type[nn.Module], *, batchnorm: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=not batchnorm)
        self.norm1 = nn.BatchNorm2d(width) if batchnorm else nn.Identity()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=not batchnorm)
        self.norm2 = nn.BatchNorm2d(2 * width) if batchnorm else nn.Identity()
        self.hidden = nn.Linear(8 * width, 4 * width)
        self.head = nn.Linear(4 * width, classes)
        self.activation = activation()
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, 1, 8, 8]`` to logits ``[n, classes]``."""
        x = self.pool(self.activation(self.norm1(self.conv1(images))))
        x = self.pool(self.activation(self.norm2(self.conv2(x))))
        logits: Tensor = self.head(self.activation(self.hidden(x.flatten(1))))
        return logits


class Perceptron(nn.Module):
    """Two hidden layers and a head, for 8×8 images."""

    def __init__(self, classes: int, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(_PIXELS, 8 * width)
        self.hidden2 = nn.Linear(8 * width, 4 * width)
        self.head = nn.Linear(4 * width, classes)
        self.activation = activation()

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, 1, 8, 8]`` to logits ``[n, classes]``."""
        x = self.activation(self.hidden1(images.flatten(1)))
        logits: Tensor = self.head(self.activation(self.hidden2(x)))
        return logits


def build_model(
    architecture: str, classes: int, *, width: int = 16, activation: str = "relu", seed: int = 0
) -> nn.Module:
    """A freshly initialised small network; its last layer is called ``head``.

    Args:
        architecture: ``cnn``, ``cnn-batchnorm`` or ``mlp``.
        classes: number of outputs.
        width: channels of the first convolution; the other layers are multiples of it.
        activation: ``relu`` or ``gelu``.
        seed: of the initial weights. The global random state is left as it was.

    Raises:
        UsageError: no such architecture or activation.
    """
    activations: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
    if architecture not in ARCHITECTURES or activation not in activations:
        raise UsageError(
            f"no network {architecture!r} with activation {activation!r}: there are "
            f"{', '.join(ARCHITECTURES)} with {', '.join(activations)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "mlp":
            return Perceptron(classes, width, activations[activation])
        batchnorm = architecture == "cnn-batchnorm"
        return ConvolutionalNetwork(classes, width, activations[activation], batchnorm=batchnorm)


@dataclass(frozen=True)
class Settings:
    """How the networks of one trajectory are trained.

    Attributes:
        architecture: see :func:`build_model`.
        classes: how many of the ten digits it has; the seed draws which.
        width: see :func:`build_model`.
        activation: see :func:`build_model`.
        epochs: of session 0; enough for the training data to be learned by heart, so that only
            more data could help.
        later_epochs: share of these epochs in later sessions.
        continued_epochs: share of these epochs in continuations of Θ0 on more data.
        learning_rate: of session 0.
        later_rate: share of this learning rate in all later sessions and continuations.
        batch_size: samples a step.
        optimiser: ``adam`` or ``sgd``.
        weight_decay: see :func:`~know_cli.forgetting.fitting.fit`.
        cosine: whether the learning rate falls to 0 along half a cosine; else it stays.
    """

    architecture: str
    classes: int
    width: int
    activation: str
    epochs: int
    later_epochs: float
    continued_epochs: float
    learning_rate: float
    later_rate: float
    batch_size: int
    optimiser: str
    weight_decay: float
    cosine: bool


def settings(seed: int, options: Mapping[str, str]) -> Settings:
    """Draw a trajectory's settings from its seed; options, as text, go first.

    Raises:
        UsageError: an option does not exist, or its value cannot be read.
    """
    generator = np.random.default_rng([seed, 1])
    optimiser = options.get("optimiser") or str(generator.choice(["adam", "sgd"], p=[0.75, 0.25]))
    lowest, highest = (1e-3, 5e-3) if optimiser == "adam" else (1e-2, 8e-2)
    drawn = Settings(
        architecture=str(generator.choice(ARCHITECTURES, p=[0.4, 0.35, 0.25])),
        classes=int(generator.integers(5, CLASSES + 1)),
        width=int(generator.choice([8, 12, 16])),
        activation=str(generator.choice(["relu", "gelu"])),
        epochs=int(generator.integers(25, 61)),
        later_epochs=round(float(generator.uniform(0.25, 1.0)), 3),
        continued_epochs=round(float(generator.uniform(0.5, 1.0)), 3),
        learning_rate=float(
            f"{math.exp(generator.uniform(math.log(lowest), math.log(highest))):.3g}"
        ),
        later_rate=round(float(math.exp(generator.uniform(math.log(0.2), 0.0))), 3),
        batch_size=int(generator.choice([16, 32, 64])),
        optimiser=optimiser,
        weight_decay=float(generator.choice([0.0, 1e-4, 1e-2])),
        cosine=bool(generator.random() < 0.5),
    )
    values = asdict(drawn)
    for key, text in options.items():
        if key not in values:
            known = ", ".join(item.name for item in fields(Settings))
            raise UsageError(f"option {key!r}: the digits have only {known}")
        values[key] = _parse(key, text, type(values[key]))
    if not 2 <= values["classes"] <= CLASSES:
        raise UsageError(f"option classes={values['classes']}: must lie between 2 and {CLASSES}")
    return Settings(**values)


def _parse(key: str, text: str, kind: type) -> object:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise UsageError(f"option {key}={text}: is not of type {kind.__name__}") from error


@cache
def _data(seed: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels of a trajectory's classes, and test images and labels."""
    images, labels = load_digits("meta")
    chosen = np.random.default_rng([seed, 2]).permutation(CLASSES)[:classes]
    numbers = torch.full((CLASSES,), -1)
    numbers[torch.from_numpy(chosen.copy())] = torch.arange(classes)
    parts = []
    for indices in split_test(labels):
        renumbered = numbers[labels[indices]]
        kept = renumbered >= 0
        parts += [images[indices][kept], renumbered[kept]]
    return parts[0], parts[1], parts[2], parts[3]


def labels(seed: int, options: Mapping[str, str]) -> NDArray[np.int64]:
    """Classes ``[n]`` of the data set that a trajectory divides into nested subsets."""
    found: NDArray[np.int64] = _data(seed, settings(seed, options).classes)[1].numpy()
    return found


def train(session: TrainingSession) -> tuple[nn.Module, dict[str, float | str | bool]]:
    """Train one session on the ``meta`` half of the digits.

    Returns:
        The trained network, and its settings with its accuracy on the session's own samples
        and on test images that no session trains on.

    Raises:
        UsageError: an option does not exist or has no possible value.
    """
    chosen = settings(session.trajectory_seed, session.options)
    images, numbers, test_images, test_numbers = _data(session.trajectory_seed, chosen.classes)
    model = build_model(
        chosen.architecture,
        chosen.classes,
        width=chosen.width,
        activation=chosen.activation,
        seed=session.seed,
    )
    epochs, learning_rate = float(chosen.epochs), chosen.learning_rate
    if session.start is not None:
        model.load_state_dict(session.start)
        learning_rate *= chosen.later_rate
        epochs *= chosen.continued_epochs if session.is_continuation else chosen.later_epochs
    samples = torch.from_numpy(session.indices)
    fit(
        model,
        images[samples],
        numbers[samples],
        epochs=max(round(epochs), 1),
        learning_rate=learning_rate,
        batch_size=chosen.batch_size,
        seed=session.seed,
        optimiser=chosen.optimiser,
        weight_decay=chosen.weight_decay,
        schedule="cosine" if chosen.cosine else "constant",
    )
    measured: dict[str, float | str | bool] = {
        "train_accuracy": round(accuracy(model, images[samples], numbers[samples]), 4),
        "test_accuracy": round(accuracy(model, test_images, test_numbers), 4),
    }
    return model, measured | (asdict(chosen) if session.index == 0 else {})


train.labels = labels  # type: ignore[attr-defined]
