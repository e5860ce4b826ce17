"""Checkpoint → TensorRT and TensorRT-RTX engines of the packed graph, or the kit to build one elsewhere.

Why the graph has no Attention and no RotaryEmbedding of ONNX's opset 23: both were tried with TensorRT-RTX 1.7.1 for
sm_86 (17m shape, one profile, no GPU) and ONNX Runtime 1.32, and give the same kernels.

- Attention with `softmax_precision` is not read: "Setting softmax precision is not supported in TensorRT Attention"; so
  ONNX would have the softmax in bf16. With one query, as in the last layer, it is not built: "Attention operation was
  not supported by a dedicated kernel". In the other global layers it gives 120 layers with 7 fused attentions, as the
  graph without it, and an engine of the same size. ONNX Runtime refuses the broadcast mask ("inconsistent
  q_sequence_length"); with the mask expanded to [pairs, 1, longest, longest] its scores are equal.
- RotaryEmbedding in fp32, with two-dimensional caches and position ids, is read and built. Scores of ONNX Runtime are
  equal to 1.1e-5. It gives as many kernels of each kind, and an engine that is 1.8 of 43.3 MB smaller, since its tables
  are half as wide. TensorRT reads it from 10.15 on (its changelog), and kits are for 10.14, too.
"""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ettin.artifacts.manifest import Engine, Needs
from ettin.artifacts.targets import target_named
from ettin.export.options import BuildOptions
from ettin.export.targets.to_onnx import FORM, PackedOnnxWriter, packed_onnx
from ettin.export.writer import PACKED, Lowered, Model, Writer
from ettin.gpu.engines.profiles import BATCH_PAIRS, BATCH_TOKENS, Profile, profiles
from ettin.gpu.targets.tensorrt_builder import build, builder_module, check_options, checked_arch
from ettin.runtimes.machine import gpus

_ENTRY = "engine/model.engine"
_SCRIPT = "engine/build.sh"
_RELEASES = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"  # and their versions


class TensorRtWriter(Writer):
    """Writes `engine/model.engine`, or with `--build-kit` what builds it.

    "bf16" has linear layers and attention in bf16, the rest in fp32.
    """

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        shapes = profiles(model.max_length_tokens)
        (folder / "engine").mkdir()
        arch, version, fused_attentions = (
            self._write_kit(model, shapes, folder) if self.build.kit else self._write_engine(model, shapes, folder)
        )
        return Lowered(
            entry=_ENTRY,
            interface=PACKED,
            needs=Needs(device="cuda", isa=(), package=self.target.runtime.packages[0], version=version),
            graph=asdict(FORM) | {"batch_tokens": BATCH_TOKENS, "batch_pairs": BATCH_PAIRS},
            engine=Engine(arch=arch, profiles=tuple(shapes), fused_attentions=fused_attentions),
        )

    def _write_engine(self, model: Model, shapes: list[Profile], folder: Path) -> tuple[str, str, int | None]:
        """Returns the architecture, the builder's version and the number of fused attentions."""
        arch = checked_arch(self.target.name, self.build.arch, gpus())
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
            onnx = Path(scratch) / "model.onnx"
            packed_onnx(model, "bfloat16", onnx)
            built = build(self.target.name, onnx, shapes, arch, self.build)
        (folder / _ENTRY).write_bytes(built.engine)
        return arch, str(builder_module(self.target.name).__version__), built.fused_attentions

    def _write_kit(self, model: Model, shapes: list[Profile], folder: Path) -> tuple[str, str, int | None]:
        arch, script = str(self.build.arch), folder / _SCRIPT
        packed_onnx(model, "bfloat16", folder / "engine" / "model.onnx")
        script.write_text(_build_script(shapes, arch, self.build), encoding="utf-8")
        script.chmod(0o755)
        return arch, "that of the container", None

    def proof(self, precision: str) -> Writer:
        return PackedOnnxWriter(target_named("onnx"))

    def check(self) -> None:
        check_options(self.target.name, self.build)

    def check_runs_here(self, precision: str) -> None:
        arch = checked_arch(self.target.name, self.build.arch, gpus())
        self.target.runtime_class().check_machine(self.target.name, arch)


def _build_script(shapes: Sequence[Profile], arch: str, options: BuildOptions) -> str:
    """A shell script that builds the engine with `trtexec`, on the machine that has TensorRT and the GPU."""
    words = ["--onnx=model.onnx", "--saveEngine=model.engine.part", "--profilingVerbosity=detailed"]
    words += ["--timingCacheFile=timing.cache", "--skipInference"]
    if options.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}M")
    for number, profile in enumerate(shapes):
        words.append(f"--profile={number}")
        for kind in ("min", "opt", "max"):
            spec = ",".join(f"{name}:{'x'.join(map(str, getattr(shape, kind)))}" for name, shape in profile.items())
            words.append(f"--{kind}Shapes={spec}")
    arguments = " \\\n  ".join(shlex.quote(word) for word in words)
    return f"""#!/bin/sh
# Builds the engine that this folder lacks, on a machine with a GPU of {arch}:
#   docker run --rm --gpus all -v "$PWD:/artifact" -w /artifact nvcr.io/nvidia/tensorrt:RELEASE-py3 sh {_SCRIPT}
# RELEASE must have TensorRT 10.14 or later, and the version that will run the engine (Triton: the same RELEASE of both
# containers), see {_RELEASES}
# Afterwards, where the engine will run: ettin-verify .
set -eu
cd "$(dirname "$0")"
# Without --stronglyTyped, TensorRT 10 would choose types of its own. TensorRT 11 knows only typed networks: 11.0 and
# 11.1 ignore the option, and a later release may refuse it.
options=$(trtexec --help)
case $options in *--stronglyTyped*) set -- --stronglyTyped ;; *) set -- ;; esac
trtexec "$@" \\
  {arguments}
mv model.engine.part model.engine
"""
