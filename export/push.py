"""`ettin-export --push`: puts artifacts into a repository of the Hugging Face hub, as one commit."""

from collections.abc import Mapping
from pathlib import Path

from ettin.artifacts.errors import MissingDependency, UnverifiedArtifact, UsageError
from ettin.artifacts.manifest import CARD_NAME, MANIFEST_NAME
from ettin.artifacts.opened import OpenArtifact
from ettin.artifacts.precisions import unproven
from ettin.artifacts.signatures import SIGNATURE_NAME
from ettin.export.card import collection_card
from ettin.runtimes.hub import Remote, checked_commit, first_answer, parsed, reached

_OTHERWISE = "What was exported stays here"


def check_push(repository: str) -> None:
    """Refuses what can be refused before an export.

    Raises:
        UsageError: not the name of a repository, or no token.
        DownloadError: the hub can't be reached, or refuses the token.
        MissingDependency: the hub's client is not installed.
    """
    if parsed(repository) != (repository, None, ""):
        raise UsageError(f"--push is '{repository}', expected ORGANISATION/NAME")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingDependency("--push", str(error.name), "hub") from None
    if not huggingface_hub.get_token():
        raise UsageError("--push needs a token that may write to the hub. Run: hf auth login")
    with reached(f"--push {repository}", "Leave --push out to export without it"):
        huggingface_hub.utils.validate_repo_id(repository)
        first_answer(huggingface_hub.HfApi().whoami)


def push(
    artifacts: Mapping[str, Path], repository: str, checkpoint: Path, allow_unverified: bool = False
) -> tuple[str, str]:
    """Uploads artifacts, each into a folder of its own; whatever was in that folder before is deleted.

    A repository that does not exist is made, private. Its own card is written if there is none; of one that is there,
    only the list of artifacts between its two marks changes.

    Args:
        artifacts: folder here by folder there.
        repository: ORGANISATION/NAME.
        checkpoint: folder of the checkpoint, for the card.
        allow_unverified: push what nobody has proven yet, too.

    Returns:
        The commit and its page.

    Raises:
        UsageError: a folder's name is none that `load` would take.
        UnverifiedArtifact: one is not verified.
        DamagedArtifact: one is not as its manifest says.
        DownloadError: the hub can't be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files: dict[str, Path | bytes] = {}
    for name, folder in artifacts.items():
        if parsed(f"{repository}/{name}") is None:
            raise UsageError(f"{folder}: on the hub, '{name}' can't name a folder. Choose another: --output DIR")
        with OpenArtifact(folder) as artifact:
            manifest = artifact.manifest
            if (names := unproven(artifact.whole_manifest)) and not allow_unverified:
                raise UnverifiedArtifact(
                    f"{folder}: scores in {', '.join(names)} are not proven. Push it all the same: --allow-unverified"
                )
            artifact.check()
            artifact.check_contents()
            paths = [*(entry.path for entry in manifest.files), MANIFEST_NAME, CARD_NAME, SIGNATURE_NAME]
            files |= {f"{name}/{path}": folder / path for path in paths if (folder / path).is_file()}
    api = HfApi()
    with reached(f"--push {repository}", _OTHERWISE):
        api.create_repo(repository, private=True, exist_ok=True)
        head = checked_commit(repository, api.model_info(repository).sha)
        present = set(api.list_repo_files(repository, revision=head))
        old = {path for path in present if path.partition("/")[0] in artifacts} - files.keys()
        folders = {path.rpartition("/")[0] for path in present | files.keys() if path.endswith(f"/{MANIFEST_NAME}")}
        card = Remote(repository, head, "").card() if CARD_NAME in present else None
        files[CARD_NAME] = collection_card(manifest, folders, card, checkpoint).encode()
        made = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path, is_folder=False) for path in sorted(old)),
            ],
            commit_message=f"{', '.join(artifacts)} of {manifest.name}",
            parent_commit=head,
        )
        commit = checked_commit(repository, made.oid)
    return commit, f"{api.endpoint}/{repository}/tree/{commit}"
