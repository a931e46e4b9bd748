"""The zoo: what its networks are given, give, are called, weigh and learn."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from know_cli.errors import UsageError
from know_cli.kinds import Kind, classify
from know_cli.lab.zoo import ARCHITECTURES, Design, Inputs, build, random_design
from know_cli.normalisation import find_norm_layers

LIMIT = 3_000_000
INPUTS = {
    "image": [
        Inputs("image", (1, 8, 8)),
        Inputs("image", (1, 28, 28)),
        Inputs("image", (3, 32, 32)),
        Inputs("image", (2, 9, 13)),
        Inputs("image", (3, 64, 48)),
    ],
    "text": [Inputs("text", (100, 7)), Inputs("text", (8000, 64)), Inputs("text", (30_000, 128))],
}
CASES = [
    pytest.param(name, inputs, id=f"{name}-{'x'.join(map(str, inputs.shape))}")
    for name, entry in ARCHITECTURES.items()
    for inputs in INPUTS[entry.kind]
]
# Names of element types in safetensors, as far as networks have them.
DTYPES = {torch.float32: "F32", torch.int64: "I64"}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def smallest(name: str) -> Inputs:
    return INPUTS[ARCHITECTURES[name].kind][0]


def samples(inputs: Inputs, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if inputs.kind == "image":
        return torch.randn(n, *inputs.shape, generator=generator)
    vocabulary, length = inputs.shape
    return torch.randint(vocabulary, (n, length), generator=generator)


def designs(name: str, inputs: Inputs, count: int, seed: int = 0) -> list[Design]:
    generator = np.random.default_rng(seed)
    return [random_design(name, inputs, 5, generator) for _ in range(count)]


def size(design: Design) -> int:
    return sum(parameter.numel() for parameter in build(design, 0).parameters())


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What it gives


@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_logits_and_gradients(name: str, inputs: Inputs) -> None:
    for seed, design in enumerate(designs(name, inputs, 2 if inputs == smallest(name) else 1)):
        model = build(design, seed)
        assert model.training
        logits = model(samples(inputs, 3))
        assert logits.shape == (3, 5)
        assert logits.dtype == torch.float32
        nn.functional.cross_entropy(logits, torch.arange(3)).backward()
        for parameter, tensor in model.named_parameters():
            assert tensor.dtype == torch.float32
            assert tensor.grad is not None, parameter
            assert torch.isfinite(tensor.grad).all(), parameter
        assert model.eval()(samples(inputs, 1)).shape == (1, 5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_matters(name: str) -> None:
    """No gradient is zero throughout, but where theory has it so."""
    inputs = smallest(name)
    for seed, design in enumerate(designs(name, inputs, 3)):
        model = build(design, seed)
        nn.functional.cross_entropy(model(samples(inputs, 32)), torch.arange(32) % 5).backward()
        for parameter, tensor in model.named_parameters():
            # Whatever is added before a BatchNorm, or to all keys, changes nothing.
            if not parameter.endswith(".bias"):
                assert tensor.grad is not None
                assert tensor.grad.abs().max() > 0, (parameter, design)


@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_small(name: str, inputs: Inputs) -> None:
    choices = ARCHITECTURES[name].choices(inputs)
    largest = Design(
        name,
        inputs,
        100,
        {
            option: max(values)
            for option, values in choices.items()
            if not isinstance(values[0], str)
        },
    )
    assert size(largest) < LIMIT
    for design in designs(name, inputs, 3):
        assert 500 < size(design) < LIMIT


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"mlp", "text", "vit", "pyramid"}))
@pytest.mark.parametrize("side", [8, 16, 28])
def test_batch_of_one_can_be_trained(name: str, side: int) -> None:
    inputs = Inputs("image", (1, side, side))
    choices = ARCHITECTURES[name].choices(inputs)
    for depth in (min, max):
        options = {
            option: depth(values)
            for option, values in choices.items()
            if not isinstance(values[0], str)
        }
        model = build(Design(name, inputs, 3, {**options, "norm": "batch"}), 0)
        assert torch.isfinite(model(samples(inputs, 1))).all()


def test_shorter_texts() -> None:
    model = build(Design("text", Inputs("text", (50, 16)), 3), 0)
    assert model(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_is_last(name: str) -> None:
    model = build(Design(name, smallest(name), 7), 0)
    last, layer = list(model.named_modules())[-1]
    assert last == "head"
    assert isinstance(layer, nn.Linear)
    assert layer.out_features == 7
    assert list(model.state_dict())[-2:] == ["head.weight", "head.bias"]


# Seeds


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_seed_decides_and_global_state_is_left_alone(name: str) -> None:
    for design in designs(name, smallest(name), 2):
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        first = build(design, 3).state_dict()
        torch.rand(5)
        second = build(design, 3).state_dict()
        other = build(design, 4).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not torch.equal(first["head.weight"], other["head.weight"])
        torch.random.set_rng_state(before[0])
        build(design, 5)
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_designs_are_drawn_from_the_generator(name: str) -> None:
    drawn = designs(name, smallest(name), 12)
    assert drawn == designs(name, smallest(name), 12)
    assert drawn != designs(name, smallest(name), 12, seed=1)
    assert len({json.dumps(design.to_json()) for design in drawn}) > 8


def test_with_and_without_normalisation() -> None:
    for name in ("cnn", "resnet", "densenet", "shufflenet", "mobilenetv2", "mlp"):
        norms = {design.options["norm"] for design in designs(name, smallest(name), 60)}
        assert {"batch", "none"} < norms
        for norm in norms:
            model = build(Design(name, smallest(name), 3, {"norm": norm}), 0)
            found = {type(module) for module in model.modules() if isinstance(module, NORMS)}
            assert len(found) == (norm != "none")


# Names


def expected_kinds(model: nn.Module) -> dict[str, Kind]:
    """By the type of each tensor's module, rather than by name and shape."""
    kinds = dict.fromkeys(model.state_dict(), Kind.BIAS)
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            kinds[f"{prefix}.weight"] = Kind.CONV
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            kinds[f"{prefix}.weight"] = Kind.FC
    kinds |= {name: Kind.COPY for name, _ in model.named_buffers()}
    kinds |= {name: Kind.FC for name in ("cls_token", "pos_embed") if name in kinds}
    return kinds


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kinds(name: str) -> None:
    seen = set()
    for design in designs(name, smallest(name), 8):
        model = build(design, 0)
        state = model.state_dict()
        for key, kind in expected_kinds(model).items():
            tensor = state[key]
            assert classify(key, tuple(tensor.shape), DTYPES[tensor.dtype]).kind is kind, key
            seen.add(kind)
    assert {Kind.FC, Kind.BIAS} <= seen
    assert (Kind.CONV in seen) == (name not in ("mlp", "text"))


def watch_feeders(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Name of each normalisation layer → name of the layer whose output it read."""
    outputs: dict[int, str] = {}
    kept: list[Any] = []
    feeders: dict[str, str] = {}
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            if isinstance(module, NORMS) and id(given[0]) in outputs:
                feeders[name] = outputs[id(given[0])]
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                outputs[id(output)] = name
            kept.append(output)  # else another tensor might get its id

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (*NORMS, nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(watch(name)))
    model(samples(inputs, 4))
    for handle in handles:
        handle.remove()
    return feeders


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_normalisation_layers_are_found(name: str) -> None:
    inputs = smallest(name)
    for design in designs(name, inputs, 8):
        model = build(design, 0)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        layers = {layer.prefix: layer for layer in find_norm_layers(shapes)}
        assert set(layers) == {
            key for key, module in model.named_modules() if isinstance(module, NORMS)
        }
        feeders = watch_feeders(model, inputs)
        for prefix, layer in layers.items():
            if layer.source_weight is not None:
                assert layer.source_weight == f"{feeders[prefix]}.weight"
            elif design.options["norm"] == "batch":
                # DenseNet normalises before its convolutions, elsewhere the names tell.
                assert name == "densenet"


def test_names_are_those_of_networks_in_use() -> None:
    for name, keys in {
        "cnn": ["conv1.weight", "bn1.running_mean", "conv2.bias"],
        "resnet": ["conv1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.1.running_var"],
        "densenet": ["features.conv0.weight", "features.denseblock1.denselayer2.norm1.weight"],
        "shufflenet": ["stage2.0.branch1.0.weight", "conv5.1.num_batches_tracked"],
        "mobilenetv2": ["features.0.0.weight", "features.2.conv.1.0.weight"],
        "vit": ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"],
        "pyramid": ["stages.0.blocks.0.attn.sr.weight", "stages.0.blocks.0.mlp.dwconv.dwconv.bias"],
        "mlp": ["fc1.weight", "head.weight"],
        "text": [
            "embeddings.word_embeddings.weight",
            "encoder.layer.0.attention.self.query.weight",
            "encoder.layer.0.attention.output.LayerNorm.bias",
        ],
    }.items():
        assert set(keys) <= set(build(Design(name, smallest(name), 3), 0).state_dict())


# Learning


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        (name, norm)
        for name, entry in ARCHITECTURES.items()
        for norm in dict.fromkeys(entry.choices(smallest(name))["norm"])
    ],
)
def test_learns(name: str, norm: str) -> None:
    inputs, classes, steps = smallest(name), 4, 50
    labels = torch.arange(16) % classes
    if inputs.kind == "image":
        data = samples(inputs, classes, seed=1)[labels] + 0.3 * samples(inputs, 16)
    else:
        # Each class has a word of its own among others.
        data = torch.where(torch.arange(7) % 2 == 0, labels[:, None], samples(inputs, 16))
    model = build(Design(name, inputs, classes, {"norm": norm}), 0)
    first, loss = None, torch.inf
    for _ in range(steps):
        error = nn.functional.cross_entropy(model(data), labels)
        loss = float(error.detach())
        first = first or loss
        if loss < 0.4 * first:
            break
        model.zero_grad()
        error.backward()
        with torch.no_grad():
            # Sign descent is Adam without memory, and imports nothing that takes seconds.
            for parameter in model.parameters():
                parameter -= 4e-3 * parameter.grad.sign()
    # It starts near chance, which untrainable initial weights do not.
    assert first < 3 * math.log(classes)
    assert loss < 0.4 * first


@pytest.mark.parametrize("name", ["cnn", "resnet", "densenet", "shufflenet", "mobilenetv2", "mlp"])
@pytest.mark.parametrize("initial", ["he_normal", "he_uniform"])
def test_signals_keep_their_size_without_normalisation(name: str, initial: str) -> None:
    inputs = Inputs("image", (3, 32, 32))
    choices = ARCHITECTURES[name].choices(inputs)
    deepest = {option: max(values) for option, values in choices.items() if type(values[0]) is int}
    deepest.pop("stem_stride", None)
    options = {**deepest, "norm": "none", "initial": initial}
    logits = build(Design(name, inputs, 10, options), 0).eval()(samples(inputs, 8))
    assert 0.02 < float(logits.detach().std()) < 5


# Designs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_json_round_trip(name: str) -> None:
    for design in designs(name, smallest(name), 5):
        again = Design.from_json(json.loads(json.dumps(design.to_json())))
        assert again == design
        first, second = build(design, 1).state_dict(), build(again, 1).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_entries_are_complete(name: str, inputs: Inputs) -> None:
    entry = ARCHITECTURES[name]
    choices = entry.choices(inputs)
    accepted = inspect.signature(entry.construct).parameters
    assert set(choices) == set(accepted) - {"inputs", "classes"}
    for values in choices.values():
        assert len({type(value) for value in values}) == 1
        assert isinstance(values[0], (int, float, str, bool))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_choice_can_be_built(name: str) -> None:
    inputs = smallest(name)
    for option, values in ARCHITECTURES[name].choices(inputs).items():
        for value in dict.fromkeys(values[1:]):
            assert size(Design(name, inputs, 3, {option: value})) > 0


def test_integers_of_json_are_numbers() -> None:
    inputs = Inputs("image", (1, 8, 8))
    model = build(Design("cnn", inputs, 3, {"dropout": 0, "width": 24.0}), 0)
    assert model.get_submodule("conv1").weight.shape[0] == 24


IMAGE = Inputs("image", (1, 8, 8))


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Design("vgg", IMAGE, 3), "unknown architecture 'vgg'; choose from cnn, "),
        (Design("text", IMAGE, 3), "text takes text, not image"),
        (Design("cnn", Inputs("text", (9, 9)), 3), "cnn takes image, not text"),
        (Design("cnn", IMAGE, 3, {"depht": 2}), "option 'depht': cnn has only width, depth"),
        (Design("cnn", IMAGE, 3, {"width": 17}), "width=17: must be one of 16, 24, 32"),
        (Design("cnn", IMAGE, 3, {"width": 16.5}), "width=16.5: must be one of"),
        (Design("cnn", IMAGE, 3, {"width": True}), "width=True: must be one of"),
        (
            Design("cnn", IMAGE, 3, {"dropout": math.nan}),
            "dropout=nan: must be one of 0.0, 0.2, 0.4",
        ),
        (Design("cnn", IMAGE, 3, {"bias": 1}), "bias=1: must be one of True, False"),
        (Design("cnn", IMAGE, 3, {"norm": "instance"}), "must be one of batch, none, group"),
        (Design("text", Inputs("text", (10**6, 9)), 3), "text of 1000000 words"),
        (Design("mlp", Inputs("image", (3, 224, 224)), 3), "too large for an mlp"),
    ],
)
def test_designs_that_cannot_be_built(design: Design, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(design, 0)


@pytest.mark.parametrize(("name", "inputs"), [("vgg", IMAGE), ("text", IMAGE)])
def test_designs_that_cannot_be_drawn(name: str, inputs: Inputs) -> None:
    with pytest.raises(UsageError, match=name):
        random_design(name, inputs, 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("sound", (1,), "unknown kind of inputs 'sound'; choose from image, text"),
        ("image", (28, 28), r"image of shape \(28, 28\): must be \(channels, height, width\)"),
        ("image", (1, 28, 0), "must be"),
        ("image", (1, 28.0, 28), "must be"),
        ("image", (1, 7, 28), "sides of at least 8 pixels"),
        ("text", (1000,), r"must be \(vocabulary, length\)"),
    ],
)
def test_inputs_that_do_not_exist(kind: Any, shape: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Inputs(kind, shape)


def test_a_classifier_has_classes() -> None:
    with pytest.raises(UsageError, match="1 classes"):
        Design("cnn", IMAGE, 1)


@pytest.mark.parametrize(
    "change", [{"inputs": None}, {"inputs": {"kind": "image"}}, {"classes": "3"}, {"options": 3}]
)
def test_json_that_is_no_design(change: dict[str, Any]) -> None:
    content = Design("cnn", IMAGE, 3).to_json()
    assert Design.from_json(content) == Design("cnn", IMAGE, 3)
    with pytest.raises(UsageError, match="not a design"):
        Design.from_json(content | change)
    with pytest.raises(UsageError, match="not a design"):
        Design.from_json({key: content[key] for key in content if key not in change})
