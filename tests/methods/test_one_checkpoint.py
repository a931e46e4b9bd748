"""Methods that read nothing but Θ0, from a single checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from know_cli.errors import EXIT_DONE, EXIT_USAGE
from tests.support.command import Command, one_line


class Network(nn.Module):
    """Convolutions with BatchNorm behind them, whose scale then does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, inputs: Tensor) -> Tensor:
        found = torch.relu(self.bn1(self.conv1(inputs)))
        return self.bn2(self.conv2(found))  # type: ignore[no-any-return]


@pytest.fixture
def trained() -> tuple[Network, Tensor]:
    """A network that has seen some images, and the images."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network, images = Network(), torch.randn(16, 3, 9, 9)
        for tensor in network.parameters():
            tensor.data += 0.1 * torch.randn_like(tensor)
    for _ in range(100):
        network(images)
    return network.eval(), images


def test_a_checkpoint_of_a_run_alone_is_not_taken_for_a_forgetting(
    tmp_path: Path, know: Command
) -> None:
    for name in ("epoch_5", "epoch_6"):
        save_file({"fc.weight": torch.randn(4, 3)}, tmp_path / f"{name}.safetensors")
    shrunk = ["-o", "start.safetensors", "--force", "--method", "shrink"]
    done = know("predict", "epoch_5.safetensors", *shrunk, cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "training run" not in done.stderr
    done = know("predict", "epoch_5", "epoch_6", *shrunk, cwd=tmp_path)
    assert "look like those of one training run" in done.stderr


def test_a_network_with_normalisation_stays_what_it_is(
    trained: tuple[Network, Tensor], tmp_path: Path, know: Command
) -> None:
    network, images = trained
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file(before, tmp_path / "model.safetensors")
    arguments = ["--method", "shrink", "--option", "lambda=0.5"]
    done = know("predict", "model", "-o", "start.safetensors", *arguments, cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "1 step from model.safetensors alone, shrink" in done.stdout
    after = load_file(tmp_path / "start.safetensors")
    for name, tensor in before.items():
        if name.startswith("conv") and name.endswith("weight"):
            assert torch.equal(after[name], tensor / 2)
        elif "running" not in name:
            assert torch.equal(after[name], tensor), name
    # A convolution's bias is not shrunk, so that its running mean is (mean − bias)/2 + bias.
    expected = (before["bn1.running_mean"] - before["conv1.bias"]) / 2 + before["conv1.bias"]
    torch.testing.assert_close(after["bn1.running_mean"], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after["bn1.running_var"], before["bn1.running_var"] / 4)
    with torch.no_grad():
        same = network(images)
        network.load_state_dict(after)
        torch.testing.assert_close(network(images), same, rtol=0, atol=2e-3)
    done = know("verify", "start.safetensors", "model", "--full", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr


@pytest.mark.parametrize("of", ["weights", "all"])
def test_the_other_checkpoints_say_nothing(of: str, tmp_path: Path, know: Command) -> None:
    generator = torch.Generator().manual_seed(1)
    states = [
        {
            "a.weight": torch.randn(5, 4, generator=generator),
            "a.bias": torch.randn(5, generator=generator),
            "b.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        }
        for _ in range(3)
    ]
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"ckpt{k}.safetensors")
    options = ["--method", "shrink", "--option", "lambda=0.8", "--option", f"of={of}"]
    for name, checkpoints in (("alone", ["ckpt0"]), ("all", ["ckpt0..ckpt2"])):
        done = know("predict", *checkpoints, "-o", name, *options, "--steps", "2", cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
    alone, others = load_file(tmp_path / "alone"), load_file(tmp_path / "all")
    for name, tensor in states[0].items():
        assert torch.equal(alone[name], others[name])
        kept = name.endswith("bias") and of == "weights"
        expected = tensor.double() if kept else (0.8**2 * tensor.double())
        assert torch.equal(alone[name], expected.float().to(tensor.dtype))


def test_who_needs_more_says_so(tmp_path: Path, know: Command) -> None:
    save_file({"a.weight": torch.randn(3, 3)}, tmp_path / "one.safetensors")
    for method in ("known", "average", "linear", "last"):
        done = know("predict", "one", "-o", "out", "--method", method, cwd=tmp_path)
        assert done.returncode == EXIT_USAGE
        assert one_line(done.stderr).endswith("; --method shrink takes one")
    done = know("predict", "one", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert torch.equal(
        load_file(tmp_path / "out")["a.weight"], load_file(tmp_path / "one.safetensors")["a.weight"]
    )


def test_shrinking_before_a_normalisation_is_a_learning_rate(
    trained: tuple[Network, Tensor],
) -> None:
    """Adam from λ·Θ0 at a rate is Adam from Θ0 at 1/λ times the rate, for any number of steps."""
    network, images = trained
    factor, rate = 0.4, 1e-3
    ends = []
    for scale, learning_rate in ((1.0, rate / factor), (factor, rate), (1.0, rate)):
        copy = Network().double()
        copy.load_state_dict(network.double().state_dict())
        weights = [copy.conv1.weight, copy.conv2.weight]
        for convolution in (copy.conv1, copy.conv2):
            convolution.weight.data *= scale
            convolution.bias = None  # the normalisation would take it away again
        for layer in (copy.bn1, copy.bn2):
            layer.eps = 1e-30
        optimiser = torch.optim.Adam(weights, learning_rate, eps=1e-30)
        for _ in range(7):
            optimiser.zero_grad()
            (copy(images.double()) - 1).pow(4).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        ends.append(copy(images.double()).detach())
    faster, shrunk, same_rate = ends
    torch.testing.assert_close(shrunk, faster, rtol=0, atol=1e-9)
    assert (same_rate - faster).abs().max() > 1e-3
