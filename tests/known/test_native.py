"""The compiled kernel against the reference module; skipped where none was compiled."""

from __future__ import annotations

import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from know_cli.checkpoints.metadata import KERNEL
from know_cli.errors import EXIT_DONE, EXIT_USAGE
from know_cli.kinds import Kind
from know_cli.known import native_kernel
from know_cli.known.bundle import Bundle
from know_cli.known.kernels import NATIVE, TORCH
from know_cli.known.module import FEATURES, HIDDEN, SQUEEZED, Preparation
from know_cli.known.native_kernel import MOST_CHECKPOINTS, NativeKernel, packed, trouble_with_native
from know_cli.known.torch_kernel import Kernel
from tests.support.bundles import random_bundle
from tests.support.command import Command, one_line
from tests.support.trajectories import write_trajectory

ROOT = Path(__file__).parents[2]
TROUBLE = trouble_with_native(5)
compiled = pytest.mark.skipif(TROUBLE is not None, reason=str(TROUBLE))


def windows(checkpoints: int, rows: int, seed: int = 0) -> Tensor:
    """``[S, rows]``: weights that move, some that do not, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(checkpoints, rows, generator=generator) * 0.05
    values = walk.cumsum(0) + torch.randn(rows, generator=generator) * 0.2
    values[:, 3::7] = values[0, 3::7]
    values[:, 5::11] = 0
    return values


def native(bundle: Bundle, kind: Kind = Kind.CONV) -> NativeKernel:
    return NativeKernel(bundle.states[kind], bundle.checkpoints, bundle.preparation)


def predict(kernel: NativeKernel, history: Tensor) -> Tensor:
    out = torch.full((history.shape[1] + 4,), 7.0)
    kernel.predict(history, out[2:-2])
    assert out[:2].eq(7).all()  # nothing beside it is touched
    assert out[-2:].eq(7).all()
    return out[2:-2]


@compiled
@given(
    st.integers(2, 16), st.integers(1, 200), st.sampled_from(list(Preparation)),
    st.sampled_from([Kind.CONV, Kind.FC, Kind.BIAS]), st.floats(1e-6, 3),
)  # fmt: skip
@settings(max_examples=30)
def test_it_is_the_reference_module(
    checkpoints: int, rows: int, preparation: Preparation, kind: Kind, scale: float
) -> None:
    bundle = random_bundle(checkpoints, seed=rows, preparation=preparation)
    window = windows(checkpoints, rows, seed=checkpoints) * scale
    with torch.no_grad():
        expected = bundle.module(kind).double()(window.T.double())
    actual = predict(native(bundle, kind), window)
    # Of what KNOWN adds: one or two units in the last place of each operation.
    largest = float(window.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 + 1e-6 * largest)


@compiled
@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from(list(Preparation)))
@settings(max_examples=30)
def test_a_row_does_not_depend_on_the_others(rows: int, cut: int, preparation: Preparation) -> None:
    kernel = native(random_bundle(5, preparation=preparation))
    window = windows(5, rows)
    whole = predict(kernel, window)
    cut = min(cut, rows)
    parts = [predict(kernel, part) for part in (window[:, :cut], window[:, cut:])]
    assert torch.cat(parts).equal(whole)
    last = predict(kernel, window[:, -1:].contiguous())
    assert last.equal(whole[-1:])


@compiled
@pytest.mark.parametrize("preparation", list(Preparation))
def test_values_at_the_ends_of_float32(preparation: Preparation) -> None:
    """What is finite, infinite and not a number is so as in torch's kernel."""
    ends = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1.0, -1e4, 1e20, 3e38, -3e38, math.inf, math.nan]
    columns = [[a, b, a] for a in ends for b in ends]
    window = torch.tensor(columns).T.contiguous()
    bundle = random_bundle(3, preparation=preparation)
    expected = torch.empty(len(columns))
    Kernel(bundle.states[Kind.FC], 3, preparation, torch.device("cpu")).predict(window, expected)
    actual = predict(native(bundle, Kind.FC), window)
    both = expected.isfinite() & actual.isfinite()
    torch.testing.assert_close(actual[both], expected[both], rtol=1e-4, atol=1e-5)
    given_finite = window.isfinite().all(dim=0)
    assert actual.isfinite()[~given_finite].equal(expected.isfinite()[~given_finite])
    assert both.sum() >= len(columns) / 4


@compiled
def test_threads_at_once_write_what_one_does() -> None:
    kernel, window = native(random_bundle(5)), windows(5, 20_000)
    expected = predict(kernel, window)
    out = torch.empty(20_000)

    def part(begin: int) -> None:
        kernel.predict(window[:, begin : begin + 100], out[begin : begin + 100])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(part, range(0, 20_000, 100)))
    assert out.equal(expected)


def test_weights_are_all_packed_once() -> None:
    for checkpoints in (2, 5, 9):
        state = random_bundle(checkpoints).states[Kind.CONV]
        inputs = checkpoints + checkpoints - 1
        hidden = (inputs + 2) * (SQUEEZED + HIDDEN) + 2 * 2 * HIDDEN * (SQUEEZED + 1)
        features = 2 * FEATURES * (SQUEEZED + 1 + HIDDEN + 1)
        assert len(packed(state)) == 1 + hidden + features


# ------------------------------------------------------------------ the command line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_trajectory(tmp_path)
    return tmp_path


def kernel_of(folder: Path, name: str) -> str:
    from safetensors import safe_open

    with safe_open(str(folder / name), "pt") as file:
        return str(file.metadata()[KERNEL])


@compiled
def test_it_is_the_default_and_any_number_of_threads_writes_the_same(
    run: Path, bundle_path: Path, know: Command
) -> None:
    command = ("predict", "ckpt0..ckpt4", "--weights", bundle_path, "--steps", 2)
    for threads in (1, 2, 3):
        done = know(*command, "-o", f"out{threads}", "--threads", threads, cwd=run)
        assert done.returncode == EXIT_DONE, done.stderr
        assert (run / f"out{threads}").read_bytes() == (run / "out1").read_bytes()
    assert kernel_of(run, "out1") == NATIVE
    assert know(*command, "-o", "own", "--kernel", NATIVE, cwd=run).returncode == EXIT_DONE
    assert (run / "own").read_bytes() == (run / "out1").read_bytes()
    report = know(*command, "-o", "other", "--kernel", TORCH, "--json", "r.json", cwd=run)
    assert report.returncode == EXIT_DONE, report.stderr
    assert kernel_of(run, "other") == TORCH
    assert json.loads((run / "r.json").read_text())["kernel"] == TORCH
    for name in ("out1", "other"):  # each is computed again by the kernel that made it
        done = know("verify", name, "ckpt0..ckpt4", "--weights", bundle_path, cwd=run)
        assert done.returncode == EXIT_DONE, done.stdout + done.stderr
        assert "rounding" not in done.stderr


def test_where_none_was_compiled_torch_computes(
    run: Path, bundle_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("predict", "ckpt0..ckpt4", "--weights", bundle_path)
    with monkeypatch.context() as patch:
        patch.setattr(native_kernel, "LIBRARY", run / "no library")
        assert know(*command, "-o", "out", cwd=run).returncode == EXIT_DONE
        assert kernel_of(run, "out") == TORCH
        done = know(*command, "-o", "no", "--kernel", NATIVE, cwd=run)
        assert done.returncode == EXIT_USAGE
        assert "--kernel native: it was not compiled when" in one_line(done.stderr)
    with monkeypatch.context() as patch:
        patch.setattr(native_kernel, "_library", lambda: None)
        patch.setattr(native_kernel, "LIBRARY", Path(__file__))
        done = know(*command, "-o", "no", "--kernel", NATIVE, cwd=run)
        assert "or this machine cannot run it (it needs AVX2)" in one_line(done.stderr)


def test_kernels_that_cannot_be(run: Path, bundle_path: Path, know: Command) -> None:
    command = ("predict", "ckpt0..ckpt4", "--weights", bundle_path, "-o", "out", "--device", "cpu")
    for kernel, words in (
        ("fast", "--kernel fast: is none of auto, native, torch, triton"),
        ("triton", "--kernel triton: is for --device cuda, not for cpu"),
    ):
        done = know(*command, "--kernel", kernel, cwd=run)
        assert done.returncode == EXIT_USAGE
        assert words in one_line(done.stderr)
    assert not (run / "out").exists()


def test_windows_that_are_too_long_are_torch_s() -> None:
    trouble = trouble_with_native(MOST_CHECKPOINTS + 1)
    assert trouble == "it reads at most 32 checkpoints"
    state = random_bundle(2).states[Kind.CONV]
    with pytest.raises(RuntimeError, match="at most 32"):
        NativeKernel(state, MOST_CHECKPOINTS + 1, Preparation.RAW)


# ------------------------------------------------------------------ compiling


def hook() -> Any:
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def building(tmp_path: Path) -> Any:
    """The hook for a copy of the sources."""
    module = hook()
    for source in module.LIBRARIES:
        (tmp_path / source).parent.mkdir(parents=True)
        shutil.copy(ROOT / source, tmp_path / source)
    made = module.NativeHook(str(tmp_path), {}, None, None, str(tmp_path), "wheel")
    return made, module


def initialised(building: Any, version: str = "standard") -> dict[str, Any]:
    data: dict[str, Any] = {"artifacts": []}
    building[0].initialize(version, data)
    return data


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@compiled
def test_a_wheel_has_the_kernel_and_its_platform(building: Any, tmp_path: Path) -> None:
    data = initialised(building)
    assert data["artifacts"] == ["know_cli/known/_native.so", "know_cli/passes/_native.so"]
    assert data["tag"].startswith("py3-none-")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in data["artifacts"])


@pytest.mark.parametrize("trouble", ["no compiler", "it fails", "other processor", "unwanted"])
def test_without_a_kernel_the_wheel_is_for_all(
    building: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    made, module = building
    monkeypatch.delenv("KNOW_NATIVE", raising=False)
    old = [tmp_path / source.with_name(module.NAME) for source in module.LIBRARIES]
    for library in old:
        library.write_bytes(b"of an earlier installation")
    if trouble == "no compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
    elif trouble == "it fails":
        monkeypatch.setenv("CC", f"{sys.executable} -c 'raise SystemExit(1)'")
    elif trouble == "other processor":
        monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    else:
        monkeypatch.setenv("KNOW_NATIVE", "no")
    assert initialised(building) == {"artifacts": []}
    assert not any(library.exists() for library in old)
    if trouble != "unwanted":
        monkeypatch.setenv("KNOW_NATIVE", "require")
        with pytest.raises(RuntimeError, match="C compiler|failed|not written for"):
            made.initialize("standard", {"artifacts": []})
