"""Checkpoint → TensorRT and TensorRT-RTX engines of the packed graph, or the kit to build one elsewhere."""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ettin.artifacts.manifest import Engine, Needs, ShapeRange
from ettin.artifacts.targets import target_named
from ettin.export.options import BuildOptions
from ettin.export.targets.tensorrt_builder import Profile, build, builder_module, check_options, checked_arch
from ettin.export.targets.to_onnx import onnx_lowered, packed_onnx
from ettin.export.writer import PACKED, Lowered, Model, Writer
from ettin.runtimes.machine import gpus

# What one batch may hold, padding included: enough for the largest GPUs to be busy with the smallest size, and within
# 8 GB of GPU memory with the largest (computed from the graph's activations, not measured).
BATCH_TOKENS = 32768
BATCH_PAIRS = 1024

# A profile's kernels and memory are those of its largest shapes. A batch of pairs up to `longest` tokens has at most
# BATCH_TOKENS / (the class below) pairs, so four classes bound what the gathered global attention takes at four times
# the budget, and a short batch never pays for a long one.
_LONGEST = (128, 512, 2048)
_SHORTEST = 32  # what "up to 128" starts from when pairs are counted
_SMALL = (16, 1024)  # pairs and tokens of a lone request

_ENTRY = "engine/model.engine"
_SCRIPT = "engine/build.sh"


def profiles(max_length: int) -> list[Profile]:
    """Optimisation profiles, smallest first: the runtime takes the first that a batch fits.

    Args:
        max_length: tokens of the longest pair.
    """

    def profile(pairs: int, tokens: int, longest: int) -> Profile:
        def upto(most: int, least: int = 1) -> ShapeRange:
            return ShapeRange(min=(least,), opt=(max(least, most // 2),), max=(most,))

        return {"input_ids": upto(tokens), "cu_seqlens": upto(pairs + 1, 2), "longest": upto(longest)}

    pairs, tokens = _SMALL
    found = [profile(pairs, tokens, min(tokens, max_length))]
    above = _SHORTEST
    for longest in (*(each for each in _LONGEST if each < max_length), max_length):
        found.append(profile(min(BATCH_PAIRS, BATCH_TOKENS // above), BATCH_TOKENS, longest))
        above = longest
    return found


class TensorRtWriter(Writer):
    """Writes `engine/model.engine`, or with `--build-kit` what builds it.

    "bf16" has linear layers and attention in bf16, the rest in fp32.
    """

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        build_options, shapes, fused = self.build, profiles(model.max_length_tokens), None
        if build_options.kit:
            arch, version = str(build_options.arch), "that of the container"
            form = packed_onnx(model, "bfloat16", folder / "engine" / "model.onnx")
            script = folder / _SCRIPT
            script.write_text(build_script(shapes, arch, build_options), encoding="utf-8")
            script.chmod(0o755)
        else:
            arch = checked_arch(self.target.name, build_options.arch, gpus())
            version = str(builder_module(self.target.name).__version__)
            (folder / "engine").mkdir()
            with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
                onnx = Path(scratch) / "model.onnx"
                form = packed_onnx(model, "bfloat16", onnx)
                built = build(self.target.name, onnx, shapes, arch, build_options)
            (folder / _ENTRY).write_bytes(built.engine)
            fused = built.fused_attentions
        return Lowered(
            entry=_ENTRY,
            interface=PACKED,
            needs=Needs(device="cuda", isa=(), package=self.target.runtime.packages[0], version=version),
            graph=asdict(form) | {"batch_tokens": BATCH_TOKENS, "batch_pairs": BATCH_PAIRS},
            engine=Engine(arch=arch, profiles=tuple(shapes), fused_attentions=fused),
        )

    @property
    def proof(self) -> Writer:
        return PackedWriter(target_named("onnx"))

    def check(self) -> None:
        check_options(self.target.name, self.build)

    def check_runs_here(self) -> None:
        arch = checked_arch(self.target.name, self.build.arch, gpus())
        self.target.runtime_class().check_machine(self.target.name, arch)


class PackedWriter(Writer):
    """Writes the same graph as an `onnx` artifact in fp32: it proves the graph where the engine can't run."""

    def write(self, model: Model, precision: str, folder: Path) -> Lowered:
        path = folder / "onnx" / "model.onnx"
        form = packed_onnx(model, "float32", path)
        return onnx_lowered(path, folder, PACKED, precision, form)


def build_script(shapes: Sequence[Profile], arch: str, options: BuildOptions) -> str:
    """A shell script that makes the engine with `trtexec`, for the machine that has TensorRT and the GPU."""
    words = ["--onnx=model.onnx", "--stronglyTyped", "--saveEngine=model.engine.part", "--profilingVerbosity=detailed"]
    words += ["--timingCacheFile=timing.cache", "--skipInference"]
    if options.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}M")
    for number, profile in enumerate(shapes):
        words.append(f"--profile={number}")
        for kind in ("min", "opt", "max"):
            spec = ",".join(f"{name}:{'x'.join(map(str, getattr(each, kind)))}" for name, each in profile.items())
            words.append(f"--{kind}Shapes={spec}")
    arguments = " \\\n  ".join(shlex.quote(word) for word in words)
    return f"""#!/bin/sh
# Builds the engine that this folder lacks, on a machine with a GPU of {arch}:
#   docker run --rm --gpus all -v "$PWD:/artifact" -w /artifact nvcr.io/nvidia/tensorrt:RELEASE-py3 sh {_SCRIPT}
# RELEASE must have the TensorRT version that will run the engine (Triton: the same RELEASE of both containers).
# Afterwards, where the engine will run: ettin-verify .
set -eu
cd "$(dirname "$0")"
trtexec \\
  {arguments}
mv model.engine.part model.engine
"""
