"""What the names of parameters say: statistics, masks, tables, embeddings, factors.

All questions are asked of whole words, so that ``mask`` is a mask, and ``mask_token`` is not.
"""

from __future__ import annotations

import re
from collections.abc import Set
from enum import Enum, auto

from know_cli.names import Path, Shape, words
from know_cli.optimisers import is_of_optimiser


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ------------------------------------------------------------------ normalisation layers

_NORM_WORDS = _set("norms ln lns lnf lnq lnk lnv bn bns syncbn sbn abn gn grn frn rms")
_NORM_ENDINGS = ("norm", *(f"normali{s}{end}" for s in "sz" for end in ("ation", "e", "er")))


def _is_norm_word(word: str) -> bool:
    return word in _NORM_WORDS or word.endswith(_NORM_ENDINGS)


def is_norm_name(text: str) -> bool:
    """Whether a part of a name says that it is a normalisation layer.

    >>> [is_norm_name(text) for text in ("post_attention_layernorm", "LayerNorm_0", "abnormal")]
    [True, True, False]
    """
    return any(_is_norm_word(word) for word in words(text))


def is_called_norm(path: Path) -> bool:
    """Whether a module, or the list that a numbered module stands in, is called a norm.

    A numbered module in ``conv_norm_relu`` may be anything; what is in ``layer_norms`` is a norm.
    """
    named = [part for part in path if not part.isdecimal()]
    if not named:
        return False
    return is_norm_name(named[-1]) and (path[-1] == named[-1] or ends_with_norm(named[-1]))


def ends_with_norm(text: str) -> bool:
    """Whether the last word of a part of a name is that of a normalisation layer."""
    found = words(text)
    return bool(found) and _is_norm_word(found[-1])


# ------------------------------------------------------------------ what no gradient moves

_STATISTICS = _set(
    "mean means var vars variance variances std stds invstd count counts counter avg average "
    "ema amax amin absmax min max usage utilization utilisation histogram"
)
_SQUARES = _set("sq square squares squared")
_STATISTICS_FIRST = frozenset({"running", "moving", "ema", "num"})
_EXTREMES = re.compile(r"(?:.*_)?(?:min|max)_?(?:val|vals|value|values)$")
_CLUSTERS = _set("size sizes usage count counts")
_LOADS = _set("token tokens load loads usage count counts")


def is_statistic(leaf: str) -> bool:
    """Whether a parameter is called as running statistics, moving averages and counters are."""
    found = words(leaf)
    if not found or found[:2] == ("log", "std"):  # policies of reinforcement learning train it
        return False
    last = found[-2] if found[-1] in _SQUARES and len(found) > 1 else found[-1]
    return (
        last in _STATISTICS
        or (found[0] in _STATISTICS_FIRST and len(found) > 1)
        or (found[-2:] == ("per", "expert") and bool(_LOADS & {*found}))
        or is_codebook_statistic(leaf)
        or _EXTREMES.match(leaf) is not None
    )


def is_codebook_statistic(leaf: str) -> bool:
    """Whether a parameter is called as what codebooks keep that follow a moving average."""
    found = words(leaf)
    return found[-2:] in (("embed", "avg"), ("embed", "sum")) or (
        "cluster" in found and found[-1] in _CLUSTERS
    )


_INDEX = frozenset({"id", "ids", "idx", "idxs", "index", "indices", "indexes", "ptr"})
_MASK, _MASK_QUANTITIES = _set("mask masks"), _set("prob probs value values")
_BUFFERS = frozenset({"queue", "center", "inited", "initted", "initialized", "anchors", "pe"})
_ROTARY = frozenset({"freq", "freqs"})
_TRIGONOMETRIC = frozenset({"cos", "sin"})
_SCHEDULE = frozenset({"cumprod", "posterior"})
_SCHEDULES = frozenset({"betas", "alphas", "sigmas", "timesteps"})
_SIGNAL = _set("mel fft stft dct hann hamming window windows resample fbank filterbank blur")
_LOSS_OWNERS = frozenset({"criterion", "loss", "losses", "loss_fn", "loss_fct", "loss_func"})


def is_index(leaf: str) -> bool:
    """Whether a parameter is called as positions, indices and pointers are."""
    found = words(leaf)
    return bool(found) and found[-1] in _INDEX


def is_mask(leaf: str) -> bool:
    """Whether a parameter is called as a mask; ``mask_token`` and the like are not."""
    found = words(leaf)
    return bool(found) and (
        found[-1] in _MASK
        or (bool(_MASK & set(found)) and found[-1] in _MASK_QUANTITIES)
        or leaf == "masked_bias"
    )


def is_rotary(leaf: str) -> bool:
    """Whether a parameter is called as tables of rotary embeddings are."""
    found = set(words(leaf))
    return bool(
        _ROTARY & found
        or (
            _TRIGONOMETRIC & found
            and found <= _TRIGONOMETRIC | {"cached", "cache", "table", "pos", "emb"}
        )
    )


def is_fixed_table(path: Path, leaf: str, shape: Shape) -> bool:
    """Whether a parameter is called as tables are that are computed once and never trained."""
    found = words(leaf)
    unique = set(found)
    return bool(found) and bool(
        leaf.strip("_") in _BUFFERS
        or found[-1] == "queue"
        or leaf in ("relative_coords_table", "final_logits_bias")
        or _SCHEDULE & unique
        or found[-1] in _SCHEDULES
        or _SIGNAL & unique
        or found[-1] in ("slope", "slopes", "alibi", "gaussian")
        or found[0] in ("slope", "alibi")
        or {"noise", "const"} <= unique
        or found[-1] in ("eps", "epsilon")
        or (leaf in ("kernel", "filter") and _is_filter(path, shape))
    )


def _is_filter(path: Path, shape: Shape) -> bool:
    """Whether a shape is that of a fixed filter, which blurs or resamples every channel alike.

    The kernel of Flax's and Keras' pointwise convolutions, ``[1, 1, inputs, outputs]``, is like it.
    """
    if shape[:2] != (1, 1) or len(shape) != 4:
        return shape[:2] == (1, 1)
    is_small = shape[2] == shape[3] <= _LONGEST_KERNEL
    return is_small and not _is_convolution_name(path[-1:])


def is_loss_weight(path: Path, leaf: str) -> bool:
    """Whether a parameter weighs classes in a loss."""
    return leaf in ("pos_weight", "class_weight", "class_weights", "empty_weight") or (
        leaf == "weight" and bool(path) and path[-1] in _LOSS_OWNERS
    )


def is_routing_bias(leaf: str, siblings: Set[str], path: Path) -> bool:
    """Whether a parameter balances experts, which a rule moves and no gradient.

    Args:
        leaf: the parameter.
        siblings: names of the modules beside its own.
        path: its module.
    """
    found = set(words(leaf))
    return (
        {"correction", "bias"} <= found
        or {"expert", "bias"} == found
        or (bool({"balance", "balancing"} & found) and bool({"bias", "biases"} & found))
        or (leaf == "bias" and path[-1:] == ("gate",) and "experts" in siblings)
    )


_QUANTISED = re.compile(
    r"qweight|qzeros|scales|g_idx|zero_points?|SCB"
    r"|(?:weight|input|output|activation|act|k|v|q|kv|prob|kv_cache)_scale(?:_inv)?"
    r"|(?:kv_cache|prequant)_scaling_factor"
    r"|(?:weight|input)_(?:zero_point|global_scale)|pre_quant_scale"
    r"|(?:weight\.)?(?:nested_)?(?:absmax|quant_map)|weight\.quant_state\.\w+"
    r"|weight\._(?:scale|shift|data|zero_point)"
)
# What training in simulated integers, as of I-BERT and HAWQ, computes beside its weights. Of other
# names, a ``scaling_factor`` may well be trained.
_SIMULATED = re.compile(
    r"(?:act|activation|weights?|fc|conv|convbn)_scaling_factor|(?:weight|bias)_integer"
)
_OBSERVERS = frozenset(
    {"activation_post_process", "weight_fake_quant", "input_quantizer", "output_quantizer"}
    | {"weight_quantizer", "observer"}
)


def is_quantisation_factor(path: Path, leaf: str) -> bool:
    """Whether a parameter is called as the factors are that go with a quantised weight."""
    return (
        _QUANTISED.fullmatch(leaf) is not None
        or is_simulated(leaf)
        or (bool(path) and path[-1] in _OBSERVERS)
    )


def is_simulated(leaf: str) -> bool:
    """Whether a parameter is called as what training in simulated integers derives from weights.

    >>> [is_simulated(leaf) for leaf in ("act_scaling_factor", "latent_scaling_factor")]
    [True, False]
    """
    return _SIMULATED.fullmatch(leaf) is not None


# ------------------------------------------------------------------ what weights are

_TABLE = _set(
    "token tokens embed embeds embedding embeddings emb embs latent latents query queries probe "
    "probes prompt prompts codevectors codebook codebooks newline pointer encoding encodings "
    "prototype prototypes"
)
_FACTOR = _set(
    "scale scales scaling bias biases gain gate gamma beta alpha temperature magnitude norm "
    "weight shift"
)
_SCALES = frozenset({"scale", "gamma", "gain", "ls", "layerscale"})
_POSITION = frozenset({"pos", "position", "positional", "positions"})
_LINEAR = frozenset({"linear", "lin", "dense"})
_PROJECTION = frozenset({"proj", "projection", "fc", "mlp"})
_LONGEST_KERNEL = 11
_EXPERTS = frozenset({"expert", "experts", "moe"})


def is_table(leaf: str) -> bool:
    """Whether a parameter is an embedding, a token, or a table of them, by its name."""
    found = words(leaf)
    return bool(found) and (
        (bool(_TABLE & set(found)) and found[-1] not in _FACTOR | {"queue"})
        or leaf.endswith("position_bias_table")
        or found[:2] == ("rel", "pos")
    )


def is_weight(leaf: str) -> bool:
    """Whether a parameter is called as the weight of a layer is, of whatever library.

    ``weight``, ``weight_v`` and ``weight_orig`` of torch's reparametrisations, ``kernel``.
    """
    return leaf in ("weight", "kernel", "w", "W", "filters") or leaf.startswith("weight_")


def _is_convolution_name(parts: Path) -> bool:
    return any("conv" in part.lower() for part in parts)


def is_stack(path: Path, shape: Shape) -> bool:
    """Whether a weight of three dimensions is a stack of matrices and no convolution.

    Convolutions have short kernels, or say what they are.
    """
    if len(shape) != 3 or _is_convolution_name(path[-2:]):
        return False
    last = [part for part in path if not part.isdecimal()][-1:]
    named = set(words(last[0])) if last else set()
    if shape[2] > 1 and any(_EXPERTS & set(words(part)) for part in path):
        return True
    if named & _LINEAR:
        return shape[2] > 1
    return shape[2] >= 32 and (bool(named & _PROJECTION) or shape[1] >= 64)


def is_position_table(path: Path) -> bool:
    """Whether a module is called as one that holds a table of positions."""
    found = words(path[-1]) if path else ()
    return bool(found) and bool(_POSITION & set(found)) and found[-1] in _TABLE


def is_convolution(path: Path, leaf: str, shape: Shape) -> bool:
    """Whether a parameter is the weight of a convolution, by name and shape."""
    if len(shape) < 3:
        return False
    if leaf == "kernel" and len(shape) == 3 and is_attention_projection(path, leaf):
        return False  # Flax and Keras keep an attention's heads apart: [inputs, heads, width]
    if is_weight(leaf):
        return not is_stack(path, shape) and not (len(shape) == 3 and is_position_table(path))
    named = words(leaf)
    if named and "conv" in leaf.lower() and named[-1] not in _FACTOR - {"weight"}:
        return True
    # Of a name that says nothing: two dimensions of channels, and a short kernel.
    return (
        len(shape) > 3
        and min(shape[:2]) > 1
        and 1 < max(shape[2:]) <= _LONGEST_KERNEL
        and not is_table(leaf)
    )


def is_factor(path: Path, leaf: str) -> bool:
    """Whether a ``weight`` is one factor a channel: layer scale, DoRA's magnitude."""
    named = [words(part) for part in path if not part.isdecimal()][-2:]
    return (
        leaf.endswith(("_g", "_magnitude"))
        or any("magnitude" in found for found in named)
        or any(found[-1:] and found[-1] in _SCALES for found in named[-1:])
    )


def is_channel_scale(leaf: str) -> bool:
    """Whether a parameter is itself called as layer scale is: ``gamma_1``, ``lambda_1``."""
    found = words(leaf)
    return bool(found) and (
        found[-1] in _SCALES or {"layer", "scale"} <= set(found) or found == ("lambda",)
    )


# ------------------------------------------------------------------ what layers do

_ATTENTION = _set("attn attns attention attentions crossattention mha")
_PROJECTIONS = _set(
    "q k v qk kv qkv query key value queries keys values proj projection out output o dense attn "
    "wq wk wv wo wqkv"
)
# Of a projection's module no more parts are looked at: ``attention.output.dense``.
_NEAR = 3
_EMBEDDINGS = _set("embed embeds embedding embeddings emb embs codebook codebooks wte wpe")
_EMBEDDED = _set("token tokens word words position positions")


def is_attention_projection(path: Path, leaf: str) -> bool:
    """Whether a parameter is of a projection in a module that is called attention.

    >>> is_attention_projection(("h", "0", "attn", "c_proj"), "weight")
    True
    >>> is_attention_projection(("h", "0", "mlp", "c_proj"), "weight")
    False
    """
    parts = [*(words(part) for part in path if not part.isdecimal()), words(leaf)][-_NEAR - 1 :]
    for number, found in enumerate(parts[:-1]):
        if found and found[-1] in _ATTENTION:
            # A parameter of the attention itself is called as one of a projection, or is none.
            inner = parts[number + 1 : -1] or parts[-1:]
            return any(_PROJECTIONS & set(part) for part in inner)
    return False


def is_embedding_module(path: Path) -> bool:
    """Whether a module is called as one is whose matrix is a table: ``word_embeddings``, ``wte``.

    What stands in one, as in ``time_embed.0`` and ``patch_embed.proj``, is a layer.
    """
    found = words(path[-1]) if path else ()
    return bool(found) and (
        found[-1] in _EMBEDDINGS or (found[0] in _EMBEDDINGS and found[-1] in _EMBEDDED)
    )


# ------------------------------------------------------------------ all of one parameter


class Role(Enum):
    """What a parameter is by its own name, its module's and its shape; it can be several."""

    STATISTIC = auto()
    ROTARY_TABLE = auto()
    MASK_OR_INDEX = auto()
    QUANTISATION_FACTOR = auto()
    LOSS_WEIGHT = auto()
    TABLE = auto()
    FIXED_TABLE = auto()
    WEIGHT = auto()
    FACTOR = auto()
    CONVOLUTION = auto()


def find_roles(path: Path, leaf: str, shape: Shape) -> frozenset[Role]:
    """All roles of a parameter.

    Args:
        path: its module's name in parts, without wrappers.
        leaf: its own name within the module.
        shape: its shape.

    >>> find_roles(("conv1",), "weight", (8, 3, 3, 3)) == {Role.WEIGHT, Role.CONVOLUTION}
    True
    """
    applies = {
        Role.STATISTIC: is_statistic(leaf) or is_of_optimiser(path, leaf),
        Role.ROTARY_TABLE: is_rotary(leaf),
        Role.MASK_OR_INDEX: is_mask(leaf) or is_index(leaf) or _is_causal_mask(path, leaf, shape),
        Role.QUANTISATION_FACTOR: is_quantisation_factor(path, leaf),
        Role.LOSS_WEIGHT: is_loss_weight(path, leaf),
        Role.TABLE: is_table(leaf),
        Role.FIXED_TABLE: is_fixed_table(path, leaf, shape),
        Role.WEIGHT: is_weight(leaf),
        Role.FACTOR: is_factor(path, leaf),
        Role.CONVOLUTION: is_convolution(path, leaf, shape),
    }
    return frozenset(role for role, does in applies.items() if does)


def _is_causal_mask(path: Path, leaf: str, shape: Shape) -> bool:
    """GPT-2's causal mask is called "bias" and has four dimensions; a real bias has one."""
    return (
        leaf == "bias"
        and len(shape) > 2
        and shape[-1] == shape[-2]
        and any("attn" in part or "attention" in part for part in path[-1:])
    )
