"""Teaches a hyper-model through the networks: by what they say with the weights that it predicts.

A step takes some runs and a window of each, predicts the weights, and follows the gradient of the
logarithm of the networks' cross entropy on samples that their runs were not trained on.
Running statistics are those that the hyper-model gives with its weights. Forgettings are learned
from alike, but that their networks normalise by the batch, and so are branches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from know_cli.checkpoints import open_checkpoint, save_checkpoint
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.errors import UsageError
from know_cli.forgetting.recorder import derived_seed
from know_cli.meta.kept import check_kept_file
from know_cli.meta.manifest import versions
from know_cli.meta.network_data import MEAN, VARIANCE, NetworkRun, State, Window, outputs
from know_cli.meta.network_downstream import loss_downstream
from know_cli.meta.network_models import NetworkModel, new_model
from know_cli.meta.network_settings import NetworkSettings

# Random streams of one training.
_WEIGHTS, _STEP = range(2)
_LARGEST_GRADIENT = 1.0
_KEPT = "know.network"
# What the zoo's layers add to a variance: torch's default.
_EPSILON = 1e-5
_TEMPERATURES = tuple(2 ** (step / 4) for step in range(-6, 13))


def teach(
    runs: Sequence[NetworkRun],
    settings: NetworkSettings,
    report: Callable[[int, float, NetworkModel], Any] = lambda step, loss, model: None,
    *,
    every: int = 50,
    partial: Path | None = None,
    reported_of: Sequence[str] = (),
) -> tuple[NetworkModel, list[Any]]:
    """Train a hyper-model on runs.

    The same runs, settings, versions and number of threads give the same weights on the same
    machine, whether or not the training was interrupted.

    Args:
        runs: to learn from.
        settings: how.
        report: called every so many steps with the step, the mean logarithm of the loss since the
            last time, and the model; what it returns is kept as JSON.
        every: steps between reports; what was learned is kept as often.
        partial: a file for what was learned so far; None keeps nothing.
        reported_of: names of the runs that reports measure; reports of others are not gone on with.

    Returns:
        The hyper-model, and what was reported, also before an interruption.

    Raises:
        UsageError: the training diverges, there are no runs, or the hyper-model cannot be taught
            on them.
    """
    if not runs:
        raise UsageError("no runs are left to learn from; record more")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, _WEIGHTS))
        model = new_model(settings, runs[0].trajectory)
    adam = torch.optim.Adam(model.module.parameters(), settings.learning_rate)
    taught_on = [[run.name, run.setup.to_json(), len(run.others)] for run in runs]
    facts = [settings.to_json(), taught_on, sorted(reported_of), torch.get_num_threads()]
    identity = json.dumps([*facts, versions()], sort_keys=True)
    begin, told = _resume(partial, identity, model.module, adam)
    # Counted, since a training that goes on may report at other steps than it was kept at.
    total, taken = 0.0, 0
    for step in range(begin, settings.steps):
        for group in adam.param_groups:
            share = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            group["lr"] = settings.learning_rate * share
        adam.zero_grad()
        generator = np.random.default_rng([settings.seed, _STEP, step])
        for number in generator.permutation(len(runs))[: settings.runs]:
            loss, gained = _loss(model, runs[number], settings, generator)
            if not math.isfinite(float(loss.detach())):
                raise UsageError(
                    f"the training diverged in step {step + 1}, at {runs[number].name}; lower "
                    "--learning-rate, or --downstream-steps"
                )
            (loss / settings.runs).backward()  # type: ignore[no-untyped-call]
            total, taken = total + gained, taken + 1
        nn.utils.clip_grad_norm_(model.module.parameters(), _LARGEST_GRADIENT)
        adam.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            told.append(report(step + 1, total / taken, model))
            kept = {"identity": identity, "step": step + 1, "told": told}
            _keep(partial, kept, model.module, adam)
            total, taken = 0.0, 0
    model.module.eval()
    return model, told


def check_partial(partial: Path) -> None:
    """Refuse a file for what is kept that is something else.

    Raises:
        OutputError: it is.
    """
    check_kept_file(partial, _KEPT)


def _loss(
    model: NetworkModel, run: NetworkRun, settings: NetworkSettings, generator: np.random.Generator
) -> tuple[Tensor, float]:
    """What is minimised of one run, and the logarithm of its cross entropy."""
    choices = run.windows(settings.checkpoints)
    window = run.window(settings.checkpoints, *choices[generator.integers(len(choices))])
    rows = torch.from_numpy(generator.permutation(len(run.labels))[: settings.batch])
    # A single number takes no draw, so that those of settle are as they were without it.
    step = 1 + int(generator.integers(model.steps)) if model.steps > 1 else 1
    weights = model.predicted(window, step)
    base = {**window.states[-1], **weights}
    run.model.train(settings.batch_statistics)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator.integers(2**31)))
        found = outputs(run, _differentiable(base), run.inputs[rows])
    run.model.eval()
    if settings.calibrated:
        found = found / _temperature(found.detach(), run.labels[rows])
    loss = nn.functional.cross_entropy(found, run.labels[rows]).log()
    gained = float(loss.detach())
    if settings.downstream and run.others:
        after = loss_downstream(run, base, settings, generator)
        loss = loss + settings.downstream * after.log()
    if settings.distance and window.target is not None:
        loss = loss + settings.distance * _distance(weights, window, window.target)
    return loss, gained


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature among :data:`_TEMPERATURES` with the least cross entropy."""
    losses = [nn.functional.cross_entropy(logits / one, labels) for one in _TEMPERATURES]
    return _TEMPERATURES[int(torch.stack(losses).argmin())]


def _differentiable(state: Mapping[str, Tensor]) -> State:
    """The same network with running statistics through which no gradient has to pass.

    Batch normalisation gives none for its statistics. Their gradient goes through its weight and
    bias instead, γ(x − μ)/σ + β being γ·(σ₀/σ)·(x − μ₀)/σ₀ + β + (γ/σ)(μ₀ − μ) for any μ₀ and σ₀.
    """
    found = dict(state)
    for name, variance in state.items():
        stem, _, leaf = name.rpartition(VARIANCE)
        if leaf or not name.endswith(VARIANCE) or not variance.requires_grad:
            continue
        mean, weight, bias = state[stem + MEAN], state[stem + "weight"], state[stem + "bias"]
        deviation = (variance + _EPSILON).sqrt()
        found[name], found[stem + MEAN] = variance.detach(), mean.detach()
        found[stem + "weight"] = weight * deviation.detach() / deviation
        found[stem + "bias"] = bias + weight / deviation * (mean.detach() - mean)
    return found


def _distance(weights: Mapping[str, Tensor], window: Window, target: State) -> Tensor:
    """Squared distance to a target as a share of the average's, or of a forgetting's newest one's.

    An untaught model predicts the average, which the annealed weights of a run are near to; of a
    forgetting what one has without any prediction is its newest checkpoint, Θ0. The average of
    branches is one without Θ0.
    """
    far = near = torch.zeros(())
    averaged = {
        TrajectoryKind.RUN: slice(None),
        TrajectoryKind.FORGETTING: slice(-1, None),
        TrajectoryKind.BRANCHES: slice(None, -1),
    }[window.run.trajectory]
    for name in window.run.kinds:
        wanted = target[name]
        base = window.stacked(name)[averaged].mean(0).view_as(wanted)
        near = near + (weights[name] - wanted).square().sum()
        far = far + (base - wanted).square().sum()
    return near / far.clamp(min=1e-30)


def _keep(
    partial: Path | None, facts: Mapping[str, Any], model: nn.Module, adam: torch.optim.Adam
) -> None:
    if partial is None:
        return
    kept = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, state in adam.state_dict()["state"].items():
        kept |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    save_checkpoint(partial, kept, {_KEPT: json.dumps(facts)})


def _resume(
    partial: Path | None, identity: str, model: nn.Module, adam: torch.optim.Adam
) -> tuple[int, list[Any]]:
    """The step to go on with, and what was told; 0 where nothing of the same training was kept."""
    if partial is None or not partial.exists():
        return 0, []
    with open_checkpoint(partial) as checkpoint:
        facts = json.loads(checkpoint.metadata.get(_KEPT, "{}"))
    if facts.get("identity") != identity:
        return 0, []
    weights: State = {}
    states: dict[int, State] = {}
    for name, tensor in read_state(partial).items():
        owner, _, rest = name.partition(".")
        if owner == "model":
            weights[rest] = tensor
        else:
            number, _, entry = rest.partition(".")
            states.setdefault(int(number), {})[entry] = tensor
    model.load_state_dict(weights)
    adam.load_state_dict({**adam.state_dict(), "state": states})
    return int(facts["step"]), list(facts["told"])
