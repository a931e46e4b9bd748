"""``know eval --regime release``: the protocol, the search for the rate, the page; on noise."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.engine.settings import NormMode
from know_cli.errors import UsageError
from know_cli.evaluation.release import fine_tuning, plan, results, suite
from know_cli.evaluation.release.fine_tuning import (
    GRID,
    HIGHEST,
    LOWEST,
    FineTuning,
    FineTunings,
    shifted_and_flipped,
    tuned,
)
from know_cli.evaluation.release.markdown import to_markdown
from know_cli.evaluation.release.plan import RELEASE_TASKS, chosen
from know_cli.evaluation.release.pretraining import first_data, other_data, pretrained, sessions
from know_cli.evaluation.release.task import Arm, ReleaseTask
from know_cli.evaluation.release.trial import ReleaseTrial
from know_cli.evaluation.runs.wording import difference_text
from know_cli.evaluation.statistics import Estimate, mean_estimate
from know_cli.evaluation.tasks import Downstream, Examples
from know_cli.evaluation.tasks import cifar as cifar_tasks
from know_cli.evaluation.variants import Variant, predict
from know_cli.forgetting.subsets import nested_subsets
from know_cli.lab.fitting import one_thread
from know_cli.lab.stepping import Training
from know_cli.settle.bundle import SettleBundle, save_bundle
from know_cli.settle.module import Settle
from tests.support.command import Command, one_line

CLASSES = 10
RECIPE = FineTuning(epochs=1, head_epochs=1, batch_size=8)


@pytest.fixture(autouse=True)
def _little_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise in ten classes instead of images."""

    def noise(name: str, folder: Path | None) -> tuple[Examples, Examples, int]:
        generator = torch.Generator().manual_seed(3)
        train, test = (
            Examples(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % CLASSES)
            for n in (160, 40)
        )
        return train, test, CLASSES

    monkeypatch.setattr(cifar_tasks, "load_images", noise)
    with one_thread():
        yield


@pytest.fixture
def _few_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rates for every start: on noise, the search for the best one goes anywhere."""
    monkeypatch.setattr(fine_tuning, "GRID", (1.0, 2.0))
    monkeypatch.setattr(fine_tuning, "HIGHEST", 2.0)
    monkeypatch.setattr(fine_tuning, "LOWEST", 1.0)


def tiny(name: str = "release-cifar10-resnet", **changes: Any) -> ReleaseTask:
    """A task as it is, but with next to no data and training."""
    task = RELEASE_TASKS[name]
    base = replace(
        task.base,
        samples=40,
        recipe=replace(task.base.recipe, batch_size=8),
        downstream=tuple(Downstream(size, 1, 4e-4, 1) for size in (8, 16, 32)),
        tested=16,
    )
    return replace(task, base=base, fine_tuning=RECIPE, **changes)


def arms(task: ReleaseTask, *names: str) -> list[Arm]:
    return chosen(task.arms({}), names)


# --- the rate ----------------------------------------------------------------------------------


@given(st.integers(-12, 16))
@settings(max_examples=40, deadline=None)
def test_the_grid_grows_until_the_best_rate_is_well_inside(power: int) -> None:
    asked: list[float] = []

    def score(factor: float) -> float:
        asked.append(factor)
        return -abs(torch.tensor(factor).log2().item() - power)

    best, scores = tuned(score)
    assert len(asked) == len(set(asked))
    assert list(scores) == sorted(asked)
    assert set(GRID) <= set(scores)
    assert best == min(max(2.0**power, LOWEST), HIGHEST)
    assert max(scores) == max(min(4 * best, HIGHEST), GRID[-1])
    assert min(scores) == min(max(best / 4, LOWEST), GRID[0])


def test_of_equal_rates_the_lowest_is_chosen() -> None:
    best, scores = tuned(lambda factor: float(factor >= 4))
    assert (best, list(scores)) == (4, [1, 2, 4, 8, 16])


def test_one_lower_score_by_chance_does_not_end_the_search() -> None:
    best, scores = tuned(lambda factor: -10.0 if factor == 16 else -abs(factor - 32) / 10)
    assert (best, max(scores)) == (32, 128)


def test_only_batch_norm_and_head_are_trained_first(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny()
    problem = task.base.prepare(0, None)
    model = problem.build_downstream(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[tuple[float, str, float]] = []
    advance = Training.advance

    def noting(self: Training, steps: int, schedule: Callable[[int], float]) -> None:
        advance(self, steps, schedule)
        seen.extend(
            (self._learning_rate, type(self._optimiser).__name__, schedule(k)) for k in range(steps)
        )

    monkeypatch.setattr(Training, "advance", noting)
    recipe = replace(RECIPE, optimiser="sgd", weight_decay=0.1, learning_rate=0.01, epochs=2)
    tunings = FineTunings(
        recipe,
        model,
        ("head",),
        problem.cells[0].pool.take(torch.arange(16)),
        5,
        shifted_and_flipped,
    )
    first = tunings.at(2.0)
    # Two batches at the first phase's rate, then two epochs of two along a cosine.
    half = 0.5**0.5 / 2
    assert seen == [
        (1e-3, "AdamW", 1.0),
        (1e-3, "AdamW", 1.0),
        *((0.02, "SGD", pytest.approx(share)) for share in (1, 0.5 + half, 0.5, 0.5 - half)),
    ]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    parts = {name.rpartition(".")[0] for name in changed}
    assert "head" in parts
    assert all(
        name == "head" or isinstance(model.get_submodule(name), nn.BatchNorm2d) for name in parts
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(first.conv1.weight, before["conv1.weight"])
    # The first phase is shared: it is not done again, nor changed by what follows.
    again = tunings.at(2.0)
    assert len(seen) == 2 + 4 + 4
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("power", [1, 2])
def test_before_batch_norm_a_factor_of_the_weights_is_one_of_the_rate(power: int) -> None:
    """λ·θ at the rate λ·η is θ at η for Adam, at λ²·η for SGD: what the docs say of shrinking."""
    factor, rate = 0.5, 0.01
    inputs = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    torch.manual_seed(2)
    convolution, norm = (
        nn.Conv2d(3, 4, 3, bias=False).double(),
        nn.BatchNorm2d(4, eps=1e-300).double(),
    )
    shrunk = copy.deepcopy(convolution)
    shrunk.weight.data *= factor
    layers = []
    for own, lr in ((convolution, rate), (shrunk, rate * factor**power)):
        behind = copy.deepcopy(norm)
        groups = [
            {"params": list(own.parameters()), "lr": lr},
            {"params": list(behind.parameters())},
        ]
        steps = (
            torch.optim.Adam(groups, rate, eps=0)
            if power == 1
            else torch.optim.SGD(groups, rate, 0.9)
        )
        for _ in range(5):
            steps.zero_grad()
            behind(own(inputs)).tanh().square().mean().backward()
            steps.step()
        layers.append(nn.Sequential(own, behind))
    torch.testing.assert_close(shrunk.weight.data, factor * convolution.weight.data)
    torch.testing.assert_close(layers[0](inputs), layers[1](inputs))


# --- the pre-training --------------------------------------------------------------------------


def test_every_session_is_one_epoch_on_a_subset_with_the_moments_kept() -> None:
    task, seed = tiny(), 4
    problem = task.base.prepare(seed, None)
    found = {state.name: state for state in pretrained(task, problem, seed)}
    assert list(found) == [
        *(f"ckpt{k}" for k in range(5)), "longer", "longer-decayed", "more-data",
    ]  # fmt: skip
    # 40, 20, 10, 5 and 2 samples in batches of 8, of which at least one is made.
    assert [found[f"ckpt{k}"].steps for k in range(5)] == [5, 7, 8, 9, 10]
    assert [found[f"ckpt{k}"].samples for k in range(5)] == [40, 20, 10, 5, 2]
    assert found["longer"].steps == found["longer-decayed"].steps == 10
    assert (found["more-data"].steps, found["more-data"].samples) == (10, 80)
    assert len({float(state.state["conv1.weight"].sum()) for state in found.values()}) == 8

    data = first_data(task, problem, seed)
    subsets = nested_subsets(len(data), 0.5, 5, 0, data.targets.numpy())
    first = Training(problem.build(1), data.inputs, data.targets, batch_size=8, learning_rate=1e-3, seed=2)  # fmt: skip
    first.advance(first.epoch_steps, lambda step: 1.0)
    steps, before = first.done, rows(data.inputs)
    for run, subset in zip(
        sessions(first, subsets, seed, task.base.recipe), subsets[1:], strict=True
    ):
        assert run.done == run.epoch_steps
        steps += run.done
        # The optimiser has counted every step since the initial weights: nothing was reset.
        assert {int(kept["step"]) for kept in run._optimiser.state.values()} == {steps}
        own = rows(run._data[0])
        assert own < before
        assert own == rows(data.inputs[torch.from_numpy(subset)])
        before = own
    assert rows(data.inputs) < rows(problem.pool.inputs)


def test_where_the_rate_falls_every_session_is_as_long_as_the_first_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = RELEASE_TASKS["release-cifar10-resnet-converged"]
    assert (whole.base.recipe.epochs, whole.base.recipe.schedule) == (12, "cosine")
    task = tiny(whole.name)
    task = replace(task, base=replace(task.base, recipe=replace(task.base.recipe, epochs=2)))
    courses: list[list[float]] = []
    advance = Training.advance

    def noting(self: Training, steps: int, schedule: Callable[[int], float]) -> None:
        courses.append([schedule(self.done + k) for k in range(steps)])
        advance(self, steps, schedule)

    monkeypatch.setattr(Training, "advance", noting)
    found = {s.name: s for s in pretrained(task, task.base.prepare(1, None), 1)}
    # Two epochs of 40, 20, 10, 5 and 2 samples in batches of 8, of which at least one is made.
    lengths = [10, 4, 2, 2, 2]
    steps = list(itertools.accumulate(lengths))
    assert [found[f"ckpt{k}"].steps for k in range(5)] == steps
    assert found["longer-decayed"].steps == found["longer"].steps == steps[-1]
    assert (found["more-data"].steps, found["more-data"].samples) == (20, 80)
    cosines = [[(1 + math.cos(math.pi * k / n)) / 2 for k in range(n)] for n in [*lengths, 20]]
    assert courses[5] == [1.0] * 10  # longer
    for course, cosine in zip([*courses[:5], courses[7]], cosines, strict=True):
        assert course == pytest.approx(cosine)


def rows(images: Tensor) -> set[float]:
    """Noise tells images apart by their first pixel."""
    return set(images[:, 0, 0, 0].tolist())


def test_a_decayed_continuation_goes_less_far_than_one_at_the_same_rate() -> None:
    task = tiny()
    found = {s.name: s.state for s in pretrained(task, task.base.prepare(1, None), 1)}

    def distance(name: str) -> float:
        return float((found[name]["head.weight"] - found["ckpt0"]["head.weight"]).norm())

    assert 0 < distance("longer-decayed") < distance("longer")


@pytest.mark.usefixtures("_few_rates")
def test_hindsight_fits_what_is_not_in_the_first_data(tmp_path: Path) -> None:
    task = tiny()
    trial = ReleaseTrial(task, 3, tmp_path, None)
    arm = next(arm for arm in task.arms({}) if arm.name == "hindsight")
    trial.run([arm], [25])
    problem = trial.problem
    own, other = first_data(task, problem, 3), other_data(task, problem, 3)
    assert not rows(own.inputs) & rows(other.inputs)
    assert rows(own.inputs) | rows(other.inputs) == rows(problem.pool.inputs)

    def loss(state: Mapping[str, Tensor]) -> float:
        model = problem.build(0)
        model.load_state_dict({**model.state_dict(), **state})
        model.train()  # as it was fitted, by the batch's statistics
        return float(nn.functional.cross_entropy(model(other.inputs), other.targets).detach())

    path = trial.folder / "hindsight.safetensors"
    state = read_state(path)
    assert loss(state) < min(loss(read_state(trial.checkpoint(k))) for k in range(5)) - 0.05
    computed = trial.computed
    assert "hindsight" in trial.found([arm], [25])["cells"]["8 images"]
    path.unlink()  # it is made again where a start is needed
    model = trial.start(arm)
    torch.testing.assert_close(model.get_parameter("conv1.weight"), state["conv1.weight"])
    assert trial.computed == computed + 1
    everything = replace(task, uses_all=True)
    assert not len(other_data(everything, problem, 3))
    assert "hindsight" not in [one.label for one in everything.arms({})]


# --- starts ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_few_rates")
def test_the_mean_of_the_three_most_forgotten_is_a_start(tmp_path: Path) -> None:
    task = tiny()
    trial = ReleaseTrial(task, 0, tmp_path, None)
    (arm,) = [arm for arm in task.arms({}) if arm.label == "average-forgotten-3"]
    trial.run([arm], [25])
    assert "average-forgotten-3" in trial.found([arm], [25])["cells"]["8 images"]
    last = [read_state(trial.checkpoint(k))["conv1.weight"].double() for k in (2, 3, 4)]
    torch.testing.assert_close(
        trial.start(arm).get_parameter("conv1.weight").double(),
        sum(last) / 3, rtol=0, atol=1e-7,
    )  # fmt: skip


def test_starts_are_what_their_names_say(tmp_path: Path) -> None:
    task = tiny()
    trial = ReleaseTrial(task, 0, tmp_path, None)
    trial.run(arms(task, "shrink-0.5"), [])
    every = {arm.label: arm for arm in task.arms({})}
    first = read_state(trial.checkpoint(0))
    norm, conv = "layer2.bn1", "layer2.conv1"

    def state(label: str) -> dict[str, Tensor]:
        return trial.start(every[label]).state_dict()

    fresh = nn.BatchNorm2d(16).state_dict()
    for label in ("naive", "shrink-0.5", "continuation-x8", "average", "scratch"):
        found = state(label)
        assert all(torch.equal(found[f"{norm}.{leaf}"], fresh[leaf]) for leaf in fresh)
        # The head is the same for all.
        assert torch.equal(found["head.weight"], state("scratch")["head.weight"])
        assert torch.equal(found[f"{conv}.weight"], first[f"{conv}.weight"]) == (label == "naive")
    assert torch.equal(state("shrink-0.5")[f"{conv}.weight"], 0.5 * first[f"{conv}.weight"])
    assert torch.equal(state("shrink-0.5")[f"{conv}.bias"], first[f"{conv}.bias"])
    for label in ("naive-stored", "continuation-x8-stored"):
        found = state(label)
        assert all(torch.equal(found[f"{norm}.{leaf}"], first[f"{norm}.{leaf}"]) for leaf in fresh)
    again = state("naive-re-estimated")
    assert torch.equal(again[f"{norm}.weight"], first[f"{norm}.weight"])
    assert not torch.equal(again[f"{norm}.running_var"], first[f"{norm}.running_var"])
    mean = torch.stack([read_state(trial.checkpoint(k))["conv1.weight"].double() for k in range(5)])
    torch.testing.assert_close(
        state("average")["conv1.weight"].double(), mean.mean(0), rtol=0, atol=1e-7
    )
    # As the engine's own reset has it.
    files = [trial.checkpoint(k) for k in range(5)]
    reset = predict(Variant("", {"weights": "retrodiction"}), files, NormMode.RESET, 3)
    for step, label in ((1, "retrodiction-x2"), (3, "retrodiction-x8")):
        found = state(label)
        assert all(
            torch.equal(found[name], tensor)
            for name, tensor in reset[step].items()
            if not name.startswith("head") and "num_batches" not in name
        )


def test_fewer_checkpoints_are_read_by_the_hyper_model_for_so_many(tmp_path: Path) -> None:
    task = tiny(fewer=(2, 4), steps=(1, 2))
    every = {arm.label: arm for arm in task.arms({})}
    fewer = [label for label in every if "-s" in label and label.startswith("retro")]
    assert [*fewer][-4:] == [f"retrodiction-s{s}-x{x}" for s in (2, 4) for x in (2, 4)]
    assert not any("-s2-" in arm.label for arm in tiny().arms({}))
    assert RELEASE_TASKS["release-cifar100-cifar10-resnet18"].fewer == (2, 3, 4)
    trial = ReleaseTrial(task, 0, tmp_path, None)
    paths = trial.checkpoints()
    variant = Variant("retrodiction", {"weights": "retrodiction"})
    for count in (2, 4, 5):
        wanted = predict(variant, paths[:count], NormMode.COPY, 2, 0.5)
        for step, factor in ((1, 2), (2, 4)):
            stem = "retrodiction" if count == 5 else f"retrodiction-s{count}"
            found = trial.start(every[f"{stem}-x{factor}"]).state_dict()
            assert torch.equal(found["conv1.weight"], wanted[step]["conv1.weight"])


def test_averages_are_of_normalisation_layers_too(tmp_path: Path) -> None:
    task = tiny("release-cifar10-pyramid")
    save_bundle(SettleBundle.of(Settle(5), {}, TrajectoryKind.FORGETTING), tmp_path / "settle")
    every = {arm.label: arm for arm in task.arms({"untaught": str(tmp_path / "settle")})}
    trial = ReleaseTrial(task, 0, tmp_path, None)
    states = [read_state(path) for path in trial.checkpoints()]
    norms = [name for name in states[0] if "norm" in name]
    assert norms
    for label in ("average", "untaught"):  # which is the mean, as long as it is untaught
        found = trial.start(every[label]).state_dict()
        for name in norms:
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-7)
    known = trial.start(every["retrodiction-x2"]).state_dict()
    assert all(torch.equal(known[name], states[0][name]) for name in norms)


def test_networks_without_batch_norm_have_no_treatments_of_it(tmp_path: Path) -> None:
    task = tiny("release-cifar10-cnn")
    trial = ReleaseTrial(task, 0, tmp_path, None)
    assert [arm.label for arm in trial._possible(arms(task, "*-stored"))] == ["naive"]
    third = RELEASE_TASKS["release-cifar10-resnet-third"]
    labels = [arm.label for arm in third.arms({"mine": "folder"})]
    assert {"continuation-x3", "retrodiction-x27", "mine-x27", "retrodiction-x27-stored"} < {
        *labels
    }
    assert len(labels) == len(set(labels))


def test_every_start_has_every_treatment_and_those_of_most_only_by_name() -> None:
    every = tiny().arms({"mine": "folder"})
    halves = {"shrink-0.5-first", "shrink-0.5-last"}
    plain = {arm.label for arm in every if arm.norm == "fresh"} - {"scratch"} - halves
    for norm in ("stored", "re-estimated"):
        treated = {arm.label for arm in every if arm.norm == norm}
        assert treated == {f"{label}-{norm}" for label in plain}
    usual = {arm.label for arm in chosen(every, [])}
    assert usual == plain | {"scratch"} | {
        f"{label}-{norm}"
        for label in ("naive", "shrink-0.5", "continuation-x8", "retrodiction-x8")
        for norm in ("stored", "re-estimated")
    }
    assert {arm.label for arm in chosen(every, ["longer*"])} == {
        "naive",
        "longer",
        "longer-decayed",
    }
    assert {arm.label for arm in chosen(every, ["longer*-stored", "last-re-estimated"])} == {
        "naive", "longer-stored", "longer-decayed-stored", "last-re-estimated",
    }  # fmt: skip
    # Those of half of the layers only where a pattern is the whole name.
    assert not halves & {arm.label for arm in chosen(every, ["shrink-*"])}
    assert {arm.label for arm in chosen(every, ["shrink-0.5-last"])} == {"naive", "shrink-0.5-last"}
    assert {"longer-stored", "mine-x2-stored"} < {arm.label for arm in chosen(every, ["*-stored"])}


@pytest.mark.usefixtures("_few_rates")
def test_half_of_the_layers_shrinks_alone(tmp_path: Path) -> None:
    task = tiny()
    trial = ReleaseTrial(task, 0, tmp_path, None)
    names = ("shrink-0.5-first", "shrink-0.5-last")
    trial.run(arms(task, *names), [25])
    assert {*names} < set(trial.found(arms(task, *names), [25])["cells"]["8 images"])
    every = {arm.label: arm for arm in task.arms({})}
    whole, none, *halves = (
        trial.start(every[name]).state_dict() for name in ("shrink-0.5", "naive", *names)
    )
    weights = [name for name in none if not torch.equal(none[name], whole[name])]
    layers = [
        name for name, module in trial.problem.build(0).named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]  # fmt: skip
    assert weights == [f"{name}.weight" for name in layers]
    assert len(weights) > 3
    for number, name in enumerate(weights):
        first = number < len(weights) // 2
        for half, has_shrunk in zip(halves, (first, not first), strict=True):
            assert torch.equal(half[name], (whole if has_shrunk else none)[name])
    for name in none:
        if name not in weights:
            assert all(torch.equal(half[name], none[name]) for half in halves)


@pytest.mark.usefixtures("_few_rates")
def test_half_of_the_layers_shrinks_beside_frozen_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is frozen is in no checkpoint, and has the same values in all starts."""
    trial = ReleaseTrial(tiny(), 0, tmp_path, None)
    build = trial.problem.build

    def partly_frozen(seed: int) -> torch.nn.Module:
        model = build(seed)
        next(model.parameters()).requires_grad_(requires_grad=False)
        return model

    frozen, *_ = (name for name, _ in build(0).named_parameters())
    problem = replace(trial.problem, build=partly_frozen, build_downstream=partly_frozen)
    monkeypatch.setattr(trial, "problem", problem)
    names = ("shrink-0.5-first", "shrink-0.5-last")
    trial.run(arms(trial.task, *names), [25])
    every = {arm.label: arm for arm in trial.task.arms({})}
    for name in names:
        state = trial.start(every[name]).state_dict()
        assert frozen in state
        assert frozen not in read_state(next(tmp_path.rglob(f"{name}.safetensors")))


def test_tasks_of_other_lengths_differ_in_nothing_else() -> None:
    usual, *others = (
        task.definition()
        for name in ("", "-epochs-10", "-epochs-90")
        for task in [RELEASE_TASKS[f"release-cifar10-pyramid{name}"]]
    )
    assert [one["fine_tuning"]["epochs"] for one in (usual, *others)] == [30, 10, 90]
    for one in others:
        lengths = one.pop("fine_tuning"), usual["fine_tuning"]
        assert {k for k in lengths[0] if lengths[0][k] != lengths[1][k]} == {"epochs"}
        # The task's own list of conditions, which names the length, too.
        assert {k for k in one if one[k] != usual[k]} <= {"name", "title", "downstream"}


@pytest.mark.usefixtures("_few_rates")
def test_a_treatment_by_name_is_of_its_start(tmp_path: Path) -> None:
    task = tiny()
    trial = ReleaseTrial(task, 0, tmp_path, None)
    trial.run(arms(task, "last-stored"), [25])
    assert set(trial.found(task.arms({}), [25])["cells"]["8 images"]) == {"naive", "last-stored"}
    every = {arm.label: arm for arm in task.arms({})}
    last = read_state(trial.checkpoint(4))
    stored = trial.start(every["last-stored"]).state_dict()
    fresh = trial.start(every["last"]).state_dict()
    norms = [name for name in last if "bn" in name and name.endswith("running_mean")]
    assert norms
    for name in norms:
        assert torch.equal(stored[name], last[name])
        assert not fresh[name].any()


@pytest.mark.usefixtures("_few_rates")
def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    task = tiny()
    wanted = arms(task, "retrodiction-x2", "scratch")
    trial = ReleaseTrial(task, 1, tmp_path, None)
    assert trial.found(wanted, [25]) == {"pretraining": None, "cells": {}}
    trial.run(wanted, [25])
    found = trial.found(task.arms({}), [25, 50, 100])
    assert list(found["cells"]) == ["8 images"]
    assert list(found["cells"]["8 images"]) == ["naive", "retrodiction-x2", "scratch"]
    for start in found["cells"]["8 images"].values():
        best = max(rate["validation"] for rate in start["rates"].values())
        assert start["rates"][f"{start['factor']:g}"]["validation"] == best
        assert list(start["rates"]) == ["1", "2"]
    again = ReleaseTrial(task, 1, tmp_path, None)
    again.run(wanted, [25])
    assert again.computed == 0
    assert again.found(wanted, [25]) == found
    # What an interruption left out is all that is done.
    kept = sorted((trial.folder / "downstream").iterdir())
    kept[0].unlink()
    assert again.found(wanted, [25]) != found
    again.run(wanted, [25])
    # Weights that are predicted are not kept: of those the prediction is repeated as well.
    assert again.computed in (1, 2)
    changed = again.found(wanted, [25])["cells"]["8 images"]
    for name, start in found["cells"]["8 images"].items():
        assert (changed[name]["factor"], changed[name]["rates"]) == (
            start["factor"],
            start["rates"],
        )
    assert ReleaseTrial(task, 2, tmp_path, None).found(wanted, [25])["pretraining"] is None


def test_conditions_share_their_examples_and_none_is_validated_on(tmp_path: Path) -> None:
    trial = ReleaseTrial(tiny(), 0, tmp_path, None)
    assert [cell.downstream.size for cell in trial.cells([100, 25])] == [8, 32]
    pool = trial.problem.cells[0].pool
    trained = rows(pool.take(trial._order[:32]).inputs)
    assert len(trial._validation) == len(pool) - 32
    assert not trained & rows(trial._validation.inputs)
    assert not rows(pool.inputs) & rows(trial.problem.cells[0].test.inputs)


# --- results -----------------------------------------------------------------------------------

NAIVE = [0.50, 0.60, 0.55]


def start(own: list[Any], best: list[Any], factors: list[Any]) -> dict[str, Any]:
    return {
        "factors": factors,
        "tuned": best,
        "rates": {
            "1": {"values": own, "validation": own},
            "4": {"values": best, "validation": best},
        },
    }


def content(**others: dict[str, Any]) -> dict[str, Any]:
    measure = {"name": "accuracy", "unit": "points", "scale": 100.0}
    cell = {"naive": start(NAIVE, [0.60, 0.70, 0.65], [4.0, 4.0, 8.0]), **others}
    task = {
        "title": "noise to noise", "definition": tiny().definition(), "seeds": [0, 1, 2],
        "seconds": [1.0] * 3, "cells": {"8 images": cell},
        "facts": {"parameters": 10, "batch_norm": True, "tested": 16, "downstream_tested": 16, "validated": 8, "measure": measure},
        "trained": {"ckpt0": {"steps": 5, "samples": 40, "test": [0.4, 0.5, 0.6]}},
    }  # fmt: skip
    return {
        "machine": {"processor": "x", "cores": 2, "system": "y", "python": "3", "torch": "2"},
        "version": "0", "settings": {"seeds": 3}, "tasks": {"noise": task}, "not_run": {"other": "why"},
    }  # fmt: skip


def test_the_page_says_what_the_numbers_say() -> None:
    page = to_markdown(
        content(
            # 4, 3 and 5 points above at the release's rate; at the tuned one −1, 0 and 1.
            better=start([0.54, 0.63, 0.60], [0.59, 0.70, 0.66], [1.0, 4.0, 4.0]),
            # 3, 4 and 5 points below at both; without the last seed no more than the mean counts.
            worse=start([0.47, 0.56, 0.50], [0.57, 0.66, 0.60], [4.0, 4.0, 4.0]),
            **{"worse-stored": start([0.40, None, None], [0.50, None, None], [4.0, None, None])},
        )
    )
    assert "**noise, 8 images**, 3 seeds:" in page
    # t(2) = 4.3027, standard deviation 1 point, over √3.
    assert (
        "At the release's rate: significantly above Θ0 `better` (+4.00 ± 2.48); significantly "
        "below `worse` (-4.00 ± 2.48); of 2 starts." in page
    )
    assert (
        "At the rate tuned for each: significantly above Θ0 none; significantly below `worse` "
        "(-4.00 ± 2.48); of 2 starts." in page
    )
    assert "Tuning the rate of Θ0 itself is worth +10.00 ± 0.00." in page
    assert "| naive | 55.00 |  | 65.00 |  | ×4 (2), ×8 |" in page
    assert "| better | 59.00 | +4.00 ± 2.48 | 65.00 | +0.00 ± 2.48 | ×1, ×4 (2) |" in page
    assert "| worse-stored | 40.00 | -10.00 | 50.00 | -10.00 | ×4 |" in page
    assert "| naive | 55.00 | 65.00 |" in page
    assert "| ckpt0 | 5 | 40 | 50.00 |" in page
    assert "| other | why |" in page


def test_over_tasks_every_trial_counts_as_one() -> None:
    found = content(other=start([0.52, 0.61, 0.58], [0.61, 0.70, None], [4.0, 4.0, None]))
    assert "## Over" not in to_markdown(found)
    second = content(other=start([0.49, 0.60, 0.57], [0.60, 0.72, 0.66], [4.0] * 3))
    found["tasks"]["more"] = second["tasks"]["noise"]
    both = results.pooled(found["tasks"], "8 images")
    assert list(both) == ["other"]
    (of,) = both.values()
    assert (of.tasks, of.trials) == (2, 6)
    own = [0.02, 0.01, 0.03, -0.01, 0.0, 0.02]
    # Two trials of each of three seeds: Student's t of the seeds' means, 2 degrees of freedom.
    of_seeds = [(a + b) / 2 for a, b in zip(own[:3], own[3:], strict=True)]
    half = 4.3027 * statistics.stdev(of_seeds) / 3**0.5
    assert of.own.value == pytest.approx(statistics.mean(own))
    assert of.own.half_width == pytest.approx(half, rel=1e-4)
    assert of.tuned.value == pytest.approx((0.01 + 0.0 + 0.0 + 0.02 + 0.01) / 5)
    text = to_markdown(found)
    assert "## Over 2 tasks, 1 epoch, 8 images" in text
    assert "| other | 2 | 6 | +1.17 ± " in text
    assert results.pooled(found["tasks"], "16 images") == {}


@pytest.mark.parametrize(
    ("part", "fact", "value"),
    [
        ("recipe", "epochs", 12),
        ("recipe", "schedule", "cosine"),
        ("fine_tuning", "weight_decay", 0.3),
        ("fine_tuning", "optimiser", "sgd"),
    ],
)
def test_tasks_that_are_trained_otherwise_are_not_thrown_together(
    part: str, fact: str, value: Any
) -> None:
    found = content(other=start([0.52, 0.61, 0.58], [0.61, 0.70, None], [4.0, 4.0, None]))
    tasks = found["tasks"]
    tasks["alike"] = copy.deepcopy(tasks["noise"])
    tasks["otherwise"] = copy.deepcopy(tasks["noise"])
    tasks["otherwise"]["definition"][part][fact] = value
    assert [list(group) for group in results.alike(tasks)] == [["noise", "alike"], ["otherwise"]]
    page = to_markdown(found)
    assert page.count("## Over") == 1
    assert "## Over 2 tasks, 1 epoch, 8 images" in page
    del tasks["alike"]
    assert "## Over" not in to_markdown(found)


def test_a_page_says_how_a_task_was_trained_where_it_is_unusual() -> None:
    found = content()
    assert "in batches of 8 at 0.001. Downstream" in to_markdown(found)
    definition = found["tasks"]["noise"]["definition"]
    definition["recipe"].update(epochs=12, schedule="cosine")
    definition["fine_tuning"]["weight_decay"] = 0.3
    page = to_markdown(found)
    assert "Θ0 is trained for 12 epochs in batches of 8 at 0.001, which falls to 0 along" in page
    assert "of AdamW with weight decay 0.3 in batches" in page


def test_half_the_weights_are_compared_with_twice_the_rate() -> None:
    def by_rate(rates: dict[str, list[Any]]) -> dict[str, Any]:
        best = rates["1"]
        found = {name: {"values": of, "validation": of} for name, of in rates.items()}
        return {"factors": [1.0] * 3, "tuned": best, "rates": found}

    found = content()
    cell = found["tasks"]["noise"]["cells"]["8 images"]
    cell["naive"] = by_rate({"1": NAIVE, "2": [0.60, 0.70, 0.65], "4": [0.60, 0.70, None]})
    cell["shrink-0.5"] = by_rate({"1": [0.60, 0.71, 0.64], "2": [0.61, 0.71, None], "8": NAIVE})
    page = to_markdown(found)
    # 10, 11 and 9 points above at the same rate; 0, 1 and −1 at twice of it: t(2) = 4.3027 over √3.
    assert "| ×1 | +10.00 ± 2.48 | +0.00 ± 2.48 |" in page
    # Of two seeds 1 and 1 point in either.
    assert "| ×2 | +1.00 ± 0.00 | +1.00 ± 0.00 |" in page
    assert "| ×8 | +" not in page  # Θ0 has neither that rate nor twice of it
    assert "with its weights halved" not in to_markdown(content())


def test_one_seed_says_nothing() -> None:
    found = content()
    found["tasks"]["noise"]["seeds"] = [0]
    cell = found["tasks"]["noise"]["cells"]["8 images"]
    cell["naive"] = start([0.5], [0.6], [4.0])
    cell["other"] = start([0.6], [0.7], [4.0])
    assert "one seed has no interval, so nothing can be said." in to_markdown(found)
    found["tasks"]["noise"]["seeds"] = [0, 1]
    found["tasks"]["noise"]["cells"]["8 images"] = {
        "naive": start([0.5, 0.4], [0.6, 0.5], [4.0] * 2)
    }
    page = to_markdown(found)
    assert "At the release's rate: no other start was measured." in page
    assert "nothing can be said" not in page


@pytest.mark.usefixtures("_few_rates")
def test_outcomes_become_results_in_the_order_of_seeds(tmp_path: Path) -> None:
    task = tiny()
    request = suite.ReleaseRequest(
        folder=tmp_path, tasks=[task], seeds=2, shares=(25,), methods=("shrink-0.5",)
    )
    outcomes = list(suite.evaluate(request))
    assert [outcome.seed for outcome in outcomes] == [0, 1]
    del outcomes[1].found["cells"]["8 images"]["shrink-0.5"]
    found = json.loads(json.dumps(results.to_json(request, outcomes[::-1], {})))
    of_task = found["tasks"]["release-cifar10-resnet"]
    assert of_task["seeds"] == [0, 1]
    cell = of_task["cells"]["8 images"]
    assert list(cell) == ["naive", "shrink-0.5"]
    assert cell["shrink-0.5"]["tuned"][1] is None
    for seed, outcome in enumerate(outcomes):
        one = outcome.found["cells"]["8 images"]["naive"]
        assert cell["naive"]["factors"][seed] == one["factor"]
        assert cell["naive"]["tuned"][seed] == one["rates"][f"{one['factor']:g}"]["value"]
    assert results.at_own_rate(cell)["shrink-0.5"].seeds == 1
    assert results.at_tuned_rate(cell)["naive"].seeds == 2
    assert "### release-cifar10-resnet, 8 images" in to_markdown(found)


def test_tasks_are_found_by_pattern() -> None:
    assert [t.name for t in plan.find_release_tasks(["*-sgd", "*cnn"])] == [
        "release-cifar10-cnn", "release-cifar10-resnet-sgd",
    ]  # fmt: skip
    assert len(plan.find_release_tasks([])) == 23  # without the large ones
    sgd = RELEASE_TASKS["release-cifar10-resnet-sgd"]
    assert (sgd.fine_tuning.optimiser, sgd.fine_tuning.weight_decay) == ("sgd", 5e-4)
    with pytest.raises(UsageError, match=r"--bundle continuation=…: is already the name"):
        plan.check_methods([sgd], {"continuation": "folder"}, [])
    assert {task.rate for task in RELEASE_TASKS.values()} == {0.5, 1 / 3}


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, know: Command) -> None:
    release = ("--regime", "release")
    for arguments, words in (
        ([*release, "--task", "nothing"], "no task of the release regime is named 'nothing'; choo"),
        ([*release, "--method", "nothing"], "unknown start 'nothing'; choose from naive, longer"),
        (
            [*release, "--method", "naive", "--method", "*-last"],
            "--method *-last: matches only starts that have to be written out: shrink-0.5-last",
        ),
        ([*release, "--bundle", "mine=nowhere/at-all"], "--weights nowhere/at-all: neither a fold"),
        ([*release, "--share", "30"], "--share 30: choose from 25, 50, 100"),
        ([*release, "--task", "*-sgd"], "none of these tasks can run here"),
        ([*release, "--norm", "copy"], "--norm: has no effect with --regime release"),
        ([*release, "--device", "cuda:99"], "--device cuda:99: torch sees"),
        ([*release, "--device", "gpu"], "--device gpu: is none of"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--trajectory", "run", "--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--trajectory", "branches", "--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--share", "25"], "--share is for --regime release"),
        (["--trajectory", "run", *release], "--regime is for --trajectory forgetting, not for run"),
    ):
        done = know("eval", *arguments, "-o", "out", cwd=tmp_path)
        assert done.returncode == 2
        assert words in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    path = Path(plan.__file__).parents[3] / "docs" / "results" / "release.json"
    assert to_markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_the_prose_has_what_is_left_over_all_tasks() -> None:
    root = Path(plan.__file__).parents[3]
    tasks = json.loads((root / "docs" / "results" / "release.json").read_text())["tasks"]
    found = results.pooled(results.alike(tasks)[0], "1250 images")
    for page in ("README.md", "docs/expectations.md"):
        text = (root / page).read_text().replace("−", "-")
        for name in (
            "longer", "average-forgotten-3", "more-data", "continuation-x8", "retrodiction-x8",
            "shrink-0.5",
        ):  # fmt: skip
            assert difference_text(found[name].tuned, 100) in text, (page, name)
        below = found["authors-x8"].tuned
        assert below.high < 0
        assert f"{-100 * below.value:.1f} ± {100 * below.half_width:.1f}" in text, page


def over_three(tasks: dict[str, Any], start: str, first: int = 0) -> results.Pooled:
    """A start over the three networks, from a seed on."""
    three = copy.deepcopy({n: tasks[f"release-cifar10-{n}"] for n in ("resnet", "cnn", "pyramid")})
    for task in three.values():
        # Of all that is kept for each seed.
        from_seed = [k for k, seed in enumerate(task["seeds"]) if seed >= first]
        task["seeds"] = [task["seeds"][k] for k in from_seed]
        for of in task["cells"]["1250 images"].values():
            of["tuned"] = [of["tuned"][k] for k in from_seed]
            of["rates"] = {"1": {"values": [of["rates"]["1"]["values"][k] for k in from_seed]}}
    return results.pooled(three, "1250 images")[start]


def text_of(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ± {100 * estimate.half_width:.1f}"


def of_own_layers(cell: dict[str, Any], start: str) -> list[str]:
    """Differences of a start to Θ0, both with BatchNorm's layers as they were, or measured again."""
    found = []
    for norm in ("stored", "re-estimated"):
        one, other = (cell[f"{name}-{norm}"] for name in (start, "naive"))
        pairs = (
            results.paired(one["rates"]["1"]["values"], other["rates"]["1"]["values"]),
            results.paired(one["tuned"], other["tuned"]),
        )
        assert [len(values) for values in pairs] == [10, 10]
        means = [mean_estimate([a - b for a, b in values]) for values in pairs]
        found.append([f"{100 * m.value:+.1f} ± {100 * m.half_width:.1f}" for m in means])
    assert found[0] == found[1]
    return found[0]


def test_the_prose_has_what_other_tasks_and_factors_give() -> None:
    root = Path(plan.__file__).parents[3]
    tasks = json.loads((root / "docs" / "results" / "release.json").read_text())["tasks"]

    def said(task: str, start: str, *, tuned: bool = False, of: str = "1250 images") -> str:
        cell = tasks[f"release-{task}"]["cells"][of]
        found = (results.at_tuned_rate if tuned else results.at_own_rate)(cell)[start].difference
        assert found is not None
        return f"{100 * found.value:+.1f} ± {100 * found.half_width:.1f}"

    pages = [" ".join((root / "docs" / name).read_text().replace("−", "-").split())
             for name in ("expectations.md", "methods.md")]  # fmt: skip
    others = ("cifar10-resnet-sgd", "fashion-cifar10-resnet", "cifar10-fashion-resnet")
    for start, words in (
        ("shrink-0.5", "half the weights gain {}, {} and {} points"),
        ("authors-x8", "the authors' release ×8 {}, {} and {}."),
    ):
        assert words.format(*(said(task, start) for task in others)) in pages[0]
    far = "cifar10-fashion-resnet"
    left = [said(far, start, tuned=True) for start in ("longer", "average-forgotten-3")]
    assert (
        "training longer leaves {} and the mean of the three most forgotten {}".format(*left)
        in (pages[0])
    )
    thirds = [f"cifar10-{network}-third" for network in ("resnet", "cnn", "pyramid")]
    figures = [said(third, start) for third in thirds for start in ("shrink-0.5", "authors-x27")]
    assert (
        "At the release's rate half the weights and the authors' release ×27 are {} and {} from Θ0 on "
        "the ResNet, {} and {} on the CNN, and {} and {} on the transformer; at the tuned one nothing "
        "is left of either but {} for half the weights on the CNN."
    ).format(*figures, said(thirds[1], "shrink-0.5", tuned=True)) in pages[0]
    for factor in ("0.9", "0.7", "0.5", "0.4"):
        cells = [
            said(f"cifar10-{network}", f"shrink-{factor}", tuned=tuned)
            for network in ("resnet", "cnn", "pyramid")
            for tuned in (False, True)
        ]
        assert f"| {factor} | {' | '.join(cells)} |" in pages[1]
    of_factor = [over_three(tasks, f"shrink-{factor}") for factor in ("0.9", "0.7", "0.5")]
    confirmed = over_three(tasks, "shrink-0.7", first=20)
    assert [found.trials for found in (*of_factor, confirmed)] == [30, 30, 30, 15]
    texts = [text_of(found.tuned) for found in (*of_factor, confirmed)]
    assert (
        f"over the three networks {texts[1]} points in thirty trials, {texts[3]} in the fifteen that "
        "were run to confirm it"
    ) in pages[1]
    assert (
        f"0.9 leaves nothing ({texts[0]}), and 0.5, which is as near to 0.7, {texts[2]}."
        in pages[1]
    )
    own = {
        start: of_own_layers(tasks["release-cifar10-resnet"]["cells"]["1250 images"], start)
        for start in ("shrink-0.5", "authors-x8", "longer", "average-forgotten-3")
    }
    words = (
        "half the weights are {0} and the authors' release ×8 {2} above Θ0 at the release's rate, "
        "and {1} and {3} at the tuned one; training longer {4} and {5}, the mean of the three most "
        "forgotten {6} and {7}."
    )
    assert words.format(*(figure for pair in own.values() for figure in pair)) in pages[0]
    scaled = []
    for network in ("resnet", "cnn"):
        cell = tasks[f"release-cifar10-{network}"]["cells"]["1250 images"]
        for rate, twice in (("2", "4"), ("4", "8")):
            values = [
                cell[s]["rates"][r]["values"] for s, r in (("shrink-0.5", rate), ("naive", twice))
            ]
            found = mean_estimate([one - other for one, other in results.paired(*values)])
            value = found.value if network == "resnet" else -found.value
            scaled.append(f"{100 * value:.1f} ± {100 * found.half_width:.1f}")
    assert (
        "half the weights at two and four times the release's rate are {} and {} points from Θ0 at "
        "twice these; without normalisation, they are {} and {} below"
    ).format(*scaled) in pages[1]
    loss = said("cifar10-resnet18", "shrink-0.5").removeprefix("-")
    assert f"shrinking loses {loss} points at the release's" in pages[1]
    left = [said("cifar10-cnn", f"shrink-{factor}", tuned=True) for factor in ("0.7", "0.5")]
    assert "{} for λ = 0.7 and {} for half of them".format(*left) in pages[0]


_ROWS = {
    "authors-x8": "the authors' release ×8 (ResNet: 15 seeds)",
    "shrink-0.5": "half of Θ0's weights",
    "longer": "Θ0 trained longer (15 seeds)",
    "continuation-x8": "`continuation` ×8",
    "retrodiction-x8": "`retrodiction` ×8",
    "average": "the mean of the five",
    "average-forgotten-3": "the mean of the three most forgotten",
    "more-data": "on twice the data",
    "hindsight": "the best combination in hindsight",
}


def test_the_prose_has_the_table_of_the_three_networks() -> None:
    root = Path(plan.__file__).parents[3]
    tasks = json.loads((root / "docs" / "results" / "release.json").read_text())["tasks"]
    page = (root / "docs" / "expectations.md").read_text().replace("−", "-")
    own, tuned = (
        {
            start: [standing(tasks[f"release-cifar10-{network}"]["cells"]["1250 images"])[start]
                    for network in ("resnet", "cnn", "pyramid")]
            for start in _ROWS
        }
        for standing in (results.at_own_rate, results.at_tuned_rate)
    )  # fmt: skip
    for found, starts in ((own, list(_ROWS)[:7]), (tuned, list(_ROWS))):
        for start in starts:
            cells = [
                f"{100 * one.difference.value:+.1f} ± {100 * one.difference.half_width:.1f}"
                for one in found[start]
                if one.difference is not None
            ]
            assert f"| {_ROWS[start]} | {' | '.join(cells)} |\n" in page


def test_the_prose_has_what_the_most_forgotten_are_worth_beside_training_longer() -> None:
    root = Path(plan.__file__).parents[3] / "docs"
    page = " ".join((root / "expectations.md").read_text().replace("−", "-").split())
    tasks = json.loads((root / "results" / "release.json").read_text())["tasks"]
    apart = results.pooled(results.alike(tasks)[0], "1250 images", "longer")["average-forgotten-3"]
    figure = text_of(apart.tuned)
    assert f"the mean is {figure} points from it, on the {apart.trials} trials" in page
    converged = json.loads((root / "results" / "forgotten.json").read_text())["tasks"]
    of_images: dict[str, list[float]] = {}
    of_text = []
    for name, task in converged.items():
        values = {
            start["method"]: np.mean(
                [np.array(seeds) for seeds in start["values"].values()], axis=0
            )
            for start in task["starts"]
        }
        for start in ("longer", "average-forgotten-3"):
            differences = list(task["measure"]["scale"] * (values[start] - values["naive"]))
            if not name.startswith("text-"):
                of_images.setdefault(start, []).extend(differences)
            elif start != "longer":
                of_text += differences
    assert len(of_images["longer"]) == 28
    first, second = (mean_estimate(of_images[start]) for start in ("average-forgotten-3", "longer"))
    assert f"this mean is {first.value:+.1f} ± {first.half_width:.1f} points from it on" in page
    assert f"training longer {second.value:+.1f} ± {second.half_width:.1f})" in page
    assert f"and {-max(of_text):.1f} to {-min(of_text):.1f} nats below it on text" in page
