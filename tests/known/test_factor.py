"""KNOWN with a second output, a factor on θ0: the formula, its kernels, its bundles, its commands."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints.metadata import KERNEL
from know_cli.engine.lanes import Lane
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_USAGE, CheckpointError, UsageError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known import devices
from know_cli.known.bundle import Bundle, load_bundle, save_bundle
from know_cli.known.devices import open_devices, open_lanes, torch_kernels
from know_cli.known.module import Known, Preparation, has_factor, initialise, roll
from know_cli.known.native_kernel import NativeKernel, trouble_with_native
from know_cli.known.torch_kernel import Kernel
from tests.support.bundles import random_bundle
from tests.support.by_hand import by_hand
from tests.support.command import Command, one_line
from tests.support.keras import same, write_keras
from tests.support.plans import block_of
from tests.support.trajectories import write_trajectory

CPU = torch.device("cpu")
PREPARATIONS = pytest.mark.parametrize("preparation", list(Preparation))


def windows(rows: int, checkpoints: int, seed: int = 1) -> Tensor:
    """``[rows, S]``: weights that move, some that do not, and zeros."""
    window = torch.randn(rows, checkpoints, generator=torch.Generator().manual_seed(seed)) * 0.2
    window[3::7] = window[3::7, :1]
    window[5::11] = 0.0
    return window


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def by_kernel(
    state: dict[str, Tensor], window: Tensor, preparation: Preparation, rows: int | None = None
) -> Tensor:
    """``[rows]``, by torch's kernel."""
    kernel = Kernel(state, window.shape[1], preparation, CPU, block_rows=rows)
    out = torch.empty(len(window))
    kernel.predict(window.T.contiguous(), out)
    return out


# ------------------------------------------------------------------ the formula


@PREPARATIONS
@pytest.mark.parametrize("checkpoints", [2, 3, 5, 8])
def test_module_and_kernel_follow_the_formula(checkpoints: int, preparation: Preparation) -> None:
    bundle = random_bundle(checkpoints, seed=checkpoints, preparation=preparation, factor=True)
    window = windows(200, checkpoints)
    for kind, state in bundle.states.items():
        expected = by_hand(state, window.double().numpy(), preparation)
        with torch.no_grad():
            module = bundle.module(kind)(window)
        np.testing.assert_allclose(module.numpy(), expected, atol=2e-6)
        np.testing.assert_allclose(by_kernel(state, window, preparation), expected, atol=2e-6)
        first = {**state, "head.weight": state["head.weight"][:1], "head.bias": state["head.bias"][:1]}  # fmt: skip
        without = by_hand(first, window.double().numpy(), preparation)
        assert np.abs(expected - without).max() > 1e-2  # the factor matters


@PREPARATIONS
def test_golden_values(preparation: Preparation) -> None:
    """Where all weights are 0 but the head's biases, outputs are tanh of these."""
    state = {name: torch.zeros_like(value) for name, value in Known(3, factor=True).state_dict().items()}  # fmt: skip
    state["head.bias"] = torch.tensor([math.atanh(0.5), math.atanh(-0.25)])
    window = torch.tensor([[1.0, 4.0, 2.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0], [1.0, 0.0, -8.0]])
    scale = [1, 1, 1, 1] if preparation is Preparation.RAW else [2, 0, 0, 9]
    expected = [
        0.75 * newest + 0.5 * size for newest, size in zip([2, 3, 0, -8], scale, strict=True)
    ]
    known = Known(3, preparation, factor=True)
    known.load_state_dict(state)
    with torch.no_grad():
        np.testing.assert_allclose(known(window), expected, rtol=1e-6)
    np.testing.assert_allclose(by_kernel(state, window, preparation), expected, rtol=1e-6)


@given(
    st.integers(2, 8), st.integers(1, 300), st.integers(0, 100), st.sampled_from(list(Preparation))
)
@settings(max_examples=30, deadline=None)
def test_without_a_second_row_it_is_known_to_the_bit(
    checkpoints: int, rows: int, seed: int, preparation: Preparation
) -> None:
    """The head is a product per output, and adding 0·θ0 to the change changes no bit of it."""
    bundle = random_bundle(checkpoints, seed, preparation)
    window = windows(rows, checkpoints, seed)
    for kind, state in bundle.states.items():
        wider = {**state}
        for name in ("head.weight", "head.bias"):
            wider[name] = torch.cat([state[name], torch.zeros_like(state[name])])
        known = Known(checkpoints, preparation, factor=True)
        known.load_state_dict(wider)
        with torch.no_grad():
            assert torch.equal(
                bits(roll(known, window, 3)), bits(roll(bundle.module(kind), window, 3))
            )
        one, other = (by_kernel(each, window, preparation) for each in (wider, state))
        assert torch.equal(bits(one), bits(other))


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_spread_still_makes_the_prediction_follow_the_scale_of_the_weights(
    scale: float, seed: int
) -> None:
    known = random_bundle(5, preparation=Preparation.SPREAD, factor=True).module(Kind.CONV)
    window = windows(50, 5, seed)
    with torch.no_grad():
        torch.testing.assert_close(known(window * scale) / scale, known(window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpoints", [2, 5])
def test_it_has_65_parameters_more(checkpoints: int) -> None:
    sizes = [
        sum(one.numel() for one in Known(checkpoints, factor=factor).parameters())
        for factor in (False, True)
    ]
    assert sizes == [128 * checkpoints + 8785, 128 * checkpoints + 8850]
    assert [has_factor(Known(5, factor=factor).state_dict()) for factor in (False, True)] == [False, True]  # fmt: skip


@PREPARATIONS
def test_a_training_starts_at_the_same_known_with_the_same_numbers_left(
    preparation: Preparation,
) -> None:
    found, left = [], []
    for factor in (False, True):
        generator = torch.Generator().manual_seed(3)
        known = Known(5, preparation, factor=factor)
        initialise(known, generator)
        found.append(known)
        left.append(torch.randperm(50, generator=generator))
    assert torch.equal(*left)
    for (name, one), other in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert torch.equal(one, other[:1] if name.startswith("head.") else other)
    assert not found[1].head.weight[1:].any()
    # And from there the second output can be learned.
    found[1](windows(50, 5)).abs().sum().backward()
    assert found[1].head.weight.grad is not None
    assert found[1].head.weight.grad[1].any()


# ------------------------------------------------------------------ kernels


@PREPARATIONS
def test_the_kernel_is_the_module_s_equal_in_whole_and_in_part_blocks(
    preparation: Preparation,
) -> None:
    bundle = random_bundle(5, preparation=preparation, factor=True)
    local = threading.local()
    kernels = {
        kind: Kernel(state, 5, preparation, CPU, local) for kind, state in bundle.states.items()
    }
    block = kernels[Kind.CONV].block_rows
    # The workspace, which the kinds share, holds what the call before left there.
    for rows in (block, 3, block - 1, 1, block):
        history = torch.randn(5, rows, generator=torch.Generator().manual_seed(rows)) * 0.2
        for kind, kernel in kernels.items():
            out = torch.empty(rows)
            kernel.predict(history, out)
            with torch.no_grad():
                expected = bundle.module(kind)(history.T.contiguous())
            torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_a_thread_needs_one_more_number_per_row() -> None:
    state, wider = (random_bundle(5, factor=factor).states[Kind.FC] for factor in (False, True))
    one, other = (Kernel(each, 5, Preparation.RAW, CPU) for each in (state, wider))
    assert other.thread_bytes == one.thread_bytes + 4 * one.block_rows


@PREPARATIONS
def test_lanes_of_devices_predict_all_steps(preparation: Preparation) -> None:
    bundle = random_bundle(4, preparation=preparation, factor=True)
    window = windows(70, 4)
    (lane, *_) = open_lanes(bundle, 3, CPU, torch_kernels, 100)
    for kind in PREDICTED_KINDS:
        out = torch.full((3, 70), torch.nan)
        lane.start(block_of(kind, 70), window.T.contiguous(), out)
        lane.finish()
        with torch.no_grad():
            expected = roll(bundle.module(kind), window, 3)
        torch.testing.assert_close(out.T, expected, atol=1e-5, rtol=1e-5)


def test_the_native_kernel_refuses_it() -> None:
    trouble = trouble_with_native(5, factor=True)
    assert trouble == "it has no second output, which a KNOWN with a factor needs"
    with pytest.raises(RuntimeError, match="no second output"):
        NativeKernel(random_bundle(5, factor=True).states[Kind.FC], 5, Preparation.RAW)


def test_the_triton_kernel_refuses_it() -> None:
    pytest.importorskip("triton")
    from know_cli.known.triton_kernel import TritonKernel

    with pytest.raises(RuntimeError, match="no second output"):
        TritonKernel(random_bundle(5, factor=True).states[Kind.FC], 5, Preparation.RAW, CPU)


def test_on_cuda_the_torch_kernel_runs_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_cpu(bundle: Bundle, steps: int, _: object, kernels, rows: int = 256) -> list[Lane]:  # type: ignore[no-untyped-def]  # fmt: skip
        assert kernels is torch_kernels
        return open_lanes(bundle, steps, CPU, kernels, rows)

    monkeypatch.setattr(devices, "open_lanes", on_the_cpu)
    bundle, cuda = random_bundle(factor=True), [torch.device("cuda", 0)]
    predictor = open_devices(bundle, 2, cuda)
    assert predictor.kernel == "torch"
    assert predictor.notices == (
        "Triton's kernel has no second output, which a KNOWN with a factor needs; KNOWN runs "
        "through plain torch operations",
    )
    assert open_devices(bundle, 2, cuda, "torch").notices == ()
    with pytest.raises(UsageError) as error:
        open_devices(bundle, 2, cuda, "triton")
    assert str(error.value) == (
        "--kernel triton: Triton's kernel has no second output, which a KNOWN with a factor "
        "needs; leave it out"
    )


# ------------------------------------------------------------------ bundles


@PREPARATIONS
def test_bundle_survives_a_round_trip(tmp_path: Path, preparation: Preparation) -> None:
    bundle = random_bundle(5, preparation=preparation, factor=True)
    save_bundle(bundle, tmp_path / "b")
    loaded = load_bundle(tmp_path / "b")
    assert same(bundle, loaded)
    assert loaded.factor
    assert loaded.digest == bundle.digest
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["factor"] is True
    assert manifest["parameters"] == 9490
    save_bundle(loaded, tmp_path / "again")
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_bundle_without_it_says_nothing_of_it(tmp_path: Path) -> None:
    save_bundle(random_bundle(), tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert "factor" not in facts
    assert not load_bundle(tmp_path / "b").factor
    # What a person may have added is right, too.
    manifest.write_text(json.dumps({**facts, "factor": False}))
    assert not load_bundle(tmp_path / "b").factor
    assert not load_bundle(write_keras(random_bundle(), tmp_path / "keras")).factor


def test_the_digest_tells_it_apart() -> None:
    plain, bundle = random_bundle(), random_bundle(factor=True)
    wider = {
        kind: {
            **state,
            **{name: torch.cat([state[name], 0 * state[name]]) for name in ("head.weight", "head.bias")},
        }
        for kind, state in plain.states.items()
    }  # fmt: skip
    zeros = Bundle(wider, 5, plain.preparation, plain.target)
    assert len({plain.digest, bundle.digest, zeros.digest}) == 3


@pytest.mark.parametrize("value", ["yes", 1, None, [True]])
def test_a_factor_that_is_no_boolean(tmp_path: Path, value: object) -> None:
    save_bundle(random_bundle(factor=True), tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "factor": value}))
    with pytest.raises(CheckpointError, match=r"and a factor \(true or false\)") as error:
        load_bundle(tmp_path / "b")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("factor", [False, True])
def test_a_head_that_is_not_what_the_manifest_says(tmp_path: Path, factor: bool) -> None:
    save_bundle(random_bundle(factor=factor), tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "factor": not factor}))
    with pytest.raises(CheckpointError) as error:
        load_bundle(tmp_path / "b")
    has, says = ("a", "nothing of ") if factor else ("no", "")
    assert str(error.value) == (
        f"{tmp_path / 'b' / 'conv.safetensors'}: has {has} factor on θ0, and manifest.json says "
        f'{says}"factor": true; install or train the bundle again'
    )


def test_a_head_with_other_rows_than_two(tmp_path: Path) -> None:
    save_bundle(random_bundle(factor=True), tmp_path / "b")
    file = tmp_path / "b" / "fc.safetensors"
    state = load_file(file)
    for name, rows in (("head.weight", 1), ("head.weight", 3), ("head.bias", 3)):
        save_file({**state, name: torch.ones(rows, *state[name].shape[1:])}, file)
        with pytest.raises(CheckpointError, match=rf"tensor '{name}' is \({rows}.* has \(2"):
            load_bundle(tmp_path / "b")
    del state["head.bias"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"tensor 'head.bias' is missing, .* has \(2,\)"):
        load_bundle(tmp_path / "b")


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trajectory, and a bundle with a factor and a linear rule."""
    folder = tmp_path_factory.mktemp("run")
    write_trajectory(folder)
    rule = {kind.value: [0.0, 0.0, 0.0, -1.0, 2.0] for kind in PREDICTED_KINDS}
    bundle = random_bundle(preparation=Preparation.SPREAD, factor=True)
    save_bundle(bundle, folder / "known", {"rule": rule})
    return folder


def kernel_of(path: Path) -> str | None:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata()).get(KERNEL)


@pytest.mark.parametrize("arguments", [(), ("--kernel", "torch")])
def test_predicts_what_the_module_does(run: Path, know: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:  # fmt: skip
    out = tmp_path / "out"
    done = know(
        "predict", "ckpt0..ckpt4", "-o", out, "--weights", "./known", "--steps", 2, *arguments,
        "--device", "cpu", "--report", tmp_path / "r.json", cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert kernel_of(out) == "torch"
    report = json.loads((tmp_path / "r.json").read_text())
    bundle = load_bundle(run / "known")
    assert (report["kernel"], report["bundle"]) == ("torch", bundle.digest)
    states = [load_file(run / f"ckpt{k}.safetensors") for k in range(4, -1, -1)]
    for name, kind in {"conv1.weight": Kind.CONV, "fc.weight": Kind.FC, "fc.bias": Kind.BIAS}.items():  # fmt: skip
        window = torch.stack([state[name].flatten() for state in states], dim=1)
        with torch.no_grad():
            expected = roll(bundle.module(kind), window, 2)[:, -1]
        torch.testing.assert_close(load_file(out)[name].flatten(), expected, atol=1e-5, rtol=1e-5)
    done = know("verify", out, "ckpt0..ckpt4", "--weights", "./known", "--full", cwd=run)
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    assert "rounding" not in done.stderr


@pytest.mark.parametrize("method", ["noise", "lstsq"])
def test_other_methods_that_read_it(method: str, run: Path, know: Command, tmp_path: Path) -> None:
    command = ("ckpt0..ckpt4", "--weights", "./known")
    out = tmp_path / "out"
    done = know("predict", *command, "-o", out, "--method", method, cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert kernel_of(out) == ("torch" if method == "noise" else None)
    done = know("verify", out, *command, "--full", cwd=run)
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr


def test_every_step_and_any_number_of_threads(run: Path, know: Command, tmp_path: Path) -> None:
    command = ("ckpt0..ckpt4", "--weights", "./known", "--steps", 3, "--device", "cpu")
    for threads in (1, 2):
        done = know(
            "predict", *command, "-o", tmp_path / f"out{threads}.safetensors", "--every-step",
            "--threads", threads, cwd=run,
        )  # fmt: skip
        assert done.returncode == EXIT_DONE, done.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    ones, twos = names[: len(names) // 2], names[len(names) // 2 :]
    assert len(ones) == 3
    for one, two in zip(ones, twos, strict=True):
        assert (tmp_path / one).read_bytes() == (tmp_path / two).read_bytes()
        done = know("verify", tmp_path / one, "ckpt0..ckpt4", "--weights", "./known", cwd=run)
        assert done.returncode == EXIT_DONE, done.stdout + done.stderr


@pytest.mark.parametrize("method", ["known", "noise"])
def test_kernels_that_do_not_have_it_are_refused(
    method: str, run: Path, know: Command, tmp_path: Path
) -> None:
    command = ("predict", "ckpt0..ckpt4", "--weights", "./known", "--method", method, "-o", tmp_path / "out", "--device", "cpu")  # fmt: skip
    done = know(*command, "--kernel", "native", cwd=run)
    assert done.returncode == EXIT_USAGE
    assert one_line(done.stderr).endswith(
        "--kernel native: it has no second output, which a KNOWN with a factor needs; leave it "
        "out, or take --kernel torch"
    )
    done = know(*command, "--kernel", "triton", cwd=run)
    assert done.returncode == EXIT_USAGE
    assert "--kernel triton: is for --device cuda" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_not_what_its_manifest_says_is_told(
    run: Path, know: Command, tmp_path: Path
) -> None:
    save_bundle(load_bundle(run / "known"), tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["factor"]
    manifest.write_text(json.dumps(facts))
    done = know(
        "predict", "ckpt0..ckpt4", "--weights", tmp_path / "b", "-o", tmp_path / "out", cwd=run
    )
    assert done.returncode == EXIT_CHECKPOINT
    assert 'manifest.json says nothing of "factor": true' in one_line(done.stderr)


def test_it_is_measured_without_the_native_kernel(run: Path, know: Command, tmp_path: Path) -> None:
    done = know(
        "bench", "--sizes", "1e4", "--rows", 2000, "--rounds", 1, "--threads", 2, "--weights",
        "./known", "--json", tmp_path / "r.json", cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    kernels = json.loads((tmp_path / "r.json").read_text())["kernels"]
    assert "kernel, raw windows" in kernels
    assert not [name for name in kernels if name.startswith("native")]
