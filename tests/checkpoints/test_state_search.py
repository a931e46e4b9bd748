"""Where the state dict of a model is found in what a training program saved."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from know_cli.checkpoints.pickle_names import Opaque, PickledTensor, Storage
from know_cli.checkpoints.state_search import TOP, USUAL, Found, find_state, is_average
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, CheckpointError
from tests.support.command import Command, one_line

FILE = Path("in.pt")


def tensor(*shape: int, dtype: str = "float32", key: str = "0") -> PickledTensor:
    strides = tuple(1 for _ in shape)
    return PickledTensor(dtype, shape, strides, 0, Storage(key, 1, dtype, 4))


def find(content: Any, key: str = "") -> Found:
    return find_state(FILE, content, key)


MODEL = {"conv.weight": tensor(2, 3), "conv.bias": tensor(2), "bn.num_batches_tracked": tensor()}
OTHER = {"conv.weight": tensor(2, 3, key="1"), "conv.bias": tensor(2, key="1")}
RNG = tensor(5056, dtype="uint8")
ADAM = {
    "state": {0: {"step": tensor(), "exp_avg": tensor(2, 3), "exp_avg_sq": tensor(2, 3)}},
    "param_groups": [{"lr": 0.1}],
}
NAMED_ADAM = {"state": {"conv.weight": {"exp_avg": tensor(2, 3), "exp_avg_sq": tensor(2, 3)}}}
CALLBACKS = {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": tensor()}}

FOUND: dict[str, tuple[dict[str, Any], str]] = {
    "alone": (MODEL, ""),
    "a single weight": ({"w": tensor(2)}, ""),
    "only what is no weight": ({"steps": tensor()}, ""),
    "stray tensors": ({"model_state_dict": MODEL, "rng_state": RNG, "best_loss": tensor()}, "model_state_dict"),
    "stray tensors first": ({"rng_state": RNG, "class_weights": tensor(1000), "model": MODEL}, "model"),
    "under a name of their own": ({"rng_state": RNG, "backbone": MODEL}, "backbone"),
    "few stray weights": ({"class_weights": tensor(2), "backbone": MODEL}, "backbone"),
    "in a nest": ({"trainer": {"run": {"model": MODEL, "step": 3}, "best": tensor()}}, "trainer.run.model"),
    "beside an optimizer": ({"net": MODEL, "optimizer": ADAM, "scaler": {"scale": tensor(1)}}, "net"),
    "beside a named optimizer": ({"net": MODEL, "optim": NAMED_ADAM}, "net"),
    "of PyTorch Lightning": ({"state_dict": MODEL, "callbacks": CALLBACKS, "loops": {"fit": {"n": tensor(3)}}, "hyper_parameters": {}}, "state_dict"),
    "only an average": ({"ema": MODEL}, "ema"),
    "twice the same": ({"model": MODEL, "state_dict": dict(MODEL)}, "model"),
    "extra state": ({**MODEL, "bn._extra_state": {"amax": tensor(9)}}, ""),
    "extra state of the model": ({**MODEL, "_extra_state": {"amax": tensor(9)}}, ""),
    "metrics": ({"weights": MODEL, "metrics": {"accuracy": tensor()}}, "weights"),
    "a model that is one number": ({"model": {"temperature": tensor()}, "history": {"loss": tensor(9)}}, "?"),
    "a training part's name": ({"optimus": MODEL}, "optimus"),
    "model and average": ({"model": MODEL, "ema": OTHER}, "?"),
    "averages by other names": ({"state_dict": MODEL, "state_dict_ema": OTHER}, "?"),
    "two networks": ({"generator": MODEL, "discriminator": OTHER}, "?"),
    "two parts": ({"model": {"encoder": MODEL, "decoder": OTHER}}, "?"),
    "weights around a model": ({**OTHER, "model": MODEL}, "?"),
    "a weight around something": ({"weight": tensor(9), "model": MODEL}, "?"),
    "many weights around something": ({"w": tensor(90), "aux": MODEL}, "?"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_which_state_dict_is_taken(case: str) -> None:
    content, key = FOUND[case]
    if key == "?":
        with pytest.raises(CheckpointError, match="holds more than one state dict: .*--key"):
            find(content)
        return
    found = find(content)
    assert found.key == key
    expected = content
    for part in filter(None, key.split(".")):
        expected = expected[part]
    names = [name for name, value in expected.items() if isinstance(value, PickledTensor)]
    assert list(found.tensors) == names


def test_what_was_found_beside_it() -> None:
    found = find({"model_state_dict": {**MODEL, "step": 3}, "rng_state": RNG, "best": tensor()})
    assert found.left_out == ["step"]
    assert found.strays == ["rng_state", "best"]
    assert not found.is_average
    found = find({"model": MODEL, "model_ema": OTHER, "swa": {"a": dict(OTHER)}}, "model")
    assert found.averages == ["model_ema", "swa.a"]
    found = find({"model": MODEL, "model_ema": OTHER}, "model_ema")
    assert found.is_average
    assert found.averages == []


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("ema", True), ("model_ema", True), ("ema_state_dict", True), ("StateDictEMA", True),
        ("averaged_model", True), ("EMAModel", True), ("swa", True), ("shadow_params", True),
        ("schema", False), ("swag", False), ("model", False), ("remain", False), ("", False),
    ],
)  # fmt: skip
def test_moving_averages_are_known_by_their_names(name: str, yes: bool) -> None:
    assert is_average(name) is yes


KEYED = {
    "model": {"state_dict": MODEL, "v1.0": {"ema.x": OTHER}},
    "model.state": {"dict": OTHER},
    "optimizer": ADAM,
    "epoch": 3,
    "names": ["a"],
    "args": Opaque("argparse.Namespace"),
    "w": tensor(3),
}


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("model.state_dict", MODEL),
        ("model.v1.0.ema.x", OTHER),
        ("model.state.dict", OTHER),
        ("model.state", OTHER),
        ("model.v1.0", OTHER),
        (TOP, {"w": 1}),
    ],
)
def test_a_key_chooses(key: str, names: dict[str, Any]) -> None:
    assert list(find(KEYED, key).tensors) == list(names)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modell", "--key modell: there is no such key; state dicts are '.' (1 tensor), 'model.state_dict' (3 tensors), "),
        ("model.x", "there is no such key"),
        ("epoch", "--key epoch: is a number, not a state dict; state dicts are"),
        ("epoch.x", "there is no such key"),
        ("names", "is a list, not a state dict"),
        ("args", "is an object of 'argparse.Namespace', not a state dict"),
        ("w", "is a tensor, not a state dict"),
        ("model", "holds more than one state dict: 'model.state_dict' (3 tensors), 'model.v1.0.ema.x' (2 tensors, a moving average)"),
        ("optimizer", "is a mapping, not a state dict"),
        ("model.", "there is no such key"),
    ],
)  # fmt: skip
def test_keys_that_lead_nowhere(key: str, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        find(KEYED, key)
    assert message in str(error.value)


def test_without_a_state_dict_the_outermost_keys_are_listed() -> None:
    content = {f"key{n}": None for n in range(20)} | {"optimizer": ADAM}
    with pytest.raises(CheckpointError, match=r"its keys are 'key0' \(None\), .* and 13 more"):
        find(content)
    with pytest.raises(CheckpointError, match=r"no such key; its keys are 'key0' \(None\)"):
        find(content, "model")


def test_structures_without_end() -> None:
    """A mapping in itself, a tree whose branches are one, a nest as deep as can be."""
    loop: dict[str, Any] = {"model": MODEL}
    loop["self"] = loop
    assert find(loop).key == "model"
    tree: dict[str, Any] = dict(MODEL)
    for _ in range(60):
        tree = {"left": tree, "right": tree}
    with pytest.raises(CheckpointError, match="holds no state dict"):
        find(tree)
    with pytest.raises(CheckpointError, match="there is no such key"):
        find(tree, ".".join(["left"] * 80))
    deep: dict[str, Any] = dict(MODEL)
    for _ in range(20_000):
        deep = {"x": deep}
    with pytest.raises(CheckpointError, match="holds no state dict"):
        find(deep)
    many = {f"net{n}": {"w": tensor(2, key=str(n))} for n in range(5_000)}
    with pytest.raises(CheckpointError, match="and [0-9]+ more; choose one with --key"):
        find(many)
    assert find(many, "net4999").key == "net4999"


words = st.sampled_from(["runs", "best", "trainer", "last", "task", "stage", "inner", "wrapper"])
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.just(Opaque("pathlib.PosixPath")),
    st.just(ADAM), st.sampled_from([tensor(), RNG, tensor(dtype="int64")]),
)  # fmt: skip
models = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,4}){0,3}", fullmatch=True),
    st.builds(
        lambda shape, dtype: tensor(*shape, dtype=dtype),
        st.lists(st.integers(1, 4), min_size=1, max_size=4),
        st.sampled_from(["float32", "bfloat16", "float16"]),
    ),
    min_size=1,
    max_size=5,
)


@given(models, st.lists(st.tuples(words, st.dictionaries(words, plain, max_size=3)), max_size=5),
       st.sampled_from([*USUAL, ""]))  # fmt: skip
def test_however_deep_a_state_dict_is_planted_it_is_found(
    model: dict[str, PickledTensor], nest: list[tuple[str, dict[str, Any]]], name: str
) -> None:
    content: dict[str, Any] = {name: model, "epoch": 1} if name else model
    parts = [name] if name else []
    for key, beside in nest:
        content = {**beside, key: content}
        parts.insert(0, key)
    found = find(content)
    assert found.tensors == model
    assert list(found.tensors) == list(model)
    assert found.key == ".".join(parts)
    if parts:
        assert find(content, ".".join(parts)).tensors == model


def test_the_command_lists_and_takes_keys(tmp_path: Path, know: Command) -> None:
    model: dict[str, Tensor] = OrderedDict({"fc.weight": torch.ones(2, 2)})
    average = {name: value * 2 for name, value in model.items()}
    torch.save({"model": {"state_dict": model}, "ema": average, "rng": torch.get_rng_state()},
               tmp_path / "in.pt")  # fmt: skip
    done = know("convert", "in.pt", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert (
        "in.pt: holds more than one state dict: 'ema' (1 tensor, a moving average), "
        "'model.state_dict' (1 tensor); choose one with --key"
    ) in one_line(done.stderr)
    done = know("convert", "in.pt", "-o", "out", "--key", "model.state_dict", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stderr.splitlines() == [
        "taking the state dict under 'model.state_dict'",
        "a moving average of the weights is there as well, under 'ema': --key ema converts it",
        "left out, since they are not in the state dict: 'rng'",
    ]
    done = know("convert", "in.pt", "-o", "ema", "--key", "ema", cwd=tmp_path)
    assert "what is converted is a moving average of weights, by its name" in done.stderr
    torch.save({"model.w": torch.ones(1), "model_ema.w": torch.ones(1)}, tmp_path / "both.pt")
    done = know("convert", "both.pt", "-o", "both", cwd=tmp_path)
    assert "1 of the 2 tensors is a moving average of weights, by its name: 'model_ema.w'" in (
        done.stderr
    )
