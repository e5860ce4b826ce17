"""Cards: the `README.md` of an artifact, and the one of a repository on the hub that holds several.

They are for people, and no program of ours reads them. Text of a checkpoint enters them as code spans, which Markdown
does not interpret; its metadata enters only where it has the form of an identifier.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

from ettin.artifacts.manifest import CARD_NAME, Manifest, TensorSpec
from ettin.artifacts.precisions import in_precision, precisions
from ettin.artifacts.targets import target_named

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9._-]{1,96})?")
_MAX_CARD_BYTES = 1 << 20
_LIBRARIES = {"onnx": "transformers.js", "openvino": "openvino", "transformers": "sentence-transformers"}
_VARIANTS = re.compile(r"(?<=<!-- variants -->\n).*?(?=<!-- /variants -->)", re.DOTALL)

_DTYPES = {"model_quantized.onnx": "q8"}  # what transformers.js calls the precision of a file


def code(text: str) -> str:
    """A Markdown code span with any text of one line."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def card(manifest: Manifest, checkpoint: Path) -> str:
    """The card of an artifact: what it is, how to use it, what was proven about it, and how it was made.

    Args:
        manifest: of the artifact, complete.
        checkpoint: folder of the checkpoint, whose own card names its licence and languages.
    """
    source = manifest.source
    revision = f" at revision {code(source.revision)}" if source.revision else ""
    scores = "raw logits" if manifest.activation == "identity" else "sigmoid(logit)"
    random = f"""> [!WARNING]
> **Random weights.** This artifact has the shape of {code(source.id)} and none of its weights: the scores mean nothing.
> It is for trying hardware.

"""
    experimental = f"""> [!WARNING]
> **Experimental.** When this artifact was exported, this project had not yet run one of target {code(manifest.target)}
> in {manifest.precision}. Verify it where it will run.

"""
    target = target_named(manifest.target)
    runs_on = target.runs_on if _known_to_others(manifest) else f"device {code(manifest.needs.device)} alone"
    names = precisions(manifest)
    tags = ["cross-encoder", "reranker", "modernbert", "ettin-export", manifest.target, *names]
    variants = [in_precision(manifest, name) for name in names]
    headings = [
        f"### {variant.precision}: {code(variant.entry)}\n\n" if manifest.variants else "" for variant in variants
    ]
    proof = "\n".join(heading + _proof(variant) for heading, variant in zip(headings, variants, strict=True))
    return f"""{_front_matter(manifest, tags, checkpoint, _LIBRARIES.get(_known_to_others(manifest), "ettin-export"))}
# {code(manifest.name)}: {manifest.target}, {", ".join(names)}

{random if source.weights == "random" else ""}{experimental if manifest.experimental else ""}\
A reranker: it reads a query and a document together and gives one score, {scores}. A higher score means a more relevant
document. It is {code(source.id)}{revision} for {runs_on}.

## Use

`{_folder(manifest)}` stands for the path of this folder. Python, HTTP server and Triton also take its id on the hub,
`ORGANISATION/NAME@COMMIT/{_folder(manifest)}`.

{_uses(manifest)}

Pairs are truncated to {manifest.max_length_tokens} tokens (`longest_first`). {code(manifest.entry)} takes
{_tensors(manifest.interface.inputs)} and gives {_tensors(manifest.interface.outputs)}.
{_other_precisions(manifest)}
## Proof

{proof}
The pairs and the reference's scores are in `parity.jsonl`. To compare again, on any machine and
without the checkpoint:

```sh
ettin-verify .
```

## How it was made

{_how(manifest)}
"""


def collection_card(manifest: Manifest, folders: Iterable[str], present: str | None, checkpoint: Path) -> str:
    """The card of a repository with several artifacts.

    Args:
        manifest: of one of them.
        folders: all that are there.
        present: the card that is there; of it, only the list between the two marks changes. None: there is none.
        checkpoint: folder of the checkpoint.
    """
    rows = "".join(f"- [`{folder}`](./{folder})\n" for folder in sorted(folders))
    if present is not None:
        return _VARIANTS.sub(lambda _: rows, present)
    tags = ["cross-encoder", "reranker", "modernbert", "ettin-export"]
    return f"""{_front_matter(manifest, tags, checkpoint, "ettin-export")}
# {code(manifest.name)}

{code(manifest.source.id)}, a reranker, in formats for CPUs and GPUs. Each folder is one artifact
of ettin-export: its card says how to use it, what was proven about its scores, and how it was made.

<!-- variants -->
{rows}<!-- /variants -->

```python
# pip install "ettin-export[hub]", and the extra that the card of the folder names
from ettin.runtimes import load

reranker = load("ORGANISATION/NAME@COMMIT/{min(folders)}")
```
"""


def _front_matter(manifest: Manifest, tags: Iterable[str], checkpoint: Path, library: str) -> str:
    """What the hub reads of a card. All values are identifiers, so that none needs quotes."""
    lines = [f"{key}: {value}" for key, value in _metadata(checkpoint / CARD_NAME).items()]
    if manifest.source.revision and _IDENTIFIER.fullmatch(manifest.source.id):
        lines.append(f"base_model: {manifest.source.id}")
    lines += ["pipeline_tag: text-ranking", f"library_name: {library}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---", ""])


def _metadata(path: Path) -> dict[str, str]:
    """Licence and languages in the card of a checkpoint, which is not trusted."""
    from huggingface_hub import metadata_load

    try:
        if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
            return {}
        stated = metadata_load(path) or {}
    except Exception:  # no card, or YAML that is none: a checkpoint needs neither
        return {}
    languages = stated.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    known = {"license": [stated.get("license")], "language": languages}
    valid = {
        key: [value for value in values if isinstance(value, str) and _IDENTIFIER.fullmatch(value)]
        for key, values in known.items()
    }
    return {key: values[0] if key == "license" else json.dumps(values) for key, values in valid.items() if values}


def _folder(manifest: Manifest) -> str:
    return manifest.target if manifest.variants else f"{manifest.target}-{manifest.precision}"


def _known_to_others(manifest: Manifest) -> str:
    """The target, if other programs can load the artifact: they know the inputs of what runs on its own device."""
    target = target_named(manifest.target)
    return target.name if target.device_for(manifest.needs.device) == target.device else ""


def _uses(manifest: Manifest) -> str:
    """The sections of `uses.md` that are for this artifact: its target's, and those that need a file that it has."""
    target = target_named(manifest.target)
    kinds = {
        "all",
        _known_to_others(manifest),
        "triton" if target.triton_backends else "",
        *(file.path for file in manifest.files),
    }
    text = (Path(__file__).parent / "uses.md").read_text(encoding="utf-8")
    chosen = [use for kind, use in re.findall(r"<!-- (.*?) -->\n(.*?)(?=<!--|\Z)", text, re.DOTALL) if kind in kinds]
    return Template("".join(chosen).rstrip()).substitute(
        requirement=target.component(target.device_for(manifest.needs.device)).requirement,
        folder=_folder(manifest),
        entry=manifest.entry,
        dtype=_DTYPES.get(Path(manifest.entry).name, manifest.precision),
    )


def _other_precisions(manifest: Manifest) -> str:
    calls = (f'`load("{_folder(manifest)}", precision="{name}")`' for name in precisions(manifest)[1:])
    return f"\nOther precisions in this folder: {', '.join(calls)}.\n" if manifest.variants else ""


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"`{spec.name}` {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in specs)


def _proof(manifest: Manifest) -> str:
    parity = manifest.parity
    if parity.status != "verified":
        return "**Not verified.** It loads after `ettin-verify .` has passed once on the machine that runs it.\n"
    figures = {
        "largest error (logits)": (parity.max_abs_error, ".2e"),
        "mean error (logits)": (parity.mean_abs_error, ".2e"),
        "Spearman correlation": (parity.spearman, ".6f"),
        "mixed batch against single": (parity.batch_max_abs_error, ".1e"),
    }
    if isinstance(parity.quality, dict):
        figures["drop of nDCG@10"] = (parity.quality.get("ndcg10_drop"), ".5f")
        figures["overlap of the first ten"] = (parity.quality.get("top10_overlap"), ".3f")
    rows = "\n".join(
        f"| {name} | {'–' if value is None else format(value, form)} |" for name, (value, form) in figures.items()
    )
    return f"""Compared with {parity.reference} on {parity.pairs} pairs ({parity.rule}):

| figure | value |
| --- | --- |
{rows}
"""


def _how(manifest: Manifest) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items() if name != "machine")
    calibration = manifest.calibration
    int8 = (
        f"""
int8 was calibrated on {calibration.pairs} pairs of {code(calibration.text)}: {code(calibration.scheme)}.
"""
        if calibration
        else ""
    )
    return f"""    {manifest.command}

on {manifest.created} with {code(versions)}. The SHA-256 of the checkpoint's weights is
`{manifest.source.weights_sha256}`.
{int8}
`manifest.json` lists every file with its SHA-256; this card is not one of them and may be edited."""
