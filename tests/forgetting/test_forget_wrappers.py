"""Models that come back from training inside a wrapper are recorded under their own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from know_cli.errors import EXIT_DONE, EXIT_USAGE, UsageError
from know_cli.forgetting.recorder import state_of
from tests.support.command import Command, one_line


def bare() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


class Holder(nn.Module):
    """A user's own module that has a child of that name, which is no wrapper."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.module = inside


class Backbone(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.backbone = inside
        self.head = nn.Linear(2, 2)


def compiled(model: nn.Module) -> nn.Module:
    """As torch.compile wraps it, without compiling anything."""
    wrapped: nn.Module = torch.compile(model, backend=lambda graph, _: graph)
    return wrapped


NAMES = set(bare().state_dict())
INSIDE = {f"backbone.{name}" for name in NAMES} | {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: bare(), NAMES),
        (lambda: nn.DataParallel(bare()), NAMES),
        (lambda: compiled(bare()), NAMES),
        (lambda: nn.DataParallel(compiled(bare())), NAMES),
        (lambda: compiled(nn.DataParallel(bare())), NAMES),
        (lambda: Backbone(compiled(bare())), INSIDE),
        (lambda: Backbone(nn.DataParallel(bare())), INSIDE),
        (lambda: Holder(bare()), {f"module.{name}" for name in NAMES}),
        (lambda: nn.DataParallel(Holder(bare())), {f"module.{name}" for name in NAMES}),
    ],
)
def test_wrappers_leave_no_names(make: Callable[[], nn.Module], names: set[str]) -> None:
    model = make()
    state = state_of(model, "here")
    assert set(state) == names
    # What has been looked at once is not looked at again.
    assert state_of(state, "here") is state
    expected = model.state_dict()
    for tensor in state.values():
        assert any(tensor.data_ptr() == other.data_ptr() for other in expected.values())


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (["module.a.weight", "module.b.weight"], {"a.weight", "b.weight"}),
        (["_orig_mod.a.weight", "_orig_mod.b"], {"a.weight", "b"}),
        (["module._orig_mod.a", "module._orig_mod.b"], {"a", "b"}),
        (["net._orig_mod.a", "head.b"], {"net.a", "head.b"}),
        (["f._fsdp_wrapped_module.a", "f._checkpoint_wrapped_module.b"], {"f.a", "f.b"}),
        # Not all of them are inside, so that it is a part of the model.
        (["module.a", "head.b"], {"module.a", "head.b"}),
        # Both would have the same name.
        (["_orig_mod.a", "a"], {"_orig_mod.a", "a"}),
    ],
)
def test_state_dicts_of_wrappers(returned: list[str], names: set[str]) -> None:
    state: dict[str, Tensor] = {name: torch.full((2,), float(n)) for n, name in enumerate(returned)}
    found = state_of(state, "here")
    assert set(found) == names
    assert [float(tensor[0]) for tensor in found.values()] == [float(n) for n in range(len(returned))]  # fmt: skip


TRAINING = """
import torch
from torch import nn

def train(session):
    torch.manual_seed(session.seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    {load}
    model = {wrap}
    {late}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return {what}
"""
LOAD = "model.load_state_dict(session.start) if session.start else None"
WRAPS = {
    "DataParallel": "nn.DataParallel(model)",
    "compile": "torch.compile(model, backend=lambda graph, _: graph)",
    "both": "torch.compile(nn.DataParallel(model), backend=lambda graph, _: graph)",
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("what", ["model", "model.state_dict()"])
def test_sessions_go_on_from_wrapped_models(
    wrap: str, what: str, tmp_path: Path, know: Command
) -> None:
    text = TRAINING.format(load=LOAD, wrap=WRAPS[wrap], late="", what=what)
    (tmp_path / "train.py").write_text(text)
    done = know(
        "forget", "train.py:train", "run", "--size", 40, "--sessions", 3, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    for k in range(3):
        assert set(load_file(tmp_path / "run" / f"ckpt{k}.safetensors")) == NAMES


def test_other_names_are_not_taken_for_wrappers(tmp_path: Path, know: Command) -> None:
    load = "model.load_state_dict({'module.x': torch.ones(1)})"
    text = TRAINING.format(load=load, wrap="model", late="", what="model")
    (tmp_path / "train.py").write_text(text)
    done = know("forget", "train.py:train", "run", "--size", 40, "--sessions", 2, cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "before wrapping" not in one_line(done.stderr)


def test_loading_into_a_wrapped_model_is_explained(tmp_path: Path, know: Command) -> None:
    text = TRAINING.format(load="", wrap=WRAPS["DataParallel"], late=LOAD, what="model")
    (tmp_path / "train.py").write_text(text)
    done = know("forget", "train.py:train", "run", "--size", 40, "--sessions", 2, cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "load session.start, which has the bare model's names, before wrapping" in one_line(done.stderr)  # fmt: skip


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.ones(2)}, "here: has 1 where a tensor's name should be"),
        ({"w": 1}, "here: entry 'w' of the state dict is an int, not a tensor"),
    ],
)
def test_what_is_no_state_dict_is_named(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        state_of(state, "here")


def test_a_model_without_tensors_is_told_as_such() -> None:
    with pytest.raises(UsageError, match="^here: the model has no parameters or buffers to save"):
        state_of(nn.Identity(), "here")
