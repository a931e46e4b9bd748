"""The hyper-model for runs: what it computes, and the method that predicts with it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.metadata import TRAINING_STEP, TRAJECTORY_KIND, TrajectoryKind
from know_cli.engine.movements import Course, course_of
from know_cli.engine.settings import Settings
from know_cli.errors import CheckpointError, KnowError
from know_cli.kinds import Kind
from know_cli.known.bundle import load_bundle as load_known
from know_cli.known.shipped import family
from know_cli.methods.bundles import open_bundle
from know_cli.methods.registry import find_method
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import verify
from know_cli.settle.bundle import SettleBundle, load_bundle, save_bundle
from know_cli.settle.course import feature_count, features
from know_cli.settle.module import Settle, shares
from tests.support.ranks import together

S = 4


def model(width: int, *, taught: bool = True) -> Settle:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = Settle(S, 6, width)
        if taught:
            torch.nn.init.normal_(made.gate.weight, 0, 0.3)
            if width:
                torch.nn.init.normal_(made.last.weight, 0, 0.3)
    return made.requires_grad_(False)


def a_run() -> list[dict[str, Tensor]]:
    """Checkpoints of a run, the newest first; with statistics, halves and what does not move."""
    generator = torch.Generator().manual_seed(1)
    states: list[dict[str, Tensor]] = []
    for step in range(S):
        moved = {
            "conv.weight": torch.randn(6, 3, 3, 3, generator=generator),
            "bn.weight": 1 + 0.1 * torch.randn(6, generator=generator),
            "bn.bias": torch.randn(6, generator=generator),
            "bn.running_mean": torch.randn(6, generator=generator),
            "bn.running_var": 1 + torch.rand(6, generator=generator),
            "bn.num_batches_tracked": torch.tensor(10 - step),
            "fc.weight": torch.randn(400, 50, generator=generator) + 0.3 * step,
            "fc.bias": torch.randn(400, generator=generator).bfloat16(),
            "still.weight": torch.ones(3, 3),
        }
        states.append(moved)
    return states


def write(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number, state in enumerate(a_run()):
        step = 100 - 10 * number
        path = folder / f"checkpoint-{step}.safetensors"
        kind = {TRAJECTORY_KIND: TrajectoryKind.RUN.value, TRAINING_STEP: str(step)}
        save_checkpoint(path, state, {"format": "pt", **kind})
        paths.append(path)
    return paths


def predict(
    paths: list[Path], output: Path, bundle: Path | None, threads: int = 1, memory: int = 1 << 30
) -> Path:
    method = "average" if bundle is None else "settle"
    weights = None if bundle is None else str(bundle.absolute())
    settings = Settings(threads=threads, max_memory=memory)
    request = Request(paths, output, weights, method=method, settings=settings, force=True)
    with open_prediction(request) as prediction:
        prediction.execute()
    return output


def by_hand(made: Settle) -> dict[str, Tensor]:
    """What the docstring of the module says, in float64 but for the correction."""
    newest_first = a_run()
    kinds = {
        "conv.weight": Kind.CONV, "bn.weight": Kind.BIAS, "bn.bias": Kind.BIAS,
        "fc.weight": Kind.FC, "fc.bias": Kind.BIAS,
    }  # fmt: skip
    windows = {
        name: torch.stack([state[name].double().flatten() for state in newest_first[::-1]])
        for name in newest_first[0]
    }
    courses = {name: course_of(windows[name]) for name in kinds}
    run = Course.together(courses.values())
    exact = model(made.width).double()

    def gates(course: Course, kind: Kind | None) -> tuple[Tensor, Tensor]:
        row = torch.tensor([features(run, course, kind)], dtype=torch.float64)
        coefficients, conditions = exact.gates(row)
        return coefficients[0], conditions[0]

    found = {}
    for name, kind in kinds.items():
        coefficients, condition = gates(courses[name], kind)
        values = coefficients @ windows[name]
        if made.width:
            length, size = (torch.tensor(v) for v in (courses[name].length, courses[name].size))
            values = values + exact.correction(windows[name], condition, length, size)
        found[name] = values.view(newest_first[0][name].shape)
    mixed = shares(gates(run, None)[0])
    mean = mixed @ windows["bn.running_mean"]
    found["bn.running_mean"] = mean
    apart = (windows["bn.running_mean"] - mean).square()
    found["bn.running_var"] = mixed @ (windows["bn.running_var"] + apart)
    return found


@pytest.mark.parametrize("width", [0, 5])
def test_untaught_it_is_the_mean_of_the_window(width: int, tmp_path: Path) -> None:
    save_bundle(SettleBundle.of(model(width, taught=False), {}), tmp_path / "bundle")
    paths = write(tmp_path / "run")
    mean = load_file(predict(paths, tmp_path / "mean.safetensors", None))
    found = load_file(predict(paths, tmp_path / "found.safetensors", tmp_path / "bundle"))
    assert found.keys() == mean.keys()
    assert all(torch.equal(found[name], mean[name]) for name in mean)


@pytest.mark.parametrize("width", [0, 5])
def test_a_prediction_is_what_the_formula_says(width: int, tmp_path: Path) -> None:
    made = model(width)
    save_bundle(SettleBundle.of(made, {}), tmp_path / "bundle")
    paths = write(tmp_path / "run")
    found = load_file(predict(paths, tmp_path / "found.safetensors", tmp_path / "bundle"))
    for name, wanted in by_hand(made).items():
        atol = 1e-2 if found[name].dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(
            found[name].double(), wanted, rtol=4e-3 if atol > 1e-3 else 1e-5, atol=atol
        )
    assert torch.equal(found["still.weight"], torch.ones(3, 3))
    assert found["bn.num_batches_tracked"] == 10


def test_bytes_depend_on_no_threads_memory_or_ranks(tmp_path: Path) -> None:
    save_bundle(SettleBundle.of(model(5), {}), tmp_path / "bundle")
    paths = write(tmp_path / "run")
    files = [
        predict(
            paths,
            tmp_path / f"{threads}-{memory}.safetensors",
            tmp_path / "bundle",
            threads=threads,
            memory=memory,
        )
        for threads, memory in ((1, 1 << 30), (2, 1 << 30), (1, 20 << 20))
    ]

    def as_rank(ranks):  # type: ignore[no-untyped-def]
        request = Request(
            paths, tmp_path / "ranks.safetensors", str(tmp_path / "bundle"), method="settle"
        )
        with open_prediction(request, ranks=ranks) as prediction:
            prediction.execute()

    together(2, as_rank)
    files.append(tmp_path / "ranks.safetensors")
    assert len({file.read_bytes() for file in files}) == 1
    weights = str(tmp_path / "bundle")
    assert not verify(files[0], paths, spans=2, seed=1, weights=weights).differences


@given(
    st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6), min_size=4, max_size=4
    )
)
def test_features_are_finite_and_coefficients_sum_to_1(values: list[list[float]]) -> None:
    window = torch.tensor(values, dtype=torch.float64)
    course = course_of(window)
    row = features(Course.together([course, course]), course, Kind.FC)
    assert len(row) == feature_count(S)
    assert all(math.isfinite(one) and abs(one) <= 4 for one in row)
    coefficients, _ = model(0).double().gates(torch.tensor([row], dtype=torch.float64))
    assert float(coefficients.sum()) == pytest.approx(1, abs=1e-12)
    mixed = shares(coefficients)
    assert float(mixed.min()) >= 0
    assert float(mixed.sum()) == pytest.approx(1)


def test_features_tell_a_straight_line_from_noise() -> None:
    straight = torch.arange(S, dtype=torch.float64)[:, None] * torch.ones(1, 8)
    back_and_forth = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None] * torch.ones(1, 8)
    line, noise = (
        features(course_of(one), course_of(one), None) for one in (straight, back_and_forth)
    )
    assert line[: S - 2] == pytest.approx([1, 1])
    assert noise[: S - 2] == pytest.approx([-1, 1])


def test_two_tensors_together_go_as_one() -> None:
    generator = np.random.default_rng(3)
    parts = [torch.from_numpy(generator.normal(size=(S, n))) for n in (3, 11)]
    whole, joined = course_of(torch.cat(parts, 1)), Course.together(map(course_of, parts))
    assert joined.count == 14
    assert joined.size == pytest.approx(whole.size)
    np.testing.assert_allclose(joined.products, whole.products)


def _spoil(folder: Path, what: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    state = load_file(folder / "settle.safetensors")
    if what == "shape":
        state["gate.weight"] = torch.zeros(2, 2)
    elif what == "finite":
        state["gate.weight"][0, 0] = torch.nan
    elif what == "other":
        state["gate.weight"][0, 0] += 1
    elif what == "roles":
        manifest["roles"] = True
    elif what == "no roles":
        manifest["roles"] = "no"
    elif what == "model":
        manifest["model"] = "known"
    elif what == "json":
        (folder / "manifest.json").write_text("{")
        return
    save_checkpoint(folder / "settle.safetensors", state, {})
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"settle.safetensors: tensor 'gate.weight' is \(2, 2\), the manifest wants"),
        ("finite", "tensor 'gate.weight' is not finite"),
        ("other", "weights and manifest.json do not belong together"),
        ("roles", r"tensor 'read.weight' is \(6, 12\), the manifest wants float32 of \(6, 19\)"),
        ("no roles", "is not a manifest .* and digest, and roles, if it is there, true or false"),
        ("model", "is not a manifest of format 1 of a hyper-model settle"),
        ("json", "is not the manifest of a hyper-model settle"),
    ],
)
def test_a_damaged_bundle_is_refused(what: str, message: str, tmp_path: Path) -> None:
    save_bundle(SettleBundle.of(model(2), {"note": "kept"}), tmp_path)
    assert load_bundle(tmp_path).manifest["note"] == "kept"
    _spoil(tmp_path, what)
    with pytest.raises(CheckpointError, match=message):
        load_bundle(tmp_path)


def test_hyper_models_are_not_taken_for_each_other(tmp_path: Path) -> None:
    save_bundle(SettleBundle.of(model(2), {}), tmp_path)
    with pytest.raises(CheckpointError, match=r"is of the hyper-model 'settle', not of KNOWN; pre"):
        load_known(tmp_path)
    with pytest.raises(CheckpointError, match="is of a KNOWN; take --method known"):
        load_bundle(family("continuation", "--weights")[5])


def test_roles_in_the_weights_alone_are_refused(tmp_path: Path) -> None:
    save_bundle(SettleBundle.of(Settle(S, 6, 2, roles=True), {}), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.pop("roles") is True
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    wanted = r"'read.weight' is \(6, 19\), the manifest wants float32 of \(6, 12\); install or tra"
    with pytest.raises(CheckpointError, match=wanted):
        load_bundle(tmp_path)


def test_a_bundle_without_roles_is_what_it_was_before_there_were_any() -> None:
    made = Settle(3, 2, 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 64)
    assert json.dumps(SettleBundle.of(made, {"note": 1}).to_json()) == (
        '{"format": 1, "model": "settle", "checkpoints": 3, "hidden": 2, "width": 1, '
        '"target": "network", "trajectory": "run", "digest": "f5f7c349a416a491", '
        '"parameters": 38, "note": 1}'
    )


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    save_bundle(SettleBundle.of(model(0), {}), tmp_path / "family" / "window-4")
    paths, bundle = write(tmp_path / "run"), tmp_path / "family"
    with pytest.raises(CheckpointError, match=r"only for 4; give as many \(--last 4\)"):
        predict(paths[:3], tmp_path / "out", bundle)
    with pytest.raises(CheckpointError, match="reads 4 checkpoints, 3 were given"):
        predict(paths[:3], tmp_path / "out", bundle / "window-4")
    request = Request(
        paths, tmp_path / "out", str(bundle), method="settle", trajectory=TrajectoryKind.RUN
    )
    assert open_bundle(find_method("settle"), str(bundle), 4) is not None
    with pytest.raises(KnowError, match="nowhere: neither a folder with a hyper-model settle"):
        Request(paths, request.output, "nowhere", method="settle")
