"""On a real CUDA device, where there is one; everything else is tested without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.engine.settings import Settings
from know_cli.errors import CheckpointError
from know_cli.kinds import Kind
from know_cli.known.devices import open_devices, open_lanes, torch_kernels, triton_kernels
from know_cli.known.module import roll
from know_cli.known.preparation import Preparation
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.bundles import random_bundle
from tests.support.plans import block_of
from tests.support.trajectories import network, write_trajectory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("kernels", [triton_kernels, torch_kernels])
@pytest.mark.parametrize("preparation", list(Preparation))
@pytest.mark.parametrize("checkpoints", range(2, 9))
def test_both_kernels_are_the_reference_module(
    checkpoints: int, preparation: Preparation, kernels: object
) -> None:
    bundle = random_bundle(checkpoints, preparation=preparation)
    windows = torch.randn(1000, checkpoints, generator=torch.Generator().manual_seed(1)) * 0.2
    windows[5::7] = 0.05
    for steps, rows in ((1, 1), (2, 64), (3, 1000)):
        (lane, *_) = open_lanes(bundle, steps, DEVICE, kernels, 1024)  # type: ignore[arg-type]
        for kind in (Kind.CONV, Kind.BIAS):
            out = torch.full((steps, rows), torch.nan)
            lane.start(block_of(kind, rows), windows[:rows].T.contiguous(), out)
            lane.finish()
            with torch.no_grad():
                expected = roll(bundle.module(kind), windows[:rows], steps)
            torch.testing.assert_close(out.T, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_triton_kernel_reads_every_float_dtype(dtype: torch.dtype) -> None:
    bundle = random_bundle(5)
    kernel = triton_kernels(bundle, 1, DEVICE, 0)[Kind.FC]
    windows = (torch.randn(300, 5, generator=torch.Generator().manual_seed(1)) * 0.2).to(dtype)
    out = torch.empty(1, 300, device=DEVICE)
    kernel.predict(block_of(Kind.FC, 300), windows.T.contiguous().to(DEVICE), out)
    with torch.no_grad():
        expected = bundle.module(Kind.FC)(windows.float())
    torch.testing.assert_close(out[0].cpu(), expected, atol=2e-6, rtol=0)


def test_triton_is_what_runs() -> None:
    pytest.importorskip("triton")
    predictor = open_devices(random_bundle(), 2, [DEVICE])
    assert (predictor.kernel, predictor.notices) == ("triton", ())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A trajectory of several blocks and batches, of mixed dtypes."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {
        **network(),
        "large.weight": torch.randn(1300, 1100, generator=generator) * 0.1,
        "half.large.weight": (torch.randn(700, 900, generator=generator) * 0.1).bfloat16(),
    }
    paths = []
    for k in range(5):
        paths.append(folder / f"ckpt{k}.safetensors")
        save_file(state, paths[-1])
        for name, tensor in state.items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.01
                state[name] = (tensor.float() + noise).abs().to(tensor.dtype)
    return paths


def predict(paths: list[Path], bundle: Path, output: Path, device: str, memory: int) -> bytes:
    request = Request(
        paths, output, str(bundle), Settings(steps=2, max_memory=memory), device=device, force=True
    )
    with open_prediction(request) as opened:
        opened.execute()
    return output.read_bytes()


def test_a_whole_prediction(large: list[Path], bundle_path: Path, tmp_path: Path) -> None:
    contents = {
        predict(large, bundle_path, tmp_path / "out", device, memory << 20)
        for device in ("cuda", "cuda:0", "cuda:all")
        for memory in (64, 200, 1024)
    }
    assert len(contents) == 1
    predict(large, bundle_path, tmp_path / "cpu", "cpu", 1 << 30)
    ours, expected = load_file(tmp_path / "out"), load_file(tmp_path / "cpu")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        # Relative for values above 1, a step of which is larger.
        loose = 4e-6 if tensor.dtype in (torch.float32, torch.float64) else 2**-7
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=loose)


def test_a_prediction_that_is_not_finite_is_refused_or_replaced(
    bundle_path: Path, tmp_path: Path
) -> None:
    trajectory = [{"w": torch.tensor([[0.1, 3e38], [0.2, 0.3]]) * (1 - 0.01 * k)} for k in range(5)]
    paths = write_trajectory(tmp_path, trajectory)
    with pytest.raises(CheckpointError, match=r"tensor 'w': the prediction of element \[0, 1\]"):
        predict(paths, bundle_path, tmp_path / "out", "cuda", 1 << 30)
    settings = Settings(steps=2, allow_nonfinite=True)
    request = Request(paths, tmp_path / "out", str(bundle_path), settings, device="cuda")
    with open_prediction(request) as opened:
        opened.execute()
    out = load_file(tmp_path / "out")["w"]
    assert out[0, 1] == trajectory[0]["w"][0, 1]
    assert torch.isfinite(out).all()
    assert not torch.equal(out[1], trajectory[0]["w"][1])
