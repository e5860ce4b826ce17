"""What the NVIDIA driver says of this machine's GPUs. Needs no CUDA package."""

import functools
import shutil
import subprocess
from dataclasses import dataclass

from ettin.artifacts.errors import HardwareError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: such as "NVIDIA GeForce RTX 3090".
        arch: compute capability, such as "sm_86".
        driver: version of the driver.
    """

    name: str
    arch: str
    driver: str


@functools.cache
def gpus() -> list[Gpu]:
    """All GPUs, in the driver's order; none without a driver. Asked once in a process.

    Raises:
        HardwareError: there is a driver, and it fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    if found.returncode:
        reason = (found.stderr or found.stdout).strip().partition("\n")[0][:120]
        raise HardwareError(f"the NVIDIA driver does not answer: nvidia-smi says '{reason}'. Reinstall the driver")
    rows = (line.split(", ") for line in found.stdout.splitlines() if line.strip())
    return [Gpu(name, "sm_" + capability.replace(".", ""), driver) for name, capability, driver in rows]
