"""The artifact's README."""

from ettin.artifacts.manifest import Manifest, TensorSpec
from ettin.runtimes.registry import ENGINES

_RANDOM = """> [!WARNING]
> **Random weights.** This artifact has the shape of {id} and nothing else of it: its scores mean nothing. It is for
> trying hardware.

"""


def card(manifest: Manifest) -> str:
    """Markdown for whoever finds the folder."""
    source, parity = manifest.source, manifest.parity
    revision = f" at revision `{source.revision}`" if source.revision else ""
    spearman = "–" if parity.spearman is None else f"{parity.spearman:.6f}"
    extra = ENGINES[manifest.target].extra
    if parity.status == "verified":
        proof = (
            f"Compared with {parity.reference} on {parity.pairs} pairs ({parity.rule}):\n\n"
            "| max \\|Δ\\| | mean \\|Δ\\| | Spearman | mixed batch against single |\n| --- | --- | --- | --- |\n"
            f"| {parity.max_abs_error:.2e} | {parity.mean_abs_error:.2e} | {spearman} "
            f"| {parity.batch_max_abs_error:.1e} |\n\n"
            "Again, on any machine, without torch: `ettin-verify .`"
        )
    else:
        proof = "**Not verified.** It loads after `ettin-verify .` has passed once on the machine that runs it."
    scores = "raw logits" if manifest.activation == "identity" else "sigmoid(logit)"
    banner = _RANDOM.format(id=source.id) if source.weights == "random" else ""
    return f"""# {manifest.name}: {manifest.target}, {manifest.precision}

{banner}Reranker `{source.id}`{revision}, exported by ettin-export {manifest.toolchain["ettin-export"]}:

    {manifest.command}

```python
# pip install "ettin-export[{extra}]"
from ettin.runtimes import load

with load(".") as reranker:
    scores = reranker.predict([("query", "document")])
    hits = reranker.rank("query", ["document", "another"], top_k=1)
```

Scores are {scores}; pairs are truncated to {manifest.max_length_tokens} tokens (`longest_first`).
`{manifest.entry}` takes {_tensors(manifest.interface.inputs)} and gives {_tensors(manifest.interface.outputs)}.

## Proof

{proof}
"""


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"`{each.name}` {each.dtype} [{', '.join(map(str, each.shape))}]" for each in specs)
