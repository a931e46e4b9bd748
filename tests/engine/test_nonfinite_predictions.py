"""A prediction that is not finite, of inputs that are, is refused with the name of its tensor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from know_cli.engine.lanes import DevicePredictor
from know_cli.engine.predictor import Predictors
from know_cli.engine.report import Report
from know_cli.engine.settings import Settings
from know_cli.errors import EXIT_CHECKPOINT, CheckpointError
from know_cli.kinds import Kind, Override
from know_cli.known.bundle import Bundle
from know_cli.known.devices import open_lanes, torch_kernels
from know_cli.methods import known, task_vector
from know_cli.methods.inputs import Inputs
from know_cli.methods.registry import find_method
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.command import Command, one_line
from tests.support.ranks import together
from tests.support.trajectories import write_trajectory

SIZE = 5
LARGE = 3e38
FC = (Override("*", Kind.FC),)


def predict(
    paths: list[Path], output: Path, method: str, bundle: Path, *, ranks: int = 1, **wishes: Any
) -> Report:
    weights = str(bundle) if find_method(method).reads_bundle else None
    own = {key: wishes.pop(key) for key in ("resume", "options") if key in wishes}
    options = Settings(**{"overrides": FC, **wishes})
    request = Request(
        paths, output, weights, options, device="cpu", force=True, method=method, **own
    )

    def work(which: Any) -> Report:
        with open_prediction(request, which) as opened:
            return opened.execute()

    return together(ranks, work)[0] if ranks > 1 else work(None)


def trajectory_of(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(SIZE)
    ]


def explode(states: list[dict[str, Tensor]], name: str, at: tuple[int, ...]) -> None:
    """A value so large that twice of it, or KNOWN's exponentials of it, are not finite."""
    for k, state in enumerate(states):
        state[name][at] = LARGE if k == 0 else -LARGE


#: How tensors are read: many in one block, one in many blocks and batches, one at once.
PLACES: dict[str, tuple[str, dict[str, tuple[int, ...]], str, tuple[int, ...]]] = {
    "among many small ones": ("known", {f"t{n}.weight": (3, 2) for n in range(40)}, "t17.weight", (2, 1)),
    "a scalar": ("task-vector", {f"t{n}": () for n in range(9)}, "t5", ()),
    "in a large one": ("known", {"small": (3,), "large.weight": (300, 200)}, "large.weight", (251, 7)),
    "in a large one, linear": ("task-vector", {"large.weight": (300, 200)}, "large.weight", (299, 199)),
    "in one that is taken whole": ("tsv", {"small": (3,), "fc.weight": (12, 9)}, "fc.weight", (11, 0)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_refused_by_name_wherever_it_is(
    place: str, ranks: int, bundle_path: Path, tmp_path: Path
) -> None:
    method, shapes, name, at = PLACES[place]
    states = trajectory_of(shapes)
    explode(states, name, at)
    paths = write_trajectory(tmp_path, states)
    least = {} if method == "tsv" else {"max_memory": 14 << 20}
    with pytest.raises(CheckpointError) as found:
        predict(paths, tmp_path / "out", method, bundle_path, ranks=ranks, **least)
    where = f"element {list(at)}" if at else "its value"
    assert str(found.value) == (
        f"{paths[0]}: tensor '{name}': the prediction of {where} after step 1 is not finite in "
        "float32; --allow-nonfinite copies such values from the first checkpoint"
    )
    assert sorted(tmp_path.iterdir()) == paths

    report = predict(
        paths, tmp_path / "out", method, bundle_path, ranks=ranks, allow_nonfinite=True, **least
    )
    assert (
        f"predictions that are not finite have the first checkpoint's value: '{name}' "
        f"({report.replaced})"
    ) in report.notices
    out = load_file(tmp_path / "out")
    assert out[name][at] == states[0][name][at]
    assert all(torch.isfinite(tensor).all() for tensor in out.values())


def test_it_is_refused_on_other_devices_too(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predictors(inputs: Inputs) -> Predictors:
        lanes = open_lanes(
            inputs.bundle_of(Bundle), inputs.steps, torch.device("cpu"), torch_kernels, 64
        )
        return Predictors(DevicePredictor(lanes, inputs.checkpoints, "torch"))

    monkeypatch.setattr(known, "predictors", predictors)
    states = trajectory_of({"a.weight": (30, 20), "b.weight": (3, 2)})
    explode(states, "a.weight", (29, 3))
    paths = write_trajectory(tmp_path, states)
    message = r"tensor 'a.weight': the prediction of element \[29, 3\] after step 1"
    with pytest.raises(CheckpointError, match=message):
        predict(paths, tmp_path / "out", "known", bundle_path, steps=2)


def test_a_step_that_is_not_written_counts(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last step is written, and it is finite again: after the first checkpoint's value."""
    states = trajectory_of({"a.weight": (5, 4)})

    class Once:
        device, block_rows, thread_bytes = torch.device("cpu"), 1 << 14, 0

        def predict(self, block: Any, step: int, history: Tensor, out: Tensor) -> None:
            out.copy_(history[-1])
            if step == 2:
                out[6] = math.nan

    monkeypatch.setattr(task_vector, "predictors", lambda _: Predictors(Once()))
    paths = write_trajectory(tmp_path, states)
    message = r"tensor 'a.weight': the prediction of element \[1, 2\] after step 2 is not finite"
    with pytest.raises(CheckpointError, match=message):
        predict(paths, tmp_path / "out", "task-vector", bundle_path, steps=3)
    predict(paths, tmp_path / "out", "task-vector", bundle_path, steps=3, allow_nonfinite=True)
    assert torch.equal(load_file(tmp_path / "out")["a.weight"], states[0]["a.weight"])


@pytest.mark.parametrize(("dtype", "word"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])  # fmt: skip
def test_what_does_not_fit_the_output_s_type_is_refused(
    dtype: torch.dtype, word: str, bundle_path: Path, tmp_path: Path
) -> None:
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    states = [{n: t.to(dtype) for n, t in s.items()} for s in trajectory_of({"a.weight": (4, 4)})]
    states[0]["a.weight"][1, 0] = largest
    for state in states[1:]:  # one unit in the last place less
        state["a.weight"][1, 0] = torch.nextafter(largest, torch.zeros_like(largest))
    paths = write_trajectory(tmp_path, states)
    line: dict[str, Any] = {"options": {"alpha": 0.4}}
    predict(paths, tmp_path / "out", "task-vector", bundle_path, **line)
    assert load_file(tmp_path / "out")["a.weight"][1, 0] == largest, "rounded down"
    line["options"]["alpha"] = 0.7
    message = rf"tensor 'a.weight': the prediction of element \[1, 0\] after step 1 is not finite in {word}"
    with pytest.raises(CheckpointError, match=message):
        predict(paths, tmp_path / "out", "task-vector", bundle_path, **line)
    report = predict(
        paths, tmp_path / "out", "task-vector", bundle_path, allow_nonfinite=True, **line
    )
    assert report.replaced == 1
    assert load_file(tmp_path / "out")["a.weight"][1, 0] == largest


def test_rescaled_statistics_that_do_not_fit_are_refused(tmp_path: Path, bundle_path: Path) -> None:
    """BatchNorm's variance in float16 follows weights that grow by half."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 3, 3, generator=generator).half()
    states = [
        {
            "conv1.weight": weight * (1 - 0.5 * k / (SIZE - 1)),
            "bn1.weight": torch.rand(6, generator=torch.Generator().manual_seed(1)).half(),
            "bn1.bias": torch.randn(6, generator=torch.Generator().manual_seed(2)).half(),
            "bn1.running_mean": torch.linspace(-1, 1, 6).half() + k,
            "bn1.running_var": torch.tensor([1.0, 2.0, 60_000.0, 3.0, 4.0, 5.0]).half(),
        }
        for k in range(SIZE)
    ]
    paths = write_trajectory(tmp_path, states)
    wishes: dict[str, Any] = {"overrides": (), "steps": 3}
    with pytest.raises(
        CheckpointError,
        match="ckpt0.safetensors: tensor 'bn1.running_var': 1 value rescaled after step 3 is not finite in "
        "float16; --allow-nonfinite",
    ):  # fmt: skip
        predict(paths, tmp_path / "out", "task-vector", bundle_path, **wishes)
    report = predict(
        paths, tmp_path / "out", "task-vector", bundle_path, allow_nonfinite=True, **wishes
    )
    assert report.replaced == 1
    assert any("'bn1.running_var' (1)" in notice for notice in report.notices)
    assert load_file(tmp_path / "out")["bn1.running_var"][2] == 60_000


def test_a_run_that_goes_on_names_what_was_replaced_before(
    bundle_path: Path, tmp_path: Path
) -> None:
    states = trajectory_of({f"t{n}.weight": (100, 90) for n in range(7)})
    for n in range(7):
        explode(states, f"t{n}.weight", (n, n))
    paths = write_trajectory(tmp_path, states)
    wishes: dict[str, Any] = {"allow_nonfinite": True, "max_memory": 4 << 20, "steps": 2}
    at_once = predict(paths, tmp_path / "one", "known", bundle_path, **wishes)
    interrupted(paths, tmp_path / "two", bundle_path, Settings(overrides=FC, **wishes))
    report = predict(paths, tmp_path / "two", "known", bundle_path, resume=True, **wishes)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert report.replaced == at_once.replaced > 0
    named = [notice for notice in report.notices if "predictions that are not finite" in notice]
    assert named == [n for n in at_once.notices if "predictions that are not finite" in n]
    assert named[0].endswith("and 2 other tensors")


def interrupted(paths: list[Path], output: Path, bundle: Path, settings: Settings) -> None:
    class Ends:
        left = 2

        def phase(self, text: str, parameters: int = 0) -> None: ...

        def advance(self, parameters: int) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    request = Request(paths, output, str(bundle), settings, device="cpu", resume=True)
    with open_prediction(request) as opened, pytest.raises(KeyboardInterrupt):
        opened.execute(Ends())


def test_the_command_ends_with_one_line(know: Command, tmp_path: Path) -> None:
    states = trajectory_of({"fc.weight": (6, 4)})
    explode(states, "fc.weight", (2, 3))
    write_trajectory(tmp_path, states)
    line = ("predict", "ckpt0..ckpt4", "-o", "out", "--method", "task-vector")
    done = know(*line, cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "tensor 'fc.weight': the prediction of element [2, 3] after step 1" in one_line(
        done.stderr
    )
    assert not (tmp_path / "out").exists()
    done = know(*line, "--allow-nonfinite", "--json", "r.json", cwd=tmp_path)
    assert done.returncode == 0
    assert "'fc.weight' (1)" in done.stderr
    assert "1 prediction was not finite: the first checkpoint's value" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["replaced"] == 1


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_inputs_that_are_not_finite_are_named(ranks: int, resume: bool, tmp_path: Path) -> None:
    shapes = {"a.weight": (30, 20), "b.weight": (3, 2), "c.weight": (4, 4)}
    states = trajectory_of(shapes)
    states[2]["a.weight"][29, 3] = math.nan
    states[0]["a.weight"][0, 1] = states[4]["a.weight"][0, 2] = math.inf
    states[1]["c.weight"][1] = -math.inf
    paths = write_trajectory(tmp_path, states)
    report = predict(
        paths,
        tmp_path / "out",
        "linear",
        tmp_path,
        ranks=ranks,
        allow_nonfinite=True,
        resume=resume,
    )
    assert report.nonfinite == 7
    assert (
        "inputs that are not finite have the first checkpoint's value: 'a.weight' (3), "
        "'c.weight' (4)"
    ) in report.notices
    out = load_file(tmp_path / "out")
    assert out["a.weight"][29, 3] == states[0]["a.weight"][29, 3]
    assert torch.equal(out["c.weight"][1], states[0]["c.weight"][1])
