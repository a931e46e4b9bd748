"""``--distance`` of forgettings: to the weights after training on more data, where recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from know_cli.checkpoints.state import read_state
from know_cli.forgetting.recorder import checkpoint_name
from know_cli.lab.data import DataSet, Samples, load
from know_cli.lab.fitting import one_thread
from know_cli.meta import network_data, network_downstream
from know_cli.meta.network_data import NetworkRun
from know_cli.meta.network_loading import load_networks
from know_cli.meta.network_models import NetworkModel, settled
from know_cli.meta.network_settings import NetworkSettings
from know_cli.meta.network_training import _distance, teach
from know_cli.meta.setup import Setup, draw_setup
from know_cli.settle.bundle import load_bundle
from know_cli.settle.module import Settle
from tests.support.command import Command, one_line
from tests.support.recorded import collect_forgettings

SETTINGS = NetworkSettings(checkpoints=3, hidden=4, steps=4, runs=2, batch=16, distance=0.5)
#: Data sets with numbers of sessions and continuations.
RECORDED = (("digits", 4, 1), ("digits", 3, 1), ("digits", 3, 0), ("colours", 5, 2))
#: By which the second is held out of these.
SEED = 0


def _colours(count: int, generator: torch.Generator) -> Samples:
    """Noise; the brightness tells the class."""
    labels = torch.arange(count) % 4
    noise = torch.randint(0, 20, (count, 3, 8, 8), generator=generator)
    return Samples((noise + 60 * labels[:, None, None, None]).byte(), labels)


@pytest.fixture(scope="module", autouse=True)
def sets() -> Iterator[dict[str, DataSet]]:
    """Data sets of one side, so that each is another task for what was trained on the other."""
    generator = torch.Generator().manual_seed(0)
    samples = [_colours(count, generator) for count in (2400, 300)]
    found = {"digits": load("digits"), "colours": DataSet("colours", "image", *samples, 4)}
    with pytest.MonkeyPatch.context() as patch:
        for module in (network_data, network_downstream):
            patch.setattr(module, "load", lambda name, folder: found[name])
        yield found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def setup(number: int, data: DataSet, sessions: int, continuations: int) -> Setup:
    drawn = draw_setup(50 + number, {data.name: data}, ["mlp"])
    return replace(
        drawn, samples=60, rate=0.8, sessions=sessions, continuations=continuations, start=None, epochs=4,
        later_epochs=1.0, later_rate=1.0, learning_rate=0.004, batch_size=8, optimiser="adam",
        schedule="constant", augmentation="none",
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, sets: dict[str, DataSet]
) -> tuple[Path, Path]:
    """The files of collected forgettings, and the checkpoints that these are of."""
    setups = [
        (setup(number, sets[name], *counts), sets[name])
        for number, (name, *counts) in enumerate(RECORDED)
    ]
    return collect_forgettings(tmp_path_factory.mktemp, setups, rows=300_000)


@pytest.fixture(scope="module")
def networks(recorded: tuple[Path, Path]) -> list[NetworkRun]:
    found, left_out = load_networks([recorded[0]], 3, None)
    assert not left_out
    return found


def test_targets_are_what_was_trained_on_more_data(
    networks: list[NetworkRun], recorded: tuple[Path, Path]
) -> None:
    # By the number of the forgetting: which checkpoint is the target of which window. One of
    # every second checkpoint has a rate of its own, so that its target is two sessions further.
    wanted = (
        {(1, 0): -1, (1, 1): 0},
        {(1, 0): -1},
        {(1, 0): None},
        {(1, 0): -1, (1, 1): 0, (1, 2): 1, (2, 0): -2},
    )
    for number, (run, targets) in enumerate(zip(networks, wanted, strict=True)):
        assert run.windows(3) == list(targets)
        for (apart, back), index in targets.items():
            window = run.window(3, apart, back)
            if index is None:
                assert window.target is None
                continue
            whole = read_state(recorded[1] / f"{number:05d}" / checkpoint_name(index))
            assert window.target is not None
            for name, tensor in window.target.items():
                assert torch.equal(tensor, whole[name])
            assert run.kinds.keys() <= window.target.keys()
    # Of six sessions without anything after them, one of every second needs two of them left.
    states = [dict(networks[0].states[-1]) for _ in range(7)]
    chain = replace(networks[0], states=states, continued=())
    assert chain.window(3, 2, 2).target is states[6]
    assert chain.window(3, 2, 1).target is None
    assert chain.window(3, 3, 0).target is None


def test_it_is_a_share_of_the_newest_checkpoint_s_distance(networks: list[NetworkRun]) -> None:
    torch.manual_seed(0)
    taught = Settle(3)
    nn.init.normal_(taught.gate.weight, std=0.3)
    for run, back in ((networks[0], 1), (networks[1], 0), (networks[3], 2)):
        window = run.window(3, 1, back)
        target = window.target
        assert target is not None
        for model in (Settle(3), taught):
            weights = settled(model, window)[0]
            # By hand, in double precision, from the tables themselves.
            near = far = 0.0
            for name in run.kinds:
                place = len(run.states) - 1 - back
                goal = [*run.states, *run.continued][place + 1][name].double().numpy()
                newest = run.states[place][name].double().numpy()
                found = weights[name].detach().double().numpy()
                near += float(np.square(found - goal).sum())
                far += float(np.square(newest - goal).sum())
            got = _distance(weights, window, target)
            assert float(got.detach()) == pytest.approx(near / far, rel=1e-4)
        # What is predicted is Θ0: all of its distance is left.
        base = {name: window.states[-1][name] for name in run.kinds}
        assert float(_distance(base, window, target)) == pytest.approx(1)
        assert float(_distance(target, window, target)) == 0


def test_the_gradient_reaches_the_hyper_model(networks: list[NetworkRun]) -> None:
    torch.manual_seed(1)
    model = Settle(3, 4)
    nn.init.normal_(model.gate.weight, std=0.1)
    window = networks[0].window(3, 1, 1)
    target = window.target
    assert target is not None
    _distance(settled(model, window)[0], window, target).backward()  # type: ignore[no-untyped-call]
    for parameter in (model.gate.weight, model.read.weight):
        slope = parameter.grad
        assert slope is not None
        direction = slope / slope.norm()
        ends = []
        with torch.no_grad():
            for step in (1e-2, -1e-2):
                parameter += step * direction
                ends.append(float(_distance(settled(model, window)[0], window, target)))
                parameter -= step * direction
        assert float(slope.norm()) > 0
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(slope.norm()), rel=2e-2)


def test_it_is_learned_and_left_out_where_there_is_no_target(networks: list[NetworkRun]) -> None:
    def taught(run: NetworkRun, distance: float, steps: int = 4) -> Settle:
        changes = {"learning_rate": 0.03, "runs": 1}
        settings = replace(SETTINGS, distance=distance, steps=steps, **changes)  # type: ignore[arg-type]
        return teach([run], settings)[0].module  # type: ignore[return-value]

    without, alone = (taught(networks[2], distance) for distance in (0.0, 2.0))
    assert torch.equal(without.gate.weight, alone.gate.weight)
    window = networks[1].window(3, 1, 0)
    assert window.target is not None
    shares = []
    for model in (Settle(3), taught(networks[1], 0.0, 25), taught(networks[1], 5.0, 25)):
        with torch.no_grad():
            shares.append(float(_distance(settled(model, window)[0], window, window.target)))
    assert shares[2] < min(shares[:2])


def test_an_interrupted_training_ends_as_a_whole_one(
    networks: list[NetworkRun], tmp_path: Path
) -> None:
    whole = teach(networks, SETTINGS, every=2)[0].module.state_dict()

    def interrupt(step: int, loss: float, model: NetworkModel) -> str:
        if step == 4:
            raise KeyboardInterrupt
        return f"first {step}"

    with pytest.raises(KeyboardInterrupt):
        teach(networks, SETTINGS, interrupt, every=2, partial=tmp_path / "partial")
    again, told = teach(networks, SETTINGS, every=2, partial=tmp_path / "partial")
    assert told == ["first 2", None]
    assert all(torch.equal(again.module.state_dict()[name], whole[name]) for name in whole)


def test_the_command_takes_all_terms(
    know: Command, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, page = tmp_path / "bundle", tmp_path / "page.md"
    arguments = [
        "train", recorded[0], "-o", bundle, "--objective", "network", "--checkpoints", 3,
        "--meta-steps", 2, "--runs-per-step", 3, "--holdout", 0.3, "--seed", SEED,
    ]  # fmt: skip
    terms = ["--distance", 0.5, "--downstream", 1, "--downstream-steps", 2]
    numbers = ["--downstream-examples", 200, "--downstream-examples", 40]
    done = know(*arguments, *terms, *numbers, "--table", page)
    assert done.returncode == 0, done.stderr
    assert "--distance: 6 of 7 windows have a target\n" in done.stderr
    loaded = load_bundle(bundle)
    assert loaded.manifest["settings"]["downstream_examples"] == [40, 200]
    words = "with 0.5 of the distance to weights of more data, with 1 of the loss on another task"
    assert f"{words} after 2 steps on 40 or 200 examples of it" in page.read_text()
    again = know(*arguments, *terms, *reversed_pairs(numbers), "--force")
    assert again.returncode == 0, again.stderr
    assert load_bundle(bundle).digest == loaded.digest
    refused = {
        ("--downstream-examples", 40): "--downstream-examples needs --downstream",
        ("--downstream-steps", 10): "--downstream-steps needs --downstream",
        (*terms, "--downstream-examples", 31): "'--downstream-examples': Input should be greater",
        (*terms, "--downstream-examples", 2000): "--downstream-examples 2000: another task has",
        ("--downstream", 1, "--downstream-steps", 0): "'--downstream-steps': Input should be gr",
        ("--downstream", 1, "--downstream-steps", 101): "'--downstream-steps': Input should be le",
    }
    for options, reason in refused.items():
        found = know(*arguments, *options, "--force")
        assert (found.returncode, found.stdout) == (2, "")
        assert reason in one_line(found.stderr)
    assert load_bundle(bundle).digest == loaded.digest


def reversed_pairs(options: list[object]) -> list[object]:
    """Repeated options in the other order."""
    return [*options[2:], *options[:2]]
