"""The released sizes: where they are and, for random weights, their shapes."""

from dataclasses import dataclass
from pathlib import Path

from ettin.graph import ModelShape


@dataclass(frozen=True)
class Size:
    """A released checkpoint. Source of parameters and revisions: MTEB's model registry."""

    name: str  # what `--size` takes
    parameters: int  # of encoder and head
    revision: str  # the hub commit that is exported
    hidden_size: int
    num_layers: int
    intermediate_size: int

    @property
    def hub_id(self) -> str:
        """Repository on the Hugging Face hub."""
        return f"cross-encoder/ettin-reranker-{self.name}-v1"

    @property
    def shape(self) -> ModelShape:
        """The shape of random weights. A downloaded checkpoint states its own."""
        return ModelShape(
            vocab_size=50368,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.hidden_size // 64,
            global_layers=tuple(layer % 3 == 0 for layer in range(self.num_layers)),
            window_tokens=64,
            rope_theta_global=160_000.0,
            rope_theta_local=160_000.0,
            norm_eps=1e-5,
            head_norm_eps=1e-5,
            max_tokens=7999,
            pad_token_id=50283,
        )


_RELEASED = (
    Size("17m", 16_863_745, "9e4aa35321a6dd1a43ca313f500c4b4f7cfb5cc6", 256, 7, 384),
    Size("32m", 32_031_745, "b33e5ceb5110773ea9cf5e00c9bedc83a8c2afdd", 384, 10, 576),
    Size("68m", 68_408_321, "d166fa88ddde3c42bc3ee92f7df476d941c8204a", 512, 19, 768),
    Size("150m", 149_606_401, "025501c4e0f9bbeb4c5b198318e0089ff061cc14", 768, 22, 1152),
    Size("400m", 395_833_345, "5dca36282a5d85f368d2544002513a29159b4c9e", 1024, 28, 2624),
    Size("1b", 1_031_267_329, "7d20e9baad17016fdf5549c08f69a2d7ca3e60c3", 1792, 28, 3840),
)
SIZES = {size.name: size for size in _RELEASED}
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
