"""Parity and throughput on a GPU, with torch, transformers and this repository alone; no install.

    python bench/gpu.py --minutes 8 --json results.json
    python bench/gpu.py --device cpu --sizes tiny --minutes 1   # a trial where there is no GPU

Throughput by the release's method: pairs at their natural lengths, max_length 512, tokenising included, batch size from
8 doubled until out of memory (here: or no gain twice), three passes, their median. The settings are those of the
release's ablation, run by a loop that does what sentence-transformers' `CrossEncoder.predict` does; and ours.
"""

# ruff: noqa: T201, E402
import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# A source checkout keeps the package's name in .dev, an assembled folder is a package itself. The script's own folder
# must not come first: its profile.py is not the standard library's.
_ROOT = next(root for root in (HERE.parent / ".dev", HERE.parents[1]) if (root / "ettin" / "bench").exists())
if __name__ == "__main__":
    sys.path[0] = str(_ROOT)

import torch

from ettin.artifacts.errors import EttinError
from ettin.bench.gpu_speed import (
    MAX_LENGTH,
    best_of,
    linear_flops_per_token,
    matrix_peak_tflops,
    settings,
)
from ettin.bench.gpu_subject import Pairs, Place, opened, parity, plain_varlen
from ettin.bench.machine import write_result
from ettin.export.reference import natural_pairs, read_pairs
from ettin.export.source.checkpoint import read_checkpoint
from ettin.export.source.sizes import DEMO_FOLDER, SIZES
from ettin.export.source.weights import write_random_checkpoint
from ettin.graph import ModelShape
from ettin.runtimes.engines.flash import flash_kernel
from ettin.runtimes.tokenizer import PairTokenizer

_TINY = ModelShape(
    vocab_size=8192, hidden_size=64, intermediate_size=96, num_heads=2, global_layers=(True, False, False, True),
    window_tokens=64, rope_theta_global=160_000.0, rope_theta_local=160_000.0, norm_eps=1e-5, head_norm_eps=1e-5,
    max_tokens=7999, pad_token_id=0,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs parity, then throughput, size after size; prints tables and writes JSON after each."""
    options = _options(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.monotonic()
    place = Place(options.device, flash_kernel() if options.device == "cuda" else plain_varlen)
    pairs, text = _texts(options.pairs)
    checkpoint = options.checkpoint or (HERE / "checkpoint" if (HERE / "checkpoint").exists() else DEMO_FOLDER)
    tokenizer_folder = options.tokenizer or checkpoint
    found: dict[str, Any] = {
        "text": text,
        "max_length": MAX_LENGTH,
        "tokenizer": tokenizer_folder.name,
        "sizes": {},
    }
    command, card = shlex.join(["python", *sys.argv]), _card(place)
    with opened(read_checkpoint(checkpoint), place) as subject:
        tokenizer = PairTokenizer(checkpoint / "tokenizer.json")
        measured = parity(subject, tokenizer, pairs[:256], MAX_LENGTH)
        cases = measured.pop("cases")
        found["parity"] = {"weights": f"trained: {checkpoint.name}"} | measured
        golden = {"weights_sha256": subject.checkpoint.weights_sha256(), "cases": cases}
    _show_parity(found["parity"])
    write_result(options.golden, "fa2-golden", command, golden, card)
    write_result(options.json, "gpu", command, found, card)

    peak = found["matrix_peak_tflops"] = matrix_peak_tflops(place)
    sizes = options.sizes.split(",")
    deadline = started + 60 * options.minutes
    for number, size in enumerate(sizes):
        until = _fair(deadline, len(sizes) - number)
        found["sizes"][size] = _measured(size, place, pairs, tokenizer_folder, until, peak)
        _show_speed(size, found["sizes"][size])
        write_result(options.json, "gpu", command, found, card)
    print(f"{time.monotonic() - started:.0f} s in all")


def _measured(
    size: str, place: Place, pairs: Pairs, tokenizer_folder: Path, deadline: float, peak: float | None
) -> dict[str, Any]:
    shape = _TINY if size == "tiny" else SIZES[size].shape
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_random_checkpoint(Path(scratch), shape, 0, tokenizer_folder)
        with opened(read_checkpoint(Path(scratch), is_random=True), place) as subject:
            file = Path(scratch) / "tokenizer.json"
            tokens = sum(len(each) for each in PairTokenizer(file).pairs(pairs, MAX_LENGTH)) / len(pairs)
            entries = settings(subject, file)
            for number, (name, (ready, first)) in enumerate(entries.items()):
                until = _fair(deadline, len(entries) - number)
                predict = ready()
                rows[name] = best_of(predict, first, pairs, place, until)
                del predict
                if place.device == "cuda":
                    torch.cuda.empty_cache()
    for row in rows.values():
        if "pairs_per_s" in row and peak:
            row["share_of_peak"] = row["pairs_per_s"] * tokens * linear_flops_per_token(shape) / peak / 1e12
    return {"weights": "random", "tokens_per_pair": tokens, "rows": rows}


def _fair(deadline: float, left: int) -> float:
    """When the next of `left` measurements must end."""
    now = time.monotonic()
    return now + (deadline - now) / left


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}, tiny (default: the released)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial")
    parser.add_argument("--pairs", type=Path, help="JSON lines with query and document (default: those that are here)")
    parser.add_argument("--checkpoint", type=Path, help="trained, for parity (default: the one that is here)")
    parser.add_argument("--tokenizer", type=Path, help="folder, for speed (default: the checkpoint's)")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--golden", type=Path, help="write FlashAttention-2's scores there, for parity_tests/goldens/")
    options = parser.parse_args(arguments)
    unknown = set(options.sizes.split(",")) - {*SIZES, "tiny"}
    if unknown:
        parser.error(f"unknown size {', '.join(sorted(unknown))}")
    return options


def _texts(path: Path | None) -> tuple[list[tuple[str, str]], str]:
    path = path or (HERE / "pairs.jsonl" if (HERE / "pairs.jsonl").exists() else None)
    if path is None:
        return [(pair.query, pair.document) for pair in natural_pairs()], "the project's own passages"
    return [(pair.query, pair.document) for pair in read_pairs(path)], path.name


def _card(place: Place) -> dict[str, object]:
    if place.device != "cuda":
        return {"device": place.device}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": place.device,
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "gpu_mib": properties.total_memory >> 20,
        "cuda": torch.version.cuda,
    }


def _show_parity(found: dict[str, Any]) -> None:
    print(f"\nerror against fp32, {found['pairs']} pairs, weights {found['weights']}")
    print(f"{'':36}{'largest':>10}{'mean':>10}{'of FA2':>8}")
    for name, row in found["rows"].items():
        print(f"{name:36}{row['max_abs_error']:10.1e}{row['mean_abs_error']:10.1e}{row['of_reference']:8.2f}")


def _show_speed(size: str, found: dict[str, Any]) -> None:
    rows = found["rows"]
    base = rows["bf16 FA2 unpadded"].get("pairs_per_s")
    print(f"\n{size}, random weights, {found['tokens_per_pair']:.0f} tokens a pair")
    print(f"{'':24}{'pairs/s':>10}{'× FA2':>8}{'batch':>8}{'MiB':>8}{'of peak':>9}  stopped")
    for name, row in rows.items():
        speed = row.get("pairs_per_s")
        figures = (
            f"{speed:10.0f}" if speed else f"{'–':>10}",
            f"{speed / base:8.2f}" if speed and base else f"{'–':>8}",
            f"{row.get('batch', '–')!s:>8}",
            f"{row.get('peak_gpu_mib') or '–'!s:>8}",
            f"{row['share_of_peak']:9.1%}" if "share_of_peak" in row else f"{'–':>9}",
        )
        print(f"{name:24}{''.join(figures)}  {row['stopped']}")


if __name__ == "__main__":
    try:
        main()
    except (EttinError, OSError) as error:
        sys.exit(f"error: {error}")
