"""Normalisation layers and the layers that feed them, by names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from know_cli.normalisation import NormLayer, find_norm_layers
from tests.support.architectures import Shapes, batchnorm, preactivation, residual, sources


def test_batchnorm_is_found_whole() -> None:
    shapes = {"conv1.weight": (8, 3, 3, 3), "conv1.bias": (8,), **batchnorm("bn1", 8)}
    (layer,) = find_norm_layers(shapes)
    assert layer == NormLayer(
        "bn1", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
        "bn1.num_batches_tracked", "conv1.weight", "conv1.bias",
    )  # fmt: skip
    assert layer.has_statistics
    assert layer.affine == ("bn1.weight", "bn1.bias")
    assert layer.statistics == ("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked")


def test_batchnorm_without_affine_parameters() -> None:
    (layer,) = find_norm_layers({"x.running_mean": (8,), "x.running_var": (8,)})
    assert layer.affine == ()
    assert layer.statistics == ("x.running_mean", "x.running_var")


def test_layers_without_statistics_are_found_by_name() -> None:
    shapes: Shapes = {
        "h.0.ln_1.weight": (8,), "h.0.ln_1.bias": (8,),  # GPT-2
        "input_layernorm.weight": (8,),  # Llama
        "LayerNorm.gamma": (8,), "LayerNorm.beta": (8,),  # BERT of old
        "q_norm.weight": (8,), "norm_f.weight": (8,), "gn.weight": (8,), "gn.bias": (8,),
        "norms.3.weight": (8,),
    }  # fmt: skip
    assert [layer.prefix for layer in find_norm_layers(shapes)] == [
        "LayerNorm", "gn", "h.0.ln_1", "input_layernorm", "norm_f", "norms.3", "q_norm",
    ]  # fmt: skip
    assert find_norm_layers(shapes)[0].affine == ("LayerNorm.gamma", "LayerNorm.beta")


def test_a_numbered_layernorm_is_found_by_its_shapes() -> None:
    (layer,) = find_norm_layers({"downsample.0.weight": (8,), "downsample.0.bias": (8,)})
    assert layer.affine == ("downsample.0.weight", "downsample.0.bias")


def test_what_is_no_normalisation_layer() -> None:
    assert not find_norm_layers(
        {
            "norm_proj.weight": (8, 8), "norm_proj.bias": (8,),  # a linear layer
            "prelu.weight": (8,),
            "abnormal.weight": (8,),
            "fc.bias": (8,),
            "x.running_mean": (8,),  # no variance
            "y.running_mean": (8,), "y.running_var": (4,),
        }
    )  # fmt: skip


def test_a_bias_of_another_shape_is_not_the_layer_s() -> None:
    (layer,) = find_norm_layers({"norm.weight": (8,), "norm.bias": (4,)})
    assert layer.affine == ("norm.weight",)


def test_residual_network() -> None:
    shapes = {
        "conv1.weight": (8, 3, 7, 7), **batchnorm("bn1", 8),
        **residual("layer1.0", 8, 8), **residual("layer2.0", 8, 16),
        "layer2.0.downsample.0.weight": (16, 8, 1, 1), **batchnorm("layer2.0.downsample.1", 16),
    }  # fmt: skip
    assert sources(shapes) == {
        "bn1": "conv1.weight",
        "layer1.0.bn1": "layer1.0.conv1.weight",
        "layer1.0.bn2": "layer1.0.conv2.weight",
        "layer2.0.bn1": "layer2.0.conv1.weight",
        "layer2.0.bn2": "layer2.0.conv2.weight",
        "layer2.0.downsample.1": "layer2.0.downsample.0.weight",
    }


@pytest.mark.parametrize("name", ["up", "decoder.upconv", "net.deconv1", "conv_transpose"])
def test_square_layers_that_may_be_transposed_are_no_sources(name: str) -> None:
    """Their outputs come second, which a square shape does not show."""
    layers = {
        "down.0.weight": (8, 3, 3, 3), **batchnorm("down.1", 8),
        f"{name}.0.weight": (8, 8, 2, 2), **batchnorm(f"{name}.1", 8),
    }  # fmt: skip
    assert sources(layers) == {"down.1": "down.0.weight", f"{name}.1": None}


def test_preactivation_network_has_no_sources() -> None:
    shapes = {
        "conv1.weight": (8, 3, 3, 3),
        **preactivation("layer1.0", 8, 8),
        **preactivation("layer2.0", 8, 16),
    }
    assert set(sources(shapes).values()) == {None}


def test_constant_width_gives_no_evidence() -> None:
    shapes = {**preactivation("a", 8, 8), **preactivation("b", 8, 8)}
    assert set(sources(shapes).values()) == {None}


def test_depthwise_convolutions_alone_give_no_evidence() -> None:
    shapes = {"conv1.weight": (8, 1, 3, 3), **batchnorm("bn1", 8)}
    assert sources(shapes) == {"bn1": None}


def test_depthwise_convolution_among_others() -> None:
    shapes = {
        "0.weight": (8, 3, 1, 1), **batchnorm("1", 8), "3.weight": (8, 1, 3, 3), **batchnorm("4", 8),
    }  # fmt: skip
    assert sources(shapes) == {"1": "0.weight", "4": "3.weight"}


def test_transposed_convolution_is_refused() -> None:
    shapes = {"up.0.weight": (16, 8, 2, 2), **batchnorm("up.1", 8)}
    assert sources(shapes) == {"up.1": None}


def test_linear_layer_before_batchnorm() -> None:
    shapes = {"fc1.weight": (8, 20), "fc1.bias": (8,), **batchnorm("bn1", 8)}
    (layer,) = find_norm_layers(shapes)
    assert (layer.source_weight, layer.source_bias) == ("fc1.weight", "fc1.bias")


@given(st.permutations(sorted(residual("a.b", 3, 8).items())))
def test_order_does_not_matter(items: list[tuple[str, tuple[int, ...]]]) -> None:
    assert find_norm_layers(dict(items)) == find_norm_layers(residual("a.b", 3, 8))
