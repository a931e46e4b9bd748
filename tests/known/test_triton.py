"""Triton's kernel without a GPU: in Triton's interpreter, and compiled for some of them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from know_cli.kinds import Kind
from know_cli.known import devices
from know_cli.known.devices import open_devices, open_lanes
from know_cli.known.module import Preparation
from tests.support.bundles import random_bundle

if TYPE_CHECKING:
    from know_cli.known.triton_kernel import TritonKernel

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (extra 'test')"
)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which: str) -> None:
    """Runs ``triton_interpreted.py``; what Triton is imported with holds for a whole process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", which,
         "tests/support/triton_interpreted.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


MMA = r"\bmma\.sync\.aligned\.m16n8k8\S*\.f32\.tf32\.tf32\.f32"
WGMMA = r"\bwgmma\.mma_async\S*\.m64n\d+k8\.f32\.tf32\.tf32"
COMPILED = [
    pytest.param(90, 5, Preparation.SPREAD, WGMMA, marks=pytest.mark.slow),
    pytest.param(80, 5, Preparation.SPREAD, MMA, marks=pytest.mark.slow),
    *(
        pytest.param(architecture, checkpoints, preparation, products, marks=pytest.mark.slow)
        for architecture, products in ((80, MMA), (86, MMA), (89, MMA), (90, WGMMA), (100, MMA), (120, MMA))
        for checkpoints in (2, 8)
        for preparation in Preparation
    ),
]  # fmt: skip


class NoDriver:
    """What Triton compiles for, without one."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by this number.
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def kernel_for(
    architecture: int, checkpoints: int, preparation: Preparation, patch: pytest.MonkeyPatch
) -> TritonKernel:
    """A kernel that is on the CPU, but as it would be on a GPU."""
    from triton.runtime import driver

    from know_cli.known.triton_kernel import TritonKernel

    patch.setattr(driver, "_active", NoDriver(architecture))
    patch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(architecture, 10))
    state = random_bundle(checkpoints).states[Kind.CONV]
    kernel = TritonKernel(state, checkpoints, preparation, torch.device("cpu"))
    kernel.constants["BLOCK"] = block_of(torch.device("cuda"))
    return kernel


def block_of(device: torch.device) -> int:
    from know_cli.known.triton_kernel import block_rows

    return block_rows(device)


@pytest.mark.parametrize(("architecture", "checkpoints", "preparation", "products"), COMPILED)
def test_it_compiles_to_products_on_tensor_cores(
    architecture: int,
    checkpoints: int,
    preparation: Preparation,
    products: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = kernel_for(architecture, checkpoints, preparation, monkeypatch)
    ptx = kernel.compile()
    # Three for each product of 16 or 64 rows, 8 inputs and 8 or more outputs.
    assert len(re.findall(products, ptx)) >= 3 * 2 * 18
    assert re.search(rf"^\.target sm_{architecture}", ptx, re.MULTILINE)
    (cubin,) = tmp_path.rglob("*.cubin")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    print(architecture, checkpoints, preparation.value, usage.splitlines()[-1])
    # What registers do not hold is on the stack: little, where it depends on the version.
    assert int(found["STACK"]) <= 256
    (facts,) = tmp_path.rglob("_predict.json")
    assert json.loads(facts.read_text())["shared"] <= 48 << 10


def test_what_has_no_products_on_tensor_cores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from know_cli.known import triton_kernel

    class Trap:
        asm: ClassVar = {"ptx": ".target sm_90a\n trap;\n exit;"}

    kernel = kernel_for(90, 5, Preparation.SPREAD, monkeypatch)
    monkeypatch.setattr(triton_kernel._predict, "warmup", lambda *_, **__: Trap)
    with pytest.raises(RuntimeError, match="without tensor cores"):
        kernel.compile()
    with pytest.raises(RuntimeError, match="have no TF32"):
        kernel_for(75, 5, Preparation.SPREAD, monkeypatch)


@pytest.mark.parametrize(
    ("architecture", "rows"), [(80, 64), (90, 64), (100, 32), (103, 32), (110, 32), (120, 64)]
)
def test_blocks_are_smaller_where_larger_ones_do_not_compile(
    architecture: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.7.1 makes nothing but a trap of 64 rows for sm_100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: divmod(architecture, 10))
    assert block_of(torch.device("cuda")) == rows


def test_where_there_is_no_gpu_to_compile_for_the_torch_kernel_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real kernel fails here as it would for a user whose Triton finds no driver."""

    def on_the_cpu(bundle, steps, _, kernels, rows=100):  # type: ignore[no-untyped-def]
        return open_lanes(bundle, steps, torch.device("cpu"), kernels, rows)

    monkeypatch.setattr(devices, "open_lanes", on_the_cpu)
    (notice,) = open_devices(random_bundle(), 1, [torch.device("cuda")]).notices
    assert re.fullmatch(
        r"Triton's kernel does not work on cuda \(.+\); KNOWN runs through plain torch operations",
        notice,
    )
