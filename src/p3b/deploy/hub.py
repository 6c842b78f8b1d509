"""Models on the Hugging Face hub, by its own client: a saved model is a repository with config.json and model.safetensors.

What a repository holds is somebody else's: two plain files are fetched, of one commit, and never more bytes than the config,
which is read first, makes necessary. They are opened as any saved folder is, with all its checks. `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HOME` and `HF_HUB_OFFLINE` mean to p3b what they mean to the client.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from p3b.deploy.card import CARD_FILE, has_own_card, write_card
from p3b.errors import ConfigError, HubError, WeightsError
from p3b.storage import artifact
from p3b.storage.artifact import CONFIG_FILE, WEIGHTS_FILE
from p3b.storage.model_config import read_config_file, skeleton_of
from p3b.storage.untrusted import MOST_JSON, first_line

PREFIX = "hf-hub:"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".onnx", ".pt2", ".pth")
_MOST_BYTES_OF_A_NUMBER = 8
_MOST_HEADER = 1 << 20
"""Of a safetensors file with the names of all tensors of a network of `MOST_BLOCKS`."""
_PUSHED = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, "*.png", "*.svg")


def local_copy(path: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder or file that a model's name stands for, fetched where it is of the hub.

    Args:
        path: a folder, a .pth file, "hf-hub:user/name", or "user/name" where nothing lies here by that name.
        revision: branch, tag or commit of a model of the hub.
        cache_dir: of the hub's client.

    Raises:
        ConfigError: a revision of something that lies here.
        WeightsError: as `fetch`.
    """
    name = str(path)
    if name.startswith(PREFIX):
        repo, _, at = name.removeprefix(PREFIX).partition("@")
        return fetch(repo, revision or at or None, cache_dir)
    if isinstance(path, str) and _may_be_of_the_hub(name):
        return fetch(name, revision, cache_dir)
    if revision is not None:
        raise ConfigError(f"revision={revision!r} is of a model of the hub; {name} lies here. Give 'hf-hub:user/name'.")
    return Path(path)


def fetch(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Fetch a saved model from the hub, or take it from the client's cache; returns the folder of its two files.

    Args:
        repo_id: "user/name".
        revision: branch, tag or commit; by default the main branch.
        cache_dir: of the hub's client.

    Raises:
        WeightsError: there is no such model, it cannot be reached, was not saved by p3b, or claims to be larger than it can be.
    """
    with _told(repo_id, revision):
        config_file = _fetch_file(repo_id, CONFIG_FILE, revision, MOST_JSON, cache_dir)
        skeleton = skeleton_of(read_config_file(config_file), config_file)
        most = _MOST_HEADER + _MOST_BYTES_OF_A_NUMBER * sum(value.numel() for value in skeleton.state_dict().values())
        commit = config_file.parent.name  # the client keeps a folder for each commit
        return _fetch_file(repo_id, WEIGHTS_FILE, commit, most, cache_dir).parent


def push(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "A model saved by p3b",
    **description: Any,
) -> str:
    """Put a model on the Hugging Face hub, with a model card; returns the address of the commit.

    Args:
        model: a module, or what p3b saved: run/pruned, or a .pth. A README.md in the folder is taken as the card where it is
            not p3b's, or was edited; otherwise one is made of the model and of the run that it lies in.
        repo_id: "user/name"; made where it is absent.
        revision: branch, made where it is absent; by default the main branch.
        private: whether a new repository is; by default as the hub does for the user.
        message: of the commit.
        description: class_names, preprocessing and provenance of a module, as for `p3b.save`.

    Raises:
        ModelError, WeightsError: the model cannot be saved, or is damaged.
        ConfigError: a description of something that has its own.
        HubError: the hub cannot be reached, or refuses.
    """
    with TemporaryDirectory() as scratch:
        folder = _staged(model, Path(scratch) / "model", repo_id, description)
        with _refused(repo_id):
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                allow_patterns=list(_PUSHED),
            )
    return str(done.commit_url)


def _may_be_of_the_hub(name: str) -> bool:
    """Whether a name has the form of the hub's, no ending of ours, and no folder here that it could lie in."""
    return bool(_REPO_ID.fullmatch(name)) and Path(name).suffix not in _FILES and not Path(name).parent.exists()


def _staged(model: nn.Module | str | Path, folder: Path, repo_id: str, description: dict[str, Any]) -> Path:
    """A folder with what is to be pushed: the model, saved anew and so checked, and its card."""
    if isinstance(model, nn.Module):
        artifact.save(model, folder, **description)
        write_card(folder, name=repo_id, on_hub=True)
        return folder
    origin = Path(model)
    if description:
        raise ConfigError(f"{origin} says itself what its {', '.join(description)} are; leave that out.")
    config = artifact.read_config(origin)
    own = {key: config[key] for key in ("class_names", "preprocessing", "provenance")}
    artifact.save(artifact.load(origin), folder, **own)
    if has_own_card(origin):
        (folder / CARD_FILE).write_bytes((origin / CARD_FILE).read_bytes())
        for figure in [*origin.glob("*.png"), *origin.glob("*.svg")]:
            (folder / figure.name).write_bytes(figure.read_bytes())
    else:
        write_card(folder, name=repo_id, on_hub=True, origin=origin)
    return folder


def _fetch_file(repo_id: str, name: str, revision: str | None, most: int, cache_dir: str | Path | None) -> Path:
    """One file of a repository; its size is asked before it is fetched. Where nobody answers, the cache is all there is."""
    try:
        claimed = get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision))
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError):
        raise
    except Exception:  # of whichever HTTP library this version of the client stands on
        return Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir, local_files_only=True))
    if claimed.size is None or claimed.size > most:
        raise WeightsError(
            f"{name} of {repo_id} on the hub claims to be of {claimed.size} bytes; expected at most {most}. It was not fetched."
        )
    return Path(hf_hub_download(repo_id, name, revision=claimed.commit_hash, cache_dir=cache_dir))


@contextmanager
def _told(repo_id: str, revision: str | None) -> Iterator[None]:
    """Errors of the client, while something is fetched, as ours."""
    of = f"{repo_id} (revision {revision})" if revision else repo_id
    here = f"Nothing lies here by that name: if a folder was meant, check its path. A model of the hub is 'user/name'; {PREFIX}"
    try:
        yield
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise WeightsError(
            f"The hub shows no model {of}. {here}user/name says so. A private one needs HF_TOKEN or `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"{repo_id} on the hub has no revision '{revision}'. Give a branch, a tag or a commit.") from error
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"The hub cannot be reached for {of}, and it is not in the client's cache. {here}user/name says so."
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(
            f"{of} on the hub is no model that p3b saved: it lacks {CONFIG_FILE} or {WEIGHTS_FILE}. Weights of other libraries "
            "are fetched with timm or huggingface_hub, and given as files."
        ) from error
    except HFValidationError as error:
        raise WeightsError(
            f"'{repo_id}' is no name of a model of the hub; expected 'user/name' ({first_line(error)})."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise WeightsError(f"The hub cannot be asked for {of} ({first_line(error)}).") from error


@contextmanager
def _refused(repo_id: str) -> Iterator[None]:
    """Errors of the client, while something is pushed, as ours."""
    try:
        yield
    except Exception as error:  # the client's own, and those of whichever HTTP library it stands on
        raise HubError(
            f"The hub did not take {repo_id} ({first_line(error)}). It needs a name 'user/name', and a token that may write: "
            "HF_TOKEN, or `hf auth login`."
        ) from error
