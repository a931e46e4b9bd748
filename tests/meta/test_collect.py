"""``know collect``: what is drawn, what is recorded, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from know_cli.checkpoints.metadata import Regime
from know_cli.cli.options import parse_shard
from know_cli.errors import UsageError
from know_cli.forgetting import subset_sizes
from know_cli.kinds import Kind
from know_cli.lab.data import load
from know_cli.lab.data.parts import meta_part
from know_cli.lab.zoo import ARCHITECTURES
from know_cli.meta import collecting
from know_cli.meta.collecting import Collected, Request, _collect_one, existing
from know_cli.meta.recording import record_trajectory
from know_cli.meta.release_setup import draw_release_setup
from know_cli.meta.series import NotUsableError, Series, load_series, save_series
from know_cli.meta.settings import Target
from know_cli.meta.setup import draw_setup
from know_cli.meta.totals import Line
from know_cli.meta.windows import collect_windows, find_trajectories
from tests.support.command import Command, one_line
from tests.support.data_sets import SETS, data_set

#: As many images as a data set of Fashion-MNIST's size leaves for meta-training.
LARGE = {"fashion-mnist": data_set("fashion-mnist", 60_000)}


@given(st.integers(0, 2**62))
@settings(max_examples=200)
def test_every_trajectory_that_is_drawn_can_be_recorded(seed: int) -> None:
    setup = draw_setup(seed, SETS)
    assert setup == draw_setup(seed, SETS)
    data = SETS[setup.data_set]
    assert ARCHITECTURES[setup.design.architecture].kind == data.kind
    assert len(set(setup.classes)) == setup.design.classes >= 3
    pool = int(np.isin(meta_part(data).labels.numpy(), setup.classes).sum())
    # The largest continuation has its data, and the smallest session has some.
    assert setup.largest <= pool + 1
    assert setup.continuations >= 1
    assert 5 <= setup.sessions <= 8
    sizes = subset_sizes(setup.largest, setup.rate, setup.continuations + setup.sessions)
    assert sizes[-1] >= 4
    assert abs(sizes[setup.continuations] - setup.samples) <= 1
    assert 0.3 <= setup.rate <= 0.9
    assert all(setup.continued(step) >= 1 for step in (1, 2, 3))
    assert json.loads(json.dumps(setup.to_json()))["rate"] == setup.rate


def test_draws_are_varied() -> None:
    setups = [draw_setup(seed, SETS) for seed in range(300)]
    assert {setup.design.architecture for setup in setups} == set(ARCHITECTURES)
    assert {setup.data_set for setup in setups} == set(SETS)
    assert {setup.start for setup in setups} == {None, "fresh", "pretrained"}
    assert {setup.sessions for setup in setups} >= {5, 7, 8}
    assert {setup.optimiser for setup in setups} == {"adam", "sgd"}
    assert 0.3 < np.mean([setup.augmentation != "none" for setup in setups]) < 0.7


def test_a_regime_can_be_asked_for() -> None:
    for regime in Regime:
        setups = [draw_setup(seed, SETS, None, regime) for seed in range(40)]
        assert {setup.start is None for setup in setups} == {regime is Regime.CHAIN}
    # What else is drawn stays the same.
    assert replace(draw_setup(3, SETS, None, Regime.CHAIN), start="fresh") == replace(
        draw_setup(3, SETS, None, Regime.COMMON_START), start="fresh"
    )


def test_the_second_half_of_real_data_is_never_drawn_from() -> None:
    assert len(meta_part(SETS["fashion-mnist"])) == 2000
    assert len(meta_part(SETS["digits"])) == 700


@given(st.integers(0, 2**62))
@settings(max_examples=100)
def test_the_release_s_trajectories_are_as_its_sample_script_records_them(seed: int) -> None:
    setup = draw_release_setup(seed, LARGE)
    assert setup == draw_release_setup(seed, LARGE)
    assert ARCHITECTURES[setup.design.architecture].kind == "image"
    assert (setup.sessions, setup.continuations, setup.start) == (7, 0, "fresh")
    assert (setup.epochs, setup.optimiser, setup.schedule) == (1, "adam", "constant")
    assert (setup.weight_decay, setup.augmentation) == (0.0, "affine")
    assert 1e-5 <= setup.learning_rate <= 4e-3
    assert 0.3 <= setup.rate <= 0.9
    assert setup.samples == setup.largest == 30_000
    assert replace(setup, start=None) == draw_release_setup(seed, LARGE, chain=True)
    request = Request(Path(), 1, [], seed=3, like_release=True, regime=Regime.COMMON_START)
    first, second = (
        replace(request, regime=regime).draw(0, LARGE) for regime in (request.regime, Regime.CHAIN)
    )
    assert (first.start, second.start) == ("fresh", None)
    assert 32 <= setup.batch_size <= subset_sizes(30_000, setup.rate, 7)[-1]
    fewer = draw_release_setup(seed, LARGE, most_samples=12_000, largest_batch=64)
    assert fewer.samples == 12_000
    assert 32 <= fewer.batch_size <= min(64, max(32, subset_sizes(12_000, fewer.rate, 7)[-1]))
    asked = replace(request, most_samples=12_000, largest_batch=64).draw(0, LARGE)
    assert (asked.samples, asked.batch_size <= 64) == (12_000, True)


def test_the_release_s_trajectories_need_many_images() -> None:
    with pytest.raises(UsageError, match="none of the data sets .* has 10,000 images"):
        draw_release_setup(0, SETS)
    with pytest.raises(UsageError, match="architecture 'text': is none that takes images"):
        draw_release_setup(0, LARGE, ["text"])


@pytest.mark.parametrize("chain", [False, True])
def test_a_trajectory_of_the_release_is_recorded_and_taught_on(chain: bool, tmp_path: Path) -> None:
    data = load("digits")
    like = draw_setup(7, {"digits": data}, ["mlp"])
    setup = replace(
        draw_release_setup(5, LARGE, ["mlp"], chain=chain), design=like.design, data_set="digits",
        classes=like.classes, samples=60, rate=0.8, batch_size=8, learning_rate=0.004, epochs=4,
    )  # fmt: skip
    series = record_trajectory(setup, data, tmp_path, rows_per_tensor=50)
    assert series.indices == tuple(range(7))
    assert series.facts["regime"] == ("chain" if chain else "common-start")
    recorded = series.facts["recorded"]
    assert [recorded[str(k)]["samples"] for k in range(3)] == [60, 48, 38]
    assert "longer_test_accuracy" not in recorded["0"]["measurements"]
    line = Line()
    line.add(Collected(0, series.facts, {Kind.FC: 3}))
    assert line.mean("full") == recorded["0"]["measurements"]["test_accuracy"]
    assert line.mean("longer") is None
    windows = collect_windows([_saved(series, tmp_path)], target=Target.RETRODICTION)
    assert windows.windows[Kind.FC].windows.shape[1] == 5


def _saved(series: Series, folder: Path) -> Path:
    save_series(series, folder / "00000.safetensors")
    return folder / "00000.safetensors"


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(UsageError, match="unknown architecture 'lenet'"):
        draw_setup(0, SETS, ["lenet"])
    with pytest.raises(UsageError, match="'text': none of the data sets digits suits it"):
        draw_setup(0, {"digits": SETS["digits"]}, ["text"])


@pytest.mark.parametrize("start", [None, "fresh", "pretrained"])
def test_a_trajectory_has_its_evidence(
    tmp_path: Path, start: Literal["fresh", "pretrained"] | None
) -> None:
    digits = load("digits")
    setup = draw_setup(7, {"digits": digits}, ["mlp"])
    setup = replace(setup, start=start, epochs=4, sessions=5, continuations=2, rate=0.6)
    series = record_trajectory(setup, digits, tmp_path / "a", rows_per_tensor=50)
    assert series.indices == (0, 1, 2, 3, 4, -1, -2)
    regime = Regime.CHAIN if start is None else Regime.COMMON_START
    assert series.facts["regime"] == regime.value
    assert series.facts["setup"]["design"]["architecture"] == "mlp"
    recorded = series.facts["recorded"]
    for index in series.indices:
        measured = recorded[str(index)]["measurements"]
        assert 0 <= measured["train_accuracy"] <= 1
        assert 0 <= measured["test_accuracy"] <= 1
        expected = setup.samples * 0.6**index
        assert abs(recorded[str(index)]["samples"] - expected) <= 1
    assert set(recorded["0"]["measurements"]) >= {"longer_test_accuracy", "longer_train_accuracy"}
    counts = np.bincount(series.tensors[Kind.FC])
    assert counts.max() <= 50
    again = record_trajectory(setup, digits, tmp_path / "b", rows_per_tensor=50)
    assert np.array_equal(series.values[Kind.FC], again.values[Kind.FC])


def test_a_network_that_learns_nothing_is_left_out(tmp_path: Path) -> None:
    digits = load("digits")
    setup = draw_setup(7, {"digits": digits}, ["mlp"])
    # Of ten classes no untrained network guesses half as many again as chance has it.
    setup = replace(
        setup,
        classes=tuple(range(10)),
        design=replace(setup.design, classes=10),
        learning_rate=1e-9,
        epochs=1,
        optimiser="sgd",
    )
    with pytest.raises(NotUsableError, match="session 0 learned nothing"):
        record_trajectory(setup, digits, tmp_path, rows_per_tensor=50)


def test_left_out_trajectories_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from know_cli.meta import collecting

    request = Request(tmp_path, 2, ["digits"], architectures=["mlp"])

    def diverge(*_: object, **__: object) -> None:
        raise NotUsableError("tensor 'w' is not finite")

    monkeypatch.setattr(collecting, "record_trajectory", diverge)
    monkeypatch.setattr(collecting, "_request", request, raising=False)
    monkeypatch.setattr(collecting, "_data", {"digits": load("digits")}, raising=False)
    assert _collect_one(1).reason == "tensor 'w' is not finite"
    (found,) = existing(request)
    assert (found.number, found.reason) == (1, "tensor 'w' is not finite")
    # Of other options nothing is left out, and what is no forgetting is not beside them.
    other = replace(request, seed=7)
    with pytest.raises(
        UsageError, match=r"00001\.left-out\.json: was left out with other options;"
    ):
        list(collecting.collect(other))
    (tmp_path / "00000").mkdir()
    with pytest.raises(UsageError, match="00000: is no forgetting; take"):
        list(collecting.collect(request))


def test_shards_divide_the_trajectories(tmp_path: Path) -> None:
    parts = [Request(tmp_path, 10, [], shard=parse_shard(f"{i}/3")).numbers() for i in (1, 2, 3)]
    assert sorted(number for part in parts for number in part) == list(range(10))
    for text in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(UsageError, match=f"--shard {text}"):
            parse_shard(text)


def test_collects_and_goes_on(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_one(
        function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], processes: int, folder: Path,
        prepare: Callable[..., None], shared: tuple[Any, ...],
    ) -> Iterator[Any]:  # fmt: skip
        prepare(*shared)
        return (function(*job) for job in jobs)

    monkeypatch.setattr(collecting, "in_processes", in_this_one)
    arguments = ["collect", "found", "--data-set", "digits", "--architecture", "mlp",
                 "--rows-per-tensor", "300", "--processes", "1",
                 "--seed", "725"]  # fmt: skip  # whose first trainings have few steps
    done = know(*arguments, "--trajectories", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "00000 mlp on digits" in done.stderr
    assert "1 of 1 trajectory, 0 of them left out" in done.stdout
    first = (tmp_path / "found" / "00000.safetensors").read_bytes()
    done = know(*arguments, "--trajectories", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 trajectory is already there, continuing" in done.stderr
    assert (tmp_path / "found" / "00000.safetensors").read_bytes() == first
    assert not list(tmp_path.glob("found/.partial*"))
    files = find_trajectories([tmp_path / "found"])
    assert len({load_series(file).identity for file in files}) == 2
    other = [*arguments, "--regime", "common-start", "--trajectories"]
    for count in ("3", "2"):  # also where as many are there as are asked for
        done = know(*other, count, cwd=tmp_path)
        assert done.returncode == 2
        assert "00000.safetensors: was collected with other options; give those" in done.stderr
    other = ["200" if argument == "300" else argument for argument in arguments]
    done = know(*other, "--trajectories", "3", cwd=tmp_path)
    assert done.returncode == 2
    assert "00000.safetensors: was collected with other options; give those" in done.stderr
    assert not (tmp_path / "found" / "00002.safetensors").exists()


def test_what_was_being_recorded_with_other_options_is_not_gone_on_with(tmp_path: Path) -> None:
    setup = draw_setup(3, {"digits": SETS["digits"]}, ["mlp"])
    folder = tmp_path / ".partial-00000"
    collecting._forget_another(folder, setup)
    (folder / "ckpt0.safetensors").write_bytes(b"kept")
    collecting._forget_another(folder, setup)
    assert (folder / "ckpt0.safetensors").read_bytes() == b"kept"
    collecting._forget_another(folder, replace(setup, batch_size=setup.batch_size + 1))
    assert [path.name for path in folder.iterdir()] == ["setup.json"]


@pytest.mark.slow
def test_collects_goes_on_trains_and_measures(tmp_path: Path, know: Command) -> None:
    """The whole way, as a user goes it."""
    arguments = ["collect", "found", "--data-set", "digits", "--architecture", "cnn",
                 "--rows-per-tensor", "300", "--processes", "1",
                 "--seed", "260"]  # fmt: skip  # whose first networks are small
    done = know(*arguments, "--trajectories", "1", cwd=tmp_path, process=True)
    assert done.returncode == 0, done.stderr
    assert "00000 cnn on digits" in done.stderr
    assert "1 of 1 trajectory, 0 of them left out" in done.stdout
    first = (tmp_path / "found" / "00000.safetensors").read_bytes()
    done = know(*arguments, "--trajectories", "3", cwd=tmp_path)
    assert "1 trajectory is already there, continuing" in done.stderr
    assert (tmp_path / "found" / "00000.safetensors").read_bytes() == first
    assert len(list(tmp_path.glob("found/*.safetensors"))) == 3
    assert not list(tmp_path.glob("found/.partial*"))
    files = find_trajectories([tmp_path / "found"])
    assert len({load_series(file).identity for file in files}) == 3

    train = ["train", "found", "--checkpoints", "3", "--epochs", "1", "--threads", "1"]
    done = know(*train, "-o", "known", "--target", "continuation", "--holdout", "0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = know("train", "found", "--evaluate", "./known", "--compare", "itself=known",
                "--json", "f.json", "--table", "f.md", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (scores,) = json.loads((tmp_path / "f.json").read_text()).values()
    manifest = json.loads((tmp_path / "known" / "manifest.json").read_text())
    for kind, steps in manifest["figures"]["trajectories"].items():
        for step, known in steps.items():
            one = scores["trajectories"][kind][step]
            assert one["others"] == {"itself": one["known"]}
            assert {key: one[key] for key in known} == pytest.approx(known, nan_ok=True)
    table = (tmp_path / "f.md").read_text()
    assert "| KNOWN | improved | itself | λ·θ0 (λ) |" in table
    known = [f"{one['known']:.3f}" for one in scores["trajectories"]["conv"].values()]
    assert f"| {' / '.join(known)} |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("collect", "c", "--architecture", "lenet", "--data-set", "digits"), "unknown architecture 'lenet'"),
        (("collect", "c", "--data-set", "imagenet"), "unknown data set 'imagenet'"),
        (("collect", "c", "--shard", "3/2"), "--shard 3/2: write I/N"),
        (("collect", "c", "--trajectories", "1", "--shard", "2/2", "--data-set", "digits"), "there is only 1 trajectory"),
        (("train", "c"), "give either -o BUNDLE to train a bundle, or --evaluate"),
        (("train", "c", "-o", "x", "--compare", "a=b"), "need --evaluate"),
        (("train", "c", "--evaluate", "nothing"), "--evaluate nothing: neither a folder"),
        (("train", "c", "--evaluate", "continuation", "--compare", "x"), "--compare x: write NAME=BUNDLE"),
    ],
)  # fmt: skip
def test_usage_errors(
    arguments: tuple[str, ...], message: str, tmp_path: Path, know: Command
) -> None:
    done = know(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in one_line(done.stderr)
