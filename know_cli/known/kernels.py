"""Which kernels run KNOWN, and which one takes; free of torch."""

from __future__ import annotations

from know_cli.errors import UsageError

#: Compiled, on CPUs; torch's operations, anywhere; Triton's, on CUDA devices.
NATIVE, TORCH, TRITON = "native", "torch", "triton"
#: Takes the fastest that runs.
AUTO = "auto"
KERNELS = (AUTO, NATIVE, TORCH, TRITON)
#: As a help text shows them.
KERNEL_NAMES = "|".join(KERNELS)


def check_kernel_name(name: str) -> None:
    """Refuse a name that no kernel has.

    Raises:
        UsageError: the message lists them.
    """
    if name not in KERNELS:
        raise UsageError(f"--kernel {name or repr(name)}: is none of {', '.join(KERNELS)}")


def check_kernel_device(name: str, device: str) -> None:
    """Refuse a kernel that is for other devices.

    Args:
        name: of a kernel.
        device: type of the device, such as ``cpu``.

    Raises:
        UsageError: the message says which kernel runs there.
    """
    place = {NATIVE: "cpu", TRITON: "cuda"}.get(name, device)
    if place != device:
        raise UsageError(
            f"--kernel {name}: is for --device {place}, not for {device}; leave it out, or take "
            f"--kernel {TORCH}"
        )
