"""What several test files use."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ettin.artifacts.files import list_files
from ettin.artifacts.manifest import _digest
from ettin.artifacts.targets import registered_targets
from ettin.export.source.sizes import DEMO_FOLDER
from ettin.graph import ModelShape

BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
SHARED = Path(__file__).parents[3] / "shared" / "data"
COMMANDS = Path(sys.executable).parent
# What any machine can run. ONNX in bf16 is for GPUs.
_RUNNABLE = [target for target in registered_targets() if not target.is_compiled]
VARIANTS = [
    (target.name, precision)
    for target in _RUNNABLE
    for precision in target.precisions
    if (target.name, precision) != ("onnx", "bf16")
]

# A shape that is tiny and unlike the released ones: another window, two RoPE bases, a local last layer, 3 heads of 32.
TINY = ModelShape(
    vocab_size=8192,
    hidden_size=96,
    intermediate_size=80,
    num_heads=3,
    global_layers=(True, False, False, True, False),
    window_tokens=24,
    rope_theta_global=160_000.0,
    rope_theta_local=20_000.0,
    norm_eps=1e-5,
    head_norm_eps=1e-5,
    max_tokens=3000,
    pad_token_id=8190,
)


# Plain checkpoints: what their configs say beyond `write_plain`. "generation" is the version of transformers whose keys
# the config has. The last layers are global, local (5 layers), and local by an irregular order.
PLAIN: dict[str, dict[str, Any]] = {
    "cls": {"generation": 4},
    "mean": {"generation": 4, "classifier_pooling": "mean"},
    "attention": {"attention_bias": True, "classifier_pooling": "mean"},
    "mlp": {"mlp_bias": True, "num_hidden_layers": 5},
    "norm": {"norm_bias": True, "classifier_pooling": "mean", "num_hidden_layers": 5},
    "classifier": {"classifier_bias": True, "bases": (80_000.0, 500.0)},
    "biased cls": {"generation": 4, **dict.fromkeys(BIASES, True), "bases": (80_000.0, 20_000.0)},
    "biased mean": {
        **dict.fromkeys(BIASES, True),
        "classifier_pooling": "mean",
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "norm_eps": 1e-3,
    },
}


def write_plain(folder: Path, kind: str) -> Path:
    """A plain checkpoint with random weights, written by transformers. Global and local layers have two bases."""
    import torch
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    settings = dict(PLAIN[kind])
    generation, (base, local_base) = settings.pop("generation", 5), settings.pop("bases", (160_000.0, 10_000.0))
    settings.setdefault("num_hidden_layers", 4)
    parameters = {"full_attention": base, "sliding_attention": local_base}
    config = ModernBertConfig(
        **settings, num_labels=1, vocab_size=8192, hidden_size=128, intermediate_size=96, num_attention_heads=2,
        local_attention=48, max_position_embeddings=3000, pad_token_id=8190, cls_token_id=8188, bos_token_id=8188,
        sep_token_id=8189, eos_token_id=8189, classifier_activation="gelu",
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in parameters.items()},
    )  # fmt: skip
    torch.manual_seed(3)
    model = ModernBertForSequenceClassification(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm.weight" in name:
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            elif name.endswith(".bias"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
            else:
                scale = 1.0 if "embeddings" in name else 3.0 if name.startswith("classifier") else 1.5
                tensor.copy_(
                    scale * torch.randn_like(tensor) * (1 if "embeddings" in name else tensor.shape[-1] ** -0.5)
                )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / name, folder / name)
    if generation == 4:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        for key in ("rope_parameters", "layer_types", "dtype"):
            content.pop(key)
        old = {"global_rope_theta": base, "local_rope_theta": local_base, "global_attn_every_n_layers": 3}
        path.write_text(json.dumps({**content, **old, "torch_dtype": "float32", "transformers_version": "4.57.1"}))
    return folder


def shared_path(name: str) -> Path:
    """A file of the reference data, which is not part of this repository."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the reference data ../shared/data/{name}")
    return path


def run(*arguments: str | Path, cwd: Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours, in a process of its own."""
    command = [str(COMMANDS / arguments[0]), *map(str, arguments[1:])]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=stdin, env=variables, check=False)


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Returns when a condition holds; fails if it takes too long, so that a test ends."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def in_a_child(code: str, artifact: Path, environment: dict[str, str] | None = None) -> str:
    """What a fresh process prints; OpenVINO can die instead of raising."""
    program = f"import sys\nfrom ettin.runtimes import load\n{code}"
    command = [sys.executable, "-c", program, str(artifact)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert child.returncode == 0, (child.returncode, child.stderr)
    return child.stdout


def reseal(folder: Path) -> None:
    """Lists the files anew, as a program that knows the format could."""
    rewrite(folder, lambda content: content.update(files=[each.model_dump() for each in list_files(folder)]))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Edits the manifest; signed, as a program that knows the format could."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content.pop("manifest_sha256", None)
    if sign:
        content["manifest_sha256"] = _digest(content)
    path.write_text(json.dumps(content))
