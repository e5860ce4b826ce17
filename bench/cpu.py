"""Our artifacts against what a user would run instead, on CPUs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin.bench.contest import Contest, contestants, measured, token_lengths, weights_of
from ettin.bench.texts import pairs_to_score, text_name

# Variables that limit each library to an instruction set. MLAS (OpenVINO's f32 GEMM, all of ONNX Runtime) obeys none of
# them, and torch's ATen knows no VNNI: see the notes of the result.
ISAS: dict[str, dict[str, str]] = {
    "all": {},
    "amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "avx512_vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2_vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
NOTES = {
    "all": "no limit",
    "amx": "oneDNN alone is limited, to bf16 and int8 tiles",
    "avx512_vnni": "OpenVINO's f32 GEMM (MLAS) and ONNX Runtime do not obey the limit",
    "avx2_vnni": "OpenVINO's f32 GEMM (MLAS) and ONNX Runtime do not obey the limit; torch is limited to AVX2",
}


@dataclass(frozen=True)
class CpuRun:
    """One interleaved comparison on CPUs; see `cpu` and `all`."""

    artifacts: Sequence[Path]
    checkpoint: Path | None
    peers: Sequence[str]
    data: Path | None = None
    count: int = 400
    rounds: int = 5
    max_length: int = 512
    fill: bool = False
    streams: int | None = None
    cache_dir: Path | None = None
    isa: str = "all"

    def measured(self) -> dict[str, Any]:
        """Runs it; the result."""
        chosen = {"streams": self.streams, "cache_dir": str(self.cache_dir) if self.cache_dir else None}
        settings = {key: value for key, value in chosen.items() if value}
        entries = contestants(self.artifacts, settings, self.checkpoint, self.peers)
        pairs = pairs_to_score(self.data, self.count, self.max_length if self.fill else None)
        candidates = min(100, len(pairs))
        contest = Contest(
            pairs, candidates, self.max_length, self.rounds, environment=ISAS[self.isa], warm=bool(self.cache_dir)
        )
        lengths = token_lengths(contest, self.artifacts[0])
        results = measured(contest, entries, self.artifacts, lengths)
        return {
            "data": text_name(self.data),
            "pairs": len(pairs),
            "tokens_per_pair": sum(lengths) / len(pairs),
            "candidates": candidates,
            "rounds": self.rounds,
            "max_length": self.max_length,
            "filled": self.fill,
            "model_cache": bool(self.cache_dir),
            "weights": weights_of(self.artifacts),
            "isa": self.isa,
            "isa_note": NOTES[self.isa],
            "contestants": results,
        }
