"""``know eval``: tasks, protocol, statistics, what is kept, and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from know_cli.checkpoints import save_checkpoint
from know_cli.engine.settings import NormMode
from know_cli.errors import CheckpointError, UsageError
from know_cli.evaluation import cache, hindsight, results
from know_cli.evaluation import statistics as stats
from know_cli.evaluation import suite as running
from know_cli.evaluation import trial as protocol
from know_cli.evaluation import variants as methods
from know_cli.evaluation.anchors import ANCHORS
from know_cli.evaluation.hindsight import best_combination
from know_cli.evaluation.jobs import jobs
from know_cli.evaluation.markdown import to_markdown
from know_cli.evaluation.release import cost
from know_cli.evaluation.starts import Outcome, Wanted
from know_cli.evaluation.statistics import Status
from know_cli.evaluation.tasks import TASKS, Downstream, Examples, Task, find_tasks
from know_cli.evaluation.tasks import data as task_data
from know_cli.evaluation.tasks.appearance import DOMAINS, in_domain
from know_cli.evaluation.tasks.measures import ACCURACY, LOG_LIKELIHOOD, MEAN_IOU
from know_cli.evaluation.tasks.scenes import CAPTION, SIDE, WORDS, compose
from know_cli.evaluation.tasks.text import _CODE, MANUAL, load_passages
from know_cli.evaluation.trial import Trial
from know_cli.known.shipped import DEFAULT_WEIGHTS, shipped, weights_folder
from know_cli.lab.data import DataSet, Samples, glyphs, load
from know_cli.lab.data.parts import meta_part
from know_cli.lab.data.text import _MODULES
from tests.support.command import Command, one_line
from tests.support.costs import TARGET, published
from tests.support.evaluation import tiny

Values = dict[str, list[float]]

FIVE = shipped()["continuation"][5]


def images(count: int, seed: int, classes: int = 10) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Samples(pixels, torch.arange(count) % classes)


FEW = 5
FASHION = DataSet("fashion-mnist", "image", images(2400, 1), images(400, 2), 10)


@pytest.fixture
def _little_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise in the shape of Fashion-MNIST, few glyphs and little hindsight: nothing takes long."""
    monkeypatch.setattr(hindsight, "_ITERATIONS", FEW)
    task_data.load_images.cache_clear()
    monkeypatch.setattr(task_data, "load", lambda name, folder: FASHION)
    monkeypatch.setattr(task_data, "_GLYPHS", (420, 60))
    yield
    task_data.load_images.cache_clear()


CONTINUATION = Wanted(methods.find_variants(["continuation"]), steps=2)


# --- tasks -------------------------------------------------------------------------------------


#: With BatchNorm, with adapters, of domains, of captions; the others take as long, and are slow.
QUICK = ("glyphs-digits-cnn-batchnorm", "text-lora", "domains-resnet", "scenes-captioning")


@pytest.mark.usefixtures("_little_data")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in TASKS]
)
def test_every_task_runs_end_to_end(name: str, tmp_path: Path) -> None:
    trial = Trial(tiny(name), 3, tmp_path, None)
    problem = trial.problem
    assert len(problem.pool) == 68
    outcome = trial.run(CONTINUATION)
    labels = [results.start_name(start) for start in outcome.values]
    assert labels == [*ANCHORS, "continuation ×2", "continuation ×4"]
    for values in outcome.values.values():
        assert set(values) == {cell.name for cell in problem.cells}
        assert np.isfinite(list(values.values())).all()
    anchors = {"longer", "hindsight", "more-data", "oracle"}
    assert set(outcome.trained) == {"0", "1", "2", "3", "4", *anchors}
    assert [outcome.trained[str(k)]["samples"] for k in range(5)] == [34, 17, 8, 4, 2]
    assert outcome.trained["oracle"]["samples"] == outcome.trained["more-data"]["samples"] == 68
    assert 0 < outcome.facts["parameters"] < (12_000_000 if TASKS[name].large else 100_000)
    for cell in problem.cells:
        assert not shared(cell.pool, cell.test)
    assert not shared(problem.pool, problem.test)


def shared(first: Examples, second: Examples) -> bool:
    seen = {example.numpy().tobytes() for example in first.inputs}
    return any(example.numpy().tobytes() in seen for example in second.inputs)


def test_pre_training_uses_nothing_that_meta_training_may_use() -> None:
    used, kept = meta_part(FASHION), task_data.evaluation_part(FASHION)
    assert len(used) + len(kept) == len(FASHION.train)
    assert not shared(Examples(used.inputs, used.labels), Examples(kept.inputs, kept.labels))
    train, _, _ = task_data.load_images("digits", None)
    meta = load("digits")
    before = {pattern(image) for samples in (meta.train, meta.test) for image in samples.inputs}
    assert len(meta.train) + len(meta.test) + len(train) == 1797
    assert not before & {pattern(image) for image in train.inputs}
    # Glyphs are drawn at random, so that other seeds are other images.
    assert not set(task_data._GLYPH_SEEDS) & {glyphs._TRAIN_SEED, glyphs._TEST_SEED}
    for corpus in ("code", "other code"):
        assert not set(_CODE[corpus]) & set(_MODULES)
    passages = {tuple(row.tolist()) for row in load_passages("code")}
    assert not passages & {tuple(row.tolist()) for row in load_passages(MANUAL)}


def pattern(image: Tensor) -> bytes:
    values = image.double()
    spread = (values.max() - values.min()).clamp(min=1e-12)
    return ((values - values.min()) / spread * 100).round().numpy().tobytes()


def test_domains_change_how_images_look_and_not_what_they_are() -> None:
    examples = Examples(images(12, 3).inputs.float(), torch.arange(12))
    for domain in DOMAINS:
        seen = in_domain(examples, domain, 1)
        assert seen.inputs.shape == (12, 3, 28, 28)
        assert torch.equal(seen.targets, examples.targets)
        assert torch.equal(seen.inputs, in_domain(examples, domain, 1).inputs)
        other = in_domain(examples, domain, 2)
        assert not torch.equal(seen.inputs, other.inputs)


def test_captions_tell_what_is_in_the_scene() -> None:
    objects = Examples(torch.ones(4, 1, 28, 28), torch.tensor([0, 1, 0, 1]))
    objects.inputs[:, :, 4:24, 4:24] = 2.0
    names = np.array([8, 9])
    scenes = compose(objects, names, 60, np.random.default_rng(0))
    assert scenes.images.shape == (60, 3, SIDE, SIDE)
    assert scenes.captions.shape == (60, CAPTION)
    named = {1: "bag", 2: "boot"}
    for regions, caption in zip(scenes.regions, scenes.captions, strict=True):
        words = [WORDS[number] for number in caption]
        assert words[0] == words[4] == "a"
        assert words[7] == "end"
        classes = sorted(set(regions.unique().tolist()) - {0})
        assert sorted({words[2], words[6]}) == [named[number] for number in classes]
        if len(classes) == 2:
            centres = {
                named[number]: np.argwhere(regions.numpy() == number).mean(0) for number in classes
            }
            down, right = centres[words[2]] - centres[words[6]]
            assert {
                "left-of": right < 0,
                "right-of": right > 0,
                "above": down < 0,
                "below": down > 0,
            }[words[3]]


class Fixed(nn.Module):
    """Answers what it was told, whatever the inputs."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outputs


def test_measures() -> None:
    targets = torch.tensor([[0, 1, 1], [2, -100, 0]])
    answers = torch.tensor([[0, 1, 0], [2, 2, 2]])
    outputs = nn.functional.one_hot(answers, 4).float().transpose(1, 2) * 3
    examples = Examples(torch.zeros(2, 1), targets)
    assert ACCURACY.function(Fixed(outputs), examples) == pytest.approx(3 / 5)
    # Class 0: 1 of {0, 2, 5}; 1: 1 of {1, 2}; 2: 1 of {3, 5}; 3 does not occur.
    assert MEAN_IOU.function(Fixed(outputs), examples) == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    norm = np.log(np.exp(3) + 3)
    expected = (3 * (3 - norm) + 2 * (0 - norm)) / 5
    assert LOG_LIKELIHOOD.function(Fixed(outputs), examples) == pytest.approx(expected)


def test_only_adapters_are_recorded_and_the_base_is_the_seed_s() -> None:
    task = tiny("text-lora")
    first, second, other = (
        task.prepare(seed, None).build(number) for seed, number in ((1, 5), (1, 6), (2, 5))
    )
    names = set(protocol.recorded(first))
    assert names == {name for name in first.state_dict() if "lora_" in name}
    base = "blocks.0.fc1.base.weight"
    assert torch.equal(first.state_dict()[base], second.state_dict()[base])
    assert not torch.equal(first.state_dict()[base], other.state_dict()[base])
    adapter = "blocks.0.fc1.lora_A"
    assert not torch.equal(first.state_dict()[adapter], second.state_dict()[adapter])


def test_hindsight_finds_the_combination_that_fits() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(300, 6, generator=generator)
    true = torch.randn(3, 6, generator=generator)
    examples = Examples(inputs, (inputs @ true.T).argmax(1))
    # Θ0 lacks half of what is to be known, and only the difference to Θ1 has it.
    base, other = torch.randn(2, 3, 6, generator=generator)
    states = [
        {"weight": weight, "bias": torch.zeros(3)} for weight in (base, base + base - true, other)
    ]
    model = nn.Linear(6, 3)
    before = torch.random.get_rng_state()
    best_combination(model, states, examples, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    found = model.weight.detach().flatten()
    span = torch.stack([state["weight"].flatten() for state in states], 1)
    rest = found - span @ torch.linalg.lstsq(span, found).solution
    assert rest.norm() < 1e-4 * found.norm()
    assert torch.equal(model.bias, torch.zeros(3))
    first = ACCURACY.function(fixed_linear(states[0]), examples)
    assert ACCURACY.function(model, examples) > max(first + 0.1, 0.9)
    again = nn.Linear(6, 3)
    best_combination(again, states, examples, 1)
    assert torch.equal(again.weight, model.weight)


def fixed_linear(state: dict[str, Tensor]) -> nn.Linear:
    model = nn.Linear(6, 3)
    model.load_state_dict(state)
    return model


def test_hindsight_s_running_statistics_are_those_of_the_examples() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    states = [
        {name: torch.randn(tensor.shape) for name, tensor in model.named_parameters()}
        for _ in range(2)
    ]
    inputs = torch.randn(128, 4)
    best_combination(model, states, Examples(inputs, torch.arange(128) % 3), 1)
    assert isinstance(model[1], nn.BatchNorm1d)
    with torch.no_grad():
        expected = model[0](inputs).mean(0)
    assert model[1].running_mean is not None
    torch.testing.assert_close(model[1].running_mean, expected, atol=1e-5, rtol=1e-5)
    assert model[1].momentum == 0.1


@pytest.mark.usefixtures("_little_data")
def test_hindsight_estimates_running_statistics_and_keeps_what_is_frozen() -> None:
    for name in ("fashion-classes-cnn-batchnorm", "text-lora"):
        problem = tiny(name).prepare(1, None)
        start = problem.build(2)
        state = {key: tensor.clone() for key, tensor in protocol.recorded(start).items()}
        model = problem.build(3)
        best_combination(model, [state] * 5, problem.pool, 4)
        after = model.state_dict()
        for key, tensor in start.state_dict().items():
            if "running" in key:
                assert not torch.equal(after[key], tensor)
            elif key not in state:
                assert torch.equal(after[key], tensor)


# --- statistics --------------------------------------------------------------------------------


def test_intervals_are_scipy_s() -> None:
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(1).normal(0.3, 1, 12)
    found = stats.mean_estimate(list(values))
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(values.mean())
    assert np.isnan(stats.mean_estimate([0.3]).low)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=4), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_an_interval_over_clusters_is_that_of_a_regression_on_a_constant(
    clusters: list[list[float]],
) -> None:
    """CR1 by its definition, (X'X)⁻¹ · Σ (X'u)(X'u)' · (X'X)⁻¹, with matrices."""
    from scipy.stats import t as student

    found = stats.clustered_estimate(clusters)
    values = np.concatenate([np.asarray(one) for one in clusters])
    count, ones = len(clusters), np.ones((len(values), 1))
    inverse = np.linalg.inv(ones.T @ ones)
    residuals = values - values.mean()
    of = np.repeat(np.arange(count), [len(one) for one in clusters])
    scores = [ones[of == k].T @ residuals[of == k] for k in range(count)]
    variance = inverse @ sum(np.outer(s, s) for s in scores) @ inverse * count / (count - 1)
    half = student.ppf(0.975, count - 1) * float(variance[0, 0]) ** 0.5
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.half_width == pytest.approx(half, rel=1e-6, abs=1e-9)


def test_values_that_go_together_do_not_narrow_an_interval() -> None:
    one = stats.mean_estimate([0.1, 0.3, 0.2])
    twice = stats.clustered_estimate([[0.1, 0.1], [0.3, 0.3], [0.2, 0.2]])
    alone = stats.clustered_estimate([[0.1], [0.3], [0.2], []])
    for found in (twice, alone):
        assert found.half_width == pytest.approx(one.half_width)
        assert found.value == pytest.approx(one.value)
    assert np.isnan(stats.clustered_estimate([[0.1, 0.3]]).low)
    # Of 1, 2, 3, 4: standard error 0.6455, 3 degrees of freedom, t = 3.182.
    assert stats.interval_half_width([1.0, 2.0, 3.0, 4.0]) == pytest.approx(2.0540, rel=1e-3)
    assert stats.interval_half_width([0.5] * 20) == 0.0


def test_the_recovered_gain_is_a_ratio_of_means_with_a_bootstrap_interval() -> None:
    from scipy.stats import bootstrap

    generator = np.random.default_rng(2)
    base = generator.normal(0.5, 0.05, 20)
    oracle = base + generator.normal(0.1, 0.02, 20)
    method = base + generator.normal(0.06, 0.02, 20)
    found = stats.recovered_gain(list(method), list(base), list(oracle))
    assert found.value == pytest.approx((method - base).mean() / (oracle - base).mean())
    expected = bootstrap(
        (method - base, oracle - base),
        lambda gain, whole, axis: gain.mean(axis) / whole.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    again = stats.recovered_gain(list(method), list(base), list(oracle))
    assert again == found


def cell(naive: float, scratch: float, longer: float, oracle: float, method: float) -> Values:
    wobble = np.array([-0.01, 0.0, 0.005, 0.005])
    spread = np.array([0.1, 0.0, -0.1, 0.05])
    means = {"scratch": scratch, "naive": naive, "last": naive, "longer": longer,
             "hindsight": naive,
             "more-data": oracle, "oracle": oracle, "method": method}  # fmt: skip
    return {
        name: list(mean + spread + wobble * (1 + number / 7))
        for number, (name, mean) in enumerate(means.items())
    }


def test_gains_are_given_only_where_data_are_what_limits() -> None:
    found = stats.compare(cell(0.6, 0.4, 0.65, 0.75, 0.7))
    assert (found.status, found.base) == (Status.DATA_LIMITED, "longer")
    assert found.gains["method"].value == pytest.approx(0.5)
    assert found.gains["oracle"].value == 1
    assert found.gains["longer"].value == 0
    assert found.gains["naive"].value == pytest.approx(-0.5)
    assert found.differences["method"].value == pytest.approx(0.1)
    assert "naive" not in found.differences
    found = stats.compare(cell(0.6, 0.4, 0.55, 0.7, 0.65))
    assert (found.status, found.base) == (Status.DATA_LIMITED, "naive")
    for arguments, status in (
        ((0.6, 0.4, 0.7, 0.7, 0.7), Status.LONGER),
        ((0.6, 0.4, 0.6, 0.6, 0.7), Status.NO_GAIN),
        ((0.6, 0.6, 0.6, 0.8, 0.7), Status.NO_TRANSFER),
        ((0.6, 0.7, 0.6, 0.8, 0.7), Status.NO_TRANSFER),
    ):
        found = stats.compare(cell(*arguments))
        assert found.status is status
        assert not found.gains
    single = {name: values[:1] for name, values in cell(0.6, 0.4, 0.65, 0.75, 0.7).items()}
    assert stats.compare(single).status is Status.UNKNOWN


# --- what is kept ------------------------------------------------------------------------------


def fingerprint(outcome: Outcome) -> dict[str, object]:
    return {results.start_name(start): values for start, values in outcome.values.items()}


@pytest.mark.usefixtures("_little_data")
def test_a_second_run_computes_only_what_is_missing(tmp_path: Path) -> None:
    task = tiny("fashion-classes-cnn-batchnorm")

    def run(wanted: Wanted, seed: int = 0, of: Task = task) -> Outcome:
        return Trial(of, seed, tmp_path, None).run(wanted)

    first = run(CONTINUATION)
    # Five sessions and four anchors, one prediction, and a fine-tuning of each start.
    assert first.computed == 9 + 1 + len(first.values)
    again = run(CONTINUATION)
    assert again.computed == 0
    assert fingerprint(again) == fingerprint(first)
    assert again.seconds == first.seconds
    more = run(replace(CONTINUATION, variants=methods.find_variants(["continuation", "average"])))
    assert more.computed == 2
    # Without BatchNorm's statistics in the way, the same weights are the same result.
    norms = run(replace(CONTINUATION, norms=(NormMode.RESCALE, NormMode.COPY)))
    assert norms.computed == 1 + 2
    assert "continuation ×4, norm copy" in fingerprint(norms)
    wider = replace(task, downstream=(*task.downstream, Downstream(12, 1, repetitions=2)))
    assert run(CONTINUATION, of=wider).computed > 0
    assert run(CONTINUATION, seed=1).computed == first.computed
    other = Trial(task, 1, tmp_path / "elsewhere", None).run(CONTINUATION)
    assert fingerprint(other) == fingerprint(run(CONTINUATION, seed=1))


@pytest.mark.usefixtures("_little_data")
def test_checkpoints_need_not_be_kept_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    task = tiny("fashion-classes-cnn")
    trial = Trial(task, 0, tmp_path, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "_more_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trial.run(CONTINUATION)
    went_on = Trial(task, 0, tmp_path, None).run(replace(CONTINUATION, keep=False))
    assert went_on.computed == 1 + 1 + len(went_on.values)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert Trial(task, 0, tmp_path, None).run(CONTINUATION).computed == 0
    # Another method needs them again.
    wanted = Wanted(methods.find_variants(["average"]))
    found = Trial(task, 0, tmp_path, None).run(wanted)
    assert found.computed == 9 + 2
    fresh = Trial(task, 0, tmp_path / "fresh", None).run(wanted)
    assert fingerprint(fresh) == fingerprint(found)


def interrupted(trial: Trial) -> None:
    raise KeyboardInterrupt


def test_keys_depend_on_everything_in_tensors() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    variants = [
        tensors,
        {**tensors, "b": torch.ones(1)},
        {**tensors, "a": torch.zeros(3, 2)},
        {**tensors, "a": torch.zeros(2, 3, dtype=torch.float64)},
        {"c": tensors["a"], "b": tensors["b"]},
    ]
    assert len({cache.tensors_key(variant) for variant in variants}) == len(variants)
    assert cache.tensors_key(tensors) == cache.tensors_key(dict(reversed(tensors.items())))


def test_a_torn_result_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    assert cache.read(path) is None
    cache.write(path, {"values": [1.0]})
    assert cache.read(path) == {"values": [1.0]}
    for text in ('{"values": [1.', "[1]", ""):
        path.write_text(text)
        assert cache.read(path) is None


@pytest.mark.slow
def test_processes_compute_what_one_computes(tmp_path: Path) -> None:
    # Nothing is replaced in processes of their own, so that the network must be a little one.
    task = replace(tiny("text-language-model"), width=8, heads=1, depth=1)
    wanted = Wanted(methods.find_variants(["average"]))
    request = running.Request(
        folder=tmp_path / "a", tasks=[task], seeds=2, wanted=wanted, processes=2
    )
    outcomes = {outcome.seed: outcome for outcome in running.evaluate(request)}
    assert sorted(outcomes) == [0, 1]
    (alone,) = running.evaluate(
        running.Request(folder=tmp_path / "b", tasks=[task], seeds=1, wanted=wanted)
    )
    assert fingerprint(alone) == fingerprint(outcomes[0])
    assert fingerprint(alone) != fingerprint(outcomes[1])


# --- methods -----------------------------------------------------------------------------------


def test_variants_and_numbers_of_checkpoints() -> None:
    labels = [variant.label for variant in methods.VARIANTS]
    assert len(set(labels)) == len(labels)
    assert DEFAULT_WEIGHTS in labels
    family, mean = methods.find_variants(["continuation", "average"])
    assert all(methods.is_available(family, count) for count in (2, 3, 4, 5))
    assert methods.is_available(mean, 3)
    with pytest.raises(UsageError, match="unknown method 'magic'"):
        methods.find_variants(["magic"])
    five = methods.of_bundle("five", str(FIVE))
    assert [methods.is_available(five, count) for count in (4, 5)] == [False, True]
    request = running.Request(
        folder=Path(), tasks=[], seeds=1, wanted=Wanted([five, mean], sessions=(4, 5))
    )
    assert running.check_methods(request) == ["five cannot read 4 checkpoints"]
    request = running.Request(
        folder=Path(), tasks=[], seeds=1, wanted=Wanted([five], sessions=(4,))
    )
    with pytest.raises(UsageError, match="'five': cannot read 4 checkpoints"):
        running.check_methods(request)


def test_every_variant_predicts(tmp_path: Path) -> None:
    states = [
        {"a.weight": torch.randn(6, 5, generator=torch.Generator().manual_seed(k))}
        for k in range(5)
    ]
    paths = [tmp_path / f"ckpt{k}.safetensors" for k in range(5)]
    for path, state in zip(paths, states, strict=True):
        save_checkpoint(path, state, {})
    first = states[0]["a.weight"]
    for variant in methods.VARIANTS:
        found = methods.predict(variant, paths, NormMode.RESCALE, 2)
        assert list(found) == ([1, 2] if variant.steps else [1])
        answers = [found[step]["a.weight"] for step in found]
        assert all(torch.isfinite(answer).all() for answer in answers)
        assert not torch.equal(answers[0], first), variant.label
        assert not (variant.steps and torch.equal(answers[0], answers[1])), variant.label
    assert sorted(tmp_path.iterdir()) == paths


def test_a_corrupt_bundle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError):
        methods.is_available(methods.of_bundle("mine", str(tmp_path)), 5)


# --- results -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_little_data")
def test_tables_are_computed_from_the_json(tmp_path: Path) -> None:
    task = tiny("fashion-classes-cnn")
    request = running.Request(folder=tmp_path, tasks=[task], seeds=2, wanted=CONTINUATION)
    outcomes = list(running.evaluate(request))
    content = json.loads(json.dumps(results.to_json(request, outcomes, {"other": "not found"})))
    found = content["tasks"][task.name]
    assert found["seeds"] == [0, 1]
    values: Values = cell(0.6, 0.4, 0.65, 0.75, 0.7)
    values = {name: of[:] for name, of in values.items()}
    names = [*ANCHORS, "method", "method"]
    for name, start in zip(names, found["starts"], strict=True):
        start["values"] = {"8 images": values[name]}
    found["seeds"] = [0, 1, 2, 3]
    text = to_markdown(content)
    assert "| continuation ×2 | +10.00 ± " in text
    assert "| +0.50 (+" in text
    assert "| 8 images | gain | all | gain |" in text
    assert "| worth | data-limited |  | data-limited |  |" in text
    assert "| other | not found |" in text
    assert "| continuation ×4 | +0.50 ± nan | +0.50 | +0.50 | 1 | 0 |" in text
    seconds = sum(outcome.seconds for outcome in outcomes)
    assert f"{seconds / 3600:.2f} hours" in text


# --- the command -------------------------------------------------------------------------------


def test_find_tasks() -> None:
    assert [task.name for task in find_tasks(["text-l*"])] == ["text-language-model", "text-lora"]
    assert len(find_tasks(["*"])) == len(TASKS)
    assert find_tasks([]) == [task for task in TASKS.values() if not task.large]
    large = {task.name: task for task in TASKS.values() if task.large}
    assert set(large) == {
        "cifar100-cifar10-resnet18", "cifar10-classes-resnet18", "text-decoder",
    }  # fmt: skip
    asked = running.Request(folder=Path(), tasks=[], seeds=1, wanted=CONTINUATION)
    assert running.not_asked_for(asked) == {
        "cifar100-cifar10-resnet18": "large; --task cifar100-cifar10-resnet18, with cifar100 and "
        "cifar10 in --data-folder",
        "cifar10-classes-resnet18": "large; --task cifar10-classes-resnet18, with cifar10 in "
        "--data-folder",
        "text-decoder": "large; --task text-decoder",
    }
    sizes = {
        name: sum(p.numel() for p in large[name].prepare(0, None).build(0).parameters())
        for name in ("text-decoder",)
    }
    assert sizes == {"text-decoder": 3_221_601}
    with pytest.raises(UsageError, match="unknown task 'imagenet'"):
        find_tasks(["imagenet"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--task", "imagenet"), 2, "unknown task 'imagenet'"),
        (("--method", "magic"), 2, "unknown method 'magic'"),
        (("--bundle", "x"), 2, "--bundle x: write NAME=PATH"),
        (("--bundle", "x=a", "--bundle", "x=b"), 2, "x is given twice"),
        (("--bundle", "average=a"), 2, "is already the name of a method"),
        (("--bundle", "x=nothing"), 2, "neither a folder with a hyper-model"),
        (("--sessions", "4", "--bundle", f"five={FIVE}"), 2, "cannot read 4 checkpoints"),
        (("--data-folder", "nothing"), 2, "no such folder of data sets"),
        (("--table", "no/r.md"), 4, "mkdir -p no"),
        (("--shard", "0/2"), 2, "--shard 0/2: write I/N"),
        (("--shard", "1/2", "--table", "r.md"), 2, "a shard has only some of the results"),
        (("--regime", "release", "--shard", "x"), 2, "--shard x: write I/N"),
        (("-o", "no/out"), 4, "mkdir -p no"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, know: Command
) -> None:
    output = () if "-o" in arguments else ("-o", "out")
    done = know("eval", *arguments, *output, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_tasks_without_their_data_are_named(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "available", lambda folder: [])
    done = know("eval", "--task", "scenes-*", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "scenes-captioning: not run here, not found here: fashion-mnist" in done.stderr
    assert "none of these tasks can run here" in one_line(done.stderr)


def test_the_command_and_its_second_run(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("eval", "--task", "text-language-model", "--method", "average", "--seeds", "1",
                 "--budget", "0", "--table", "r.md", "-o", "out", "--force")  # fmt: skip
    monkeypatch.setattr(hindsight, "_ITERATIONS", FEW)
    monkeypatch.setitem(TASKS, "text-language-model", tiny("text-language-model"))
    done = know(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "text-language-model, seed 0: 18 results computed" in done.stderr
    assert "wrote out/results.json" in done.stdout
    assert "## text-language-model" in (tmp_path / "r.md").read_text()
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    again = know(*arguments, cwd=tmp_path)
    assert "text-language-model, seed 0: all there already" in again.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first


def test_shards_share_the_trials_of_one_folder(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("eval", "--task", "text-language-model", "--method", "average", "--seeds", "2",
                 "--budget", "0", "-o", "out", "--processes", "1")  # fmt: skip
    monkeypatch.setattr(hindsight, "_ITERATIONS", FEW)
    monkeypatch.setitem(TASKS, "text-language-model", tiny("text-language-model"))
    done = know(*arguments, "--shard", "2/2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "text-language-model, seed 1: 18 results computed" in done.stderr
    assert done.stderr.rstrip().endswith("1 of 1")
    assert "shard 2 of 2 is done" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["work"]
    done = know(*arguments, "--shard", "3/3", cwd=tmp_path)  # of two trials
    assert (done.returncode, done.stderr) == (0, "")
    done = know(*arguments, cwd=tmp_path)
    assert "text-language-model, seed 0: 18 results computed" in done.stderr
    assert "text-language-model, seed 1: all there already" in done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["tasks"]["text-language-model"]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    "more",
    [
        (), ("--trajectory", "run"),
        ("--trajectory", "branches", "--task", "orders-text-language-model"),
    ],
)  # fmt: skip
def test_a_dry_run_tells_what_trials_cost(
    more: tuple[str, ...],
    tmp_path: Path,
    know: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        running, "available", lambda folder: ["code", "manual", "cifar10", "cifar100"]
    )
    tasks = () if "--task" in more else ("--task", "text-language-model")
    done = know("eval", *tasks, *more, "--seeds", "4", "-o", "out", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    sort = next((word for word in ("run", "branches") if word in more), "forgetting")
    seconds = published()[sort]["seconds"]
    name = (*tasks, *more)[-1 if "--task" in more else 1]
    expected = f"{4 * seconds[name] / 3600:.2f}"
    assert next(line.split(maxsplit=2) for line in done.stdout.splitlines() if name in line) == [
        name,
        "4",
        expected,
    ]
    assert "at least" not in done.stdout


def test_a_dry_run_of_the_release_regime_counts_starts_and_images(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "available", lambda folder: ["cifar10"])
    measured = cost.Measured(
        "P", {f"release-cifar10-{name}": 0.01 for name in ("cnn", "resnet")},
        frozenset({"release-cifar10-resnet"}),
    )  # fmt: skip
    monkeypatch.setattr(cost, "measured", lambda: measured)

    def hours(*more: str) -> list[str]:
        tasks = [
            part
            for n in ("cnn", "resnet", "pyramid")
            for part in ("--task", f"release-cifar10-{n}")
        ]
        done = know(
            "eval", "--regime", "release", *tasks, *more, "--seeds", "2", "-o", "o", "--dry-run",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "at least" in done.stdout
        assert "(measured on P, at 6 rates a start)" in done.stdout
        found = [line.split(maxsplit=2) for line in done.stdout.splitlines() if "release-c" in line]
        return [text for _, _, text in found]

    # Θ0 on 6,000 images, four sessions and twice as many more, a network on 12,000.
    once = 6000 + 3 * (3000 + 1500 + 750 + 375) + 12000
    # The head for 3 epochs, everything for 30 at each of six rates.
    epochs = 3 + 6 * 30

    def expected(starts: int, images: int) -> str:
        return f"{2 * 0.01 * (once + starts * images * epochs) / 3600:.2f}"

    two = expected(2, 1250)
    assert hours("--share", "25", "--method", "shrink-0.9") == [two, two, "not known"]
    of_both = [expected(5, 1250 + 5000), expected(3, 1250 + 5000), "not known"]  # resnet, cnn
    shares = ("--share", "100", "--share", "25")
    methods = ("--method", "shrink-0.5", "--method", "longer", "--method", "shrink-0.5-*")
    assert hours(*shares, *methods) == of_both


def test_the_plan_of_a_single_short_trial_is_not_of_no_time(tmp_path: Path, know: Command) -> None:
    task = "glyphs-digits-cnn-batchnorm"
    done = know("eval", "--task", task, "--seeds", "1", "-o", "out", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hours = published()["forgetting"]["seconds"][task] / 3600
    assert 0.005 < hours < 0.05
    assert f"1 trial, {hours:.2f} hours of processor time" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("results", ("--task", "text-language-model")),
        ("release", ("--regime", "release", "--task", "release-cifar10-cnn")),
        ("runs", ("--trajectory", "run", "--task", "text-language-model")),
        ("branches", ("--trajectory", "branches", "--task", "orders-text-language-model")),
    ],
)
def test_results_of_another_torch_are_told(
    name: str,
    arguments: tuple[str, ...],
    tmp_path: Path,
    know: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are gone on with, since they may have taken weeks, but not without a word."""
    monkeypatch.setattr(running, "available", lambda folder: ["code", "manual", "cifar10"])
    told = f"{name}.json: is from torch 1.0, and this is torch {torch.__version__}, which may round"
    for there in ("1.0", str(torch.__version__)):
        content = {"format": 1, "tasks": {}, "machine": {"torch": there}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        done = know("eval", *arguments, "--seeds", "1", "-o", tmp_path, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert (told in done.stderr) == (there == "1.0")


def test_what_trials_cost_is_what_was_published() -> None:
    assert json.loads(TARGET.read_text()) == published()


@given(st.integers(0, 9), st.integers(0, 5), st.integers(1, 7))
def test_every_trial_is_in_one_shard(tasks: int, seeds: int, count: int) -> None:
    def request(shard: tuple[int, int]) -> running.Request:
        names = [f"{n}" for n in range(tasks)]
        return running.Request(
            folder=Path(), tasks=names, seeds=seeds, wanted=CONTINUATION, shard=shard
        )  # type: ignore[arg-type]

    parts = [jobs(request((index, count))) for index in range(count)]
    assert sorted(chain.from_iterable(parts)) == sorted(jobs(request((0, 1))))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- committed results -------------------------------------------------------------------------

COMMITTED = Path(results.__file__).parents[2] / "docs" / "results" / "downstream.json"
IN_CARD = (
    "continuation ×2", "continuation ×8", "retrodiction ×2", "retrodiction ×8", "shrink-0.9 ×2",
    "average ×2", "authors ×2", "authors ×8", "longer", "hindsight", "oracle",
)  # fmt: skip
IN_PROSE = ("README.md", "docs/expectations.md")
IN_README = (
    "continuation ×2", "continuation ×4", "continuation ×8", "naive", "longer", "hindsight",
)  # fmt: skip


@pytest.fixture(scope="module")
def committed() -> dict[str, tuple[dict[str, Any], stats.Comparison]]:
    """By task, the committed results and their comparison over all cells."""
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return {
        name: (task, results.comparisons(task)[results.ALL])
        for name, task in found["tasks"].items()
    }


@pytest.mark.parametrize("name", ["downstream", "norms", "sessions", "scale", "fresh", "forgotten"])
def test_the_committed_tables_are_those_of_the_committed_results(name: str) -> None:
    path = COMMITTED.parent / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert to_markdown(found) == path.with_suffix(".md").read_text(encoding="utf-8")


def test_the_committed_results_have_ten_seeds_and_every_method() -> None:
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    # CIFAR-10's files are the user's own, and its tasks came later.
    small = {name for name, task in TASKS.items() if not task.large and "cifar10" not in name}
    assert set(found["tasks"]) == small
    labels = {variant.label for variant in methods.VARIANTS} | set(ANCHORS)
    labels.remove("average-forgotten-3")  # which came later, and has a page of its own
    for task in found["tasks"].values():
        assert task["seeds"] == list(range(10))
        assert labels <= {start["method"] for start in task["starts"]}


def test_what_is_said_of_text_was_measured_twice(
    committed: dict[str, tuple[dict[str, Any], stats.Comparison]],
) -> None:
    pages = {}
    for name in ("fresh", "scale"):
        found = json.loads((COMMITTED.parent / f"{name}.json").read_text(encoding="utf-8"))
        pages[name] = {
            task: results.comparisons(of)[results.ALL] for task, of in found["tasks"].items()
        }
    first = {name: whole for name, (_, whole) in committed.items()}

    def said(whole: stats.Comparison, start: str, scale: float = 1) -> str:
        of = whole.differences[start]
        return f"{scale * abs(of.value):.2f} ± {scale * of.half_width:.2f}"

    text, root = ("text-language-model", "text-lora"), weights_folder().parent
    page = " ".join((root / "docs/expectations.md").read_text(encoding="utf-8").split())
    for start, words in {
        "continuation ×2": "does harm: {} and {} nats, on [ten fresh seeds](results/fresh.md) {} and "
        "{}, and on [a decoder of three million parameters](results/scale.md) {}",
        "retrodiction ×2": "it gains {} and {}, fresh {} and {}, and {}",
    }.items():
        figures = [said(of[task], start) for of in (first, pages["fresh"]) for task in text]
        figures.append(said(pages["scale"]["text-decoder"], start))
        assert words.format(*figures) in page
        signs = [of[task].differences[start] for of in (first, pages["fresh"]) for task in text]
        assert all(of.high < 0 if start.startswith("c") else of.low > 0 for of in signs)
    shrunk = [said(first[task], "shrink-0.9 ×2") for task in text]
    assert "reads Θ0 alone, gains {} and {}".format(*shrunk) in page
    glyphs = "glyphs-digits-cnn-batchnorm"
    assert f"below Θ0, by {said(first[glyphs], 'continuation ×2', 100)} points" in page
    assert f"it is −{said(pages['fresh'][glyphs], 'continuation ×2', 100)}" in page
    for step, below, above in (("×2", 3, 5), ("×4", 2, 4)):
        found_of = [whole.differences[f"continuation {step}"] for whole in first.values()]
        assert sum(of.high < 0 for of in found_of) == below
        assert sum(of.low > 0 for of in found_of) == above


def test_the_model_card_has_the_committed_differences(
    committed: dict[str, tuple[dict[str, Any], stats.Comparison]],
) -> None:
    card = (weights_folder() / "README.md").read_text(encoding="utf-8").splitlines()
    assert f"| task | Θ0 | {' | '.join(IN_CARD)} | worth |" in card
    for name, (task, whole) in committed.items():
        (line,) = [line for line in card if line.startswith(f"| `{name}` |")]
        cells = [cell.strip().replace("−", "-") for cell in line.strip("| ").split("|")[1:]]
        scale = task["measure"]["scale"]
        differences = [whole.differences[start] for start in IN_CARD]
        assert cells == [
            f"{scale * whole.means['naive']:.2f}",
            *(f"{scale * one.value:+.2f} ± {scale * one.half_width:.2f}" for one in differences),
            whole.status.value,
        ], name


def test_readme_and_expectations_have_the_committed_recovered_gains(
    committed: dict[str, tuple[dict[str, Any], stats.Comparison]],
) -> None:
    whole = [comparison for _, comparison in committed.values()]
    root = weights_folder().parent
    pages = [(root / name).read_text(encoding="utf-8") for name in IN_PROSE]
    readme, page = (" ".join(text.split()) for text in pages)
    for start, words in {
        "continuation ×2": "recovers {} at ×2",
        "continuation ×4": "{} at ×4",
        "continuation ×8": "and {} at ×8",
        "naive": "Θ0 as it is stands at {}",
        "longer": "Θ0 trained longer at {}",
        "retrodiction ×2": "`--weights retrodiction` ×2 at {}",
        "authors ×2": "release ×2 at {}",
        "authors ×8": "and ×8 at {}",
        "shrink-0.9 ×8": "lambda=0.9` ×8, at {}",
        "hindsight": "recovers only {}",
    }.items():
        mean = stats.mean_estimate([one.gains[start].value for one in whole if one.gains])
        value = f"{mean.value:+.2f} ± {mean.half_width:.2f}".replace("-", "−")
        assert words.format(value) in page, start
        if start in IN_README:
            assert words.format(value) in readme, start
