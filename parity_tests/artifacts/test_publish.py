"""Publishing: whole or absent, never a moment without, and nothing of others is touched."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import COMMANDS, wait_until

from ettin.artifacts import publishing, writing
from ettin.artifacts.errors import DamagedArtifact, OutputError, ParityError
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.publishing import NEW, OLD, staged, workspace
from ettin.artifacts.writing import exchange, write_file
from ettin.runtimes import load
from ettin.runtimes.loading import checked_manifest, of_current

# Publishes one small artifact over another until it is killed; says so before each time.
PUBLISH_AGAIN_AND_AGAIN = """
import shutil, sys
from pathlib import Path
from ettin.artifacts import publishing
from ettin.artifacts.publishing import staged
if sys.argv[3] == "two renames":
    publishing.exchange = lambda first, second: False
print("ready", flush=True)
while True:
    with staged(Path(sys.argv[2]), force=True) as stage:
        shutil.copytree(sys.argv[1], stage, dirs_exist_ok=True)
"""
# Makes an artifact and waits in the middle of it.
WAIT_WHILE_STAGING = """
import sys, time
from pathlib import Path
from ettin.artifacts.publishing import staged
with staged(Path(sys.argv[1]), force=True) as stage:
    (stage / "manifest.json").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""
# Moved the old artifact aside and was killed before the new one took its place.
DIE_BETWEEN_TWO_RENAMES = """
import os, sys
from pathlib import Path
from ettin.artifacts import publishing
output, rename = Path(sys.argv[1]), Path.rename
def die_after(self, target):
    rename(self, target)
    os.kill(os.getpid(), 9)
publishing.exchange = lambda first, second: False
with publishing.staged(output, force=True) as stage:
    (stage / "manifest.json").write_text("new")
    Path.rename = die_after
"""


def child(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """Python in a process of its own, which has said that it is ready."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with process:
        pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_artifact(folder: Path, mark: str) -> None:
    (folder / "manifest.json").write_text(mark)


def published(output: Path, mark: str) -> Path:
    with staged(output) as stage:
        write_artifact(stage, mark)
    return output


@pytest.fixture
def small(demo_artifacts: dict[tuple[str, str], Path]) -> Path:
    return demo_artifacts["onnx", "fp32"]


def age(folder: Path, seconds: float) -> None:
    """Makes everything in `folder` as old."""
    then = time.time() - seconds
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


def from_another_machine(folder: Path) -> None:
    (folder / "lock").write_text("the boot id of another kernel")


def test_staged_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged(output) as stage:
        write_artifact(stage, "new")
        assert not output.exists()
    assert (output / "manifest.json").read_text() == "new"
    assert names(output.parent) == ["out"]


@pytest.mark.parametrize("reason", [RuntimeError, KeyboardInterrupt, ParityError])
def test_failed_export_leaves_nothing_and_loses_nothing(tmp_path: Path, reason: type[BaseException]) -> None:
    output = tmp_path / "deep" / "out"
    with pytest.raises(reason), staged(output) as stage:
        write_artifact(stage, "half")
        raise reason("stop")
    assert names(tmp_path) == []
    published(output, "old")
    with pytest.raises(reason), staged(output, force=True) as stage:
        write_artifact(stage, "half")
        raise reason("stop")
    assert names(output.parent) == ["out"]
    assert (output / "manifest.json").read_text() == "old"


@pytest.mark.parametrize("way", ["one exchange", "two renames"])
def test_existing_output_is_kept_unless_forced(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "two renames":
        monkeypatch.setattr(publishing, "exchange", lambda first, second: False)
    output = published(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="left as it is. Replace it with --force"), staged(output):
        pass
    with staged(output, force=True) as stage:
        write_artifact(stage, "new")
    assert (output / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_folder_of_the_users_is_never_replaced(tmp_path: Path) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="with other things in it, left as it is"), staged(output, force=True):
        pass
    assert (output / "chapter.txt").read_text() == "years of work"
    with pytest.raises(OutputError, match="is not a folder"), staged(output / "chapter.txt", force=True):
        pass


def test_failed_rename_gives_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = published(tmp_path / "out", "old")
    original = Path.rename

    def fail_into_place(self: Path, target: Path) -> Path:
        if Path(target) == output and self.name == NEW:
            raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(publishing, "exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(OutputError, match="the disk is full"), staged(output, force=True) as stage:
        write_artifact(stage, "new")
    assert (output / "manifest.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_output_that_cannot_be_moved_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a mount point."""
    output = published(tmp_path / "out", "old")

    def fail(first: Path, second: Path) -> bool:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(publishing, "exchange", fail)
    with pytest.raises(OutputError, match="can't be replaced .*busy.*--output DIR"), staged(output, force=True):
        pass
    assert (output / "manifest.json").read_text() == "old"


def test_two_exports_to_one_place(tmp_path: Path) -> None:
    """The later one finds the earlier one's artifact, and neither touches the other's workspace."""
    output = tmp_path / "out"
    with pytest.raises(OutputError, match="Replace it with --force"), staged(output) as first:
        write_artifact(first, "first")
        published(output, "second")
    assert (output / "manifest.json").read_text() == "second"
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can't write in"), staged(tmp_path / "out"):
        pass


def test_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(publishing.tempfile, "mkdtemp", fail)
    with pytest.raises(OutputError, match="Read-only file system"), staged(tmp_path / "out"):
        pass


def test_full_disk_while_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk is full. Nothing was published"), staged(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_what_a_killed_export_left_is_cleaned_up(tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill(child(WAIT_WHILE_STAGING, output))
    assert len(names(tmp_path)) == 1 and not output.exists()
    published(output, "new")
    assert names(tmp_path) == ["out"]


def test_a_process_id_that_lives_again_keeps_nothing(tmp_path: Path) -> None:
    """Who holds the lock counts, not which process ids there are."""
    left = tmp_path / ".out.partial-abcdefgh"
    left.mkdir()
    (left / "lock").write_bytes(publishing._machine())
    (left / "1").write_text("a process of this id runs, always")
    published(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]


def test_a_running_export_is_left_alone_whatever_its_process_id(tmp_path: Path) -> None:
    """In another PID namespace, or on another machine: the lock is all that is seen of its process."""
    output = tmp_path / "out"
    process = child(WAIT_WHILE_STAGING, output)
    try:
        (running,) = names(tmp_path)
        age(tmp_path / running, 7 * 24 * 3600)
        published(output, "new")
        assert names(tmp_path) == [running, "out"]
        assert names(tmp_path / running) == ["lock", NEW]
    finally:
        kill(process)


@pytest.mark.parametrize("is_shared", [True, False], ids=["locks", "no locks"])
def test_another_machines_workspace_is_kept_for_a_day(
    tmp_path: Path, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that can be taken proves nothing of another kernel's processes."""
    output = tmp_path / "out"
    kill(child(WAIT_WHILE_STAGING, output))
    (left,) = names(tmp_path)
    from_another_machine(tmp_path / left)
    published(output, "new")
    assert names(tmp_path) == [left, "out"]
    age(tmp_path / left, 25 * 3600)
    if not is_shared:
        monkeypatch.setattr(publishing, "_hold", lambda lock, wait=False: None)
    with staged(output, force=True) as stage:
        write_artifact(stage, "newer")
    assert names(tmp_path) == (["out"] if is_shared else [left, "out"])


def test_an_asterisk_in_a_name_is_no_pattern(tmp_path: Path) -> None:
    other = tmp_path / "model-a"
    kill(child(WAIT_WHILE_STAGING, other))
    (left,) = names(tmp_path)
    published(tmp_path / "model-*", "new")
    assert names(tmp_path) == [left, "model-*"]
    published(other, "new")
    assert names(tmp_path) == ["model-*", "model-a"]


def test_what_only_looks_like_a_workspace_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-thesis12").mkdir()
    (tmp_path / ".out.partial-thesis12" / "chapter.txt").write_text("years of work")
    (tmp_path / ".out.partial-file1234").write_text("")
    (tmp_path / ".out.partial-link1234").symlink_to(tmp_path / ".out.partial-thesis12")
    published(tmp_path / "out", "new")
    assert len(names(tmp_path)) == 4 and (tmp_path / ".out.partial-thesis12" / "chapter.txt").exists()


def test_a_swap_that_was_killed_gives_the_old_one_back(tmp_path: Path) -> None:
    output = published(tmp_path / "out", "old")
    done = subprocess.run([sys.executable, "-c", DIE_BETWEEN_TWO_RENAMES, str(output)], check=False)
    assert done.returncode == -signal.SIGKILL and not output.exists()
    with pytest.raises(OutputError, match="--force"), staged(output):
        pass
    assert (output / "manifest.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_another_machines_swap_is_given_a_minute(tmp_path: Path) -> None:
    output = tmp_path / "out"
    left = tmp_path / ".out.partial-abcdefgh"
    (left / OLD).mkdir(parents=True)
    write_artifact(left / OLD, "old")
    from_another_machine(left)
    with workspace(output):
        assert not output.exists()
    age(left, 61)
    with workspace(output):
        assert (output / "manifest.json").read_text() == "old"


def test_killed_before_the_lock_named_its_machine(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abcdefgh").mkdir()
    (tmp_path / ".out.partial-abcdefgh" / "lock").touch()
    published(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]


def test_a_workspace_that_was_killed_while_it_got_its_lock(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abcdefgh").mkdir()
    published(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]


def test_a_workspace_whose_lock_another_process_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that removes leftovers may hold the lock of a new workspace for a moment before the owner takes it."""
    make = publishing.tempfile.mkdtemp

    def made_and_looked_at(**named: Any) -> str:
        folder = make(**named)
        lock = os.open(Path(folder) / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.2, os.close, [lock]).start()
        monkeypatch.setattr(publishing.tempfile, "mkdtemp", make)
        return folder

    monkeypatch.setattr(publishing.tempfile, "mkdtemp", made_and_looked_at)
    published(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]


def test_many_exports_to_one_place_at_a_time(tmp_path: Path) -> None:
    """Each cleans up, none takes another's workspace away."""
    output, problems = tmp_path / "out", []

    def export(mark: str) -> None:
        try:
            for _ in range(20):
                with staged(output, force=True) as stage:
                    write_artifact(stage, mark)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=export, args=(str(number),)) for number in range(4)]
    published(output, "first")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_a_reader_never_misses_an_artifact_that_is_replaced(small: Path, tmp_path: Path) -> None:
    """Publishers are killed at random moments; whoever loads meanwhile always finds a whole artifact."""
    output = tmp_path / "out"
    shutil.copytree(small, output)
    (tmp_path / "x").mkdir()
    if not exchange(output, tmp_path / "x"):
        pytest.skip("this file system can't exchange two folders")
    exchange(output, tmp_path / "x")
    (tmp_path / "x").rmdir()
    loads, kills, kills_in_the_middle, moments = 0, 0, 0, random.Random(1)
    while kills < 8 or (not kills_in_the_middle and kills < 40):
        process = child(PUBLISH_AGAIN_AND_AGAIN, small, output, "exchange")
        until = time.monotonic() + moments.uniform(0.1, 0.6)
        while time.monotonic() < until:
            assert checked_manifest(output).target == "onnx"
            loads += 1
        kill(process)
        kills += 1
        # The next publisher clears away what this one left, so it must be looked for after each kill.
        kills_in_the_middle += any(name.startswith(".out.partial-") for name in names(tmp_path))
        assert checked_manifest(output).target == "onnx"
    assert loads > 8 and kills_in_the_middle
    load(output).close()
    with staged(output, force=True) as stage:
        shutil.copytree(small, stage, dirs_exist_ok=True)
    assert names(tmp_path) == ["out"]


def test_what_is_replaced_while_it_is_read_is_read_again(small: Path, tmp_path: Path) -> None:
    """A reader that has the old folder open finds its files removed; the new artifact has taken its place."""
    output, uses = tmp_path / "out", []
    shutil.copytree(small, output)

    def read() -> str:
        with OpenArtifact(output) as artifact:
            uses.append(artifact)
            if len(uses) == 1:
                with staged(output, force=True) as stage:
                    shutil.copytree(small, stage, dirs_exist_ok=True)
            artifact.check_contents()
            return artifact.manifest.target

    with pytest.raises(DamagedArtifact, match="missing"):
        read()
    uses.clear()
    assert of_current(output, read) == "onnx" and len(uses) == 2
    (output / "tokenizer.json").unlink()
    with pytest.raises(DamagedArtifact, match="missing"):
        of_current(output, read)
    assert len(uses) == 3


def test_killed_where_folders_cannot_be_exchanged(small: Path, tmp_path: Path) -> None:
    """At worst there is none until the next export, which gives the old one back."""
    output, moments = tmp_path / "out", random.Random(2)
    shutil.copytree(small, output)
    for _ in range(6):
        process = child(PUBLISH_AGAIN_AND_AGAIN, small, output, "two renames")
        time.sleep(moments.uniform(0.02, 0.3))
        kill(process)
        with workspace(output):
            assert checked_manifest(output).target == "onnx"
        assert names(tmp_path) == ["out"]


def test_files_and_folders_are_on_disk_before_they_get_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync = os.fsync

    def note_sync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_exchange(first: Path, second: Path) -> bool:
        done.append("exchange")
        return exchange(first, second)

    monkeypatch.setattr(writing.os, "fsync", note_sync)
    monkeypatch.setattr(publishing, "exchange", note_exchange)
    output = published(tmp_path / "out", "old")
    done.clear()
    with staged(output, force=True) as stage:
        write_artifact(stage, "new")
        (stage / "onnx").mkdir()
        (stage / "onnx" / "model.onnx").write_text("weights")
    assert set(done[:4]) == {"manifest.json", "onnx", "model.onnx", NEW} and done[4:] == ["exchange", tmp_path.name]
    done.clear()
    write_file(tmp_path / "result.json", b"{}")
    assert done[0].startswith(".result.json.partial-") and done[1:] == [tmp_path.name]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["result.json"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    write_file(Path(os.devnull), b"anything")


EXPORT = [
    str(COMMANDS / "ettin-export"),
    *("--size", "demo", "--target", "onnx", "--precision", "fp32", "--max-length", "64"),
]
# The same from the moment where an artifact is written, without what takes seconds to import.
PUBLISH_VERIFIED = """
import shutil, sys
from pathlib import Path
import click
from ettin.artifacts.publishing import staged
from ettin.runtimes.commands import console
from ettin.runtimes.verify import verify_in_child
@click.command()
@click.argument("artifact")
def command(artifact):
    with staged(Path("ettin-reranker-demo", "onnx-fp32"), force=False) as stage:
        shutil.copytree(artifact, stage, dirs_exist_ok=True)
        verify_in_child(stage)
console.run(command, publishes=True)
"""


def started(command: list[str], folder: Path) -> "subprocess.Popen[str]":
    # A shell lets the jobs that it runs in the background ignore SIGINT, and with them all their children.
    words = ["env", "--default-signal=INT", *command]
    return subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted; nothing unfinished was published"),
        (signal.SIGTERM, 143, "ended by SIGTERM; nothing unfinished was published"),
        (signal.SIGKILL, -9, None),
    ],
)
def test_an_export_that_is_ended_while_it_verifies(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, number: int, code: int, line: str | None
) -> None:
    """It cleans up and says so, if it can; the verifying process ends with it in any case."""
    stand_in = [sys.executable, "-c", PUBLISH_VERIFIED, str(demo_artifacts["onnx", "fp32"])]
    with started(EXPORT if number == signal.SIGTERM else stand_in, tmp_path) as process:
        wait_until(lambda: verifying(process.pid) != [])
        (verifier,) = verifying(process.pid)
        assert list(tmp_path.glob("*/.onnx-fp32.partial-*/new/manifest.json")) != []
        os.kill(verifier, signal.SIGSTOP)  # or it would soon end by itself
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "") and "Traceback" not in errors, errors
    if line:
        assert errors.splitlines()[-1] == line and names(tmp_path) == []
    if sys.platform == "linux":  # there the kernel ends it
        try:
            wait_until(lambda: not psutil.pid_exists(verifier), timeout_s=30)
        finally:
            with suppress(ProcessLookupError):
                os.kill(verifier, signal.SIGKILL)


def verifying(parent: int) -> list[int]:
    """Processes that verify and have loaded the engine."""
    found = []
    for child in psutil.Process(parent).children():
        with suppress(psutil.Error):  # it has ended meanwhile
            is_verifier = "ettin.runtimes.verify" in child.cmdline()
            if is_verifier and any("onnxruntime" in each.path for each in child.memory_maps()):
                found.append(child.pid)
    return found
