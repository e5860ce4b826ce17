"""bench/pretend_cpu: what a patched library believes of the processor, and that it computes what it did."""

import importlib.util
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ettin.runtimes import machine

FOLDER = Path(__file__).parents[2] / "bench" / "pretend_cpu"
PROGRAMS = ("gcc", "as", "objdump")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
FLAGS = machine.flags()
AVX512 = {"avx512_vnni", "avx512vl"}  # has VNNI in the encoding EVEX

spec = importlib.util.spec_from_file_location("patch_libraries", FOLDER / "patch_libraries.py")
assert spec is not None
assert spec.loader is not None
patch_libraries = importlib.util.module_from_spec(spec)
spec.loader.exec_module(patch_libraries)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="needs Linux on x86-64"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
needs_vnni = pytest.mark.skipif(
    not (AVX512 <= FLAGS or "avx_vnni" in FLAGS), reason="the processor has neither AVX-VNNI nor the VNNI of AVX-512"
)

# CPUID's bytes in what is no instruction, although decoding arrives at them from everywhere.
TABLE = random.Random(0).randbytes(200) + b"\x90" * 15 + patch_libraries.CPUID + random.Random(1).randbytes(200)


def as_bytes(data: bytes) -> str:
    """For the assembler."""
    return ".byte " + ", ".join(map(hex, data))


# A library with what is patched in OpenVINO's CPU plugin: CPUID, products of AVX-VNNI and the entry of Xbyak's opVex,
# which here returns its `type`. `products` adds left · right to sums twice, with a constant beside it in between.
LIBRARY = f"""
#include <cpuid.h>
void ask(unsigned leaf, unsigned part, unsigned* r) {{ __cpuid_count(leaf, part, r[0], r[1], r[2], r[3]); }}
unsigned immediate(void) {{ return 0xa20f1234; }}
static const int one[8] __attribute__((aligned(32))) = {{1, 1, 1, 1, 1, 1, 1, 1}};
__attribute__((target("avx2"))) void products(int* sums, const void* left, const void* right) {{
    __asm__ volatile(
        "vmovdqu (%0), %%ymm0\\n vmovdqu (%1), %%ymm9\\n"
        "%{{vex%}} vpdpbusd (%2), %%ymm9, %%ymm0\\n vpaddd %3, %%ymm0, %%ymm0\\n"
        "%{{vex%}} vpdpbusd 33(%2), %%ymm9, %%ymm0\\n vmovdqu %%ymm0, (%0)\\n vzeroupper"
        : : "r"(sums), "r"(left), "r"(right), "m"(one[0]) : "xmm0", "xmm9", "memory");
}}
__asm__(".globl opvex\\nopvex: {as_bytes(patch_libraries.OPVEX)}\\n"
        "{as_bytes(patch_libraries.OPVEX_LATER)}\\n"
        "mov %r8, %rax\\n"
        "add $0xa8, %rsp\\n pop %rbx\\n pop %rbp\\n pop %r12\\n pop %r13\\n pop %r14\\n pop %r15\\n ret\\n"
        ".skip 128\\n.globl table\\ntable: {as_bytes(TABLE)}\\n .skip 128");
"""
# What a process says of it, as JSON: CPUID's words, sums of products, and opVex's `type` by code and type.
PROGRAM = """
import ctypes, faulthandler, json, os, sys
faulthandler.enable()  # would take SIGILL away
library = ctypes.CDLL(sys.argv[1])
def ask(leaf, part):
    words = (ctypes.c_uint * 4)()
    library.ask(leaf, part, words)
    return list(words)
library.opvex.restype, library.opvex.argtypes = ctypes.c_uint64, [ctypes.c_char_p] * 4 + [ctypes.c_uint64, ctypes.c_int]
library.immediate.restype = ctypes.c_uint
table = bytes((ctypes.c_ubyte * int(sys.argv[2])).in_dll(library, "table"))
result = {"table": table.hex(), "immediate": library.immediate()}
vex = lambda type, code: library.opvex(b"", b"", b"", b"12", type, code) == type
result["cpuid"] = {f"{leaf:x}.{part}": ask(leaf, part) for leaf, part in ((0, 0), (7, 0), (7, 1), (13, 0))}
result["vex"] = [vex(0x220, 0x50), vex(0x220, 0x53), vex(0x220, 0x54), vex(0x620, 0x50), vex(0x260, 0x50)]
if len(sys.argv) > 3:
    sums = (ctypes.c_int * 8)(*range(8))
    library.products(sums, bytes(range(200, 232)), bytes(k * 5 % 256 for k in range(65)))
    result["sums"] = list(sums)
result["answered"] = ctypes.c_int.in_dll(ctypes.CDLL(None), "pretend_cpu_answered").value
print(json.dumps(result))
"""


def compiled(source: str, to: Path, *options: str) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    words = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *options, "-x", "c", "-", "-o", to]
    subprocess.run(words, input=source, text=True, check=True)  # type: ignore[call-overload]
    return to


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = (FOLDER / "pretend_cpu.c").read_text(encoding="utf-8")
    to = tmp_path_factory.mktemp("preload") / "pretend_cpu.so"
    return compiled(source, to, "-mgeneral-regs-only", "-Wl,-z,now", "-ldl")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A small OpenVINO CPU plugin in a folder that stands for an environment."""
    return compiled(LIBRARY, tmp_path / "env" / "openvino" / patch_libraries.PLUGIN, "-Wl,--build-id")


def said(preload: Path, library: Path, kind: str, *products: str) -> dict[str, object]:
    """What a process that pretends says of a library."""
    variables = {**os.environ, "LD_PRELOAD": str(preload), "PRETEND_CPU": kind}
    command = [sys.executable, "-c", PROGRAM, str(library), str(len(TABLE)), *products]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def expected_sums() -> list[int]:
    left, right = range(200, 232), [(k * 5 % 256 + 128) % 256 - 128 for k in range(65)]
    return [
        lane + 1 + sum(left[k] * (right[k] + right[33 + k]) for k in range(4 * lane, 4 * lane + 4)) for lane in range(8)
    ]


@pytest.mark.skipif(not AVX512 <= FLAGS, reason="the processor has no VNNI of AVX-512")
def test_a_patched_library_believes_and_computes(preload: Path, plugin: Path) -> None:
    """Its file is a new one, and the old one, of which it was a hard link, is as it was."""
    old = plugin.with_name("original")
    old.hardlink_to(plugin)
    before = old.read_bytes()
    assert patch_libraries.patch([plugin.parent], sorted(AVX512)) == "1 libraries patched"
    assert old.read_bytes() == before
    assert [path.name for path in sorted(plugin.parent.iterdir())] == [plugin.name, "original"]

    answers = said(preload, plugin, "avx2_vnni", "products")
    assert answers["sums"] == expected_sums()
    assert answers["vex"] == [False, False, True, True, True]
    assert answers["answered"] == 4
    assert (answers["table"], answers["immediate"]) == (TABLE.hex(), 0xA20F1234)
    words = answers["cpuid"]
    assert isinstance(words, dict)
    vendor = b"".join(word.to_bytes(4, "little") for word in (words["0.0"][1], words["0.0"][3], words["0.0"][2]))
    assert vendor == b"GenuineIntel"
    assert words["7.0"][1] >> 5 & 1  # AVX2
    assert not words["7.0"][1] >> 16 & 1  # AVX512F
    assert not words["7.0"][2] >> 11 & 1  # AVX512_VNNI
    assert words["7.1"][0] >> 4 & 3 == 1  # AVX-VNNI, and no bf16 of AVX-512
    assert words["d.0"][0] & 0xE0 == 0  # no state of AVX-512

    words = said(preload, plugin, "avx2")["cpuid"]
    assert isinstance(words, dict)
    assert not words["7.1"][0] >> 4 & 1
    words = said(preload, plugin, "host")["cpuid"]
    assert isinstance(words, dict)
    assert words["7.0"][1] >> 16 & 1


@needs_vnni
def test_with_avx_vnni_of_the_processor_nothing_but_cpuid_is_patched(preload: Path, plugin: Path) -> None:
    patch_libraries.patch([plugin.parent], ["avx_vnni"])
    texts = [text for _, _, text in patch_libraries.disassembled(plugin)]
    assert [text.split()[1] for text in texts if patch_libraries.is_vnni(text)] == ["vpdpbusd"] * 2
    assert texts.count("cpuid") == 1  # in the table
    assert said(preload, plugin, "avx2_vnni")["vex"] == [True] * 5


@needs_vnni
def test_the_assembler_chooses_the_encoding(preload: Path, tmp_path: Path) -> None:
    """Also where GCC pipes its text."""
    for name, option in (("file.so", "-no-pipe"), ("pipe.so", "-pipe")):
        options = ["-B", f"{FOLDER}/", *([option] if option == "-pipe" else [])]
        library = compiled(LIBRARY, tmp_path / name, *options)
        texts = [text for _, _, text in patch_libraries.disassembled(library) if "vpdpbusd" in text]
        assert [patch_libraries.is_vnni(text) for text in texts] == ["avx_vnni" in FLAGS] * 2
        assert said(preload, library, "avx2_vnni", "products")["sums"] == expected_sums()


def test_evex_from_vex_as_the_assembler_does(tmp_path: Path) -> None:
    operands = (
        "ymm0, ymm1, ymm2", "ymm15, ymm9, ymm8", "xmm3, xmm12, xmm7", "ymm1, ymm2, [rax]", "ymm1, ymm2, [r13]",
        "ymm1, ymm2, [rsp + 64]", "ymm1, ymm2, [rsp + 8]", "ymm1, ymm2, [rax - 32]", "ymm9, ymm2, [r9 + r15 * 4 - 31]",
        "xmm1, xmm2, [rbp + 112]", "xmm1, xmm2, [rbp + 120]", "ymm1, ymm2, [rbx + 4096]", "ymm1, ymm2, [rip + 256]",
    )  # fmt: skip
    codes = {}
    for encoding in ("vex", "evex"):
        names = ("vpdpbusd", "vpdpbusds", "vpdpwssd", "vpdpwssds")
        lines = [f"{{{encoding}}} {name} {words}" for name in names for words in operands]
        source, to = "\n".join([".intel_syntax noprefix", *lines, ""]), tmp_path / f"{encoding}.o"
        subprocess.run(["as", "-o", to], input=source, text=True, check=True)  # noqa: S607
        codes[encoding] = [code for _, code, _ in patch_libraries.disassembled(to)]
    assert [patch_libraries.evex_from_vex(code) for code in codes["vex"]] == codes["evex"]
    with pytest.raises(ValueError, match="c4e27558c2, which is no product of AVX-VNNI"):
        patch_libraries.evex_from_vex(bytes.fromhex("c4e27558c2"))  # vpbroadcastd's neighbour


def test_patching_twice_changes_nothing(plugin: Path) -> None:
    patch_libraries.patch([plugin.parent], sorted(AVX512))
    before = plugin.read_bytes()
    assert patch_libraries.patch([plugin.parent], sorted(AVX512)) == "0 libraries patched"
    assert plugin.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            (".globl opvex\\nopvex: .byte 0x41", ".globl opvex\\nopvex: .byte 0x42"),
            "found 0 places .* opVex, expected 1",
        ),
        (("%{vex%}", "%{evex%}"), "found no product of AVX-VNNI, expected some"),
        (("__cpuid_count(leaf, part, r[0], r[1], r[2], r[3]);", "r[0] = leaf + part;"), "found no CPUID instruction"),
    ],
)
def test_another_release_is_refused_before_anything_is_written(
    plugin: Path, wrong: tuple[str, str], message: str
) -> None:
    assert wrong[0] in LIBRARY
    other = compiled(LIBRARY.replace(*wrong), plugin.parent / "z" / patch_libraries.PLUGIN)
    before = [plugin.read_bytes(), other.read_bytes()]
    with pytest.raises(SystemExit, match=message) as refused:
        patch_libraries.patch([plugin.parent], sorted(AVX512))
    assert re.fullmatch(
        r".*, as in OpenVINO 2026\.4\.1, ONNX Runtime 1\.32\.0\. Nothing was patched", str(refused.value)
    )
    assert [plugin.read_bytes(), other.read_bytes()] == before


def test_other_refusals(tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="holds the environment that runs this. Run: .*make.sh FOLDER"):
        patch_libraries.patch([Path(sys.prefix)], sorted(AVX512))
    with pytest.raises(SystemExit, match="none is no folder"):
        patch_libraries.patch([tmp_path / "none"], sorted(AVX512))
    with pytest.raises(SystemExit, match="neither AVX-VNNI nor the VNNI of AVX-512"):
        patch_libraries.patch([plugin.parent], ["avx2", "avx512_vnni"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="objdump is not installed"):
        patch_libraries.patch([plugin.parent], sorted(AVX512))
