"""One folder that runs `ettin-gpu` on a machine with a GPU where only torch and transformers are installed."""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import distribution, version
from pathlib import Path

from ettin import artifacts, bench, export, gpu, graph, runtimes
from ettin.artifacts.errors import OutputError
from ettin.artifacts.publishing import check_output, staged
from ettin.export.options import BuildOptions, Job, Options
from ettin.export.pipeline import Export
from ettin.export.source.checkpoint import read_checkpoint

_LIMIT_MIB = 50
_KIT_ARCH = "sm_90"  # the visit builds the kit's engine for whatever GPU it meets
# What the project needs and transformers does not bring. tokenizers, numpy and tqdm come with transformers, in the
# versions that it wants.
_WHEELS = (
    "annotated-types", "click", "packaging", "pydantic", "pydantic-core", "tabulate", "typing-extensions",
    "typing-inspection",
)  # fmt: skip


def write_bundle(
    output: Path, checkpoint: Path, pairs: Sequence[tuple[str, str]], proven: Path | None = None, python: str = "3.12"
) -> int:
    """Writes the folder: this project, the packages that it needs, a checkpoint for parity, artifacts and text.

    The artifacts are those of the folder `proven`; by default the checkpoint is exported as what torch runs, and as the
    kit of a TensorRT engine. The bundle is for Linux on x86_64 with the given version of CPython. Returns its size in
    bytes.

    Raises:
        OutputError: the folder is there, can't be written or would be over 50 MiB; or pip could not bring a package.
    """
    check_output(output, False)
    with staged(output, False) as stage:
        for package in (artifacts, bench, export, gpu, graph, runtimes):
            source = Path(str(package.__file__)).parent
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "results", "kernels")
            shutil.copytree(source, stage / "ettin" / source.name, ignore=ignored)
        _write_metadata(stage)
        fetch_packages(stage, python)
        shutil.copytree(checkpoint, stage / "checkpoint")
        if proven is None:
            export_artifacts(checkpoint, stage / "artifacts")
        else:
            shutil.copytree(proven, stage / "artifacts")
        lines = [json.dumps({"query": query, "document": document}) for query, document in pairs]
        (stage / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("bundle_main.py"), stage / "__main__.py")
        size_bytes = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
        if size_bytes > _LIMIT_MIB << 20:
            size_mib = size_bytes >> 20
            raise OutputError(f"{output}: {size_mib} MiB, expected at most {_LIMIT_MIB}: name a smaller --checkpoint")
    return size_bytes


def _write_metadata(folder: Path) -> None:
    """Writes what an installation knows of this project: its version, and its targets, which register themselves."""
    this = distribution("ettin-export")
    metadata = folder / f"ettin_export-{this.version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ettin-export\nVersion: {this.version}\n")
    (metadata / "entry_points.txt").write_text(this.read_text("entry_points.txt") or "", encoding="utf-8")


def export_artifacts(checkpoint: Path, folder: Path) -> None:
    """Exports a checkpoint as `transformers`, which a bare machine can run, and as a build kit of a TensorRT engine."""
    kit = Options(allow_unverified=True, build=BuildOptions(arch=_KIT_ARCH, kit=True))
    jobs = {("transformers", "fp32"): Options(), ("transformers", "bf16"): Options(), ("trt", "bf16"): kit}
    for (target, precision), options in jobs.items():
        Export(read_checkpoint(checkpoint), options).run(Job(target, precision, folder / f"{target}-{precision}"))


def fetch_packages(folder: Path, python: str) -> None:
    """Unpacks wheels of the versions that are installed here, for Linux on x86_64 and the given CPython."""
    with tempfile.TemporaryDirectory() as scratch:
        platforms = [f"--platform=manylinux{form}_x86_64" for form in ("2014", "_2_17", "_2_28")]
        target = ["--only-binary=:all:", "--no-deps", f"--python-version={python}", *platforms, "-d", scratch]
        command = [sys.executable, "-m", "pip", "download", "-q", *target]
        pinned = [f"{name}=={version(name)}" for name in _WHEELS]
        done = subprocess.run([*command, *pinned], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise OutputError(f"pip could not bring {', '.join(pinned)} ({reason})")
        for wheel in sorted(Path(scratch).glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(folder)
