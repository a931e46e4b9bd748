"""``know train --objective network --roles``: taught, written, and predicted with through the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.metadata import TRAINING_STEP, TRAJECTORY_KIND, TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.errors import EXIT_USAGE
from know_cli.lab.data import load
from know_cli.lab.zoo import Design, Inputs, build
from know_cli.meta.network_data import NetworkRun
from know_cli.meta.network_models import NetworkModel, settled
from know_cli.meta.network_settings import NetworkSettings
from know_cli.meta.network_training import teach
from know_cli.meta.run_setup import draw_run_setup
from know_cli.settle.bundle import SettleBundle, load_bundle, save_bundle
from know_cli.settle.course import feature_count
from know_cli.settle.module import Settle
from know_cli.settle.role import TensorRole
from tests.support.command import Command, one_line

S = 3
IMAGES = Inputs("image", (3, 8, 8))
#: The roles of two networks that have all of them between them.
WANTED = {
    "vit": {"normalisation", "table", "attention", "factor", "other"},
    "mobilenetv2": {"normalisation", "depthwise", "pointwise", "other"},
}
OPTIONS = {"vit": {"layer_scale": True, "pooling": "token"}, "mobilenetv2": {"norm": "batch"}}


def run_of(architecture: str) -> NetworkRun:
    """Checkpoints of a network whose tensors each move by themselves, the oldest first."""
    design = Design(architecture, IMAGES, 4, OPTIONS[architecture])
    model = build(design, 0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    states = []
    for _ in range(S):
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    setup = draw_run_setup(0, {"digits": load("digits")}, ["mlp"], checkpoints=S, brief=True)
    inputs = torch.randn(40, *IMAGES.shape, generator=generator)
    return NetworkRun(
        architecture, replace(setup, design=design), states, None, model, inputs, torch.arange(40) % 4
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> dict[str, NetworkRun]:
    return {architecture: run_of(architecture) for architecture in WANTED}


def taught(width: int, *, roles: bool = True) -> Settle:
    """One with coefficients, conditions and corrections that tell roles apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Settle(S, 6, width, roles)
        nn.init.normal_(model.read.weight, 0, 0.5)
        nn.init.normal_(model.gate.weight, 0, 0.3)
        if width:
            nn.init.normal_(model.last.weight, 0, 0.3)
    return model.requires_grad_(False)


def predict(know: Command, states: list[dict[str, Tensor]], model: Settle, folder: Path) -> Path:
    """A prediction by the command, of checkpoints given the oldest first."""
    save_bundle(SettleBundle.of(model, {}), folder / "bundle")
    for number, state in enumerate(states):
        step = 10 * (number + 1)
        kind = {TRAJECTORY_KIND: TrajectoryKind.RUN.value, TRAINING_STEP: str(step)}
        save_checkpoint(folder / f"checkpoint-{step}.safetensors", state, {"format": "pt", **kind})
    paths = [folder / f"checkpoint-{10 * (n + 1)}.safetensors" for n in range(len(states))]
    output = folder / "out.safetensors"
    done = know("predict", *reversed(paths), "-o", output, "--weights", folder / "bundle")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("architecture", WANTED)
@pytest.mark.parametrize("width", [0, 4])
def test_a_prediction_is_what_was_taught(
    architecture: str, width: int, runs: dict[str, NetworkRun], know: Command, tmp_path: Path
) -> None:
    run = runs[architecture]
    assert {role.value for role in run.roles.values()} == WANTED[architecture]
    assert run.roles.keys() == run.kinds.keys()
    model = taught(width)
    wanted, _ = settled(model, run.window(S, 1, 0))
    found = read_state(predict(know, list(run.states), model, tmp_path))
    assert any(name.endswith("running_var") for name in wanted) == (architecture == "mobilenetv2")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6)
    # Roles matter: without their columns the same weights say something else.
    with torch.no_grad():
        model.read.weight[:, feature_count(S) :] = 0
    blind, _ = settled(model, run.window(S, 1, 0))
    apart = {name for name in run.roles if not torch.allclose(blind[name], wanted[name], atol=1e-4)}
    assert {run.roles[name].value for name in apart} == WANTED[architecture]


def test_equal_tensors_of_different_roles_get_different_coefficients(
    know: Command, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(2)
    states = []
    for _ in range(S):
        moved = torch.randn(6, 6, generator=generator)
        states.append({f"blocks.0.{of}.proj.weight": moved.clone() for of in ("attn", "mlp")})
    for roles in (False, True):
        folder = tmp_path / str(roles)
        folder.mkdir()
        found = read_state(predict(know, states, taught(0, roles=roles), folder))
        one, other = found.values()
        assert torch.allclose(one, other, atol=1e-3) == (not roles)


def test_all_other_weights_begin_as_they_do_without_roles() -> None:
    models = []
    for roles in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            models.append(Settle(5, 32, 48, roles))
    without, having = (model.state_dict() for model in models)
    assert without.keys() == having.keys()
    for name, tensor in without.items():
        found = having[name]
        assert torch.equal(found[:, :14] if name == "read.weight" else found, tensor), name
    embeddings = having["read.weight"][:, 14:]
    assert embeddings.shape == (32, len(TensorRole))
    assert (embeddings != 0).all()
    counts = [sum(tensor.numel() for tensor in state.values()) for state in (without, having)]
    assert counts == [4912, 4912 + 7 * 32]


def test_settings_say_it_only_where_it_is_asked_for() -> None:
    assert "roles" not in NetworkSettings().to_json()
    assert NetworkSettings(roles=True).to_json() == NetworkSettings().to_json() | {"roles": True}


def test_embeddings_are_learned_and_an_interrupted_training_ends_as_a_whole_one(
    runs: dict[str, NetworkRun], tmp_path: Path
) -> None:
    settings = NetworkSettings(checkpoints=S, hidden=4, steps=4, runs=2, batch=16, roles=True)
    networks = list(runs.values())
    begun: list[Tensor] = []

    def interrupt(step: int, loss: float, model: NetworkModel) -> str:
        begun.append(model.module.get_parameter("read.weight").detach().clone())
        if step == 4:
            raise KeyboardInterrupt
        return f"first {step}"

    with pytest.raises(KeyboardInterrupt):
        teach(networks, settings, interrupt, every=2, partial=tmp_path / "partial")
    again, told = teach(networks, settings, every=2, partial=tmp_path / "partial")
    whole, _ = teach(networks, settings, every=2)
    assert told == ["first 2", None]
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor)
    weight = whole.module.get_parameter("read.weight").detach()
    learned = weight[:, feature_count(S) :] - begun[0][:, feature_count(S) :]
    assert (learned.abs().sum(0) > 0).all()
    # What was kept without roles is not gone on with.
    _, told = teach(networks, replace(settings, roles=False), every=2, partial=tmp_path / "partial")
    assert told == [None, None]


def test_a_role_is_read_in_the_order_in_which_bundles_hold_them() -> None:
    assert [role.value for role in TensorRole] == [
        "normalisation", "table", "factor", "depthwise", "attention", "pointwise", "other",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [("-o", "other"), ("--objective", "network", "--evaluate", "bundle")]
)
def test_it_is_for_teaching_through_networks(
    arguments: tuple[str, ...], know: Command, tmp_path: Path
) -> None:
    done = know("train", "runs", "--roles", *arguments, cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert one_line(done.stderr).endswith(
        "--roles: is for -o BUNDLE with --objective network; leave it out"
    )


def test_a_bundle_says_that_it_reads_them(tmp_path: Path) -> None:
    model = taught(2)
    save_bundle(SettleBundle.of(model, {}), tmp_path)
    loaded = load_bundle(tmp_path)
    assert (loaded.roles, loaded.manifest["roles"]) == (True, True)
    assert loaded.module().roles
    assert loaded.to_json() == loaded.manifest
    save_bundle(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (
        tmp_path / "manifest.json"
    ).read_bytes()
