"""``know train --objective network --model known``: KNOWN, taught through the networks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from know_cli.checkpoints.state import read_state
from know_cli.cli.train_network import network_markdown
from know_cli.engine.settings import NormMode
from know_cli.errors import UsageError
from know_cli.evaluation.variants import is_available, method_of, of_bundle, predict
from know_cli.forgetting.recorder import checkpoint_name
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import load_bundle
from know_cli.known.preparation import Preparation
from know_cli.lab.fitting import one_thread
from know_cli.meta.network_bundle import measure_bundle, split_runs, teach_bundle
from know_cli.meta.network_data import NetworkRun, outputs
from know_cli.meta.network_loading import load_networks
from know_cli.meta.network_models import KnownModel, NetworkModel, new_model, save_bundle
from know_cli.meta.network_settings import HyperModel, NetworkSettings
from know_cli.meta.network_training import teach
from know_cli.methods.bundles import find_bundle
from know_cli.methods.registry import find_method
from know_cli.settle.bundle import SettleBundle
from know_cli.settle.bundle import save_bundle as save_settle
from know_cli.settle.module import Settle
from know_cli.settle.role import TensorRole
from tests.support.command import Command, one_line
from tests.support.recorded import collect_brief

SETTINGS = NetworkSettings(
    checkpoints=3, model=HyperModel.KNOWN, steps=4, runs=2, batch=16, learning_rate=3e-3
)
#: Small ones, by architecture and seed; the last one has BatchNorm.
NETWORKS = (("mlp", 50), ("mlp", 54), ("cnn", 70))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of three collected forgettings, and the checkpoints that these are of."""
    return collect_brief(tmp_path_factory.mktemp, NETWORKS)


@pytest.fixture(scope="module")
def networks(recorded: tuple[Path, Path]) -> list[NetworkRun]:
    return load_networks([recorded[0]], 3, None)[0]


def drawn(settings: NetworkSettings) -> NetworkModel:
    """One whose predictions are of any size, another for each kind."""
    torch.manual_seed(0)
    model = new_model(settings)
    for of in model.module.children():
        nn.init.normal_(of.head.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    return model


@pytest.mark.parametrize("preparation", Preparation)
def test_an_untaught_one_predicts_theta_0(
    networks: list[NetworkRun], preparation: Preparation
) -> None:
    settings = replace(SETTINGS, preparation=preparation, factor=True, predicted_steps=2)
    model = new_model(settings)
    for run in networks:
        for step in (1, 2):
            for name, tensor in model.predicted(run.window(3, 1, 0), step).items():
                assert torch.equal(tensor, run.states[-1][name])


@pytest.mark.parametrize(
    ("preparation", "factor"),
    [(Preparation.RAW, False), (Preparation.SPREAD, False), (Preparation.SPREAD, True)],
)
def test_a_prediction_is_what_was_taught(
    networks: list[NetworkRun],
    recorded: tuple[Path, Path],
    tmp_path: Path,
    preparation: Preparation,
    factor: bool,
) -> None:
    model = drawn(replace(SETTINGS, preparation=preparation, factor=factor, predicted_steps=3))
    bundle = model.bundle({"settings": {}}, networks[0].trajectory)
    save_bundle(bundle, tmp_path / "bundle", replace=False)
    variant = of_bundle("taught", str(tmp_path / "bundle"))
    assert method_of(variant).name == "known"
    assert is_available(variant, 3)
    for number in (0, 2):
        run = networks[number]
        paths = [recorded[1] / f"{number:05d}" / checkpoint_name(k) for k in range(3)]
        found = predict(variant, paths, NormMode.COPY, 3, rate=0.8)
        window = run.window(3, 1, 0)
        for step in (1, 3):
            with torch.no_grad():
                wanted = {**window.states[-1], **model.predicted(window, step)}
            moved = 0
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[step][name], tensor, rtol=1e-4, atol=1e-6)
                moved += not torch.equal(tensor, window.states[-1][name])
            assert moved >= 4
            norms = [name for name in run.kinds if name.startswith("bn")]
            roles = run.roles.items()
            assert set(norms) == {n for n, of in roles if of is TensorRole.NORMALISATION}
            assert all(wanted[name] is window.states[-1][name] for name in norms)
    assert TensorRole.NORMALISATION in networks[2].roles.values()


def test_what_does_not_move_stays(networks: list[NetworkRun]) -> None:
    run = networks[0]
    states = [dict(state) for state in run.states]
    (name, kind) = next(iter(run.kinds.items()))
    for state in states:
        state[name] = state[name].clone()
        state[name].view(-1)[:3] = 0.25
    still = replace(run, states=states)
    model = drawn(replace(SETTINGS, preparation=Preparation.RAW))
    found = model.predicted(still.window(3, 1, 0))[name].flatten()
    assert kind is not Kind.COPY
    assert found[:3].tolist() == [0.25] * 3
    assert (found[3:] != states[-1][name].flatten()[3:]).any()


def test_the_gradient_is_that_of_the_networks_loss(networks: list[NetworkRun]) -> None:
    """By central differences, through two steps of a prediction."""
    run = networks[0]
    model = drawn(replace(SETTINGS, predicted_steps=2))
    window = run.window(3, 1, 0)

    def loss() -> torch.Tensor:
        state = {**window.states[-1], **model.predicted(window, 2)}
        return nn.functional.cross_entropy(outputs(run, state, run.inputs[:64]), run.labels[:64])

    loss().backward()  # type: ignore[no-untyped-call]
    known = model.module.get_submodule("fc")
    parameter = known.get_submodule("head").weight
    assert isinstance(parameter, nn.Parameter)
    assert parameter.grad is not None
    direction = parameter.grad / parameter.grad.norm()
    ends = []
    with torch.no_grad():
        for step in (1e-2, -1e-2):
            parameter += step * direction
            ends.append(float(loss()))
            parameter -= step * direction
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(parameter.grad.norm()), rel=0.02)


def test_it_learns_to_lower_the_loss(networks: list[NetworkRun]) -> None:
    run = networks[:1]
    settings = replace(SETTINGS, steps=25, runs=1, batch=400, predicted_steps=2)
    _, told = teach(run, settings, lambda step, loss, model: loss, every=5)
    assert told[-1] < told[0] - 1e-2


def test_an_interrupted_training_ends_as_a_whole_one(
    networks: list[NetworkRun], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, predicted_steps=2, factor=True)
    whole = teach(networks, settings, every=2)[0].module.state_dict()

    def interrupt(step: int, loss: float, model: NetworkModel) -> None:
        assert math.isfinite(loss)
        if step == 4:
            raise KeyboardInterrupt

    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        teach(networks, settings, interrupt, every=2, partial=partial)
    again, told = teach(networks, settings, every=2, partial=partial)
    assert len(told) == 2
    assert all(torch.equal(again.module.state_dict()[name], whole[name]) for name in whole)
    assert all(bool(whole[f"{kind.value}.head.weight"].any()) for kind in (Kind.FC, Kind.BIAS))


def test_settings_are_those_of_the_model() -> None:
    known = replace(SETTINGS, predicted_steps=2).to_json()
    assert known["model"] == "known"
    assert (known["preparation"], known["factor"], known["predicted_steps"]) == ("spread", False, 2)
    assert not {"hidden", "width"} & set(known)
    settle = NetworkSettings().to_json()
    assert not {"model", "preparation", "factor", "predicted_steps"} & set(settle)
    assert (settle["hidden"], settle["width"]) == (16, 0)


def test_the_command_teaches_a_known_that_predicts(
    know: Command, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    network = ("train", recorded[0], "--objective", "network")
    arguments = [
        *network, "-o", tmp_path / "bundle", "--model", "known", "--checkpoints", 3, "--steps", 2,
        "--meta-steps", 2, "--runs-per-step", 2, "--holdout", 0.5, "--seed", 3,
        "--json", tmp_path / "gains.json", "--table", tmp_path / "gains.md",
    ]  # fmt: skip
    done = know(*arguments)
    assert done.returncode == 0, done.stderr
    assert "known ahead by points" in " ".join(done.stdout.split())
    bundle = load_bundle(tmp_path / "bundle")
    assert (bundle.target, bundle.checkpoints) == ("network", 3)
    assert bundle.preparation is Preparation.SPREAD
    kept = json.loads((tmp_path / "gains.json").read_text())
    assert kept["gains"] == bundle.manifest["gains"]
    (found,) = kept["gains"].values()
    assert {"naive", "average-forgotten-2", "known", "known-step-2"} <= set(found["accuracy"])
    assert "known" not in found["ahead"]
    assert "known-step-2" in found["ahead"]
    page = (tmp_path / "gains.md").read_text()
    assert page == network_markdown(kept)
    parameters = sum(tensor.numel() for tensor in bundle.states[Kind.CONV].values())
    words = f"a KNOWN of {parameters} parameters for each kind, spread windows, predictions of 1 to"
    assert f"{words} 2 steps ({bundle.digest})" in page
    # Measured alone, it gains what it did in the end.
    done = know(*network, "--evaluate", tmp_path / "bundle", "--json", tmp_path / "again.json")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["gains"], again["held_out"]) == (kept["gains"], kept["held_out"])
    # It predicts like any other.
    names = [recorded[1] / "00000" / checkpoint_name(k) for k in range(3)]
    output = tmp_path / "out.safetensors"
    done = know("predict", *names, "-o", output, "--weights", tmp_path / "bundle", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert f"KNOWN network {bundle.digest[:8]}" in done.stdout
    assert set(read_state(output)) == set(read_state(names[0]))
    # And with the other objective nothing says what of it was held out.
    found = know("train", recorded[0], "--evaluate", tmp_path / "bundle")
    assert found.returncode == 2
    assert "its manifest does not say how it was trained" in one_line(found.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--factor",), "--factor: with --objective network is known's; give --model known as"),
        (("--steps", 2), "--steps: with --objective network is known's; give --model known as"),
        (("--preparation", "raw"), "--preparation: with --objective network is known's"),
        (
            ("--model", "known", "--width", 8),
            "--width: with --objective network is settle's; leave",
        ),
        (("--model", "known", "--hidden", 8), "--hidden: with --objective network is settle's"),
    ],
)
def test_options_of_the_other_one_are_refused(
    know: Command, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    found = know("train", tmp_path, "-o", tmp_path / "bundle", "--objective", "network", *arguments)
    assert found.returncode == 2
    assert words in one_line(found.stderr)


def test_a_model_is_only_asked_for_where_one_is_taught(know: Command, tmp_path: Path) -> None:
    words = "--model: is for -o BUNDLE with --objective network; leave it out"
    for arguments in (
        ("-o", tmp_path / "bundle"),
        ("--objective", "network", "--evaluate", tmp_path),
    ):
        found = know("train", tmp_path, *arguments, "--model", "known")
        assert found.returncode == 2
        assert words in one_line(found.stderr)


@pytest.mark.parametrize(
    "option", [("--preparation", "raw"), ("--steps", 3), ("--hidden", 8), ("--width", 9)]
)
def test_what_a_bundle_says_is_not_asked_for(
    know: Command, tmp_path: Path, option: tuple[object, ...]
) -> None:
    found = know("train", "runs", "--objective", "network", "--evaluate", tmp_path, *option)
    assert found.returncode == 2
    assert f"{option[0]}: a bundle says its own; leave it out" in one_line(found.stderr)


def test_one_that_was_taught_by_weights_is_refused_before_networks_are_read(
    know: Command, tmp_path: Path
) -> None:
    weights = find_bundle(find_method("known"), "continuation", 5)
    arguments = ("train", tmp_path / "none", "--objective", "network", "--evaluate", weights)
    found = know(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert "was not taught through networks" in one_line(found.stderr)


def test_one_that_was_taught_by_weights_is_not_measured(
    networks: list[NetworkRun], tmp_path: Path
) -> None:
    """Nothing says by which names it knows networks."""
    bundle = teach_bundle(split_runs(networks, 0.5, 3), SETTINGS, {})
    assert measure_bundle(bundle, networks)["gains"] == bundle.manifest["gains"]
    for manifest in ({"data": {}}, {}):
        with pytest.raises(UsageError, match="was not taught through networks, so that nothing"):
            measure_bundle(replace(bundle, manifest=manifest), networks)
    assert isinstance(new_model(SETTINGS), KnownModel)
    # One of settle stays what it is.
    save_settle(SettleBundle.of(Settle(3), {}), tmp_path / "settle")
    assert method_of(of_bundle("one", str(tmp_path / "settle"))).name == "settle"
    assert len(PREDICTED_KINDS) == len(list(new_model(SETTINGS).module.children()))
