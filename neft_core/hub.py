"""Models of the Hugging Face Hub: whole ones, and their configurations alone."""

from pathlib import Path

from neft_core.errors import NeftError


def fetch(name: str, revision: str) -> Path:
    """Directory of a Hub model, downloaded where it isn't in the local cache.

    Raises:
        NeftError: it can't be reached, or there is no such model or revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja"]
    where = f"model '{name}'"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise NeftError(
            f"{where}: access is gated; accept its licence and run 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise NeftError(f"{where}: has no revision '{revision}'; see its page on the Hub") from None
    except RepositoryNotFoundError:
        raise NeftError(f"{where}: not on the Hub, or private; check model.id") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        raise NeftError(
            f"{where}: the Hub can't be reached and the local cache lacks it; connect once, "
            "or set model.kind: local and model.path to a directory"
        ) from None


def config(name: str, revision: str, *, download: bool) -> Path:
    """The config.json of a model, without its weights.

    Args:
        name: the model's id.
        revision: branch, tag or commit.
        download: fetch that file where the local cache lacks it.

    Raises:
        NeftError: it can't be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(
            hf_hub_download(name, "config.json", revision=revision, local_files_only=not download)
        )
    except GatedRepoError:
        reason = "access is gated"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        reason = "the Hub can't be reached and the local cache lacks it"
    raise NeftError(f"model '{name}': no config.json ({reason}); give the file with --config FILE")
