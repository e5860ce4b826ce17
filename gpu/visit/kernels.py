"""Part (c): where the time goes, by torch's profiler: kernels by share of GPU time, on a CPU operators of CPU time."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ettin.bench.workloads import pairs_to_score
from ettin.gpu.visit.models import Pairs, TorchModel, opened_model, our_score
from ettin.gpu.visit.report import MAX_LENGTH, Report, Task
from ettin.gpu.visit.settings import OURS, REFERENCE, SETTINGS
from ettin.gpu.visit.speed import random_checkpoint
from ettin.runtimes.batch import Batch, cut
from ettin.runtimes.tokenizer import PairTokenizer

_SIZES = ("17m", "1b")
_ROWS = 25
_NAME_CHARACTERS = 160  # templates make the names of kernels long


def run(task: Task, report: Report) -> None:
    """Profiles the reference and our graph on the smallest and the largest size."""
    pairs = pairs_to_score(task.data, 256 if task.device == "cuda" else 4)
    for size in [size for size in task.sizes if size in _SIZES] or task.sizes[:1]:
        with random_checkpoint(size, task.checkpoint) as folder:
            for name, work in ((REFERENCE, _reference_work), (OURS, _our_work)):
                report.attempt(f"{size}, {name}", partial(_profiled, folder, task.device, work, pairs))


def _reference_work(model: TorchModel, pairs: Pairs) -> Callable[[], object]:
    """The whole pass, tokenising included."""
    setting = SETTINGS[REFERENCE]
    return partial(setting.ready(model), pairs, MAX_LENGTH, setting.first_batch)


def _our_work(model: TorchModel, pairs: Pairs) -> Callable[[], object]:
    """The graph alone on batches of the same pairs: the scheduler calls it in a thread that is not profiled."""
    score, sequences = our_score(model), PairTokenizer(model.tokenizer_file).pairs(pairs, MAX_LENGTH)
    groups = cut([len(ids) for ids in sequences], SETTINGS[OURS].first_batch)
    batches = [Batch.of([sequences[index] for index in group], 0) for group in groups]
    return lambda: [score(batch) for batch in batches]


def _profiled(
    folder: Any, device: str, work_of: Callable[[TorchModel, Pairs], Callable[[], object]], pairs: Pairs
) -> dict[str, Any]:
    """Time of the work without the profiler, and the shares of what ran under it, longest first."""
    with opened_model(folder, device) as model:
        work = work_of(model, pairs)
    work()  # the first pass loads kernels
    wall_ms = min(_milliseconds(work) for _ in range(3))
    is_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
        work()
    kind = "CUDA" if is_gpu else "CPU"
    events = [
        event for event in profiler.key_averages() if event.device_type.name == kind and not event.is_user_annotation
    ]
    times_ms = {
        event: (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1000 for event in events
    }
    total_ms = sum(times_ms.values())
    longest = sorted(times_ms, key=lambda event: -times_ms[event])
    rows = [
        {
            "name": event.key[:_NAME_CHARACTERS],
            "calls": event.count,
            "milliseconds": times_ms[event],
            "share": times_ms[event] / total_ms if total_ms else None,
        }
        for event in longest[:_ROWS]
    ]
    # On a GPU, busy: what of the time without the profiler kernels would fill. The rest is waiting for the CPU.
    times = {"wall_ms": wall_ms, "total_ms": total_ms, "busy": total_ms / wall_ms}
    return {"pairs": len(pairs), **times, "calls": sum(event.count for event in events), "rows": rows}


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()  # ends with scores on the CPU
    return 1000 * (time.perf_counter() - start)
