"""Nothing but the torch runtime needs torch or transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys
blocked = {"torch", "transformers", "sentence_transformers", "safetensors", "huggingface_hub", "onnx"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name.split(".")[0])
sys.meta_path.insert(0, Block())
"""


def child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_load_predict_rank_and_verify(demo_artifacts: dict[tuple[str, str], Path], target: str) -> None:
    code = """
from ettin.runtimes import load
with load(sys.argv[1]) as reranker:
    print(reranker.predict([("red planet", "Mars is the red planet"), ("red planet", "Venus is hot")]))
    print(reranker.rank("red planet", ["Venus is hot", "Mars is the red planet"])[0]["corpus_id"])
from ettin.runtimes.verify import verify
from pathlib import Path
print(verify(Path(sys.argv[1])).ok)
assert "torch" not in sys.modules
"""
    done = child(code, str(demo_artifacts[target, "fp32"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["1", "True"]


def test_transformers_artifact_says_what_it_needs(demo_artifacts: dict[tuple[str, str], Path]) -> None:
    done = child("from ettin.runtimes import load\nload(sys.argv[1])", str(demo_artifacts["transformers", "fp32"]))
    assert done.stderr.splitlines()[-1].endswith(
        "target 'transformers' needs torch, which is not installed. Run: pip install \"ettin-export[torch]\""
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--list"], ["--doctor"]])
def test_information_needs_no_extra(arguments: list[str]) -> None:
    done = child("from ettin.export.cli import main\nsys.argv[0] = 'ettin-export'\nmain()", *arguments)
    assert done.returncode == 0, done.stderr


def test_exporting_says_what_it_needs() -> None:
    done = child("from ettin.export.cli import main\nsys.argv[0] = 'ettin-export'\nmain()", "--size", "demo")
    assert done.returncode == 1
    assert 'Run: pip install "ettin-export[export]"' in done.stderr and len(done.stderr.strip().splitlines()) == 1
