"""What values over the checkpoints say of a tensor, and what they must not be taken to say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from know_cli.behaviour import (
    FIRST_ELEMENTS,
    Behaviour,
    BehaviourWatch,
    elements_to_watch,
    settle,
    without_rectified_sources,
)
from know_cli.kinds import Classification, Kind, Override, classify_all
from know_cli.normalisation import find_norm_layers

S = 5


def watched(values: Tensor, dtype: str = "F32", chunk: int = 1 << 15) -> Behaviour:
    """The behaviour of a tensor, ``[S, …]``."""
    watch = BehaviourWatch(tuple(values.shape[1:]), dtype)
    flat = values.reshape(len(values), -1)
    for start in range(0, flat.shape[1], chunk):
        watch.add(flat[:, start : start + chunk])
    return watch.behaviour()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(S, *shape)))


def kind_of(name: str, values: Tensor, others: dict[str, tuple[int, ...]] | None = None) -> Kind:
    shapes = {name: tuple(values.shape[1:]), **(others or {})}
    classes = classify_all({key: (shape, "F32") for key, shape in shapes.items()})
    return settle(classes, {name: watched(values)})[name].kind


def unit_vectors(size: int) -> Tensor:
    values = random(size)
    return values / values.norm(dim=1, keepdim=True)


COUNTS = torch.arange(S)[:, None] * 100.0 + torch.arange(3.0)
MASKS = (random(6, 6) > 0).float()
CUMULATIVE = random(40).abs().cumsum(dim=0) * torch.tensor([1.0, 2, 3, 4, 5])[:, None]


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("layer.u0", unit_vectors(16), "a vector of length 1"),
        ("layer.left", unit_vectors(64).float(), "a vector of length 1"),
        ("layer.pruning", MASKS, "only 0 and 1"),
        ("layer.blocked", torch.where(MASKS > 0, 0.0, -math.inf), "only 0 and 1"),
        ("layer.seen", COUNTS, "whole numbers"),
        ("tokens_done", torch.arange(S)[:, None].flip(0) * 1e8 + 1e9, "whole numbers"),
        ("layer.weight", random(8, 8).mul(9).round(), "whole numbers"),
        ("layer.total", CUMULATIVE, "grows in every session"),
        ("layer.total", CUMULATIVE.flip(0), "grows in every session"),
    ],
)
def test_what_no_weight_does_is_copied_with_the_reason(
    name: str, values: Tensor, reason: str
) -> None:
    classes = classify_all({name: (tuple(values.shape[1:]), "F32")})
    assert classes[name].kind is not Kind.COPY
    found = settle(classes, {name: watched(values)})[name]
    assert (found.kind, found.by_behaviour) == (Kind.COPY, True)
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
@pytest.mark.parametrize("size", [2, 16, 4096])
def test_unit_length_survives_rounding(dtype: str, torch_dtype: torch.dtype, size: int) -> None:
    assert watched(unit_vectors(size).to(torch_dtype), dtype).has_unit_length


ONES = torch.ones(S, 32)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("act.weight", ONES * 0.25 + random(32) * 0.01),
        ("gamma", ONES + random(32) * 0.01),  # near one, never negative
        ("scale", 1 + torch.arange(S)[:, None] * 0.1 * ONES),  # grows, but does not double
        ("logit_scale", torch.arange(1.0, S + 1)[:, None] * 1.5),  # doubles, but is one number
        ("fc.bias", torch.cat([torch.zeros(1, 32), random(32)[1:]])),
        ("fc.weight", torch.cat([torch.zeros(1, 8, 8), random(8, 8)[1:]])),
        ("fc.weight", torch.arange(S)[:, None, None] + torch.ones(1, 2, 3)),  # few whole numbers
        ("fc.bias", torch.eye(S)[:, :4]),  # few, all 0 or 1
        ("total", CUMULATIVE[[0, 1, 2, 2, 4]]),  # stands still once
        ("total", ONES * torch.linspace(1.0, 1.95, S)[:, None]),  # grows, but does not double
        ("embed.weight", torch.cat([torch.zeros(S, 2, 8), random(2, 8)], dim=1)),
        ("direction", unit_vectors(8) * 1.01),
        ("codes.weight", unit_vectors(36).reshape(S, 6, 6)),  # a matrix of length 1
        ("fc.bias", torch.zeros(S, 8)),
        ("gate", torch.ones(S, 8)),  # what does not move is copied as frozen, with that reason
        ("table", torch.full((S, 8), math.nan)),
        ("spread", random(32).abs()),  # never negative, and nothing else
    ],
)
def test_what_weights_may_do_changes_nothing(name: str, values: Tensor) -> None:
    assert kind_of(name, values) is not Kind.COPY


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_trained_values_are_never_taken_for_buffers(seed: int, rows: int, columns: int) -> None:
    steps = random(rows, columns, seed=seed) * 0.01
    values = random(rows, columns, seed=seed + 1)[:1] + steps.cumsum(dim=0)
    for name, moved in [("fc.weight", values), ("factor", 1 + steps), ("gain", values.abs())]:
        assert kind_of(name, moved.to(torch.float32)) is not Kind.COPY


def test_a_vector_beside_running_statistics_that_is_never_negative_is_one() -> None:
    spread = random(8).abs()
    others = {"m.shadow_var": (8,)}
    assert kind_of("m.spread", spread, others) is Kind.COPY
    assert kind_of("m.spread", -spread, others) is Kind.BIAS
    assert kind_of("m.weight", spread, others) is Kind.BIAS
    assert kind_of("n.spread", spread, others) is Kind.BIAS


def test_the_user_and_normalisation_layers_are_left_alone() -> None:
    tensors = {"norm.weight": ((16,), "F32"), "seen": ((3,), "F32"), "old": ((3,), "F32")}
    classes = classify_all(tensors, [Override("seen", Kind.FC), Override("old", Kind.COPY)])
    assert elements_to_watch(tensors, classes) == {}
    behaviours = {"norm.weight": watched(unit_vectors(16)), "seen": watched(COUNTS)}
    assert settle(classes, behaviours) == classes


@settings(max_examples=30)
@given(chunk=st.integers(1, 50), seed=st.integers(0, 99), what=st.integers(0, 3))
def test_chunks_of_any_size_tell_the_same(chunk: int, seed: int, what: int) -> None:
    values = [random(41, seed=seed), unit_vectors(41), MASKS, COUNTS][what]
    one, many = watched(values), watched(values, chunk=chunk)
    assert replace(many, growth=0.0) == replace(one, growth=0.0)
    assert many.growth == pytest.approx(one.growth, nan_ok=True)


def test_a_part_of_a_tensor_tells_no_length() -> None:
    watch = BehaviourWatch((8,), "F32")
    watch.add(torch.tensor([[0.6, 0.8], [0.8, 0.6]]))
    seen = watch.behaviour()
    assert (seen.elements, seen.is_whole_tensor, seen.has_unit_length) == (2, False, False)


def test_nothing_seen_is_nothing_told() -> None:
    watch = BehaviourWatch((8,), "F32")
    watch.add(torch.empty(S, 0))
    assert repr(watch.behaviour()) == repr(Behaviour())


def test_large_halves_are_whole_whatever_they_are() -> None:
    values = (1000 + random(8, 8) * 100).to(torch.bfloat16)
    assert (values == values.round()).all()
    assert not watched(values, "BF16").is_whole
    assert not watched(values, "BF16").is_count


def test_numbers_that_only_rise_are_a_counter_s_also_where_the_type_has_no_others() -> None:
    values = (1000 + 300 * torch.arange(S)[:, None]).to(torch.bfloat16)
    seen = watched(values, "BF16")
    assert (seen.is_whole, seen.is_count) == (False, True)
    name = "images"
    assert settle(classify_all({name: ((1,), "BF16")}), {name: seen})[name].kind is Kind.COPY
    assert not watched(-values, "BF16").is_count
    assert not watched(values[[0, 2, 1]], "BF16").is_count


def test_only_what_may_be_predicted_is_watched_and_vectors_whole() -> None:
    tensors = {
        "fc.weight": ((1000, 1000), "F32"), "vector": ((1 << 20,), "BF16"), "row": ((1, 9), "F32"),
        "ids": ((8,), "I64"), "a.running_var": ((8,), "F32"), "empty": ((0, 8), "F32"),
        "long": ((1 << 23,), "F32"), "conv.weight": ((8, 3, 3, 3), "F32"),
        "bn.running_mean": ((8,), "F32"), "bn.running_var": ((8,), "F32"),
        "other.0.running_mean": ((8,), "F32"), "other.0.running_var": ((8,), "F32"),
    }  # fmt: skip
    layers = find_norm_layers({name: shape for name, (shape, _) in tensors.items()})
    assert {layer.source_weight for layer in layers} == {None, "conv.weight"}
    assert elements_to_watch(tensors, classify_all(tensors), layers) == {
        "fc.weight": FIRST_ELEMENTS, "vector": 1 << 20, "row": 9, "long": FIRST_ELEMENTS,
        "conv.weight": 216, "bn.running_mean": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("means", "kept"),
    [
        (random(32).abs(), False),  # ReLU
        (random(32).abs() * 3 - 0.1, False),  # GELU
        (random(32), True),
        (random(32).abs() * 0.5 - 0.2, True),
        (random(32).abs() * 30 - 1.0, True),  # lower than GELU and SiLU go
        (random(12).abs() * 3 - 0.1, True),  # too few to tell
        (torch.zeros(S, 32), True),  # fresh
    ],
)
def test_sources_behind_an_activation_are_dropped(means: Tensor, kept: bool) -> None:
    size = means.shape[1]
    layers = find_norm_layers(
        {
            "conv.weight": (size, 3, 3, 3),
            "conv.bias": (size,),
            "bn.running_mean": (size,),
            "bn.running_var": (size,),
        }
    )
    assert layers[0].source_weight == "conv.weight"
    (layer,) = without_rectified_sources(layers, {"bn.running_mean": watched(means)})
    expected = ("conv.weight", "conv.bias") if kept else (None, None)
    assert (layer.source_weight, layer.source_bias) == expected
    assert layer.running_mean == "bn.running_mean"


def test_layers_that_were_not_looked_at_stay() -> None:
    layers = find_norm_layers({"norm.weight": (8,), "c.weight": (8, 3, 3, 3)})
    assert without_rectified_sources(layers, {}) == layers


def test_a_classification_says_whether_values_told() -> None:
    assert not Classification(Kind.COPY, "frozen").by_behaviour
