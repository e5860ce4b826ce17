"""The page in `examples/browser`, in a real browser."""

import functools
import json
import os
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ettin.runtimes import load

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FIRST, SECOND = "Which planet is known as the Red Planet?", "How is bread baked?"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER or not shutil.which("npm"), reason="needs Chromium and npm")
def test_typing_a_query_reorders_the_passages(demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "examples" / "browser", tmp_path / "browser")
    shutil.copytree(demo_artifacts["onnx", "int8"], folder / "model")
    install = ["npm", "install", "--silent", "--no-audit", "playwright-core@1.65.1"]
    subprocess.run(install, cwd=folder, env={**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}, check=True)
    script = shutil.copy(ROOT / "parity_tests" / "tools" / "browser.mjs", folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        screenshot = Path(os.environ.get("ETTIN_SCREENSHOT", tmp_path / "page.png"))
        command = ["node", script, url, str(BROWSER), tmp_path / "profile", SECOND, screenshot]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["problems"] == [] and seen["hosts"] == [url.removeprefix("http://")]  # nothing comes from elsewhere
    with load(folder / "model") as runtime:
        for query, shown in ((FIRST, seen["first"]), (SECOND, seen["second"])):
            assert len(shown) == 5 and shown == sorted(shown, key=lambda row: -row[1])
            scores = runtime.predict([(query, passage) for passage, _ in shown])
            # WebAssembly rounds the quantised activations as other processors do: a step now and then.
            np.testing.assert_allclose([score for _, score in shown], scores, atol=0.02)
    assert seen["first"][0][0].startswith("Mars") and seen["second"][0][0].startswith("Bread")
