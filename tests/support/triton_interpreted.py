"""Triton's kernel in Triton's interpreter; ``test_triton.py`` runs this file in a process of its own.

What Triton is imported with holds for its whole process, so TRITON_INTERPRET=1 must be set:

    TRITON_INTERPRET=1 pytest -m 'slow or not slow' tests/support/triton_interpreted.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from know_cli.engine.lanes import DevicePredictor
from know_cli.engine.predictor import Predictors
from know_cli.engine.settings import Settings
from know_cli.kinds import Kind
from know_cli.known.bundle import Bundle, load_bundle
from know_cli.known.devices import open_lanes, torch_kernels, triton_kernels
from know_cli.known.module import Preparation, roll
from know_cli.known.triton_kernel import BLOCK, TritonKernel, _asinh, _tanh
from know_cli.methods import known
from know_cli.methods.inputs import Inputs
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.bundles import random_bundle
from tests.support.plans import block_of
from tests.support.trajectories import network, states, write_trajectory

assert os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes both branches of every choice, with numpy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CPU = torch.device("cpu")
torch.set_num_threads(1)  # operations are small, and the machine may be busy


def windows(checkpoints: int, rows: int, seed: int = 0) -> Tensor:
    """``[rows, S]``: weights that move, some that do not, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(rows, checkpoints, generator=generator) * 0.05
    values = walk.cumsum(1) + torch.randn(rows, 1, generator=generator) * 0.2
    values[3::7] = values[3::7, :1]
    values[5::11] = 0
    return values


def kernel(bundle: Bundle, kind: Kind = Kind.CONV) -> TritonKernel:
    return TritonKernel(bundle.states[kind], bundle.checkpoints, bundle.preparation, CPU)


def predict(bundle: Bundle, window: Tensor, steps: int, kind: Kind = Kind.CONV) -> Tensor:
    """``[rows, steps]``; what lies around input and output must be left alone."""
    rows, size = window.shape
    history = torch.full((size, rows + 5), torch.nan, dtype=window.dtype)
    history[:, 2 : rows + 2] = window.T
    out = torch.full((steps + 1, rows + 9), 7.0)
    kernel(bundle, kind).predict(
        block_of(kind, rows), history[:, 2 : rows + 2], out[:steps, 3 : rows + 3]
    )
    answers = out[:steps, 3 : rows + 3].T.clone()
    out[:steps, 3 : rows + 3] = 7
    assert (out == 7).all()
    return answers


def slow(*values: object) -> list[object]:
    """Parameters of tests that only ``-m slow`` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("preparation", list(Preparation))
@pytest.mark.parametrize("checkpoints", [5, *slow(2, 3, 4, 6, 7, 8)])
def test_the_kernel_is_the_reference_module(checkpoints: int, preparation: Preparation) -> None:
    bundle = random_bundle(checkpoints, seed=checkpoints, preparation=preparation)
    for kind, rows, steps in (
        (Kind.CONV, 1, 1),
        (Kind.FC, BLOCK, 1),
        (Kind.BIAS, BLOCK + 7, 3),
    ):
        window = windows(checkpoints, rows, seed=checkpoints)
        with torch.no_grad():
            expected = roll(bundle.module(kind), window, steps)
        actual = predict(bundle, window, steps, kind)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


@given(
    st.integers(2, 16), st.integers(1, 3 * BLOCK), st.integers(1, 8), st.sampled_from(list(Preparation))
)  # fmt: skip
@pytest.mark.slow
@settings(max_examples=24)
def test_any_number_of_checkpoints_rows_and_steps(
    checkpoints: int, rows: int, steps: int, preparation: Preparation
) -> None:
    bundle = random_bundle(checkpoints, seed=rows, preparation=preparation)
    window = windows(checkpoints, rows, seed=steps)
    with torch.no_grad():
        expected = roll(bundle.module(Kind.CONV), window, steps)
    # Each step adds to the errors of those before it.
    torch.testing.assert_close(predict(bundle, window, steps), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, *slow(torch.float16, torch.float32)]
)
@pytest.mark.parametrize("preparation", list(Preparation))
def test_every_float_dtype_is_read_as_float32(dtype: torch.dtype, preparation: Preparation) -> None:
    bundle = random_bundle(5, preparation=preparation)
    window = windows(5, BLOCK - 1).to(dtype)
    with torch.no_grad():
        expected = roll(bundle.module(Kind.CONV), window.float(), 2)
    torch.testing.assert_close(predict(bundle, window, 2), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("preparation", list(Preparation))
def test_values_at_the_ends_of_float32(preparation: Preparation) -> None:
    """What is finite for the torch kernel is so here, and equal to what it says."""
    bundle = random_bundle(5, preparation=preparation)
    sizes = torch.tensor([1e-45, 1e-40, 1e-38, 1e-30, 1e-10, 1e10, 1e18, 1e20, 1e30, 3e38])
    window = torch.cat([windows(5, 12, seed=k).sign() * size for k, size in enumerate(sizes)])
    window[::3, 1] *= 0.5
    (lane, _) = open_lanes(bundle, 3, CPU, torch_kernels, len(window))
    expected = torch.empty(3, len(window))
    lane.start(block_of(Kind.CONV, len(window)), window.T.contiguous(), expected)
    expected = expected.T
    actual = predict(bundle, window, 3)
    both = torch.isfinite(expected) & torch.isfinite(actual)
    assert (torch.isfinite(actual) == torch.isfinite(expected)).float().mean() > 0.98
    # Raw, the exponential overflows early; prepared by their spread, only the squares do.
    small = 1.0 if preparation is Preparation.RAW else 1e19
    assert both[window.abs().amax(dim=1) < small].all()
    # The change is bounded, so that errors are in proportion to the values.
    torch.testing.assert_close(actual[both], expected[both], atol=1e-6, rtol=1e-5)


def test_steps_go_on_from_the_first_checkpoint_where_an_answer_is_not_finite() -> None:
    bundle = random_bundle(2)
    for state in bundle.states.values():
        # exp(rate · x) overflows for large values, and 0 · inf is not a number.
        state["window.rate.bias"].fill_(1.0)
        state["window.input.weight"].fill_(1.0)
    window = torch.tensor([[0.1, 0.2], [300.0, 300.0], [0.3, 0.1]])
    answers = predict(bundle, window, 3)
    assert torch.isfinite(answers[[0, 2]]).all()
    # Each step sees θ0 in the place of the prediction before, and so the same window.
    assert torch.isnan(answers[1]).all()
    # With a smaller window in which only the oldest value is large, the second step is finite.
    once = predict(bundle, torch.tensor([[1e4, 0.1]]), 3)[0]
    assert not torch.isfinite(once[0])
    with torch.no_grad():
        expected = roll(bundle.module(Kind.CONV), torch.tensor([[0.1, 0.1]]), 2)[0]
    torch.testing.assert_close(once[1:], expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- its functions


@triton.jit
def _apply(x: tl.tensor, tanh: tl.tensor, asinh: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(tanh + at, _tanh(values))
    tl.store(asinh + at, _asinh(values))


def test_tanh_and_asinh_are_within_a_few_units_in_the_last_place() -> None:
    size = 1 << 14
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(size, generator=generator) * 160 - 120
    x = torch.exp2(exponents) * (2 * torch.randint(0, 2, (size,), generator=generator) - 1)
    x[: size // 2] = torch.randn(size // 2, generator=generator)
    x[:5] = torch.tensor([0.0, 0.625, -0.625, 1e9, 3e38])
    tanh, asinh = torch.empty(size), torch.empty(size)
    _apply[(1,)](x, tanh, asinh, SIZE=size)
    for actual, function in ((tanh, torch.tanh), (asinh, torch.asinh)):
        expected = function(x.double())
        spacing = torch.from_numpy(np.spacing(expected.abs().float().numpy())).double()
        assert ((actual.double() - expected).abs() / spacing).max() <= 4
    _apply[(1,)](torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]), tanh, asinh, SIZE=4)
    assert tanh[:2].tolist() == [1, -1]
    assert asinh[:2].tolist() == [torch.inf, -torch.inf]
    assert torch.isnan(tanh[2])
    assert torch.isnan(asinh[2])


# ---------------------------------------------------------------------- tensor cores


def as_tensor_cores(
    _: object, a: TensorHandle, b: TensorHandle, sums: TensorHandle, *__: object
) -> TensorHandle:
    """A product of which a GPU may see no more than TF32: it ignores the last 13 bits."""
    one, other = (
        (np.ascontiguousarray(part.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        for part in (a, b)
    )
    return TensorHandle(np.matmul(one, other) + sums.data, sums.dtype.scalar)


@pytest.mark.parametrize("preparation", list(Preparation))
def test_three_products_in_tf32_are_as_exact_as_float32(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated in the interpreter; in what order a GPU adds up is not in this."""
    bundle, window = random_bundle(5, preparation=preparation), windows(5, 2 * BLOCK)
    with torch.no_grad():
        exact = bundle.module(Kind.CONV).double()(window.double())
        float32 = bundle.module(Kind.CONV)(window)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", as_tensor_cores)
    whole, halved = kernel(bundle), kernel(bundle)
    # Without what TF32 leaves of the weights it is another matter.
    halved._weights[whole.constants["SMALL"] :] = 0
    errors = []
    for one in (whole, halved):
        out = torch.empty(1, len(window))
        one.predict(block_of(Kind.CONV, len(window)), window.T.contiguous(), out)
        errors.append(float((out[0].double() - exact).abs().max()))
    of_float32 = float((float32.double() - exact).abs().max())
    assert errors[0] <= 2 * of_float32
    assert errors[1] > 100 * of_float32


# ---------------------------------------------------------------------- in the engine


#: Of every kind and dtype; in the interpreter, each block takes a while.
PREDICTED = (
    ("conv1.weight", Kind.CONV), ("half.weight", Kind.FC), ("brain.weight", Kind.FC),
    ("double.weight", Kind.FC), ("fc.bias", Kind.BIAS),
)  # fmt: skip


@pytest.mark.parametrize("steps", [1, *slow(3)])
def test_a_whole_prediction(
    steps: int, tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through lanes, in place of a GPU, and for every number of lanes the same bytes."""
    contents = set()
    trajectory = [{name: state[name] for name, _ in PREDICTED} for state in states()]
    for number in (1, 3):

        def predictors(inputs: Inputs, number: int = number) -> Predictors:
            lanes = [
                lane
                for _ in range(number)
                for lane in open_lanes(
                    inputs.bundle_of(Bundle), inputs.steps, CPU, triton_kernels, 2 * BLOCK
                )
            ]
            return Predictors(DevicePredictor(lanes[:number], inputs.checkpoints, "triton"))

        monkeypatch.setattr(known, "predictors", predictors)
        request = Request(
            write_trajectory(tmp_path, trajectory), tmp_path / "out", str(bundle_path), Settings(steps=steps),
            device="cpu", force=True,
        )  # fmt: skip
        with open_prediction(request) as opened:
            opened.execute()
        contents.add((tmp_path / "out").read_bytes())
    assert len(contents) == 1
    out = load_file(tmp_path / "out")
    for name, kind in PREDICTED:
        before = network()[name]
        window = torch.stack([state[name].float().reshape(-1) for state in states()[::-1]], dim=1)
        with torch.no_grad():
            answers = roll(load_bundle(bundle_path).module(kind), window, steps)
        expected = answers[:, -1].reshape(before.shape)
        # One unit in the last place of halves: a tie may be rounded to either side.
        loose = 0 if before.dtype in (torch.float32, torch.float64) else 2**-7
        torch.testing.assert_close(out[name].float(), expected, atol=1e-6, rtol=loose)
