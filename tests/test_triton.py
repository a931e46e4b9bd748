"""Triton's kernel without a GPU: in Triton's interpreter, and compiled for two of them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from know_cli.engine import devices
from know_cli.engine.devices import open_devices, open_lanes
from know_cli.hypermodel import Preparation
from know_cli.kinds import Kind
from tests.conftest import random_bundle

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (extra 'dev')"
)


def test_in_the_interpreter() -> None:
    """Runs ``triton_interpreted.py``; what Triton is imported with holds for a whole process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreted.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


COMPILED = [
    pytest.param(80, 5, Preparation.SPREAD, r"\bmma\.sync\.aligned\.m16n8k8\S*\.f32\.tf32\.tf32\.f32"),
    pytest.param(90, 5, Preparation.SPREAD, r"\bwgmma\.mma_async\S*\.m64n\d+k8\.f32\.tf32\.tf32"),
    *(
        pytest.param(architecture, checkpoints, preparation, r"\b(mma\.sync|wgmma\.mma_async)\S*tf32",
                     marks=pytest.mark.slow)
        for architecture in (80, 86, 89, 90)
        for checkpoints in (2, 8)
        for preparation in Preparation
    ),
]  # fmt: skip


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
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from know_cli.engine.triton_kernel import OPTIONS, TritonKernel, _predict

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    state = random_bundle(checkpoints).states[Kind.CONV]
    constants = TritonKernel(state, checkpoints, preparation, torch.device("cpu")).constants
    # As Triton has it for memory of torch's and blocks whose rows are a multiple of 16.
    pointers = dict.fromkeys(("history", "out", "weights"), "*fp32")
    numbers = dict.fromkeys(("rows", "steps", "history_stride", "out_stride"), "i32")
    signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    aligned = [list(signature).index(name) for name in (*pointers, "history_stride", "out_stride")]
    source = ASTSource(
        _predict, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
    ptx = compiled.asm["ptx"]
    # Three for each: a matrix of 16 rows, or of 64, is a product of 8 × 8 and 8 of each other.
    assert len(re.findall(products, ptx)) >= 3 * 2 * 18
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert compiled.metadata.shared <= 48 << 10
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    print(architecture, checkpoints, preparation.value, usage.splitlines()[-1])
    # What registers do not hold is on the stack: little, where it depends on the version.
    assert int(found["STACK"]) <= 256


def test_where_there_is_no_gpu_to_compile_for_the_torch_kernel_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real kernel fails here as it would for a user whose Triton finds no driver."""

    def on_the_cpu(bundle, steps, _, kernels):  # type: ignore[no-untyped-def]
        return open_lanes(bundle, steps, torch.device("cpu"), kernels)

    monkeypatch.setattr(devices, "open_lanes", on_the_cpu)
    (notice,) = open_devices(random_bundle(), 1, [torch.device("cuda")]).notices
    assert re.fullmatch(
        r"cuda: Triton's kernel does not work \(.+\); KNOWN runs through plain torch operations",
        notice,
    )
