"""What fixes the shape of a scorer."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True)
class ModelShape:
    """Shape of a ModernBERT cross-encoder, as read from a checkpoint's configs.

    Args:
        vocab_size: rows of the embedding table.
        hidden_size: width of the residual stream (H).
        intermediate_size: width of each GeGLU half.
        num_heads: attention heads; the head dimension is H / num_heads.
        global_layers: for each layer, whether it attends to all tokens.
        window_tokens: in a local layer query i sees keys j with |i − j| ≤ window_tokens (half of `local_attention`).
        rope_theta_global: base of the rotary frequencies in global layers.
        rope_theta_local: the same in local layers. ModernBERT-base has 10000 here, Ettin 160000.
        norm_eps: epsilon of the encoder's norms.
        head_norm_eps: epsilon of the head's LayerNorm (in modular checkpoints 1e-5, torch's default: none is stored).
        max_tokens: longest input, in tokens.
        pad_token_id: id that fills the end of shorter rows.
        pooling: what the head reads: the first token ("cls") or the mean of all tokens ("mean").
        biases: which parts of the model have biases beyond those of an Ettin reranker: "attention", "mlp", "norm" and
            "classifier", which are the keys `*_bias` of the config.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    global_layers: tuple[bool, ...]
    window_tokens: int
    rope_theta_global: float
    rope_theta_local: float
    norm_eps: float
    head_norm_eps: float
    max_tokens: int
    pad_token_id: int
    pooling: Literal["cls", "mean"] = "cls"
    biases: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rope_rows(self) -> int:
        """Rows of the rotary tables: the longest input, padded to whole blocks of any size that divides 256."""
        return -(-self.max_tokens // 256) * 256

    def rope_table(self, is_global: bool) -> str:
        """Name of the rotary tables of global or local layers: "rope.global" for both if their bases are equal."""
        is_shared = self.rope_theta_local == self.rope_theta_global
        return "rope.global" if is_global or is_shared else "rope.local"

    @property
    def num_layers(self) -> int:
        """Encoder layers."""
        return len(self.global_layers)

    @property
    def full_layers(self) -> int:
        """Layers that are computed for all tokens: all of them, or all but the last if only the first token is read."""
        return self.num_layers - (self.pooling == "cls")

    @property
    def num_parameters(self) -> int:
        """Parameters of encoder and head, with a bias of the head's norm, which only some plain checkpoints have.

        Source: equal to `total_params` of the six released sizes.
        """
        hidden, layers = self.hidden_size, self.num_layers
        per_layer = 4 * hidden * hidden + 3 * hidden * self.intermediate_size + 2 * hidden
        encoder = self.vocab_size * hidden + hidden + layers * per_layer - hidden + hidden
        head = hidden * hidden + 2 * hidden + hidden + 1
        biases = {
            "attention": 4 * hidden * layers,
            "mlp": (2 * self.intermediate_size + hidden) * layers,
            "norm": (2 * layers + 1) * hidden,
            "classifier": hidden,
        }
        return encoder + head + sum(biases[kind] for kind in self.biases)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {**asdict(self), "global_layers": list(self.global_layers), "biases": list(self.biases)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_json`."""
        lists = {name: tuple(values.get(name, ())) for name in ("global_layers", "biases")}
        return cls(**{**values, **lists})
