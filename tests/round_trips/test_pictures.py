"""Networks for pictures with BatchNorm, of timm and segmentation-models-pytorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.command import Command
from tests.support.round_trips import (
    Sessions,
    check_answer,
    check_prediction,
    check_saved_again,
    predict,
    record,
    same,
    tensors,
)

PICTURES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(4))
STATISTICS = ["*.running_mean", "*.running_var"]


def answer(model: nn.Module) -> Tensor:
    found = model(PICTURES)
    assert isinstance(found, Tensor)
    return found


def measure(model: nn.Module) -> None:
    """Set all running statistics to those of the pictures, as a model in training sees them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(PICTURES)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


def sources(model: nn.Module) -> dict[str, str | None]:
    """The layer whose output each BatchNorm of a model gets, as its forward pass has it."""
    names = {module: name for name, module in model.named_modules()}
    given: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str | None] = {}

    def gives(module: nn.Module, _: Any, output: Tensor) -> None:
        given[id(output)] = names[module], output

    def gets(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[names[module]] = given.get(id(inputs[0]), (None, None))[0]

    handles = []
    for module in names:
        if isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(gets))
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            handles.append(module.register_forward_hook(gives))
    model.eval()
    with torch.no_grad():
        model(PICTURES)
    for handle in handles:
        handle.remove()
    return found


def check_statistics(sessions: Sessions, output: Path, model: nn.Module) -> set[str]:
    """Running statistics are Θ0's, or follow from the weights of the layer that feeds the norm.

    Returns:
        Names of the layers whose statistics were rescaled.
    """
    first, found = tensors(sessions.first), tensors(output)
    rescaled = set()
    for norm, source in sources(model).items():
        mean, variance = f"{norm}.running_mean", f"{norm}.running_var"
        assert same(found[f"{norm}.num_batches_tracked"], first[f"{norm}.num_batches_tracked"])
        if same(found[mean], first[mean]) and same(found[variance], first[variance]):
            continue
        assert source is not None, f"{norm} is rescaled, but no layer feeds it"
        assert isinstance(model.get_submodule(source), nn.Conv2d), f"{norm} is fed by {source}"
        old, new = (state[f"{source}.weight"].double().flatten(1) for state in (first, found))
        assert f"{source}.bias" not in first
        share = (new * old).sum(1) / (old * old).sum(1)
        power = (new * new).sum(1) / (old * old).sum(1)
        expected = first[mean] * share, first[variance] * power
        for name, right in zip((mean, variance), expected, strict=True):
            torch.testing.assert_close(found[name].double(), right, rtol=1e-5, atol=1e-7)
        rescaled.add(norm)
    return rescaled


def distance(state: dict[str, Tensor], measured: dict[str, Tensor]) -> float:
    """How far variances are from what was measured: the mean distance of their logarithms."""
    names = [name for name in measured if name.endswith("running_var")]
    logs = [(state[name] / measured[name]).log().abs().mean() for name in names]
    return float(torch.stack(logs).mean())


@pytest.mark.libraries
def test_an_efficientnet(tmp_path: Path, know: Command) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=5)

    def save(path: Path) -> None:
        timm.models.save_for_hf(model, path, safe_serialization=True)

    sessions = record(model, tmp_path, save, answer, between=lambda session: measure(model))
    out = predict(know, sessions)
    norms = ["*bn?.weight", "*bn?.bias", "*.num_batches_tracked"]
    found = check_prediction(sessions, out, norms, STATISTICS)
    assert check_statistics(sessions, out, model) == sources(model).keys()
    assert len(sources(model)) == 13
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    state = loaded.state_dict()
    assert state.keys() == found.keys()
    assert all(same(state[name], tensor) for name, tensor in found.items())
    check_answer(sessions, loaded, answer)
    timm.models.save_for_hf(loaded, tmp_path / "again", safe_serialization=True)
    check_saved_again(out, tmp_path / "again")
    # Measured again on the pictures, variances come out much nearer to those than to Θ0's.
    measure(loaded)
    measured, first = loaded.state_dict(), tensors(sessions.first)
    assert 0 < distance(found, measured) < 0.5 * distance(first, measured)
    copied = predict(know, sessions, "--norm", "copy", name="copied")
    check_prediction(sessions, copied, [*norms, *STATISTICS])


@pytest.mark.libraries
def test_transposed_convolutions_within_a_linknet(tmp_path: Path, know: Command) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = smp.Linknet("tu-test_resnet", encoder_weights=None, encoder_depth=4, classes=2)
    sessions = record(
        model, tmp_path, model.save_pretrained, answer, between=lambda session: measure(model)
    )
    out = predict(know, sessions)
    fed = sources(model)
    leaves = "weight", "bias", "num_batches_tracked"
    affine = [f"{norm}.{leaf}" for norm in fed for leaf in leaves]
    found = check_prediction(sessions, out, affine, STATISTICS)
    rescaled = check_statistics(sessions, out, model)
    enlarging = {f"decoder.blocks.{block}.block.1.1" for block in range(4)}
    assert not enlarging & rescaled
    assert len(rescaled) >= len(fed) // 2
    transposed = model.get_submodule("decoder.blocks.3.block.1.0")
    assert isinstance(transposed, nn.ConvTranspose2d)
    assert fed["decoder.blocks.3.block.1.1"] == "decoder.blocks.3.block.1.0"
    loaded = smp.from_pretrained(out)
    state = loaded.state_dict()
    assert state.keys() == found.keys()
    assert all(same(state[name], tensor) for name, tensor in found.items())
    check_answer(sessions, loaded, answer)
    loaded.save_pretrained(tmp_path / "again")
    check_saved_again(out, tmp_path / "again")
