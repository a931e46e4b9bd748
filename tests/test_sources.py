"""Layers that feed BatchNorms: found where names and shapes leave no doubt, and only there."""

from __future__ import annotations

import pytest

from know_cli.normalisation import find_norm_layers
from tests.support.architectures import Shapes, batchnorm, preactivation, residual, sources


def found(shapes: Shapes) -> dict[str, str]:
    return {norm: source for norm, source in sources(shapes).items() if source is not None}


# ---------------------------------------------------------------------- not certain, so copied


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize(
    ("stem", "kernel"), [("conv1", (7, 7)), ("stem.0", (3, 3)), ("conv", (4, 4))]
)
@pytest.mark.parametrize("block", ["blocks.{}", "layer{}.0", "features.unit{}"])
def test_blocks_of_one_width_after_an_ordinary_stem(
    stem: str, kernel: tuple[int, int], block: str, width: int
) -> None:
    norm = {"conv1": "bn1", "stem.0": "stem.1", "conv": "bn"}[stem]
    shapes: Shapes = {f"{stem}.weight": (width, 3, *kernel), **batchnorm(norm, width)}
    for number in range(4):
        shapes |= preactivation(block.format(number), width, width)
    blocks = {name for name in sources(shapes) if name.startswith(block.split("{")[0])}
    assert len(blocks) == 8
    assert not blocks & found(shapes).keys()


@pytest.mark.parametrize("inner", ["{}.conv.weight", "{}.body.conv.weight"])
def test_blocks_that_hold_norm_and_convolution_of_one_width(inner: str) -> None:
    shapes: Shapes = {"stem.conv.weight": (16, 3, 3, 3), **batchnorm("stem.bn", 16)}
    for number in range(3):
        shapes |= batchnorm(inner.format(f"units.{number}").replace("conv.weight", "bn"), 16)
        shapes[inner.format(f"units.{number}")] = (16, 16, 3, 3)
    assert found(shapes) == {"stem.bn": "stem.conv.weight"}


def test_a_norm_at_the_end_named_as_the_stem_s() -> None:
    shapes: Shapes = {"conv1.weight": (8, 3, 3, 3), **batchnorm("bn1", 8), "fc.weight": (10, 8)}
    for number in range(2):
        shapes |= preactivation(f"layer1.{number}", 8, 8)
    assert found(shapes) == {}


def test_grouped_convolutions_of_one_width_are_no_evidence() -> None:
    shapes: Shapes = {}
    for number in range(3):
        shapes |= {f"blocks.{number}.conv1.weight": (32, 4, 3, 3),
                   **batchnorm(f"blocks.{number}.bn1", 32)}  # fmt: skip
    assert found(shapes) == {}


def test_groups_of_three_are_no_pictures() -> None:
    shapes: Shapes = {}
    for number in range(3):
        shapes |= {f"blocks.{number}.conv1.weight": (96, 3, 3, 3),
                   **batchnorm(f"blocks.{number}.bn1", 96)}  # fmt: skip
    assert found(shapes) == {}


@pytest.mark.parametrize("number", [2, 3])
def test_an_activation_between_that_has_a_number_is_seen(number: int) -> None:
    shapes: Shapes = {"stem.0.weight": (16, 3, 3, 3), **batchnorm(f"stem.{number}", 16)}
    assert found(shapes) == {}


@pytest.mark.parametrize(
    "layers",
    [
        {"conv": (16, 8, 3, 3), "shortcut": (16, 8, 1, 1)},
        {"conv": (16, 8, 3, 3), "skip": (16, 8, 3, 3)},
        {"conv": (16, 8, 3, 3), "proj": (16, 12, 1, 1)},
        {"left": (16, 8, 3, 3), "right": (16, 8, 3, 3)},
        {"conv_a": (16, 8, 3, 3), "conv_b": (16, 16, 3, 3)},
    ],
)
def test_a_norm_after_a_sum(layers: Shapes) -> None:
    shapes: Shapes = {}
    for number in range(3):
        shapes |= {f"blocks.{number}.{name}.weight": shape for name, shape in layers.items()}
        shapes |= batchnorm(f"blocks.{number}.bn", 16)
    assert found(shapes) == {}


def test_a_norm_beside_a_branch_with_its_own() -> None:
    """RepViT: bn(conv(x) + conv1(x) + x), where ``conv`` has a norm of its own."""
    shapes: Shapes = {}
    for number, width in enumerate((8, 16, 32)):
        mixer = f"blocks.{number}.token_mixer"
        shapes |= {f"{mixer}.conv.c.weight": (width, 1, 3, 3), **batchnorm(f"{mixer}.conv.bn", width),
                   f"{mixer}.conv1.weight": (width, 1, 1, 1), **batchnorm(f"{mixer}.bn", width),
                   f"blocks.{number}.mlp.conv1.c.weight": (2 * width, width, 1, 1),
                   **batchnorm(f"blocks.{number}.mlp.conv1.bn", 2 * width)}  # fmt: skip
    assert not [name for name in found(shapes) if name.endswith("token_mixer.bn")]


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize(
    "path",
    ["{}", "decoder.{}", "decoder.blocks.0.{}", "dec.2.{}", "gen.{}", "up.{}", "net.1.deconv.{}"],
)
def test_transposed_convolutions_of_one_width(path: str, kernel: int) -> None:
    shapes: Shapes = {
        "encoder.0.weight": (64, 3, 3, 3), **batchnorm("encoder.1", 64),
        f"{path.format('0')}.weight": (64, 64, kernel, kernel), **batchnorm(path.format("1"), 64),
    }  # fmt: skip
    assert found(shapes) == {"encoder.1": "encoder.0.weight"}


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("path", ["decoder.blocks.{}", "blocks.{}", "decode{}", "net.{}.0"])
def test_transposed_convolutions_within_numbered_blocks(path: str, kernel: int) -> None:
    """Linknet: 1×1, transposed, 1×1, each with a norm, in blocks that get wider."""
    shapes: Shapes = {}
    for number, width in enumerate((256, 128, 64)):
        block = path.format(number)
        quarter = width // 4
        shapes |= {
            f"{block}.0.weight": (quarter, width, 1, 1), **batchnorm(f"{block}.1", quarter),
            f"{block}.3.weight": (quarter, quarter, kernel, kernel), **batchnorm(f"{block}.4", quarter),
            f"{block}.6.weight": (width // 2, quarter, 1, 1), **batchnorm(f"{block}.7", width // 2),
        }  # fmt: skip
    assert not [name for name in found(shapes) if name.endswith(".4")]


def test_transposed_convolutions_whose_shape_tells_refute_their_role() -> None:
    shapes: Shapes = {}
    for number, (inputs, outputs) in enumerate([(32, 16), (16, 16), (16, 8)]):
        shapes |= {f"stages.{number}.conv.weight": (inputs, outputs, 3, 3),
                   **batchnorm(f"stages.{number}.bn", outputs)}  # fmt: skip
    assert found(shapes) == {}


@pytest.mark.parametrize(
    "others",
    [
        {"conv1.lora_A.default.weight": (4, 3, 3, 3), "conv1.lora_B.default.weight": (8, 4, 1, 1)},
        {"conv1.gain": (8, 1, 1, 1)},  # standardised weights
        {"conv1.mask": (8, 3, 3, 3)},
    ],
)
def test_weights_that_are_not_what_is_used(others: Shapes) -> None:
    shapes: Shapes = {"conv1.weight": (8, 3, 3, 3), **batchnorm("bn1", 8)}
    assert found(shapes) == {"bn1": "conv1.weight"}
    assert found({**shapes, **others}) == {}


@pytest.mark.parametrize(
    "weights",
    [
        {"conv1.weight_g": (8, 1, 1, 1), "conv1.weight_v": (8, 3, 3, 3)},
        {"conv1.weight_orig": (8, 3, 3, 3), "conv1.weight_u": (8,), "conv1.weight_v": (27,)},
        {"conv1.parametrizations.weight.original": (8, 3, 3, 3)},
    ],
)
def test_reparametrised_weights_are_no_sources(weights: Shapes) -> None:
    assert found({**weights, **batchnorm("bn1", 8)}) == {}


def test_a_layer_whose_output_its_module_changes() -> None:
    """A graph convolution sums over neighbours and adds a bias of its own."""
    shapes: Shapes = {"convs.0.lin.weight": (32, 16), **batchnorm("norms.0", 32)}
    assert found(shapes) == {"norms.0": "convs.0.lin.weight"}
    assert found({**shapes, "convs.0.bias": (32,)}) == {}


def test_one_layer_is_the_source_of_one_norm() -> None:
    shapes: Shapes = {"conv1.weight": (8, 3, 3, 3), **batchnorm("bn1", 8), **batchnorm("norm1", 8)}
    assert found(shapes) == {}


def test_a_copy_of_a_module_beside_its_original_is_no_source() -> None:
    shapes: Shapes = {
        "conv1.original_module.weight": (8, 3, 3, 3),
        "conv1.modules_to_save.default.weight": (8, 3, 3, 3),
        **batchnorm("bn1", 8),
    }
    assert found(shapes) == {}


def test_shuffled_channels_after_grouped_convolutions() -> None:
    """CondenseNet shuffles between a grouped convolution and the next norm."""
    shapes: Shapes = {}
    for number in range(3):
        inputs = 200 + 32 * number
        unit = f"stage.unit{number}"
        shapes |= {**batchnorm(f"{unit}.conv1.bn", inputs),
                   f"{unit}.conv1.conv.weight": (128, inputs // 8, 1, 1),
                   **batchnorm(f"{unit}.conv2.bn", 128),
                   f"{unit}.conv2.conv.weight": (32, 32, 3, 3)}  # fmt: skip
    assert found(shapes) == {}


# ---------------------------------------------------------------------- certain


@pytest.mark.parametrize(
    ("norm", "layer"),
    [
        ("bn2", "conv2"), ("batch_norm_2", "conv_2"), ("expand_bn", "expand_conv"),
        ("depthwise_norm", "depthwise_conv"), ("normalization", "convolution"), ("bn", "linear"),
        ("batchnorm", "convolution"), ("conv1_bn", "conv1"), ("conv1/bn", "conv1"),
        ("bn_dw", "conv_dw"), ("_bn0", "_conv0"), ("BatchNorm_0", "Conv_0"), ("norm1", "conv1_1x1"),
        ("bn", "depthwise"), ("adn.N", "conv"), ("norms.0", "convs.0"), ("bns.1", "layers.1"),
        ("norm.module", "conv._orig_mod"), ("norm1", "conv1.conv"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parent", ["", "encoder.blocks.3."])
def test_names_that_go_together(parent: str, norm: str, layer: str) -> None:
    shapes = {f"{parent}{layer}.weight": (12, 32, 3, 3), **batchnorm(f"{parent}{norm}", 12)}
    assert found(shapes) == {f"{parent}{norm}": f"{parent}{layer}.weight"}


def inverted(block: str, inputs: int, outputs: int, *, factor: int = 4) -> Shapes:
    """timm's InvertedResidual, with squeeze-and-excitation."""
    hidden = factor * inputs
    return {
        f"{block}.conv_pw.weight": (hidden, inputs, 1, 1), **batchnorm(f"{block}.bn1", hidden),
        f"{block}.conv_dw.weight": (hidden, 1, 3, 3), **batchnorm(f"{block}.bn2", hidden),
        f"{block}.se.conv_reduce.weight": (8, hidden, 1, 1), f"{block}.se.conv_reduce.bias": (8,),
        f"{block}.se.conv_expand.weight": (hidden, 8, 1, 1), f"{block}.se.conv_expand.bias": (hidden,),
        f"{block}.conv_pwl.weight": (outputs, hidden, 1, 1), **batchnorm(f"{block}.bn3", outputs),
    }  # fmt: skip


def test_mobile_networks_whose_norms_are_only_numbered() -> None:
    shapes: Shapes = {
        "conv_stem.weight": (16, 3, 3, 3), **batchnorm("bn1", 16),
        **inverted("blocks.1.0", 16, 24), **inverted("blocks.1.1", 24, 24),
        **inverted("blocks.2.0", 24, 40), **inverted("blocks.2.1", 40, 40),
        "conv_head.weight": (960, 40, 1, 1), **batchnorm("bn2", 960), "classifier.weight": (10, 960),
    }  # fmt: skip
    names = {"bn1": "conv_pw", "bn2": "conv_dw", "bn3": "conv_pwl"}
    expected = {
        f"blocks.{block}.{norm}": f"blocks.{block}.{layer}.weight"
        for block in ("1.0", "1.1", "2.0", "2.1")
        for norm, layer in names.items()
    }
    assert found(shapes) == {**expected, "bn1": "conv_stem.weight", "bn2": "conv_head.weight"}


def test_a_norm_of_a_part_of_the_channels() -> None:
    """Octave convolution: the outputs are split and summed before ``h_bn``."""
    shapes: Shapes = {}
    for number in range(2):
        unit = f"stage.unit{number}"
        shapes |= {f"{unit}.conv.weight": (64, 48, 3, 3), **batchnorm(f"{unit}.h_bn", 64)}
    assert found(shapes) == {}


def test_blocks_that_fit_both_orders_are_left_alone() -> None:
    """Where inputs and outputs are the same, the norms may as well come first."""
    assert found({**inverted("blocks.0", 24, 24), **inverted("blocks.1", 24, 24)}) == {}


def test_convolutions_in_blocks_that_others_of_the_block_prove() -> None:
    shapes: Shapes = {}
    for number in range(2):
        block = f"layers.{number}"
        shapes |= {f"{block}.reduce.conv.weight": (14, 56, 1, 1), **batchnorm(f"{block}.reduce.bn", 14),
                   f"{block}.bn1.weight": (14,), f"{block}.dw.conv.weight": (14, 1, 3, 3),
                   **batchnorm(f"{block}.dw.bn", 14)}  # fmt: skip
    assert len(found(shapes)) == 4


def test_networks_that_surely_normalise_first() -> None:
    """DenseNet: every second norm follows the convolution before it at once."""
    shapes: Shapes = {}
    for number in range(3):
        layer = f"features.denseblock1.denselayer{number + 1}"
        inputs = 40 + 12 * number
        shapes |= {**batchnorm(f"{layer}.norm1", inputs), f"{layer}.conv1.weight": (48, inputs, 1, 1),
                   **batchnorm(f"{layer}.norm2", 48), f"{layer}.conv2.weight": (12, 48, 3, 3)}  # fmt: skip
    assert found(shapes) == {
        name: name.replace("norm2", "conv1.weight") for name in sources(shapes) if "norm2" in name
    }


def test_wrappers_do_not_hide_sources() -> None:
    shapes = {
        name.replace("conv1", "conv1._orig_mod").replace("bn2", "bn2.module"): shape
        for name, shape in {**residual("a.0", 3, 8), **residual("a.1", 8, 20)}.items()
    }
    assert found(shapes) == {
        "a.0.bn1": "a.0.conv1._orig_mod.weight", "a.0.bn2.module": "a.0.conv2.weight",
        "a.1.bn1": "a.1.conv1._orig_mod.weight", "a.1.bn2.module": "a.1.conv2.weight",
    }  # fmt: skip


def test_statistics_as_keras_names_them() -> None:
    shapes: Shapes = {
        "bn.gamma": (8,),
        "bn.beta": (8,),
        "bn.moving_mean": (8,),
        "bn.moving_variance": (8,),
    }
    (layer,) = find_norm_layers({"conv.weight": (8, 3, 3, 3), **shapes})
    assert layer.statistics == ("bn.moving_mean", "bn.moving_variance")
    assert (layer.affine, layer.source_weight) == (("bn.gamma", "bn.beta"), "conv.weight")
