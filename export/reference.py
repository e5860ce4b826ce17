"""The reference: gold scores from sentence-transformers' own CrossEncoder, in SDPA attention and an explicit dtype."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder
from torch import Tensor

from ettin.artifacts.errors import CheckpointError, EttinError, UnsupportedCheckpoint
from ettin.artifacts.parity import ParityCase
from ettin.export.proof_pairs import ProofPair
from ettin.export.source.checkpoint import ROPE_BASES, WRONG_BASE, Checkpoint
from ettin.runtimes.batch import cut

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Gold:
    """What the reference computes for the proof pairs."""

    cases: list[ParityCase]
    max_activation: float | None  # largest |activation| in fp32, which fp16 must be able to hold; None: not measured


def load_gold(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> CrossEncoder:
    """The checkpoint as a CrossEncoder on the CPU.

    Raises:
        CheckpointError: transformers can't read it.
        UnsupportedCheckpoint: transformers reads it with another RoPE base than it states, or CrossEncoder with another
            activation.
    """
    if int(transformers.__version__.split(".")[0]) < 5:
        raise EttinError(
            f"transformers {transformers.__version__} reads Ettin configs with a wrong RoPE base, expected 5 or later. "
            'Run: pip install -U "ettin-export[export]"'
        )
    transformers.utils.logging.disable_progress_bar()  # the exporter shows its own steps
    # transformers 5 keeps the stored dtype unless told otherwise.
    arguments = {"dtype": dtype, "attn_implementation": "sdpa"}
    try:
        model = CrossEncoder(str(checkpoint.folder), device="cpu", local_files_only=True, model_kwargs=arguments)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.folder}: sentence-transformers can't load it ({error})") from None
    config, shape = model[0].model.config, checkpoint.shape
    stated = [shape.rope_theta_global, shape.rope_theta_local]
    read = [float(config.rope_parameters[kind]["rope_theta"]) for kind in ROPE_BASES]
    if read != stated:
        raise UnsupportedCheckpoint(
            f"{checkpoint.folder / 'config.json'}: states RoPE bases {stated}, transformers reads {read}: {WRONG_BASE}"
        )
    applied = type(model.activation_fn).__name__.lower()
    if applied != checkpoint.activation:
        raise UnsupportedCheckpoint(
            f"{checkpoint.folder}: its configs say that scores are {checkpoint.activation} of the logit, CrossEncoder "
            f"applies {applied}"
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {dtype} or config._attn_implementation != "sdpa":
        raise EttinError(f"gold runs in {dtypes} with {config._attn_implementation}, expected {dtype} and sdpa")
    return model


def score_gold(
    checkpoint: Checkpoint, pairs: Sequence[ProofPair], max_length: int, *, with_bf16: bool, with_activations: bool
) -> Gold:
    """Tokenises and scores the proof pairs with the reference, then frees it.

    Pairs of the grid that are longer than `max_length` tokens are left out. Reduced precisions are judged against
    scores in bf16; fp16 needs the largest activation, which costs time.
    """
    chosen = [pair for pair in pairs if pair.max_length is None or pair.max_length <= max_length]
    model = load_gold(checkpoint)
    ids = []
    for pair in chosen:
        model.max_seq_length = pair.max_length or max_length
        ids.append(model.preprocess([[pair.query, pair.document]])["input_ids"][0].tolist())
    with _largest_activation(model) if with_activations else nullcontext() as largest:
        gold = _scores(model, ids)
    del model
    gc.collect()
    bf16 = _scores(load_gold(checkpoint, torch.bfloat16), ids) if with_bf16 else [None] * len(chosen)
    gc.collect()
    cases = [
        ParityCase(
            query=pair.query, document=pair.document, max_length=pair.max_length or max_length, ids=tokens, gold=score,
            torch_bf16=bf16_score,
        )
        for pair, tokens, score, bf16_score in zip(chosen, ids, gold, bf16, strict=True)
    ]  # fmt: skip
    return Gold(cases, largest[0] if largest else None)


@torch.inference_mode()
def _scores(model: CrossEncoder, ids: Sequence[list[int]]) -> list[float]:
    """Raw logits, in padded batches."""
    pad = model.tokenizer.pad_token_id
    scores = [0.0] * len(ids)
    model.eval()
    for batch in cut([len(row) for row in ids], _BATCH_TOKENS):
        rows = [torch.tensor(ids[index]) for index in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        logits = model({"input_ids": input_ids, "attention_mask": attention_mask})["scores"]
        for index, score in zip(batch, logits[:, 0].float().tolist(), strict=True):
            scores[index] = score
    return scores


@contextmanager
def _largest_activation(model: CrossEncoder) -> Iterator[list[float]]:
    """Watches the inputs and outputs of every module. Yields a list whose one value is the largest |activation|."""
    largest = [0.0]

    def watch(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        for value in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                largest[0] = max(largest[0], _largest(value))

    handles = [module.register_forward_hook(watch) for module in model[0].modules() if not list(module.children())]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _largest(value: Tensor) -> float:
    """Largest |x|, without −inf and the dtype's minimum, which are masks, and without NaN."""
    least, most = (float(end) for end in value.aminmax())
    if least > torch.finfo(value.dtype).min:  # so there is neither: no copy of the values
        return max(-least, most)
    rest = value[value > torch.finfo(value.dtype).min]
    return float(rest.abs().max()) if rest.numel() else 0.0
