"""`manifest.json`: what an artifact is, where it comes from, what it needs and what was proven of it."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from ettin.artifacts.errors import ManifestError, NewerFormat

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _stays_inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or str(PurePosixPath(path)) != path:
        raise ValueError(f"path '{path}' is not a plain path inside the artifact")
    return path


class _Strict(BaseModel):
    # ser_json_inf_nan: JSON has neither; a figure that is one is written as null, not as a word.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Source(_Strict):
    """The checkpoint that an artifact was made from."""

    id: str = Field(description="hub id, or the folder's name")
    revision: str | None = Field(description="hub commit; null for a folder")
    weights: Literal["checkpoint", "random"] = Field(description="random: shape only, scores mean nothing")
    weights_sha256: Sha256 = Field(description="over all weight files, in order of their names")
    shape: dict[str, Any] = Field(description="the model's shape, see ModelShape")


class TensorSpec(_Strict):
    """One input or output."""

    name: str
    dtype: str
    shape: tuple[str | int, ...] = Field(strict=False)


class Interface(_Strict):
    """What the engine file takes and gives."""

    inputs: tuple[TensorSpec, ...] = Field(strict=False)
    outputs: tuple[TensorSpec, ...] = Field(strict=False)


class Tokenizer(_Strict):
    """The tokenizer that goes with the weights."""

    sha256: Sha256
    pad_token_id: NonNegativeInt


class Needs(_Strict):
    """What a machine must have to run the artifact."""

    device: Literal["cpu", "cuda", "any"]
    isa: tuple[str, ...] = Field(strict=False, description="instruction sets; empty: any")
    package: str = Field(description="the Python package that runs it")
    version: str = Field(description="the version it was verified with")


class ShapeRange(_Strict):
    """Shapes of one input that an optimisation profile covers."""

    min: tuple[PositiveInt, ...] = Field(strict=False)
    opt: tuple[PositiveInt, ...] = Field(strict=False, description="the shape that kernels were chosen for")
    max: tuple[PositiveInt, ...] = Field(strict=False)


class Engine(_Strict):
    """What a TensorRT engine was compiled for; no other GPU, and no other version of the builder, runs it."""

    arch: str = Field(pattern=r"^sm_\d+$", description="compute capability of the GPU")
    profiles: tuple[dict[str, ShapeRange], ...] = Field(strict=False, description="by profile, by input")
    fused_attentions: NonNegativeInt | None = Field(description="attentions in one kernel, as the builder reported")


class Parity(_Strict):
    """The comparison with the reference at export. Errors are absolute, in logits."""

    status: Literal["verified", "unverified"]
    pairs: NonNegativeInt
    max_abs_error: float | None
    mean_abs_error: float | None
    spearman: float | None
    batch_max_abs_error: float | None = Field(description="a pair's score in a mixed batch against alone")
    arithmetic: tuple[str, ...] = Field(strict=False, description="types that the engine was seen to compute in")
    reference: str = Field(description="what the pairs were compared with")
    rule: str = Field(description="the tolerance, in words")
    quality: Literal["not-applicable"] | dict[str, float] = "not-applicable"


class Calibration(_Strict):
    """How int8 was made."""

    text: str = Field(description="what it was calibrated on")
    text_sha256: Sha256
    pairs: PositiveInt
    scheme: str = Field(description="what is quantised; milder than the first choice if that failed the gate")
    float_linears: tuple[str, ...] = Field(strict=False, description="linear layers that stayed in floating point")


class FileEntry(_Strict):
    """One file of the artifact."""

    path: Annotated[str, AfterValidator(_stays_inside)]
    size_bytes: NonNegativeInt
    sha256: Sha256


class Manifest(_Strict):
    """The whole manifest. Unknown keys are refused."""

    format_version: Literal[1] = 1
    name: str
    target: str
    precision: str
    source: Source
    graph: dict[str, int | bool]
    interface: Interface
    tokenizer: Tokenizer
    max_length_tokens: PositiveInt
    activation: Literal["identity", "sigmoid"]
    needs: Needs
    entry: Annotated[str, AfterValidator(_stays_inside)] = Field(description="the file that the engine opens")
    calibration: Calibration | None
    engine: Engine | None = None
    toolchain: dict[str, str]
    command: str
    created: str = Field(description="UTC, ISO 8601")
    parity: Parity
    files: tuple[FileEntry, ...] = Field(strict=False)

    def to_bytes(self) -> bytes:
        """The file's content: the fields, and `manifest_sha256` over them."""
        fields = self.model_dump(mode="json")
        return (json.dumps({**fields, "manifest_sha256": self.digest}, indent=1) + "\n").encode()

    @property
    def digest(self) -> str:
        """SHA-256 over the fields: names this very artifact."""
        return _digest(self.model_dump(mode="json"))

    @property
    def full_name(self) -> str:
        """Checkpoint, target and precision in a word: what servers call it."""
        return f"{self.name}-{self.target}-{self.precision}"

    @property
    def is_build_kit(self) -> bool:
        """Whether its engine is still to be built."""
        return self.engine is not None and self.entry not in {each.path for each in self.files}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads and validates `folder/manifest.json`.

        Raises:
            ManifestError: no such file, not valid, or edited since it was written.
            NewerFormat: a newer version of this project wrote it.
        """
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_bytes())
            found = content.pop("manifest_sha256", None)
            version = content["format_version"]
        except FileNotFoundError:
            raise ManifestError(
                f"{folder}: no {MANIFEST_NAME}, so this is not an artifact. Make one: ettin-export --size demo"
            ) from None
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ManifestError(f"{path}: not a manifest ({error}). Export again.") from None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path}: format version {version}, this ettin-export reads up to {FORMAT_VERSION}. "
                "Run: pip install -U ettin-export"
            )
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ManifestError(f"{path}: field '{where}': {first['msg']}. Export again.") from None
        if found != _digest(content):
            raise ManifestError(
                f"{path}: was edited (manifest_sha256 does not match its content). Undo the edit or export again."
            )
        return manifest


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
