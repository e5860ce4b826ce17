"""The process that contests and visits to a GPU follow: what it says, why it ended, and what ends with it."""

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ettin.artifacts.errors import EttinError
from ettin.bench.child import Child

ECHO = """
import json, sys
print("a library says this")
for line in sys.stdin:
    print(json.dumps({"ettin": json.loads(line)}), flush=True)
print("the last line", file=sys.stderr)
"""
DIES = "import os, sys; print('what it was doing', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"ettin": {"pid": %d}}' % child.pid, flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def reason(child: Child) -> str:
    with pytest.raises(EttinError) as raised:
        child.answer()
    return str(raised.value)


def test_answers_among_other_lines() -> None:
    with Child(["-c", ECHO], {}) as child:
        assert child.ask({"do": Path("here")}) == {"do": "here"}
        with pytest.raises(EttinError, match="^too large$"):
            child.ask({"problem": "too large"})
        child.tell({"do": 2}, is_last=True)
        assert child.answer() == {"do": 2} and reason(child) == "the last line"


def test_reasons_of_death() -> None:
    with Child(["-c", DIES], {}) as child:
        assert reason(child) == "died with signal 11: what it was doing"
        child.tell({"do": "nothing"})
    with Child(["-c", ""], {}) as child:
        assert reason(child) == "no message"


def test_a_process_that_is_late_is_killed() -> None:
    for has_session in (False, True):
        with Child(["-c", ECHO], {}, has_session=has_session) as child:
            child.end_at(time.monotonic(), "killed after 0 s")
            assert reason(child) == "killed after 0 s"


def test_one_that_answered_is_spared_until_the_next_end() -> None:
    with Child(["-c", ECHO], {}) as child:
        child.tell({"do": 1})
        assert select.select([child._answers], [], [], 60)[0]
        child.end_at(time.monotonic(), if_silent=True)
        child._timer.join()
        assert child.answer() == {"do": 1} and child.ask({"do": 2}) == {"do": 2}
        child.end_at(time.monotonic())
        assert reason(child) == "out of time"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of a process from /proc")
@pytest.mark.parametrize("has_session", [False, True])
def test_what_it_started_ends_with_its_session(has_session: bool) -> None:
    with Child(["-c", PARENT], {}, has_session=has_session) as child:
        pid = child.answer()["pid"]
    try:
        deadline = time.monotonic() + (60 if has_session else 0.5)
        while runs(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert runs(pid) is not has_session
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
