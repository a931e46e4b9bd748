"""LoRA's pairs of factors averaged as what they stand for: the mean of their products.

A LoRA layer adds s·B·A to a weight ("LoRA: Low-Rank Adaptation of Large Language Models", Hu et
al., ICLR 2022, arXiv 2106.09685), with A of r rows and B of r columns. The average of such models
adds s·Σ c_k·B_k·A_k, which the product of averaged factors is not. That matrix is never formed:

1. Σ c_k·B_k·A_k = L·Rᵀ with L = [√c_0·B_0 …] and R = [√c_0·A_0ᵀ …], of S·r columns.
2. L = Q·T and R = P·U by QR, and T·Uᵀ = X·Σ·Yᵀ, of S·r rows and columns at most, by its singular
   value decomposition, so that Q·X and P·Y have the singular vectors of the sum.
3. The r leading triples are the nearest matrix of rank r (Eckart and Young, 1936). They are
   written as B = Q·X·√Σ and A = √Σ·Yᵀ·Pᵀ, with the largest element of each row of A positive.

What the others had is lost: √(Σ_(i>r) σ_i²) / √(Σ σ_i²) is the relative error that is reported. It
is 0 where one of the factors is the same in all checkpoints, and then that factor is kept, and the
other averaged. Computed in float64 by one thread, whatever the dtype.

A convolution's factors are the matrices of their output channels by all else, where B has one
pixel. DoRA's magnitudes and biases are vectors, and averaged as such.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from know_cli.checkpoints import Trajectory
from know_cli.checkpoints.dtypes import BITS, TORCH_NAMES
from know_cli.checkpoints.reading import read_tensor
from know_cli.engine.plan import Group, PlannedTensor
from know_cli.errors import quoted
from know_cli.names import Shape

# What the two factors are called, as a part of a name: PEFT's, kohya's and diffusers' (old ones
# have a `lora_linear_layer`), and torchtune's and MLX's.
_DOWN = re.compile(
    r"(?:^|(?<=[._]))lora(?:_(?:linear_|conv_)?layer)?(_A|_embedding_A|[._]down|_a)(?=\.|$)"
)
# LoHa and LoKr multiply otherwise.
_OTHER_PRODUCTS = re.compile(r"(?:^|[._])(?:hada_w1_a|lokr_w1(?:_a)?)(?=\.|$)")
_OTHERS = {
    "_A": "_B",
    "_embedding_A": "_embedding_B",
    "_down": "_up",
    ".down": ".up",
    "_a": "_b",
}
# PEFT keeps the factors of all experts of a stack in one pair, whose product would add them up.
_STACK = re.compile(r"experts(\.base_layer)*\.$")
# LoCon has a third factor between the two.
_MIDDLES = {"_down": "_mid", ".down": ".mid"}


@dataclass(frozen=True)
class Pairs:
    """Pairs of factors in a trajectory.

    Attributes:
        names: A's name → B's.
        remarks: what the user should know of them.
    """

    names: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def find_pairs(trajectory: Trajectory) -> Pairs:
    """Find LoRA's pairs by their names and shapes.

    Left out are those that have a third factor between them, whose shapes do not fit, that hold
    the factors of many experts, that some branches do not have, or that are scaled by an ``alpha``
    that is not the same in all checkpoints; and other products than B·A (LoHa, LoKr).

    Raises:
        CheckpointError: a checkpoint cannot be read.
    """
    shapes = {name: entry.shape for name, entry in trajectory.first.tensors.items()}
    names, left = {}, []
    for name in shapes:
        found = list(_DOWN.finditer(name))
        if not found:
            if _OTHER_PRODUCTS.search(name):
                left.append(name)
            continue
        match = found[-1]
        start, stop = match.span(1)
        other = name[:start] + _OTHERS[match[1]] + name[stop:]
        middle = name[:start] + _MIDDLES.get(match[1], "_mid") + name[stop:]
        if other not in shapes:
            continue
        absent = [trajectory.absent.get(factor, frozenset()) for factor in (name, other)]
        if absent[0] == absent[1] and len(trajectory) - 2 <= len(absent[0]) > 0:
            continue  # at most one branch has it, and it is passed on as it is
        down, up = name, other
        if match[1] == "_a" and shapes[name][:1] > shapes[name][1:]:
            down, up = other, name  # MLX's, of a transposed weight: r columns, then r rows
        scale = f"{name[: match.start()]}alpha"
        if (
            middle in shapes
            or _STACK.search(name[: match.start()])
            or not are_factors(shapes[down], shapes[up])
            or any(absent)
            or not _is_same(trajectory, scale)
        ):
            left.append(name)
        else:
            names[down] = up
    remarks = []
    if names:
        remarks.append(
            "LoRA: the mean of the products B·A is taken, not the product of the means, and "
            "truncated to the factors' rank; --lora factors averages the factors, as other tools do"
        )
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        remarks.append(
            f"warning: LoRA: {quoted(left[0])}{more}: averaged factor by factor, which is not the "
            "mean of their products, since they have a third factor, another shape than a pair, "
            "the factors of many experts, or another alpha in each checkpoint, are multiplied "
            "otherwise (LoHa, LoKr), or are not in all branches"
        )
    return Pairs(names, tuple(remarks))


def are_factors(down: Shape, up: Shape) -> bool:
    """Whether A and B are matrices, or convolutions, with a product.

    >>> are_factors((8, 64, 3, 3), (32, 8, 1, 1))
    True
    """
    return (
        len(down) == len(up) >= 2
        and down[0] == up[1]
        and math.prod(up[2:]) == 1
        and math.prod(down) > 0
        and math.prod(up) > 0
    )


def _is_same(trajectory: Trajectory, name: str) -> bool:
    """Whether a scale, which may be an integer, is the same in all checkpoints, or in none.

    Raises:
        CheckpointError: a checkpoint cannot be read.
    """
    found = [checkpoint.tensors.get(name) for checkpoint in trajectory.checkpoints]
    values = [
        None
        if entry is None or entry.info.elements != 1 or not _has_values(entry.dtype)
        else read_tensor(checkpoint, entry).item()
        for checkpoint, entry in zip(trajectory.checkpoints, found, strict=True)
    ]
    return len(set(values)) == 1


def _has_values(dtype: str) -> bool:
    """Whether torch has numbers of a dtype; it packs two of four bits into one."""
    return dtype in TORCH_NAMES and BITS[dtype] >= 8


class ProductPredictor:
    """Averages pairs of factors as products.

    Args:
        names: A's name → B's.
        coefficients: ``[S]``, Θ0's first; none below 0.
    """

    def __init__(self, names: Mapping[str, str], coefficients: Sequence[float]) -> None:
        self._names = names
        self._coefficients = tuple(reversed(coefficients))  # as in a window

    def groups(self, tensors: Sequence[PlannedTensor]) -> list[Group]:
        """Pairs of which both move; see :class:`~know_cli.engine.predictor.TensorPredictor`."""
        by_name = {tensor.name: tensor for tensor in tensors}
        return [
            (by_name[down], by_name[up])
            for down, up in self._names.items()
            if down in by_name and up in by_name
        ]

    def nbytes(self, group: Group) -> int:
        """Bytes of main memory to average one pair.

        At their peak there are L and R, what is decomposed of one of them, Q and P, small matrices
        and LAPACK's workspace for them, and the new factors. Measured peaks were 70 to 90 % of
        this.
        """
        down, up = group
        rank, inputs, outputs = down.shape[0], math.prod(down.shape[1:]), up.shape[0]
        columns = rank * sum(share > 0 for share in self._coefficients)
        core = min(columns, inputs) * min(columns, outputs)
        return 8 * ((3 * columns + 2 * rank) * (inputs + outputs) + 8 * core)

    def predict(self, group: Group, history: Tensor, out: Tensor) -> float:
        """Average a pair; see :class:`~know_cli.engine.predictor.TensorPredictor`."""
        rank, cut = group[0].shape[0], group[0].elements
        downs = history[:, :cut].view(len(history), rank, -1)
        ups = history[:, cut:].view(len(history), -1, rank)
        new_down, new_up, error = average_products(downs, ups, self._coefficients)
        out[:, :cut] = new_down.flatten()
        out[:, cut:] = new_up.flatten()
        return error


def average_products(
    downs: Tensor, ups: Tensor, coefficients: Sequence[float]
) -> tuple[Tensor, Tensor, float]:
    """Factors of the matrix of their rank that is nearest to Σ c·B·A.

    Args:
        downs: ``[S, r, inputs]``, A of each.
        ups: ``[S, outputs, r]``, B of each.
        coefficients: ``[S]``, none below 0.

    Returns:
        A ``[r, inputs]`` and B ``[outputs, r]`` float64, balanced, and the relative error of their
        product in the Frobenius norm.
    """
    taken = [(math.sqrt(c), a, b) for c, a, b in zip(coefficients, downs, ups, strict=True) if c]
    left, left_core = torch.linalg.qr(torch.cat([root * b.double() for root, _, b in taken], dim=1))
    right, right_core = torch.linalg.qr(torch.cat([root * a.double() for root, a, _ in taken]).T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rank = downs.shape[1]
    kept = values[:rank]
    down = downs.new_zeros(downs.shape[1:], dtype=torch.float64)
    down[: len(kept)] = (kept.sqrt()[:, None] * v[:rank]) @ right.T
    up = ups.new_zeros(ups.shape[1:], dtype=torch.float64)
    up[:, : len(kept)] = left @ (u[:, :rank] * kept.sqrt())
    largest = down.gather(1, down.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    whole = float(values.norm())
    error = float(values[rank:].norm()) / whole if whole else 0.0
    return down * signs, up * signs.T, error
