"""One folder with several precisions of a model: the manifest as each of them sees it."""

from ettin.artifacts.errors import UsageError
from ettin.artifacts.manifest import FileEntry, Manifest, Parity, Variant


def precisions(manifest: Manifest) -> tuple[str, ...]:
    """The precisions in the folder; the first is the one that is loaded unless another is asked for."""
    return (manifest.precision, *(variant.precision for variant in manifest.variants))


def in_precision(manifest: Manifest, precision: str | None) -> Manifest:
    """The manifest of one precision, as if the folder held no other one; None: the first.

    Raises:
        UsageError: there is none of this name; lists those that there are.
    """
    if not manifest.variants and precision in (None, manifest.precision):
        return manifest
    for variant in (_variant(manifest), *manifest.variants):
        if precision in (None, variant.precision):
            return manifest.model_copy(update={**dict(variant), "variants": ()})
    raise UsageError(
        f"precision is '{precision}', expected one that {manifest.name}-{manifest.target} has: "
        f"{', '.join(precisions(manifest))}"
    )


def unproven(manifest: Manifest) -> list[str]:
    """The precisions in the folder whose scores nobody has proven."""
    return [name for name in precisions(manifest) if in_precision(manifest, name).parity.status == "unverified"]


def with_parity(manifest: Manifest, precision: str, parity: Parity) -> Manifest:
    """The whole manifest with another record of proof for one of its precisions."""
    if precision == manifest.precision:
        return manifest.model_copy(update={"parity": parity})
    variants = (
        variant.model_copy(update={"parity": parity}) if variant.precision == precision else variant
        for variant in manifest.variants
    )
    return manifest.model_copy(update={"variants": tuple(variants)})


def joined(manifests: tuple[Manifest, ...]) -> Manifest:
    """One manifest for the artifacts of a checkpoint that differ in precision; the first is the one loaded by default.

    `files` has the entries of all; a file that several have must be the same in each.
    """
    files: dict[str, FileEntry] = {}
    for manifest in manifests:
        for entry in manifest.files:
            assert files.setdefault(entry.path, entry) == entry, entry.path  # noqa: S101 (one pipeline wrote them)
    return manifests[0].model_copy(
        update={
            "format_version": 2,
            "variants": tuple(map(_variant, manifests[1:])),
            "files": tuple(files[path] for path in sorted(files, key=lambda path: path.split("/"))),
        }
    )


def _variant(manifest: Manifest) -> Variant:
    return Variant.model_construct(**{name: getattr(manifest, name) for name in Variant.model_fields})
