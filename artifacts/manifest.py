"""`manifest.json`: what an artifact is, where it comes from, what it needs and what was proven about it."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_serializer,
    model_validator,
)

from ettin.artifacts.arithmetic import Arithmetic
from ettin.artifacts.errors import ManifestError, NewerFormat
from ettin.artifacts.folder import Folder
from ettin.artifacts.names import FileName, Line, PathInside, Sha256, Word
from ettin.artifacts.score_calibration import ScoreCalibration
from ettin.artifacts.score_calibration import Strict as _Strict

FORMAT_VERSION = 2  # 1 in a manifest without `variants`, so that earlier readers read it
MANIFEST_NAME = "manifest.json"
CARD_NAME = "README.md"  # for people: no part of the artifact, so editing it changes nothing
MAX_MANIFEST_BYTES = 4 << 20


class Source(_Strict):
    """The checkpoint that an artifact was made from."""

    id: Line = Field(description="hub id, or the folder's name")
    revision: Line | None = Field(description="hub commit; null for a folder")
    weights: Literal["checkpoint", "random"] = Field(description="random: shape only, scores mean nothing")
    weights_sha256: Sha256 = Field(description="over all weight files, in order of their names")
    shape: dict[Line, int | float | Line | list[bool] | list[Line]] = Field(description="see ModelShape")


class TensorSpec(_Strict):
    """One input or output."""

    name: Line
    dtype: Word
    shape: tuple[Line | int, ...] = Field(strict=False)


class Graph(_Strict):
    """Choices at export that change the speed of a graph and not its scores; {} for targets without such a graph."""

    block_threshold_tokens: PositiveInt = Field(256, description="longest input whose local layers are dense")
    block_tokens: PositiveInt = Field(64, description="queries in a block of a local layer")
    split_geglu: bool = Field(True, description="two products for the halves of the GeGLU, not one")
    rotate_blocks: bool = Field(False, description="local layers cut their blocks before rotary embedding")
    ragged: bool = Field(False, description="openvino: a graph for unpadded batches stands beside the entry")
    batch_tokens: PositiveInt | None = Field(None, description="TensorRT: maximum number of tokens in a batch")
    batch_pairs: PositiveInt | None = Field(None, description="TensorRT: maximum number of pairs in a batch")


class Interface(_Strict):
    """Inputs and outputs of the engine file."""

    inputs: tuple[TensorSpec, ...] = Field(strict=False)
    outputs: tuple[TensorSpec, ...] = Field(strict=False)


class Tokenizer(_Strict):
    """The tokenizer that goes with the weights."""

    sha256: Sha256
    pad_token_id: NonNegativeInt


class Needs(_Strict):
    """What a machine must have to run the artifact."""

    device: Literal["cpu", "cuda", "trt-rtx", "any"]
    isa: tuple[Line, ...] = Field(strict=False, description="instruction sets; empty: any")
    package: Word = Field(description="the Python package that runs it")
    version: Line = Field(description="the version it was verified with")


class ShapeRange(_Strict):
    """Shapes of one input that an optimisation profile covers."""

    min: tuple[PositiveInt, ...] = Field(strict=False)
    opt: tuple[PositiveInt, ...] = Field(strict=False, description="the shape that kernels were chosen for")
    max: tuple[PositiveInt, ...] = Field(strict=False)


class Engine(_Strict):
    """What a TensorRT engine was compiled for; no other GPU, and no other version of the builder, runs it."""

    arch: str = Field(pattern=r"^sm_\d+$", description="compute capability of the GPU")
    profiles: tuple[dict[Line, ShapeRange], ...] = Field(strict=False, description="by profile, by input")
    fused_attentions: NonNegativeInt | None = Field(description="attentions in one kernel, as the builder reported")


class Parity(_Strict):
    """The comparison with the reference at export. Errors are absolute, in logits."""

    status: Literal["verified", "unverified"]
    pairs: NonNegativeInt
    max_abs_error: float | None
    mean_abs_error: float | None
    spearman: float | None
    batch_max_abs_error: float | None = Field(description="a pair's score in a mixed batch against alone")
    arithmetic: tuple[Annotated[Arithmetic, Field(strict=False)], ...] = Field(
        strict=False, description="what the engine computed in when it passed"
    )
    reference: Line = Field(description="what the pairs were compared with")
    rule: Line = Field(description="the tolerance, in words")
    quality: Literal["not-applicable"] | dict[Line, float] = "not-applicable"


class Calibration(_Strict):
    """How int8 was made."""

    text: Line = Field(description="what it was calibrated on")
    text_sha256: Sha256
    pairs: PositiveInt
    scheme: Line = Field(description="what is quantised; milder than the first choice if that failed the gate")
    float_linears: tuple[Line, ...] = Field(strict=False, description="linear layers that stayed in floating point")


class FileEntry(_Strict):
    """One file of the artifact."""

    path: PathInside
    size_bytes: NonNegativeInt
    sha256: Sha256


class Variant(_Strict):
    """The model in one more precision: what takes the place of the manifest's fields of the same names."""

    precision: Word
    needs: Needs
    entry: PathInside
    calibration: Calibration | None
    parity: Parity


class Manifest(_Strict):
    """The whole manifest. Unknown keys are refused."""

    format_version: Literal[1, 2] = 1
    name: FileName
    target: Word
    precision: Word
    source: Source
    graph: Graph
    interface: Interface
    tokenizer: Tokenizer
    max_length_tokens: PositiveInt
    activation: Literal["identity", "sigmoid"]
    needs: Needs
    entry: PathInside = Field(description="the file that the engine opens")
    calibration: Calibration | None
    engine: Engine | None = None
    experimental: bool = Field(default=False, description="the target was, at export")
    score_calibration: ScoreCalibration | None = Field(default=None, description="made by ettin-calibrate")
    toolchain: dict[Line, Line]
    command: Line
    created: Line = Field(description="UTC, ISO 8601")
    parity: Parity
    files: tuple[FileEntry, ...] = Field(strict=False)
    variants: tuple[Variant, ...] = Field(default=(), strict=False, description="the other precisions")

    @model_validator(mode="after")
    def _names_things_once(self) -> Self:
        if len({entry.path for entry in self.files}) < len(self.files):
            raise ValueError("'files' lists a path twice")
        if len({self.precision, *(variant.precision for variant in self.variants)}) <= len(self.variants):
            raise ValueError("'variants' has a precision twice")
        if (self.format_version == FORMAT_VERSION) != bool(self.variants):
            raise ValueError("format version 2 is for manifests with 'variants'")
        return self

    @field_serializer("graph")
    def _stored_graph(self, graph: Graph) -> dict[str, Any]:
        return graph.model_dump(exclude_unset=True)  # as it was read, so that the digest stays what it was

    @model_serializer(mode="wrap")
    def _stored(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if not self.variants:  # so that the digest of earlier manifests stays what it was
            del fields["variants"]
        if not self.experimental:
            del fields["experimental"]
        if self.score_calibration is None:
            del fields["score_calibration"]
        return fields

    def to_bytes(self) -> bytes:
        """The file's content: the fields, and `manifest_sha256` over them."""
        fields = self.model_dump(mode="json")
        return (json.dumps({**fields, "manifest_sha256": self.digest}, indent=1) + "\n").encode()

    @property
    def digest(self) -> str:
        """SHA-256 over the fields, which identifies the artifact."""
        return _digest(self.model_dump(mode="json"))

    @property
    def full_name(self) -> str:
        """Checkpoint, target and precision in one word: the name of the model on servers."""
        return f"{self.name}-{self.target}-{self.precision}"

    @property
    def batch_limits(self) -> tuple[int, int]:
        """Maximum number of tokens and of pairs in a batch for a compiled engine.

        Raises:
            ManifestError: the manifest does not have them.
        """
        if self.graph.batch_tokens is None or self.graph.batch_pairs is None:
            raise ManifestError(f"{self.full_name}: no batch limits in {MANIFEST_NAME}. Export again: {self.command}")
        return self.graph.batch_tokens, self.graph.batch_pairs

    @property
    def is_build_kit(self) -> bool:
        """Whether its engine is not built yet."""
        return self.engine is not None and self.entry not in {file.path for file in self.files}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads and validates `folder/manifest.json`.

        Raises:
            ManifestError: no such file, not valid, or edited since it was written.
            NewerFormat: a newer version of this project wrote it.
        """
        with opened_folder(folder) as opened:
            return cls.from_bytes(manifest_bytes(opened, folder), folder)

    @classmethod
    def from_bytes(cls, content: bytes, folder: Path) -> Self:
        """Validates what `to_bytes` wrote; `folder` is for errors, which are those of `read`."""
        path = folder / MANIFEST_NAME
        fields, digest = _parsed(content, path)
        version = fields["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path}: format version {version}, this ettin-export reads up to {FORMAT_VERSION}. "
                "Run: pip install -U ettin-export"
            )
        try:
            manifest = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part)[:100] for part in first["loc"])
            raise ManifestError(f"{path}: field '{where}': {first['msg']}. Export again.") from None
        if digest != _digest(fields):
            raise ManifestError(
                f"{path}: was edited (manifest_sha256 does not match its content). Undo the edit or export again."
            )
        return manifest


def opened_folder(folder: Path) -> Folder:
    """The open folder of an artifact; raises `ManifestError`."""
    try:
        return Folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_artifact(folder) from None
    except OSError as error:
        raise ManifestError(f"{folder}: can't be read ({error.strerror})") from None


def manifest_bytes(opened: Folder, folder: Path) -> bytes:
    """Content of the manifest in a folder that is open, not validated; raises `ManifestError`."""
    try:
        return opened.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise _no_artifact(folder) from None
    except OSError as error:
        raise ManifestError(f"{folder / MANIFEST_NAME}: not a manifest ({error.strerror}). Export again.") from None


def _no_artifact(folder: Path) -> ManifestError:
    return ManifestError(
        f"{folder}: no {MANIFEST_NAME}, so this is not an artifact. Make one: ettin-export --size demo"
    )


def _parsed(content: bytes, path: Path) -> tuple[dict[str, Any], object]:
    """The fields, and the checksum over them that the file has."""
    try:
        fields = json.loads(content)
        digest = fields.pop("manifest_sha256", None)
        _ = fields["format_version"]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(f"{path}: not a manifest ({error}). Export again.") from None
    return fields, digest


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
