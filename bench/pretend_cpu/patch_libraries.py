"""Patches the libraries in copies of environments, so that `pretend_cpu.so` decides what they believe of the processor.

usage: patch_libraries.py FOLDER…

Every CPUID instruction becomes UD2, which `pretend_cpu.so` answers. Where the processor has VNNI in AVX-512 alone, the
products of AVX-VNNI in OpenVINO's CPU plugin and in ONNX Runtime get the encoding EVEX, and Xbyak, which assembles
OpenVINO's kernels at run time, learns to emit it. Nothing is written before all of that was found. A patched library is
a new file, so hard links to the old one stay as they were, and is left alone the next time. Needs objdump (binutils).
"""

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

TRIED = "OpenVINO 2026.4.1, ONNX Runtime 1.32.0"
PLUGIN = "libopenvino_intel_cpu_plugin.so"
WITH_VNNI = (PLUGIN, "libonnxruntime.so", "onnxruntime_pybind11_state")  # beginnings of names
MARK = b"\0patched by pretend_cpu"  # ends a patched file
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
_LOAD, _NOTE, _EXECUTABLE = 1, 4, 4  # types of segments, flag of sections
_HEADER = struct.Struct("<IIQQQQQQ")  # of a segment: type, flags, offset, address, physical, file size, size, alignment
_BRANCH = re.compile(r"(bnd |notrack )?(j|call|ret|loop|ud2|hlt|int3|syscall)")
_IN_CODE = b"\0\x0f\x24\x48\x89\x8b\xe8\xff"  # over 19 % of code, 3 % of random bytes
_REACH = 40  # instructions that are moved between two of VNNI, at most

# Xbyak's opVex: push r15; push r14; mov r14,rdx | push r13; mov r13,rdi; push r12; mov r12,r8; push rbp; mov rbp,rsi;
# push rbx; mov rbx,rcx; sub rsp,0xa8; movzx eax,word [rcx]. Soon after it: test r8d,0x2000000 (T_MUST_EVEX).
OPVEX = bytes.fromhex("415741564989d641554989fd41544d89c4554889f5534889cb4881eca80000000fb701")
OPVEX_LATER = bytes.fromhex("41f7c000000002")
OPVEX_MOVED = 7  # bytes of its first three instructions
# opVex(this rdi, register rsi, p1 rdx, operand rcx, type r8, code r9d, …): `type` says T_MUST_EVEX (bit 25) where EVEX
# was asked for. This sets it for codes 0x50 to 0x53 with the prefix 66 in the map 0F38: VPDPBUSD(S), VPDPWSSD(S).
MUST_EVEX = bytes.fromhex(
    "4489c8"  # mov eax, r9d           rax holds nothing at the entry
    "83e0fc"  # and eax, -4
    "83f850"  # cmp eax, 0x50
    "7514"  # jne to the end
    "4489c0"  # mov eax, r8d
    "2560060000"  # and eax, T_66 | T_F3 | T_0F38 | T_0F3A
    "3d20020000"  # cmp eax, T_66 | T_0F38
    "7505"  # jne to the end
    "490fbae819"  # bts r8, 25
)


def disassembled(path: Path, *options: str) -> Iterator[tuple[int, bytes, str]]:
    """Address, bytes and text of each instruction that objdump finds."""
    command = ["objdump", "-d", "-w", "-M", "intel", "--insn-width=16", *options, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            parts = line.rstrip().split("\t")
            if len(parts) == 3:
                yield int(parts[0].rstrip(":"), 16), bytes.fromhex(parts[1]), parts[2]
    if process.returncode:
        raise SystemExit(f"{path}: objdump failed, exit code {process.returncode}")


def is_vnni(text: str) -> bool:
    """Whether objdump's text of an instruction is a product of AVX-VNNI, in the encoding VEX."""
    return text.startswith(("{vex} vpdpbusd", "{vex} vpdpwssd"))


def evex_from_vex(code: bytes) -> bytes:
    """A product of AVX-VNNI in the encoding of AVX-512: one byte longer, or four where a displacement grows."""
    vex, p0, p1, opcode, modrm, *rest = code
    if vex != 0xC4 or p0 & 0x1F != 2 or p1 & 0x83 != 1 or opcode & 0xFC != 0x50:
        raise ValueError(f"{code.hex()}, which is no product of AVX-VNNI")
    tail, width = bytes(rest), p1 >> 2 & 1  # 0: 16 bytes, 1: 32
    if modrm >> 6 == 1:  # a displacement of one byte; EVEX counts it in vectors
        start = 1 if modrm & 7 == 4 else 0  # after a SIB byte
        (displacement,) = struct.unpack_from("b", tail, start)
        count, beyond = divmod(displacement, 16 << width)
        if beyond:
            modrm ^= 0xC0  # four bytes
        tail = tail[:start] + (struct.pack("<i", displacement) if beyond else struct.pack("b", count))
    return bytes([0x62, p0 & 0xE0 | 0x12, p1 & 0x78 | 0x05, width << 5 | 0x08, opcode, modrm]) + tail


class Library:
    """The bytes of an x86-64 library, and code that is added to it in a segment of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, bytearray(path.read_bytes())
        (self._headers_at,) = struct.unpack_from("<Q", self.data, 32)
        count = struct.unpack_from("<H", self.data, 56)[0]
        self._headers: list[list[int]] = [
            list(_HEADER.unpack_from(self.data, self._headers_at + i * _HEADER.size)) for i in range(count)
        ]
        self._added = bytearray()
        self._added_from = -(-max(h[3] + h[6] for h in self._headers if h[0] == _LOAD) // 4096) * 4096

    def refuse(self, found: str, expected: str) -> NoReturn:
        """Ends the program: this is another release than those that it knows."""
        raise SystemExit(f"{self.path}: found {found}, expected {expected}, as in {TRIED}. Nothing was patched")

    def executable_sections(self) -> Iterator[tuple[int, int]]:
        """Offset and end of each in the file."""
        (at,) = struct.unpack_from("<Q", self.data, 40)
        size, count = struct.unpack_from("<HH", self.data, 58)
        for start in range(at, at + count * size, size):
            _, kind, flags, _, offset, length = struct.unpack_from("<IIQQQQ", self.data, start)
            if kind == 1 and flags & _EXECUTABLE:
                yield offset, offset + length

    def hide_cpuid(self) -> int:
        """Turns CPUID into UD2; returns how many.

        Its bytes may be a part of other instructions, or of a table. Those count that decoding arrives at from most of
        24 starts before them, where bytes that are common in code are not as rare as in a table of constants.
        """
        chunks, places = bytearray(), {}
        for begin, end in self.executable_sections():
            for match in re.finditer(CPUID, self.data[begin:end]):
                at = begin + match.start()
                near = self.data[max(begin, at - 128) : min(end, at + 128)]
                if sum(map(near.count, _IN_CODE)) < len(near) // 10:
                    continue
                for back in range(24, 96, 3):
                    start = max(begin, at - back)
                    places[len(chunks) + at - start] = at
                    chunks += self.data[start : at + 2] + b"\x90" * 15  # the longest instruction
        if not places:
            return 0
        with tempfile.NamedTemporaryFile() as file:
            file.write(chunks)
            file.flush()
            listing = disassembled(Path(file.name), "-D", "-z", "-b", "binary", "-m", "i386:x86-64")
            arrived = Counter(places[at] for at, _, text in listing if text == "cpuid" and at in places)
        found = [at for at, times in arrived.items() if times > 12]
        for at in found:
            self.data[at : at + 2] = UD2
        return len(found)

    def next_address(self) -> int:
        """Where the next detour goes."""
        self._added += bytes(-len(self._added) % 16)
        return self._added_from + len(self._added)

    def detour(self, start: int, size: int, code: bytes, back: int) -> None:
        """Replaces `size` bytes of instructions at an address by a jump to code, which then jumps to `back`."""
        if not any(h[0] == _NOTE for h in self._headers):
            self.refuse("no note", "one")
        to = self.next_address()
        self._added += code + b"\xe9" + struct.pack("<i", back - (to + len(code) + 5))
        at = self.offset(start)
        self.data[at : at + size] = b"\xe9" + struct.pack("<i", to - (start + 5)) + b"\xcc" * (size - 5)

    def offset(self, address: int) -> int:
        """Where an address of the loaded library is in the file."""
        return next(h[2] + address - h[3] for h in self._headers if h[0] == _LOAD and h[3] <= address < h[3] + h[5])

    def write(self) -> None:
        """Replaces the file. Added code becomes a segment in place of a note, which nobody reads."""
        if self._added:
            self.data += bytes(-len(self.data) % 4096)
            note = next(h for h in self._headers if h[0] == _NOTE)
            size = len(self._added)
            note[:] = [_LOAD, 5, len(self.data), self._added_from, self._added_from, size, size, 4096]
            self.data += self._added
            loads = iter(sorted((h for h in self._headers if h[0] == _LOAD), key=lambda h: h[3]))
            headers = [next(loads) if h[0] == _LOAD else h for h in self._headers]  # in the order of addresses
            for i, header in enumerate(headers):
                _HEADER.pack_into(self.data, self._headers_at + i * _HEADER.size, *header)
        new = self.path.with_name("pretend_cpu.new")
        new.write_bytes(self.data + MARK)
        shutil.copymode(self.path, new)
        new.replace(self.path)


def give_xbyak_evex(library: Library) -> None:
    """Makes Xbyak in OpenVINO's CPU plugin encode the products of AVX-VNNI with EVEX."""
    places = [match.start() for match in re.finditer(re.escape(OPVEX), library.data)]
    places = [at for at in places if OPVEX_LATER in library.data[at : at + 96]]
    if len(places) != 1:
        library.refuse(f"{len(places)} places that look like Xbyak's opVex", "1")
    at = places[0]
    if library.offset(at) != at:
        library.refuse("code whose addresses are not its offsets", "others")
    library.detour(at, OPVEX_MOVED, MUST_EVEX + OPVEX[:OPVEX_MOVED], at + OPVEX_MOVED)


def _moved(code: bytes, text: str, old: int, new: int) -> bytes:
    """An instruction at another address, and in EVEX."""
    result = evex_from_vex(code) if is_vnni(text) else code
    target = re.search(r"# ([0-9a-f]+)(?: <|$)", text)
    if target is None:
        return result
    displacement = struct.pack("<i", int(target[1], 16) - old - len(code))  # from RIP; an immediate may follow
    if result.count(displacement) != 1:
        raise ValueError(f"{text}, which cannot be moved")
    before, _, after = result.partition(displacement)
    return before + struct.pack("<i", int(target[1], 16) - new - len(result)) + after


def give_vnni_evex(library: Library) -> int:
    """Moves products of AVX-VNNI, and what is between them in a basic block, to where EVEX has room; returns how many.

    Jump tables are not searched. A jump that they make into the middle of moved instructions executes the old encoding,
    and the process ends with SIGILL. It never gives a wrong result.
    """
    targets, near = set(), 0
    listing: list[tuple[int, bytes, str]] = []  # from each product on
    for address, code, text in disassembled(library.path):
        is_branch = bool(_BRANCH.match(text))
        if (is_branch or text.startswith("lea")) and (match := re.search(r"(?:# | )([0-9a-f]+)(?: <|$)", text)):
            targets.add(int(match[1], 16))
        near = _REACH if is_vnni(text) else near - 1 if near > 0 and not is_branch else 0
        if near:
            listing.append((address, code, text))
    runs: list[list[tuple[int, bytes, str]]] = []
    end = None
    for instruction in listing:
        if instruction[0] == end and end not in targets:
            runs[-1].append(instruction)
        else:
            runs.append([instruction])
        end = instruction[0] + len(instruction[1])
    moved = 0
    for run in runs:
        products = [i for i, (_, _, text) in enumerate(run) if is_vnni(text)]
        if not products:
            continue
        first, last = products[0], products[-1]
        code = b""
        begin = library.next_address()
        for address, raw, text in run[first : last + 1]:
            code += _moved(raw, text, address, begin + len(code))
        library.detour(run[first][0], len(run[first][1]), code, run[last][0] + len(run[last][1]))
        moved += len(products)
    return moved


def patched(path: Path, has_vex: bool) -> Library:
    """One of the libraries with VNNI, patched in memory; the program ends if something expected is not in it."""
    library = Library(path)
    if not library.hide_cpuid():
        library.refuse("no CPUID instruction", "some")
    if not has_vex:
        if path.name == PLUGIN:
            give_xbyak_evex(library)
        try:
            count = give_vnni_evex(library)
        except ValueError as problem:
            library.refuse(str(problem), "other instructions")
        if not count:
            library.refuse("no product of AVX-VNNI", "some")
    return library


def libraries(folder: Path) -> list[Path]:
    """x86-64 libraries in a folder that are not patched yet."""
    found = []
    for path in sorted(folder.rglob("*.so*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                begins = file.read(20)
                file.seek(max(-len(MARK), -path.stat().st_size), 2)
                if begins[:6] == b"\x7fELF\x02\x01" and begins[18:] == b"\x3e\0" and file.read() != MARK:
                    found.append(path)
    return found


def patch(folders: Sequence[Path], flags: Sequence[str]) -> str:
    """Patches every library in folders; returns what was done. `flags`: of the processor, as Linux names them."""
    for folder in folders:
        if not folder.is_dir():
            raise SystemExit(f"{folder} is no folder. Run: bench/pretend_cpu/make.sh FOLDER")
        if Path(sys.prefix).resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"{folder} holds the environment that runs this. Run: bench/pretend_cpu/make.sh FOLDER")
    if "avx_vnni" not in flags and not {"avx512_vnni", "avx512vl"} <= set(flags):
        raise SystemExit("this processor has neither AVX-VNNI nor the VNNI of AVX-512. Use another machine")
    if shutil.which("objdump") is None:
        raise SystemExit("objdump is not installed. Run: apt-get install binutils")
    paths = [path for folder in folders for path in libraries(folder)]
    with_vnni = [path for path in paths if path.name.startswith(WITH_VNNI)]
    done = [patched(path, "avx_vnni" in flags) for path in with_vnni]  # all of these, before one is written
    for library in done:
        library.write()
    count = len(done)
    for path in paths:
        if path not in with_vnni and (library := Library(path)).hide_cpuid():
            library.write()
            count += 1
    return f"{count} libraries patched"


def main() -> None:
    """The command."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: patch_libraries.py FOLDER…")
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    print(patch([Path(name) for name in sys.argv[1:]], flags[1].split() if flags else []))  # noqa: T201


if __name__ == "__main__":
    main()
