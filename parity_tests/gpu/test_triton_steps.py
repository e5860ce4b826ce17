"""Each fused kernel against its torch form in float64: on a GPU, or without one in Triton's interpreter.

The interpreter (3.7) computes erf in Python, loads bf16 exactly, and cuts float32 to bf16 instead of rounding it, so
bf16 may be off by a whole unit there and by half of one on a GPU.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from ettin.gpu.engines.flash import Steps

pytest.importorskip("triton", reason="needs triton, which has wheels for Linux only")

from ettin.gpu.engines.triton_steps import TritonSteps

TYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error of rounding to a type, of the value.
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
F32 = 2**-23
SMALLEST = 2**-25  # half of the smallest step of fp16


def random(*size: int, scale: float = 1.0, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    values = torch.randn(size, generator=generator) * scale
    values.flatten()[::97] *= 8.0  # some stand out
    return values.to(dtype).to(DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor, computed: torch.Tensor | float) -> None:
    """Within the rounding of the result, and that of its computation in float32."""
    assert found.shape == expected.shape and found.dtype != expected.dtype
    excess = (found.double() - expected).abs() - UNIT[found.dtype] * expected.abs() - SMALLEST - F32 * computed
    assert not found.isnan().any() and (excess <= 0).all(), float(excess.max())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
@pytest.mark.parametrize(("rows", "width"), [(0, 256), (1, 384), (7, 96), (33, 256), (5, 768), (3, 1024), (2, 1792)])
def test_sum_and_norm(rows: int, width: int, scale: float, dtype: torch.dtype) -> None:
    x = random(rows, width, scale=scale, dtype=dtype) + 2 * scale
    change = random(rows + 1, width, scale=scale, dtype=dtype)[1:]
    kept = x.clone()
    total, normed = TritonSteps().added(x, change, 1e-5)
    assert torch.equal(x, kept)
    expected, _ = Steps().added(x.double(), change.double(), 1e-5)
    assert_close(total, expected, expected.abs())
    # The norm is that of the sum as it is stored, which the next layer adds to.
    wide = total.double()
    _, expected = Steps().added(wide, torch.zeros_like(wide), 1e-5)
    spread = (
        wide.abs().amax(-1, keepdim=True)
        / ((wide - wide.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    )
    assert_close(normed, expected, 4 * (spread + expected.abs()))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("parts", "count"), [(3, 2), (2, 1)])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(0, 4, 64), (1, 4, 64), (5, 3, 32), (9, 12, 64), (2, 28, 64), (3, 2, 48)]
)
def test_rotation(tokens: int, heads: int, head_dim: int, parts: int, count: int, dtype: torch.dtype) -> None:
    joint = random(tokens, parts, heads, head_dim, scale=4.0, dtype=dtype)
    angles = random(300, head_dim // 2, dtype=torch.float32).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE) * 37 % 300
    kept = joint.clone()
    steps = TritonSteps()
    found = steps.rotated(joint, count, steps.rope(cos, sin, positions))
    plain = Steps()
    expected = plain.rotated(kept.double(), count, plain.rope(cos.double(), sin.double(), positions))
    assert len(found) == len(expected) == parts
    for index, (part, wanted) in enumerate(zip(found, expected, strict=True)):
        # Attention takes them as they lie.
        assert part.stride(-1) == 1 and part.untyped_storage().data_ptr() == joint.untyped_storage().data_ptr()
        if index < count:
            assert_close(part, wanted, 2 * 64.0)
        else:
            assert torch.equal(part, kept[:, index])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
@pytest.mark.parametrize(
    ("tokens", "width"), [(0, 384), (1, 384), (3, 576), (7, 80), (5, 768), (4, 1152), (3, 2624), (1, 3840)]
)
def test_gelu_and_gate(tokens: int, width: int, scale: float, dtype: torch.dtype) -> None:
    up_gate = random(tokens, 2 * width, scale=scale, dtype=dtype)
    kept = up_gate.clone()
    found = TritonSteps().gated(up_gate)
    assert torch.equal(up_gate, kept)
    wide = up_gate.double()
    up, gate = wide.chunk(2, dim=-1)
    # 1 + erf cancels where up is negative, so its error is one of up.
    assert_close(found, Steps().gated(wide), 2 * (up * gate).abs())


_COMPILE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.runtime.jit import JITFunction
from ettin.gpu.engines.triton_steps import TritonSteps

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)

triton.runtime.driver.set_active(Driver())
compiled, launch = [], JITFunction.run
JITFunction.run = lambda self, *a, warmup, **k: compiled.append(launch(self, *a, warmup=True, **k))
steps = TritonSteps()
for hidden, heads, width in ((256, 4, 384), (384, 6, 576), (768, 12, 1152), (1792, 28, 3840)):
    x = torch.zeros(4, hidden, dtype=torch.bfloat16)
    steps.added(x, x.clone(), 1e-5)
    table = torch.zeros(8, 64)
    joint = torch.zeros(4, 3, heads, 64, dtype=torch.bfloat16)
    steps.rotated(joint, 2, steps.rope(table, table.clone(), torch.zeros(4, dtype=torch.int32)))
    steps.gated(torch.zeros(4, 2 * width, dtype=torch.bfloat16))
for kernel in compiled:
    assert len(kernel.asm["cubin"]) > 0
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"]); file.flush()
        arch = "sm_90a" if sys.argv[1] == "90" else "sm_" + sys.argv[1]
        said = subprocess.run([get_ptxas(int(sys.argv[1])).path, "-v", "-arch=" + arch, file.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr
    print(json.dumps([kernel.metadata.name, kernel.asm["ptx"], said]))
"""


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_gpus(architecture: int) -> None:
    """Without a GPU: to machine code, with wide loads and stores, rounding to nearest, and without spills."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE, str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 12
    for name, code, said in kernels:
        assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code and "cvt.rn.bf16x2.f32" in code, name
        assert "0 bytes spill stores, 0 bytes spill loads" in said, (name, said)
