"""The role of a tensor as the hyper-model settle reads it: what its layer does in the network.

Of :mod:`know_cli.roles`, which says all that a name may mean, this is one answer for each tensor.
It follows from what there is both where a hyper-model is taught and where one predicts: the
tensor's name, its shape, and the rule of :mod:`know_cli.kinds` that decided on its kind.
"""

from __future__ import annotations

from enum import Enum

from know_cli.kinds import NORMALISATION
from know_cli.names import Shape, extent, read_name
from know_cli.roles import (
    Role,
    find_roles,
    is_attention_projection,
    is_channel_scale,
    is_embedding_module,
)


class TensorRole(str, Enum):
    """What a tensor is in the network; the kind says besides whether it is a weight or a bias.

    Bundles hold a column of weights for each, in this order.

    Attributes:
        NORMALISATION: factor or offset of a normalisation layer.
        TABLE: embedding, token or table.
        FACTOR: one factor a channel, such as layer scale.
        DEPTHWISE: of a convolution, each of whose filters reads a single channel. Without the rest
            of the network the first one for grey images is the same.
        ATTENTION: projection to queries, keys and values, or of what attention puts out.
        POINTWISE: of a convolution of size 1.
        OTHER: everything else, such as other convolutions, linear layers and their biases.
    """

    NORMALISATION = "normalisation"
    TABLE = "table"
    FACTOR = "factor"
    DEPTHWISE = "depthwise"
    ATTENTION = "attention"
    POINTWISE = "pointwise"
    OTHER = "other"


def role_of(name: str, shape: Shape, rule: str) -> TensorRole:
    """The role of a tensor that is predicted.

    >>> role_of("blocks.0.attn.qkv.weight", (192, 64), "matrix, or a stack of them").value
    'attention'

    Args:
        name: in the state dict.
        shape: its shape.
        rule: the reason of its :class:`~know_cli.kinds.Classification`. Whose kind the user chose
            is no longer known to be a normalisation layer's.
    """
    if rule == NORMALISATION:
        return TensorRole.NORMALISATION
    read = read_name(name)
    path, leaf = read.path, read.leaf
    roles = find_roles(path, leaf, shape)
    dimensions, kernel = extent(shape), extent(shape[2:])
    is_matrix = Role.WEIGHT in roles and len(shape) == 2
    is_convolution = Role.CONVOLUTION in roles
    if (Role.TABLE in roles and dimensions) or (is_matrix and is_embedding_module(path)):
        return TensorRole.TABLE
    if dimensions < 2 and (Role.FACTOR in roles or is_channel_scale(leaf)):
        return TensorRole.FACTOR
    if is_convolution and kernel and shape[1] == 1:
        return TensorRole.DEPTHWISE
    if is_attention_projection(path, leaf):
        return TensorRole.ATTENTION
    if is_convolution and not kernel:
        return TensorRole.POINTWISE
    return TensorRole.OTHER


def role_features(role: TensorRole | None) -> list[float]:
    """What the gate reads of a role: which one it is, as a 1 among 0s; of None, nothing but 0s."""
    return [float(role is one) for one in TensorRole]
