"""What this machine has: its processor, its GPUs as the NVIDIA driver lists them, and its installed packages."""

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ettin.artifacts.errors import HardwareError, UsageError


def installed_version(package: str) -> str:
    """Version of a distribution, or that it is not installed."""
    return installed_versions([package]).get(package, "not installed at export")


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Version by distribution name, of those that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str  # such as "NVIDIA GeForce RTX 3090"
    arch: str  # its compute capability, such as "sm_86"
    driver: str  # version of the driver


@functools.cache
def gpus() -> list[Gpu]:
    """All GPUs, in the driver's order; none without a driver. Raises `HardwareError` if the driver fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    if answer.returncode:
        reason = (answer.stderr or answer.stdout).strip().partition("\n")[0][:120]
        raise HardwareError(f"the NVIDIA driver does not answer: nvidia-smi says '{reason}'. Reinstall the driver")
    rows = (line.split(", ") for line in answer.stdout.splitlines() if line.strip())
    return [Gpu(name, "sm_" + capability.replace(".", ""), driver) for name, capability, driver in rows]


# oneDNN's names (ONEDNN_MAX_CPU_ISA) in ascending order, as far as they matter here, and the first of them
# that has bf16 arithmetic. Source: oneDNN documentation, "CPU Dispatcher Control".
_ISA_ORDER = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16", "AVX10_1_512", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512_AMX",
    "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX_FP16", "DEFAULT", "ALL",
)  # fmt: skip
_FIRST_BF16 = "AVX512_CORE_BF16"
_FIRST_VNNI = "AVX2_VNNI"

INTERESTING = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@functools.cache
def _cpu_info(key: str) -> str:
    """A value of the first processor in /proc/cpuinfo; "" where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return line.split(":")[1].strip()
    return ""


@functools.cache
def flags() -> frozenset[str]:
    """Feature flags of the first processor, as Linux names them; empty where there is no /proc/cpuinfo, and on ARM.

    An emulated ARM processor has the /proc/cpuinfo of the one that emulates it.
    """
    return frozenset() if is_arm() else frozenset(_cpu_info("flags").split())


def model_name() -> str:
    """The name of the processor."""
    return _cpu_info("model name") or "unknown processor"


def is_arm() -> bool:
    """Whether this is a 64-bit ARM processor."""
    return platform.machine().lower() in {"aarch64", "arm64"}


def isa_limit() -> str | None:
    """The user's limit on oneDNN's instruction sets, if any."""
    value = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return value.upper() if value else None


def has_bf16() -> bool:
    """Whether bf16 arithmetic is there and not switched off by `ONEDNN_MAX_CPU_ISA`.

    OpenVINO's own list of capabilities ignores that limit: a bf16 graph then fails to compile.
    """
    return is_allowed(_FIRST_BF16) and bool(flags() & {"avx512_bf16", "amx_bf16"})


def lacks_vnni() -> bool:
    """Whether this processor is known to have no integer dot products, or they are switched off.

    Without them, sums of 8-bit products saturate at 16 bits, so int8 scores would be silently wrong.
    """
    return bool(flags()) and not (is_allowed(_FIRST_VNNI) and flags() & {"avx_vnni", "avx512_vnni", "amx_int8"})


def is_allowed(isa: str) -> bool:
    """Whether `ONEDNN_MAX_CPU_ISA` allows an instruction set, by oneDNN's name for it; of others it limits none."""
    limit = isa_limit()
    return limit not in _ISA_ORDER or isa not in _ISA_ORDER or _ISA_ORDER.index(limit) >= _ISA_ORDER.index(isa)


def available_cpus(system: Path = Path("/sys"), *, performance_only: bool = False) -> int:
    """Number of cores that this process may use, within a container's CPU limit.

    A second thread on a core (hyperthreading) does not count: both would share the units that matrix products wait for.

    Args:
        system: where the kernel describes the machine.
        performance_only: on a hybrid processor, leave out the efficiency cores.
    """
    cores = _cores(system, performance_only)
    return max(1, min(cores, _quota(system) or cores))


def uses_all_cpus(threads: int, system: Path = Path("/sys"), *, performance_only: bool = False) -> bool:
    """Whether so many threads take every core that this process may run on, so that no other process needs one.

    A container's CPU limit does not count: it says for how long its processes run, not on which cores.
    """
    return threads >= _cores(system, performance_only)


def _cores(system: Path, performance_only: bool) -> int:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if performance_only:
        allowed = allowed & _cpu_list(system / "devices/cpu_core/cpus") or allowed
    siblings = (_cpu_list(system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed)
    return len({min(shared, default=cpu) for cpu, shared in zip(allowed, siblings, strict=True)})


def default_threads(system: Path = Path("/sys"), *, performance_only: bool = False) -> int:
    """Number of threads that this process should use: a core each, see `available_cpus`; at most `OMP_NUM_THREADS`.

    Ray and Spark set that variable to the cores that they assign to a worker process, which they do not enforce.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list: one for each level of nesting
    cpus = available_cpus(system, performance_only=performance_only)
    return min(cpus, int(limit)) if limit.isdecimal() and int(limit) > 0 else cpus


def is_hybrid(system: Path = Path("/sys")) -> bool:
    """Whether the processor has performance and efficiency cores."""
    return bool(_cpu_list(system / "devices/cpu_core/cpus")) and bool(_cpu_list(system / "devices/cpu_atom/cpus"))


def _cpu_list(path: Path) -> set[int]:
    """The kernel's list format, "0-3,8"; empty where there is no such file."""
    try:
        ranges = [part.split("-") for part in path.read_text(encoding="ascii").strip().split(",") if part]
    except OSError:
        return set()
    return {cpu for part in ranges for cpu in range(int(part[0]), int(part[-1]) + 1)}


def _quota(system: Path) -> int | None:
    """Processors that a cgroup (v2 or v1) allows, rounded up; None: no limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            text = " ".join((system / "fs/cgroup" / name).read_text(encoding="ascii") for name in names)
            quota, period = text.split()
            return math.ceil(int(quota) / int(period)) if quota.isdigit() and int(quota) > 0 else None
    return None


@dataclass(frozen=True)
class CpuPlan:
    """How CPU threads are divided among the batches that are scored at the same time."""

    streams: int
    threads_per_stream: int

    @classmethod
    def of(cls, threads: int | None, streams: int | None) -> "CpuPlan":
        """A plan for this machine; see `load`. Raises `UsageError` for more streams than threads.

        Streams take batches from one queue, so a slow core does less. In one stream, all threads would wait for it.
        """
        threads = threads or default_threads(performance_only=streams == 1)
        streams = streams or threads
        if streams > threads:
            raise UsageError(f"streams is {streams}, expected at most the number of threads, {threads}")
        return cls(streams, threads // streams)


def own_source() -> str:
    """The folder that this project was installed from (PEP 610), or its name and version on the index."""
    # Several may have the name: a checkout that is the current folder has a record of its own, without the origin.
    for distribution in importlib.metadata.distributions(name="ettin-export"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        url = urllib.parse.urlsplit(origin.get("url", ""))
        if url.scheme == "file":
            return urllib.parse.unquote(url.path)
    return f"{'ettin-export'}=={importlib.metadata.version('ettin-export')}"
