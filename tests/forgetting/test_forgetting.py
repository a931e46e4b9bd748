"""Nested subsets, the recorder, and the runner of training functions."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from know_cli.checkpoints import open_trajectory
from know_cli.checkpoints.metadata import Continuation, Session
from know_cli.checkpoints.state import read_state
from know_cli.errors import CheckpointError, OutputError, UsageError
from know_cli.forgetting import (
    BranchRecorder,
    Recorder,
    TrainingSession,
    nested_subsets,
    subset_sizes,
)
from know_cli.forgetting.record_checks import read_record
from know_cli.forgetting.recorder import derived_seed
from know_cli.forgetting.runner import (
    Protocol,
    TrainingFunction,
    load_function,
    open_recorder,
    record,
)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


# Nested subsets


class TestNestedSubsets:
    @settings(max_examples=200)
    @given(
        n=st.integers(30, 400),
        rate=st.floats(0.3, 0.95),
        sessions=st.integers(1, 3),
        seed=st.integers(0, 2**32),
        classes=st.integers(1, 12),
        skew=st.floats(0, 3),
    )
    def test_invariants(
        self, n: int, rate: float, sessions: int, seed: int, classes: int, skew: float
    ) -> None:
        shares = np.arange(1, classes + 1, dtype=float) ** -skew
        generator = np.random.default_rng(seed)
        labels = generator.choice(classes, n, p=shares / shares.sum())
        for given_labels in (None, labels):
            subsets = nested_subsets(n, rate, sessions, seed, given_labels)
            assert np.array_equal(subsets[0], np.arange(n))
            assert [len(subset) for subset in subsets] == subset_sizes(n, rate, sessions)
            for k, subset in enumerate(subsets):
                assert subset.dtype == np.int64
                assert len(subset) == round(rate**k * n)
                assert (np.diff(subset) > 0).all()
            for larger, smaller in itertools.pairwise(subsets):
                assert np.isin(smaller, larger).all()
        for subset in nested_subsets(n, rate, sessions, seed, labels):
            counts = np.bincount(labels[subset], minlength=classes)
            exact = np.bincount(labels, minlength=classes) * len(subset) / n
            assert (np.abs(counts - exact) < 1).all()

    def test_the_seed_decides(self) -> None:
        labels = np.arange(100) % 3
        for given_labels in (None, labels):
            one, same, other = (
                nested_subsets(100, 0.5, 3, seed, given_labels)[1] for seed in (7, 7, 8)
            )
            assert np.array_equal(one, same)
            assert not np.array_equal(one, other)

    def test_many_rare_classes_do_not_crowd_out_a_common_one(self) -> None:
        labels = np.concatenate([np.zeros(900, int), np.arange(1, 101)])
        half = nested_subsets(1000, 0.5, 2, 0, labels)[1]
        assert (labels[half] == 0).sum() == 450

    def test_labels_may_be_text(self) -> None:
        half = nested_subsets(4, 0.5, 2, 0, ["cat", "dog", "cat", "dog"])[1]
        assert len(set(half % 2)) == 2

    @pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, 1.5, float("nan")])
    def test_refuses_a_rate_outside(self, rate: float) -> None:
        with pytest.raises(UsageError, match="between 0 and 1"):
            nested_subsets(10, rate, 2, 0)

    def test_refuses_empty_subsets(self) -> None:
        with pytest.raises(UsageError, match="10 samples are too few for 6 sessions"):
            nested_subsets(10, 0.5, 6, 0)

    @pytest.mark.parametrize("rate", [0.5, 0.9999])
    def test_refuses_more_sessions_than_a_record_may_have(self, rate: float) -> None:
        """What could be recorded and not be gone on with, or would take forever to draw."""
        for sessions in (1001, 10**15):
            with pytest.raises(UsageError, match=f"^{sessions} sessions: at most 1000 can be"):
                nested_subsets(10_000, rate, sessions, 0)

    def test_the_message_lists_few_sizes(self) -> None:
        with pytest.raises(UsageError, match=r"would be 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, …; use"):
            nested_subsets(8, 0.5, 1000, 0)

    @pytest.mark.parametrize("n", [-5, 0, 10**20])
    def test_refuses_a_number_of_samples_that_cannot_be(self, n: int, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=f"^{n} samples: give a number"):
            nested_subsets(n, 0.5, 2, 0)
        with pytest.raises(UsageError, match=f"^{n} samples: give a number"):
            BranchRecorder(tmp_path / "run", n, branches=2)

    def test_refuses_wrong_labels_and_seeds(self) -> None:
        with pytest.raises(UsageError, match="10 samples need"):
            nested_subsets(10, 0.5, 2, 0, np.zeros(9))
        with pytest.raises(UsageError, match="negative"):
            nested_subsets(10, 0.5, 2, -1)
        with pytest.raises(UsageError, match="at least 1"):
            nested_subsets(10, 0.5, 0, 0)


# Recorder


def recorder(folder: Path, *, seed: int = 3, before: int = 0, sessions: int = 3) -> Recorder:
    subsets = nested_subsets(40, 0.5, sessions + before, seed)
    return Recorder(folder, subsets, rate=0.5, seed=seed, before=before, options={"a": "1"})


def train(session: TrainingSession) -> dict[str, torch.Tensor]:
    """A made-up law: the checkpoint depends on start, seed and data, as a real one does."""
    start = torch.zeros(4) if session.start is None else session.start["w"]
    noise = torch.rand(4, generator=torch.Generator().manual_seed(session.seed))
    return {"w": start + noise + float(session.indices.sum())}


def run(made: Recorder, stop_before: int | None = None) -> list[int]:
    trained = []
    for session in made:
        if session.index == stop_before:
            raise KeyboardInterrupt
        made.save(session, train(session), {"accuracy": 0.5, "index": float(session.index)})
        trained.append(session.index)
    return trained


class TestRecorder:
    def test_records_sessions_that_a_trajectory_can_be_opened_from(self, tmp_path: Path) -> None:
        made = recorder(tmp_path)
        assert run(made) == [0, 1, 2]
        found = [
            Session.from_metadata(metadata_of(tmp_path / f"ckpt{k}.safetensors")) for k in (0, 1, 2)
        ]
        assert found == [Session(k, 0.5**k, 0.5, made.trajectory) for k in (0, 1, 2)]
        assert metadata_of(tmp_path / "ckpt0.safetensors")["format"] == "pt"
        with open_trajectory([tmp_path / f"ckpt{k}.safetensors" for k in (1, 0, 2)]) as opened:
            assert opened.rate == 0.5
            assert opened.first.path.name == "ckpt0.safetensors"
        told = read_record(tmp_path)
        assert told["options"] == {"a": "1"}
        assert told["recorded"]["1"]["samples"] == 20
        assert made.measurements(2) == {"accuracy": 0.5, "index": 2.0}

    def test_each_session_goes_on_from_the_one_before(self, tmp_path: Path) -> None:
        made = recorder(tmp_path, before=2)
        seeds, starts = set(), {}
        for session in made:
            seeds.add(session.seed)
            starts[session.index] = session.start
            assert session.fraction == 0.5**session.index
            assert len(session.indices) == round(10 * session.fraction)
            assert session.is_continuation == (session.index < 0)
            made.save(session, train(session))
        assert len(seeds) == 5
        assert starts[0] is None
        states = {k: read_state(tmp_path / f"ckpt{k}.safetensors")["w"] for k in (0, 1)}
        for index, before in ((1, 0), (2, 1), (-1, 0), (-2, 0)):
            start = starts[index]
            assert start is not None
            assert torch.equal(start["w"], states[before])

    def test_from_a_common_start_no_session_goes_on_from_another(self, tmp_path: Path) -> None:
        start = {"w": torch.arange(4.0)}
        subsets = nested_subsets(40, 0.5, 4, 3)

        def made(folder: str, start: dict[str, torch.Tensor] | None) -> Recorder:
            return Recorder(tmp_path / folder, subsets, rate=0.5, before=1, start=start)

        common = made("common", start)
        for session in common:
            assert session.start is not None
            if not session.is_continuation:
                assert torch.equal(session.start["w"], start["w"])
            session.start["w"] += 1  # a training function may train in place
            common.save(session, {"w": session.start["w"] * 2})
        assert torch.equal(start["w"], torch.arange(4.0))
        continued = read_state(tmp_path / "common" / "continued1.safetensors")["w"]
        assert torch.equal(continued, ((start["w"] + 1) * 2 + 1) * 2)
        assert (
            metadata_of(tmp_path / "common" / "ckpt1.safetensors")["know.regime"] == "common-start"
        )
        assert read_record(tmp_path / "common")["regime"] == "common-start"
        run(made("chain", None))
        assert metadata_of(tmp_path / "chain" / "ckpt1.safetensors")["know.regime"] == "chain"
        other = made("other", {"w": torch.arange(4.0) + 1})
        identities = {common.trajectory, made("chain", None).trajectory, other.trajectory}
        assert len(identities) == 3

    def test_continuations_are_no_sessions(self, tmp_path: Path) -> None:
        made = recorder(tmp_path, before=2)
        assert run(made) == [0, 1, 2, -1, -2]
        metadata = metadata_of(tmp_path / "continued2.safetensors")
        assert Session.from_metadata(metadata) is None
        assert Continuation.from_metadata(metadata) == Continuation(2, 4.0, 0.5, made.trajectory)
        assert Continuation.from_metadata(metadata_of(tmp_path / "ckpt0.safetensors")) is None
        larger, full = (nested_subsets(40, 0.5, 5, 3)[k] for k in (1, 2))
        assert np.isin(full, larger).all()

    @pytest.mark.parametrize("crash", [0, 1, 2, -1])
    def test_a_crashed_run_goes_on_to_the_same_bytes(self, tmp_path: Path, crash: int) -> None:
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        run(recorder(whole, before=1))
        with pytest.raises(KeyboardInterrupt):
            run(recorder(broken, before=1), stop_before=crash)
        made = recorder(broken, before=1)
        assert made.missing == [0, 1, 2, -1][[0, 1, 2, -1].index(crash) :]
        assert run(made) == [0, 1, 2, -1][[0, 1, 2, -1].index(crash) :]
        assert run(recorder(broken, before=1)) == []
        for path in whole.iterdir():
            assert path.read_bytes() == (broken / path.name).read_bytes()
        assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in whole.iterdir())

    @pytest.mark.parametrize(
        ("gone", "later"),
        [
            (0, ["ckpt1", "ckpt2", "continued1", "continued2"]),
            (1, ["ckpt2"]),
            (2, []),
            (-1, []),  # each continuation goes on from session 0
        ],
    )
    def test_what_was_trained_from_a_missing_checkpoint_is_refused(
        self, tmp_path: Path, gone: int, later: list[str]
    ) -> None:
        """A session that is trained anew need not become the one that others went on from."""
        made = recorder(tmp_path, before=2)
        run(made)
        missing = made.path(gone)
        missing.unlink()
        for name in reversed(later):
            with pytest.raises(CheckpointError) as caught:
                recorder(tmp_path, before=2)
            assert str(caught.value).startswith(f"{missing}: is missing")
            assert f"{name}.safetensors" in str(caught.value)
            (tmp_path / f"{name}.safetensors").unlink()
        assert run(recorder(tmp_path, before=2))[0] == gone

    def test_sessions_that_go_on_from_no_other_may_be_missing(self, tmp_path: Path) -> None:
        subsets = nested_subsets(40, 0.5, 3, 3)
        given = {"w": torch.ones(4)}
        for name, starts in (("common", {"start": given}), ("given", {"first": given})):
            run(Recorder(tmp_path / name, subsets, rate=0.5, **starts))  # type: ignore[arg-type]
            (tmp_path / name / "ckpt0.safetensors").unlink()
            again = Recorder(tmp_path / name, subsets, rate=0.5, **starts)  # type: ignore[arg-type]
            run(again)
            assert again.missing == []

    def test_refuses_a_folder_of_another_trajectory(self, tmp_path: Path) -> None:
        run(recorder(tmp_path))
        with pytest.raises(UsageError, match="of another trajectory"):
            recorder(tmp_path, seed=4)
        (tmp_path / "trajectory.json").unlink()
        with pytest.raises(UsageError, match=r"ckpt0.safetensors: is of another trajectory"):
            recorder(tmp_path, seed=4)

    def test_refuses_a_damaged_record_and_damaged_checkpoints(self, tmp_path: Path) -> None:
        run(recorder(tmp_path))
        (tmp_path / "ckpt1.safetensors").write_bytes(b"half")
        with pytest.raises(CheckpointError, match=r"ckpt1.safetensors"):
            recorder(tmp_path)
        (tmp_path / "trajectory.json").write_text("{}")
        with pytest.raises(UsageError, match="not the record of a trajectory"):
            recorder(tmp_path)

    def test_a_folder_that_cannot_be_written_is_told_before_training(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be made"):
            next(iter(recorder(tmp_path / "file" / "run")))

    def test_every_session_must_be_saved(self, tmp_path: Path) -> None:
        sessions = iter(recorder(tmp_path))
        next(sessions)
        with pytest.raises(UsageError, match="session 0 was not saved"):
            next(sessions)

    def test_saves_models_and_refuses_anything_else(self, tmp_path: Path) -> None:
        made = recorder(tmp_path)
        session = next(iter(made))
        for wrong in (None, {}, {"w": 3}, [torch.zeros(1)]):
            with pytest.raises(UsageError):
                made.save(session, wrong)  # type: ignore[arg-type]
        model = torch.nn.Linear(3, 2)
        made.save(session, model)
        state = read_state(tmp_path / "ckpt0.safetensors")
        assert torch.equal(state["weight"], model.weight.detach())
        with pytest.raises(UsageError, match="not the session in training"):
            made.save(session, model)

    def test_two_runs_at_once_do_not_replace_each_other(self, tmp_path: Path) -> None:
        one, two = recorder(tmp_path), recorder(tmp_path)
        sessions = [next(iter(made)) for made in (one, two)]
        one.save(sessions[0], train(sessions[0]))
        with pytest.raises(OutputError, match="ckpt0.safetensors: another run has recorded it"):
            two.save(sessions[1], train(sessions[1]))
        one, two = recorder(tmp_path), recorder(tmp_path)  # both go on
        sessions = [next(iter(made)) for made in (one, two)]
        one.save(sessions[0], train(sessions[0]), {"accuracy": 0.25})
        with pytest.raises(OutputError, match="ckpt1.safetensors: another run has recorded it"):
            two.save(sessions[1], train(sessions[1]), {"accuracy": 0.75})
        assert recorder(tmp_path).measurements(1) == {"accuracy": 0.25}

    def test_refuses_to_hold_everything_back(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="at least one must remain"):
            Recorder(tmp_path, nested_subsets(40, 0.5, 2, 0), rate=0.5, before=2)

    def test_derived_seeds_differ(self) -> None:
        seeds = {derived_seed(seed, number) for seed in range(20) for number in range(20)}
        assert len(seeds) == 400
        assert all(0 <= seed < 2**63 for seed in seeds)


# Runner


def write_module(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return f"{path}:train"


FINE = "import torch\ndef train(session):\n    return {'w': torch.ones(2)}\n"


class TestRunner:
    @pytest.mark.parametrize(
        ("text", "size"),
        [(FINE + "size = 8\n", 8), (FINE + "train.size = 9\nsize = 8\n", 9), (FINE, None)],
    )
    def test_loads_a_file(self, tmp_path: Path, text: str, size: int | None) -> None:
        assert load_function(write_module(tmp_path, text)).size == size

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("train", "write it as module:name"),
            ("no_such_module_at_all:train", "no module 'no_such_module_at_all'"),
            ("no/such.py:train", "no such file"),
            ("json:nothing", "has no 'nothing'"),
            ("json:__doc__", "not a function"),
        ],
    )
    def test_says_what_is_missing(self, name: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            load_function(name)

    def test_names_the_session_that_a_function_fails_in(self, tmp_path: Path) -> None:
        text = "import torch\ndef train(session):\n"
        text += "    if session.index == 1: raise ValueError('no\\nluck')\n"
        text += "    return {'w': torch.ones(2)}\nsize = 8\n"
        function = load_function(write_module(tmp_path, text))
        made = open_recorder(function, tmp_path / "run", Protocol(sessions=3))
        with pytest.raises(UsageError, match=r"mine.py:train: run, session 1: ValueError: no"):
            record(function, made)
        assert made.missing == [1, 2]

    def test_an_import_that_fails_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="import: ZeroDivisionError"):
            load_function(write_module(tmp_path, "1 / 0"))

    @pytest.mark.parametrize("result", ["None", "3", "({'w': torch.ones(2)}, 3)", "{'w': 1}"])
    def test_refuses_what_is_no_model(self, tmp_path: Path, result: str) -> None:
        text = f"import torch\nsize = 40\ndef train(session):\n    return {result}\n"
        function = load_function(write_module(tmp_path, text))
        with pytest.raises(UsageError, match="session 0"):
            record(function, open_recorder(function, tmp_path / "run", Protocol()))

    def test_the_size_must_be_known_and_agree(self, tmp_path: Path) -> None:
        function = TrainingFunction("f", lambda session: {"w": torch.ones(1)})
        with pytest.raises(UsageError, match="--size or --labels"):
            open_recorder(function, tmp_path, Protocol())
        with pytest.raises(UsageError, match="8 samples, but 9 labels"):
            open_recorder(function, tmp_path, Protocol(size=8, labels=np.zeros(9)))

    def test_labels_of_the_function_stratify(self, tmp_path: Path) -> None:
        def labels(seed: int, options: dict[str, str]) -> list[int]:
            return [0] * 30 + [1] * 10

        function = TrainingFunction("f", train, labels=labels)
        made = open_recorder(function, tmp_path, Protocol(sessions=2))
        for session in made:
            if session.index == 1:
                assert (session.indices >= 30).sum() == 5
            made.save(session, train(session))

    @pytest.mark.parametrize(
        "labels", [5, [None, "a"] * 5, [[1], [1, 2]], np.zeros((10, 2)), torch.zeros(10, 2)]
    )
    def test_labels_that_are_no_classes_are_refused(self, labels: object, tmp_path: Path) -> None:
        function = TrainingFunction("mine:train", train, None, labels)
        with pytest.raises(UsageError, match=r"^mine:train: labels: .*give one class per sample"):
            open_recorder(function, tmp_path, Protocol(sessions=2))

    def test_labels_of_other_libraries(self, tmp_path: Path) -> None:
        texts = np.asarray(["a", "b"] * 5, dtype=object)  # as pandas has them
        for labels in (texts, torch.zeros(10, requires_grad=True)):
            function = TrainingFunction("mine:train", train, None, labels)
            made = open_recorder(function, tmp_path / "run", Protocol(sessions=2))
            assert len(next(iter(made)).indices) == 10

    def test_several_trajectories_differ(self, tmp_path: Path) -> None:
        function = TrainingFunction("f", train, size=40)
        protocol = Protocol(sessions=2, rates=(0.3, 0.9), seed=1)
        made = [open_recorder(function, tmp_path, protocol, number) for number in range(10)]
        assert len({one.rate for one in made}) > 5
        assert all(0.3 <= one.rate <= 0.9 for one in made)
        assert len({one.trajectory for one in made}) == 10
        assert sum(record(function, one) for one in made) == 20
        assert (
            json.loads((tmp_path / "0007" / "trajectory.json").read_text())["rate"] == made[7].rate
        )


# The digits


class TestDigits:
    def test_the_halves_share_no_image(self) -> None:
        digits = pytest.importorskip("know_cli.lab.digits")
        pytest.importorskip("sklearn")
        (meta, meta_labels), (demo, demo_labels) = map(digits.load_digits, ("meta", "demo"))
        assert meta.shape == (898, 1, 8, 8)
        assert demo.shape == (899, 1, 8, 8)
        assert meta.dtype == torch.float32
        assert abs(float(torch.cat([meta, demo]).mean())) < 1e-3
        assert abs(float(torch.cat([meta, demo]).std()) - 1) < 1e-3
        counts = [np.bincount(one.numpy()) for one in (meta_labels, demo_labels)]
        assert np.abs(counts[0] - counts[1]).max() <= 1
        seen = {image.numpy().tobytes() for image in meta}
        assert not any(image.numpy().tobytes() in seen for image in demo)


def test_measurements_of_any_library_are_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, nested_subsets(8, 0.5, 2, 0), rate=0.5)
    (session, *_) = list(itertools.islice(recorder, 1))
    measured = {
        "one": np.float32(0.5), "two": torch.tensor(3), "three": np.array([2.0]), "four": math.nan,
        "five": True, "six": "sgd",
    }  # fmt: skip
    recorder.save(session, {"w": torch.ones(1)}, measured)
    kept = {"one": 0.5, "two": 3, "three": 2.0, "four": "nan", "five": True, "six": "sgd"}
    assert recorder.measurements(0) == kept
    assert json.loads((tmp_path / "trajectory.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "value",
    [10**5000, torch.zeros((), device="meta"), 1j, None],
    ids=["huge", "meta", "1j", "None"],
)
def test_a_session_is_kept_whatever_is_wrong_with_a_measurement(
    value: object, tmp_path: Path
) -> None:
    made = recorder(tmp_path)
    session = next(iter(made))
    with pytest.raises(UsageError, match="session 0 is saved without its measurements odd"):
        made.save(session, train(session), {"accuracy": 0.5, "odd": value})  # type: ignore[dict-item]
    assert recorder(tmp_path).measurements(0) == {"accuracy": 0.5}
    assert recorder(tmp_path).done == [0]


def test_a_session_is_kept_when_its_measurements_cannot_be(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, nested_subsets(8, 0.5, 2, 0), rate=0.5)
    (session, *_) = list(itertools.islice(recorder, 1))
    with pytest.raises(UsageError, match="session 0 is saved without its measurements curve"):
        recorder.save(session, {"w": torch.ones(1)}, {"curve": [1, 2], "loss": 0.5})
    assert recorder.done == [0]
    assert recorder.measurements(0) == {"loss": 0.5}
