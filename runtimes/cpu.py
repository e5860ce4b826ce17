"""What this machine's processor offers."""

import functools
import math
import os
from pathlib import Path

# oneDNN's names (ONEDNN_MAX_CPU_ISA) in ascending order, as far as they matter here, and the first of them
# that has bf16 arithmetic. Source: oneDNN documentation, "CPU Dispatcher Control".
_ISA_ORDER = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16", "AVX10_1_512", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_1_512_AMX",
    "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX_FP16", "DEFAULT", "ALL",
)  # fmt: skip
_FIRST_BF16 = _ISA_ORDER.index("AVX512_CORE_BF16")
_FIRST_VNNI = _ISA_ORDER.index("AVX2_VNNI")

INTERESTING = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@functools.cache
def flags() -> frozenset[str]:
    """Feature flags of the first processor, as Linux names them; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


@functools.cache
def model_name() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def isa_limit() -> str | None:
    """The user's limit on oneDNN's instruction sets, if any."""
    value = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return value.upper() if value else None


def has_bf16() -> bool:
    """Whether bf16 arithmetic is there and not switched off by `ONEDNN_MAX_CPU_ISA`.

    OpenVINO's own capability list ignores that limit: a bf16 graph then fails to compile.
    """
    return _limit_reaches(_FIRST_BF16) and bool(flags() & {"avx512_bf16", "amx_bf16"})


def lacks_vnni() -> bool:
    """Whether this is known to be a processor without integer dot products, or one where they are switched off.

    Without them, sums of 8-bit products saturate at 16 bits: int8 scores would be wrong without a word.
    """
    return bool(flags()) and not (_limit_reaches(_FIRST_VNNI) and flags() & {"avx_vnni", "avx512_vnni", "amx_int8"})


def _limit_reaches(first: int) -> bool:
    limit = isa_limit()
    return limit not in _ISA_ORDER or _ISA_ORDER.index(limit) >= first


def available_cpus() -> int:
    """Processors that this process may use: its affinity, and a container's CPU limit (cgroup v2 or v1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            base = Path("/sys/fs/cgroup/cpu")
            quota = (base / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (base / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        except OSError:
            return count
    if not quota.isdigit() or not period.isdigit() or int(quota) <= 0:
        return count
    return max(1, min(count, math.ceil(int(quota) / int(period))))
