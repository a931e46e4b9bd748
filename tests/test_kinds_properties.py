"""What must hold of kinds whatever the model: wrappers, unit dimensions, order, hostile names."""

from __future__ import annotations

import functools
import json
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from know_cli.kinds import Kind, classify, classify_all
from know_cli.names import MAX_PART_LENGTH, MAX_PARTS, read_name, words
from know_cli.normalisation import NormLayer, find_norm_layers

Shape = tuple[int, ...]
SAMPLE = Path(__file__).parent / "fixtures" / "inventories-sample.zip"
WRAPPERS = [
    "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
    "modules_to_save.default", "base_layer", "original_module",
]  # fmt: skip
SMALL = ["timm-levit_conv_128s", "monai-UNet_square", "transformers-xcodec", "peft-dora_conv",
         "torch-norms_in_sequential", "torch-spectral_norm_param", "names-quant_hqq"]  # fmt: skip


@functools.cache
def inventory(name: str) -> dict[str, tuple[Shape, str]]:
    with zipfile.ZipFile(SAMPLE) as archive:
        rows = json.loads(archive.read(f"{name}.json"))["tensors"]
    return {row[0]: (tuple(row[1]), row[2]) for row in rows}


def wrapped(name: str, wrapper: str, depth: int) -> str:
    """A name with a wrapper at a depth, at the latest before the parameter."""
    parts = name.split(".")
    at = min(depth, len(parts) - 1)
    return ".".join([*parts[:at], wrapper, *parts[at:]])


def unwrapped(layer: NormLayer, names: dict[str, str]) -> tuple[object, ...]:
    return (
        [names[name] for name in (*layer.affine, *layer.statistics)],
        layer.source_weight and names[layer.source_weight],
        layer.source_bias and names[layer.source_bias],
    )


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=4, deadline=None)
@given(wrapper=st.sampled_from(WRAPPERS), depth=st.integers(0, 8), more=st.booleans())
def test_wrappers_anywhere_change_nothing(name: str, wrapper: str, depth: int, more: bool) -> None:
    tensors = inventory(name)
    names = {wrapped(key, wrapper, depth): key for key in tensors}
    if more:
        names = {wrapped(key, "_orig_mod", 0): original for key, original in names.items()}
    found = classify_all({key: tensors[original] for key, original in names.items()})
    expected = classify_all(tensors)
    assert {names[key]: value for key, value in found.items()} == expected
    layers = find_norm_layers({key: tensors[original][0] for key, original in names.items()})
    before = find_norm_layers({key: shape for key, (shape, _) in tensors.items()})
    identity = {key: key for key in tensors}
    assert sorted(map(repr, (unwrapped(layer, names) for layer in layers))) == sorted(
        map(repr, (unwrapped(layer, identity) for layer in before))
    )


@pytest.mark.parametrize("name", SMALL)
def test_slashes_divide_names_as_dots_do(name: str) -> None:
    tensors = inventory(name)
    for end in ("", ":0"):
        names = {key.replace(".", "/") + end: key for key in tensors}
        found = classify_all({key: tensors[original] for key, original in names.items()})
        assert {names[key]: value for key, value in found.items()} == classify_all(tensors)


@settings(max_examples=30)
@given(name=st.sampled_from(sorted(inventory(SMALL[0]))), wrapper=st.sampled_from(WRAPPERS))
def test_a_wrapper_around_one_parameter_changes_nothing(name: str, wrapper: str) -> None:
    shape, dtype = inventory(SMALL[0])[name]
    expected = classify(name, shape, dtype)
    for depth in range(name.count(".") + 1):
        assert classify(wrapped(name, wrapper, depth), shape, dtype) == expected


# A layer's weight is left out: [8, 1] is that of a linear layer, [8, 1, 1] of a convolution.
VECTORS = [
    "attn.temperature", "block.gamma", "mixer.D", "conv.bias", "att.time_mix_k", "snake.alpha",
    "norm.weight", "q_norm.scale", "a.running_mean", "x.inv_freq", "mask", "cls_token",
    "pos_embed", "conv.weight_g", "lora_magnitude_vector", "logit_scale", "w_avg", "criterion.weight",
    "unheard_of",
]  # fmt: skip


@given(
    name=st.sampled_from(VECTORS),
    size=st.integers(2, 99),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
def test_unit_dimensions_do_not_count(name: str, size: int, before: int, after: int) -> None:
    expected = classify(name, (size,), "F32").kind
    assert classify(name, (1,) * before + (size,) + (1,) * after, "F32").kind is expected


@settings(max_examples=30)
@given(st.integers(2, 99), st.lists(st.integers(0, 2), max_size=3))
def test_unit_dimensions_of_matrices_do_not_count(size: int, places: list[int]) -> None:
    shape = [size, size + 1]
    for place in places:
        shape.insert(place, 1)
    for name in ("lora_A", "mlp.up_proj", "pos_embed", "attn.relative_position_bias_table"):
        assert classify(name, tuple(shape), "F32").kind is Kind.FC


@pytest.mark.parametrize("name", SMALL)
def test_the_order_of_tensors_does_not_matter(name: str) -> None:
    tensors = inventory(name)
    shuffled = sorted(tensors)
    random.Random(name).shuffle(shuffled)
    shapes = {key: tensors[key][0] for key in shuffled}
    assert classify_all({key: tensors[key] for key in shuffled}) == classify_all(tensors)
    assert find_norm_layers(shapes) == find_norm_layers({k: shapes[k] for k in tensors})


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=20)
            | st.sampled_from(["bn.running_mean", "bn.running_var", "0.weight"]),
            st.lists(st.integers(0, 4), max_size=4),
            st.sampled_from(["F32", "U8", "I64", "F8_E4M3", "C64", "BOOL"]),
        ),
        max_size=8,
    )
)
def test_any_checkpoint_is_classified(rows: list[tuple[str, list[int], str]]) -> None:
    tensors = {name: (tuple(shape), dtype) for name, shape, dtype in rows}
    assert classify_all(tensors).keys() == tensors.keys()
    layers = find_norm_layers({name: shape for name, (shape, _) in tensors.items()})
    owned = [name for layer in layers for name in (*layer.affine, *layer.statistics)]
    assert set(owned) <= tensors.keys()


# ---------------------------------------------------------------------- hostile names

HOSTILE = ["experts." * 8000 + "w", "a" * 65000, "_" * 65000, "norm" * 16000, "1." * 30000 + "x",
           "conv_" * 13000, "min_max_" * 8000, "A" * 65000, "bn.bn_" * 10000]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: name[:8])
def test_of_names_that_no_model_has_only_the_end_is_read(name: str) -> None:
    read = read_name(name)
    assert len(read.path) < MAX_PARTS
    assert max(map(len, [*read.path, read.leaf])) <= MAX_PART_LENGTH
    assert lines_run(name) < 2.5 * lines_run("experts." * 63 + "w")
    assert classify(f"{name}.rope.inv_freq", (8,), "F32").kind is Kind.COPY
    assert classify(f"{name}.conv.weight", (8, 8, 3, 3), "F32").kind is Kind.CONV
    (layer,) = find_norm_layers({f"{name}.bn.running_mean": (8,), f"{name}.bn.running_var": (8,)})
    assert layer.prefix == f"{name}.bn"


def test_long_names_that_end_alike_are_kept_apart() -> None:
    names = [f"{letter * 2000}.{'norm.' * 300}weight" for letter in "ab"]
    found = find_norm_layers(dict.fromkeys(names, (8,)))
    assert [layer.weight for layer in found] == names


def lines_run(*names: str) -> int:
    """How many lines of Python classifying tensors of these names takes."""
    count = 0

    def trace(*_: object) -> object:
        nonlocal count
        count += 1
        return trace

    words.cache_clear()
    sys.settrace(trace)
    try:
        classify_all({name: ((8,) if "bn" in name else (8, 8), "F32") for name in names})
    finally:
        sys.settrace(None)
    return count


def names_of_length(repeats: int) -> Iterator[str]:
    yield "experts." * repeats + "w"
    yield "norm_" * repeats + "w"
    yield "a.1." * repeats + "weight"


def test_the_work_is_in_proportion_to_a_name_s_length() -> None:
    for short, long in zip(names_of_length(7), names_of_length(14), strict=True):
        assert lines_run(long) < 2.5 * lines_run(short)


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        ("conv{}", "bn{}"),
        ("layer{}", "bn_of{}"),
        ("{}", "bn.{}"),
        ("blocks.{}.conv", "blocks.{}.bn"),
    ],
)
def test_the_work_is_in_proportion_to_the_number_of_layers(layer: str, norm: str) -> None:
    def work(count: int) -> int:
        statistics = ("weight", "running_mean", "running_var")
        names = ["blocks.0.conv1.weight", *(f"blocks.0.bn1.{leaf}" for leaf in statistics)]
        for number in range(count):
            names.append(f"{layer.format(number)}.weight")
            names += [f"{norm.format(number)}.{leaf}" for leaf in statistics]
        return lines_run(*names)

    assert work(60) < 2.5 * work(30)
