"""The hyper-model settle: coefficients that depend on how a run went, and a correction.

What is said of runs goes for forgettings, the newest checkpoint of which is Θ0.

For a tensor with the window w_0 … w_(S−1), oldest first, and the numbers ``a`` that say how it and
the whole run went (:mod:`know_cli.settle.course`):

    g = W_g tanh(V_g a + v_g)                     # [S + width], no bias: 0 where all is 0
    c_k = 1/S + g_k − mean(g)                     # coefficients, which sum to 1
    x = [(w_k − mean(w)) / u …, θ0 / size]        # each element of the tensor
    h = relu(W_2 relu(W_1 x + b_1 + g_(S…)) + b_2)
    θ̂ = Σ c_k w_k + u · (W_3 h)                   # u: length of the movements

W_g and W_3 start as zeros, so that an untaught one is the mean of the window. With a width of 0
there is no correction, and what is left is an average.

Branches have no order, and the window is they and then Θ0. For them

    c_k = (1 − c_0) / (S − 1) of each branch, c_0 = g_0 − (g_0 + Σ g_k) / S of Θ0

with the mean of g over the branches for each g_k, ``a`` tells none from another
(:func:`~know_cli.settle.course.without_order`), and a correction reads the branches' values of an
element in the order of their size. An untaught one is the mean of the branches. With c_0 < 0 it
goes beyond that, away from Θ0.

One that reads roles has the tensor's role at the end of ``a``, as a 1 among 0s
(:mod:`know_cli.settle.role`). The columns of V_g for it are the roles' embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from know_cli.engine.movements import Course
from know_cli.kinds import Kind
from know_cli.settle.course import feature_count, features, without_order
from know_cli.settle.role import TensorRole, role_features

#: Elements farther from the mean than this, in units of their movements, count as this far.
_FARTHEST = 8.0
_TINY = 1e-30


class Settle(nn.Module):
    """The hyper-model; see above.

    Args:
        checkpoints: S, at least 3.
        hidden: width of the gate.
        width: of the correction of single elements; 0 for none.
        roles: whether it reads the role of each tensor, too.
        branches: whether the checkpoints are Θ0 and branches that go on from it.
    """

    def __init__(
        self,
        checkpoints: int,
        hidden: int = 16,
        width: int = 0,
        roles: bool = False,
        branches: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoints, self.hidden, self.width = checkpoints, hidden, width
        self.roles, self.branches = roles, branches
        self.read = nn.Linear(feature_count(checkpoints), hidden)
        self.gate = nn.Linear(hidden, checkpoints + width, bias=False)
        nn.init.zeros_(self.gate.weight)
        if width:
            self.first = nn.Linear(checkpoints + 1, width)
            self.second = nn.Linear(width, width)
            self.last = nn.Linear(width, 1, bias=False)
            nn.init.zeros_(self.last.weight)
        if roles:
            # Drawn last, so that all other weights begin as they do without roles.
            self.read = _with_inputs(self.read, len(TensorRole))

    def features(
        self, run: Course, tensor: Course, kind: Kind | None, role: TensorRole | None
    ) -> list[float]:
        """What the gate reads of a tensor: of its role only where it reads roles.

        Args:
            run: see :func:`~know_cli.settle.course.features`.
            tensor: likewise.
            kind: likewise.
            role: of the tensor; None for what belongs to none.

        Returns:
            ``[features]``, and after them ``[roles]``.
        """
        if self.branches:
            run, tensor = without_order(run), without_order(tensor)
        found = features(run, tensor, kind)
        return found + role_features(role) if self.roles else found

    def gates(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients and conditions of tensors.

        Args:
            features: ``[tensors, features]``, a row of :meth:`features` each.

        Returns:
            ``[tensors, S]``, which sum to 1 in each row, and ``[tensors, width]``.
        """
        gates = self.gate(torch.tanh(self.read(features)))
        free, conditions = gates[:, : self.checkpoints], gates[:, self.checkpoints :]
        if self.branches:
            of_branches = free[:, :-1].mean(1, keepdim=True)
            start = (free[:, -1:] - of_branches) * (1 - 1 / self.checkpoints)
            share = (1 - start) / (self.checkpoints - 1)
            return torch.cat([share.expand(-1, self.checkpoints - 1), start], 1), conditions
        return 1 / self.checkpoints + free - free.mean(1, keepdim=True), conditions

    def correction(self, window: Tensor, condition: Tensor, length: Tensor, size: Tensor) -> Tensor:
        """What is added to the average of each element.

        Args:
            window: ``[S, n]``, oldest first; of branches Θ0 last.
            condition: ``[width]``, or ``[n, width]``.
            length: of the tensor's movements, a scalar or ``[n]``.
            size: root mean square of the newest weights, a scalar or ``[n]``.

        Returns:
            ``[n]``.
        """
        if self.branches:
            window = torch.cat([window[:-1].sort(0).values, window[-1:]])
        far = (window - window.mean(0)) / length.clamp(min=_TINY)
        newest = window[-1] / size.clamp(min=_TINY)
        inputs = torch.cat([far, newest[None]]).clamp(-_FARTHEST, _FARTHEST).T
        hidden = torch.relu(self.first(inputs) + condition)
        found: Tensor = self.last(torch.relu(self.second(hidden)))[:, 0] * length
        return found


def _with_inputs(layer: nn.Linear, count: int) -> nn.Linear:
    """The same layer, ``[out, in]``, with further inputs, ``[out, in + count]``."""
    wider = nn.Linear(layer.in_features + count, layer.out_features)
    with torch.no_grad():
        wider.weight[:, : layer.in_features] = layer.weight
        wider.bias.copy_(layer.bias)
    return wider


def shares(coefficients: Tensor) -> Tensor:
    """Coefficients ``[…, S]`` as shares of a mixture: none below 0, with a sum of 1."""
    kept = coefficients.clamp(min=0)
    return kept / kept.sum(-1, keepdim=True)
