"""Runs `transformers` artifacts with torch on a CPU.

It is transformers' own ModernBertForSequenceClassification, padded, with SDPA attention.
"""

import json
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import DamagedArtifact
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.batch import Batch, BatchLimits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Small batches stay in the caches. Measured with the 17m shape in fp32 on two cores, SQuAD pairs: 126 pairs/s with
# 512 tokens a thread, 94 with 4096.
_CPU_TOKENS_PER_THREAD = 512

# The keys of config.json that describe the model; all others, such as code to import, are ignored.
_CONFIG_KEYS = (
    "attention_bias", "classifier_activation", "classifier_bias", "classifier_pooling", "global_attn_every_n_layers",
    "global_rope_theta", "hidden_activation", "hidden_size", "intermediate_size", "layer_types", "local_attention",
    "local_rope_theta", "max_position_embeddings", "mlp_bias", "norm_bias", "norm_eps", "num_attention_heads",
    "num_hidden_layers", "pad_token_id", "rope_parameters", "vocab_size",
)  # fmt: skip


class TorchRuntime(Runtime):
    """The stock transformers model on a CPU; see `Runtime`.

    Args:
        artifact: open.
        settings: no streams, no cache; `threads` are torch's for the whole process, None: torch's own choice.
    """

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        settings.refuse("transformers", "streams", "cache_dir")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._model: Any = self.prepared(stock_model(artifact), artifact.manifest)
        super().__init__(artifact, settings, self.batch_limits)

    def prepared(self, model: Any, manifest: Manifest) -> Any:
        """What `logits` calls, made of the stock model."""
        return model.eval()

    @property
    def batch_limits(self) -> BatchLimits:
        """The batches that this device takes."""
        return BatchLimits(concurrency=1, batch_tokens=_CPU_TOKENS_PER_THREAD * torch.get_num_threads())

    @property
    def description(self) -> str:
        return f"torch {torch.__version__}, {self.settings.device}, SDPA, {self.manifest.precision}"

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic.BF16 if self.manifest.precision == "bf16" else Arithmetic.F32

    @torch.inference_mode()
    def score(self, batch: Batch) -> NDArray[np.float32]:
        return np.asarray(self.logits(batch).float().cpu().numpy())

    def logits(self, batch: Batch) -> Tensor:
        """Raw logits [pairs], in the model's type, on its device."""
        input_ids, attention_mask = (torch.from_numpy(array).to(self.settings.device) for array in batch.padded())
        logits: Tensor = self._model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
        return logits

    def _release(self) -> None:
        self._model = None


def stock_model(artifact: OpenArtifact) -> Any:
    """The model of transformers, made of checked bytes: no file is opened and no name in the artifact is imported."""
    manifest = artifact.manifest
    config = json.loads(artifact.read("config.json"))
    if not isinstance(config, dict) or config.get("model_type") != ModernBertConfig.model_type:
        raise DamagedArtifact(
            f"{artifact.path}/config.json: expected model_type '{ModernBertConfig.model_type}'. "
            f"Export again: {manifest.command}"
        )
    known = {key: config[key] for key in _CONFIG_KEYS if key in config}
    built = ModernBertConfig(**known, num_labels=1)
    tensors = safetensors.torch.load(artifact.read(manifest.entry))
    # transformers fills what is missing with random numbers.
    with torch.device("meta"):
        expected = ModernBertForSequenceClassification(built).state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape:
            raise DamagedArtifact(
                f"{artifact.path / manifest.entry}: the tensor {name[:200]} is missing, unknown or not of the shape "
                f"that config.json says. Export again: {manifest.command}"
            )
    # The dtype is explicit: transformers 5 would otherwise take the stored one.
    return ModernBertForSequenceClassification.from_pretrained(
        None,
        config=built,
        state_dict=tensors,
        dtype=DTYPES[manifest.precision],
        attn_implementation="sdpa",
        local_files_only=True,
    )
