"""KNOWN as a torch module that reads like its formula (the paper's section on the hyper-model).

This implementation is for reading and for training; the kernels beside it predict, and are tested
against this one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from know_cli.known.preparation import Preparation

HIDDEN = 64
SQUEEZED = 8
FEATURES = 32
NEGATIVE_SLOPE = 0.3


class Stream(nn.Module):
    """One of KNOWN's two streams: ``[rows, size]`` → ``[rows, 32]``.

    y = (W_lin z + b_lin) + (W_amp z + b_amp) · exp((W_rate z + b_rate) · x): the sum of an affine
    and an exponential law, with coefficients computed from z, a squeezed view of the history.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input = nn.Linear(size, HIDDEN)
        self.squeeze = nn.Linear(HIDDEN, SQUEEZED)
        self.linear = nn.Linear(SQUEEZED, HIDDEN)
        self.amplitude = nn.Linear(SQUEEZED, HIDDEN)
        self.rate = nn.Linear(SQUEEZED, HIDDEN)
        self.output = nn.Linear(HIDDEN, FEATURES)

    def forward(self, values: Tensor) -> Tensor:
        """Map ``[rows, size]`` float32 to ``[rows, 32]``."""
        x = self.input(values)
        z = torch.relu(self.squeeze(x))
        y = self.linear(z) + self.amplitude(z) * torch.exp(self.rate(z) * x)
        return nn.functional.leaky_relu(self.output(y), NEGATIVE_SLOPE)


class Known(nn.Module):
    """Predicts scalars from their histories over S checkpoints.

    The paper's form has one output, h₁: θ̂(−1) = θ0 + scale · tanh(h₁). With a factor on θ0 the head
    has a second one, h₂:

        θ̂(−1) = (1 + tanh(h₂)) · θ0 + scale · tanh(h₁)

    so that weights can shrink or grow as a whole, which a change without θ0 has to imitate. Where
    h₂ is 0, as with a second row of zeros in the head, that is the paper's form, to the bit.

    Args:
        checkpoints: S, the length of a window. It has 128·S + 8,785 parameters: 9,425 at S = 5.
        preparation: what is done to a window first.
        factor: whether there is a second output; it has 65 parameters.
    """

    def __init__(
        self,
        checkpoints: int,
        preparation: Preparation = Preparation.RAW,
        *,
        factor: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.preparation = preparation
        self.window = Stream(checkpoints)
        self.difference = Stream(checkpoints - 1)
        self.head = nn.Linear(2 * FEATURES, 2 if factor else 1)

    def outputs(self, values: Tensor, differences: Tensor) -> list[Tensor]:
        """The paper's f, and if there is a factor tanh(h₂), each in (−1, 1).

        Args:
            values: ``[rows, S]`` float32.
            differences: ``[rows, S − 1]`` float32.

        Returns:
            One or two tensors, each ``[rows]`` float32.
        """
        features = torch.cat([self.window(values), self.difference(differences)], dim=1)
        # A product each: one of two columns would round the first otherwise than the paper's form.
        rows = zip(torch.split(self.head.weight, 1), torch.split(self.head.bias, 1), strict=True)
        return [
            torch.tanh(nn.functional.linear(features, weight, bias)).squeeze(1)
            for weight, bias in rows
        ]

    def forward(self, window: Tensor) -> Tensor:
        """Predict the value one step before each window.

        Args:
            window: ``[rows, S]`` float32, **oldest-forgotten first, θ0 last**.

        Returns:
            ``[rows]`` float32: θ̂(−1).
        """
        values, scale = prepare(window, self.preparation)
        differences = _centred(window, scale, self.preparation).diff(dim=1)
        change, *factors = self.outputs(values, differences)
        newest, change = window[:, -1], scale * change
        # Added to the change, not to 1, where its digits would be lost.
        for factor in factors:
            change = change + newest * factor
        return newest + change


def has_factor(state: Mapping[str, Tensor]) -> bool:
    """Whether the :class:`Known` of a state dict has a second output, a factor on θ0."""
    return len(state["head.bias"]) > 1


def roll(known: Known, windows: Tensor, steps: int) -> Tensor:
    """Predict several steps, each from a window that includes the previous prediction.

    Args:
        known: predicts one step.
        windows: ``[rows, S]`` float32, θ0 last.
        steps: at least 1.

    Returns:
        ``[rows, steps]`` float32.
    """
    answers: list[Tensor] = []
    for _ in range(steps):
        answers.append(known(windows))
        windows = torch.cat([windows[:, 1:], answers[-1][:, None]], dim=1)
    return torch.stack(answers, dim=1)


def prepare(window: Tensor, preparation: Preparation) -> tuple[Tensor, Tensor]:
    """Prepare windows: what KNOWN reads, and the factor for its output.

    Args:
        window: ``[rows, S]`` float32, θ0 last.
        preparation: see :class:`Preparation`.

    Returns:
        ``[rows, S]`` float32 values for the first stream, and ``[rows]`` float32 scale.
    """
    if preparation is Preparation.RAW:
        return window, torch.ones_like(window[:, -1])
    newest = window[:, -1]
    spread = (window - newest[:, None]).abs().amax(dim=1)
    values = _centred(window, spread, preparation).clone()
    values[:, -1] = torch.asinh(newest / torch.where(spread > 0, spread, torch.inf))
    return values, spread


def _centred(window: Tensor, spread: Tensor, preparation: Preparation) -> Tensor:
    if preparation is Preparation.RAW:
        return window
    # A spread of 0 would give 0/0; dividing by infinity gives the 0 that is meant.
    divisor = torch.where(spread > 0, spread, torch.inf)
    return (window - window[:, -1:]) / divisor[:, None]


def initialise(known: Known, generator: torch.Generator) -> None:
    """Initialise for meta-training as the paper does, in place.

    The kernels of the streams' input and output layers: variance scaling 0.1, fan-in, uniform;
    all other kernels: Glorot uniform; biases: zero. A second output starts at zero, and draws no
    random numbers: so with a factor a training starts at the same KNOWN as without.
    """
    with torch.no_grad():
        for name, parameter in known.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
                continue
            drawn = parameter[:1] if parameter is known.head.weight else parameter
            fan_out, fan_in = drawn.shape
            if name.endswith(("input.weight", "output.weight")):
                limit = (3 * 0.1 / fan_in) ** 0.5
            else:
                limit = (6 / (fan_in + fan_out)) ** 0.5
            parameter.zero_()
            drawn.uniform_(-limit, limit, generator=generator)


def penalty(known: Known) -> Tensor:
    """Return the paper's L1 penalties on the streams' input and output layers, a scalar."""
    total = known.head.weight.new_zeros(())
    for stream in (known.window, known.difference):
        for layer in (stream.input, stream.output):
            total = total + 1e-6 * layer.weight.abs().sum() + 0.1 * layer.bias.abs().sum()
    return total
