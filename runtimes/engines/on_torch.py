"""Runs `transformers` artifacts with torch.

In fp32, and on CPUs: transformers' own ModernBertForSequenceClassification, padded, with SDPA attention. In bf16 on a
GPU: our graph without padding, with FlashAttention-2.
"""

import json
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import DamagedArtifact, HardwareError
from ettin.artifacts.manifest import Manifest
from ettin.artifacts.opened import OpenArtifact
from ettin.gpu.engines.flash import FlashGraph, Kernel, flash_kernel, packed_inputs
from ettin.graph import ModelShape
from ettin.graph.fold import inference_weights, modular_tensors
from ettin.runtimes.base import Runtime, Settings
from ettin.runtimes.batch import Batch, BatchLimits

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

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
    """The stock transformers model, or our graph of it; see `Runtime`.

    Args:
        artifact: open.
        settings: no streams, no cache; `threads` are torch's for the whole process, None: torch's own choice.

    Raises:
        HardwareError: no CUDA device, or for bf16 none that FlashAttention-2 runs on.
    """

    def __init__(self, artifact: OpenArtifact, settings: Settings) -> None:
        manifest, device = artifact.manifest, settings.device
        settings.refuse("transformers", "streams", "cache_dir")
        if device == "cuda" and not torch.cuda.is_available():
            raise HardwareError("device 'cuda': torch finds no CUDA device. Run: ettin-export --doctor")
        kernel = flash_kernel() if device == "cuda" and manifest.precision == "bf16" else None
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._model = _model(artifact)
        self._device = device
        self._flash = None if kernel is None else self._flash_graph(manifest, kernel)
        if self._flash is None:
            self._model.to(device).eval()
        if device == "cpu":
            limits = BatchLimits(concurrency=1, batch_tokens=_CPU_TOKENS_PER_THREAD * torch.get_num_threads())
        else:  # while the GPU computes one batch, the next is copied and its kernels are queued
            limits = BatchLimits(concurrency=2, batch_tokens=65536, in_parallel=False)
        super().__init__(artifact, settings, limits)

    def _flash_graph(self, manifest: Manifest, kernel: Kernel) -> FlashGraph:
        shape = ModelShape.from_json(manifest.source.shape)
        tensors = {name: tensor.float() for name, tensor in self._model.state_dict().items()}
        weights = inference_weights(*modular_tensors(tensors), shape)
        self._model = None
        return FlashGraph(weights, shape, kernel, _DTYPES[manifest.precision]).to(self._device)

    @property
    def description(self) -> str:
        attention = "FlashAttention-2, unpadded" if self._flash else "SDPA"
        return f"torch {torch.__version__}, {self._device}, {attention}, {self.manifest.precision}"

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic.BF16 if self.manifest.precision == "bf16" else Arithmetic.F32

    @torch.inference_mode()
    def score(self, batch: Batch) -> NDArray[np.float32]:
        if self._flash is not None:
            logits = self._flash(*packed_inputs(batch, self._device), batch.longest)
        else:
            input_ids, attention_mask = (torch.from_numpy(array).to(self._device) for array in batch.padded())
            logits = self._model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
        return np.asarray(logits.float().cpu().numpy())

    def _release(self) -> None:
        self._model = self._flash = None


def _model(artifact: OpenArtifact) -> Any:
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
        dtype=_DTYPES[manifest.precision],
        attn_implementation="sdpa",
        local_files_only=True,
    )
