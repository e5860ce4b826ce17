"""Checkpoints from the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ettin.artifacts.errors import DownloadError, MissingDependency

# No pickled weights, no code, none of the hub's own ONNX or OpenVINO files (they hold the encoder without its head).
_FILES = ["*.json", "*.safetensors", "*/config.json", "*/model.safetensors"]
_NOT = ["onnx/*", "openvino/*"]


@contextmanager
def reached(what: str, otherwise: str) -> Iterator[None]:
    """Turns a lost connection into one line.

    Args:
        what: is fetched.
        otherwise: what to do without a connection.

    Raises:
        DownloadError: the hub can't be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        # errors.HTTPError is whichever HTTP library's the installed hub client uses; it reports a lost connection.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(f"{what}: the hub can't be reached ({reason}). {otherwise}") from None


def download(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """Fetches a checkpoint into the hub's cache, with the hub's own progress bars; once there, no network is needed.

    Args:
        hub_id: "organisation/name".
        revision: commit, branch or tag; None: main.

    Returns:
        Its folder and its commit.

    Raises:
        DownloadError: no network, no such repository or revision, or no access.
        MissingDependency: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise MissingDependency("downloading a checkpoint", str(error.name), "export") from None
    by_hand = f"Or bring it as a folder: hf download {hub_id} --local-dir DIR elsewhere, then --checkpoint DIR"
    at = f" at revision {revision}" if revision else ""
    with reached(f"{hub_id}{at}", by_hand):
        try:
            folder = huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT
            )
        except errors.GatedRepoError:
            raise DownloadError(
                f"{hub_id}: the hub asks you to accept its terms first. Visit https://huggingface.co/{hub_id} and run: "
                "hf auth login"
            ) from None
        except errors.RepositoryNotFoundError:
            raise DownloadError(
                f"{hub_id}: no such repository on the hub, or a private one. Run: hf auth login"
            ) from None
        except errors.RevisionNotFoundError:
            raise DownloadError(f"{hub_id}: has no revision {revision}. Leave --revision out for the newest") from None
        except errors.HFValidationError as error:
            raise DownloadError(f"{hub_id}: neither a folder here nor a hub id ({error})") from None
    return Path(folder), Path(folder).name
