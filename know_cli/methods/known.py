"""KNOWN: a hyper-model that reads each parameter's history (arXiv 2508.05059).

Step n predicts from a window that ends with the n − 1 predictions before it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from know_cli.engine.plan import Block
from know_cli.engine.predictor import Predictors
from know_cli.errors import UsageError
from know_cli.kinds import Kind
from know_cli.known.bundle import Bundle
from know_cli.known.devices import open_devices
from know_cli.known.kernels import AUTO, NATIVE, TORCH, check_kernel_device
from know_cli.known.native_kernel import NativeKernel, trouble_with_native
from know_cli.known.torch_kernel import Kernel
from know_cli.methods.inputs import Inputs


class KnownPredictor:
    """Predicts with the three KNOWN of a bundle, a step at a time.

    Args:
        bundle: the weights.
        device: where it runs.
        kernel: ``torch``, or on the CPU ``native``.
    """

    def __init__(self, bundle: Bundle, device: torch.device, kernel: str = TORCH) -> None:
        # A thread works on one kind at a time, so the kinds can share its workspace.
        local = threading.local()
        size, preparation = bundle.checkpoints, bundle.preparation
        self._kernels: dict[Kind, Kernel | NativeKernel] = {
            kind: NativeKernel(state, size, preparation)
            if kernel == NATIVE
            else Kernel(state, size, preparation, device, local)
            for kind, state in bundle.states.items()
        }
        self.device = device

    @property
    def block_rows(self) -> int:
        """The largest number of rows that it takes at a time."""
        return self._kernels[Kind.CONV].block_rows

    @property
    def thread_bytes(self) -> int:
        """Bytes of main memory that it needs in each thread."""
        return self._kernels[Kind.CONV].thread_bytes

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        """Predict one step; see :class:`~know_cli.engine.predictor.Predictor`."""
        self._kernels[block.kind].predict(history[step - 1 :], out)


def predictors(inputs: Inputs) -> Predictors:
    """Open the method.

    Raises:
        CheckpointError: the bundle is for another number of checkpoints.
        UsageError: a device does not work, or the kernel that is wished for.
    """
    bundle, devices = inputs.bundle_of(Bundle), inputs.devices
    if devices[0].type == "cpu":
        kernel = choose_kernel(inputs, bundle)
        return Predictors(KnownPredictor(bundle, devices[0], kernel), kernel=kernel)
    check_kernel_device(inputs.kernel, devices[0].type)
    return Predictors(open_devices(bundle, inputs.steps, devices, inputs.kernel))


def choose_kernel(inputs: Inputs, bundle: Bundle) -> str:
    """The kernel on the CPU: the one that is wished for, else the native one where it runs.

    Args:
        inputs: what the method is given.
        bundle: the weights.

    Raises:
        UsageError: the one that is wished for does not run here.
    """
    wish = inputs.kernel
    check_kernel_device(wish, inputs.devices[0].type)
    trouble = trouble_with_native(bundle.checkpoints, factor=bundle.factor)
    if wish == NATIVE and trouble is not None:
        raise UsageError(f"--kernel {NATIVE}: {trouble}; leave it out, or take --kernel {TORCH}")
    return NATIVE if trouble is None and wish in (AUTO, NATIVE) else TORCH
