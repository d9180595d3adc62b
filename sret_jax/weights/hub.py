"""Files of the Hugging Face hub: hf://owner/name, or hf://owner/name@revision.

They come through huggingface_hub, with its cache, its login and its offline mode (HF_HUB_OFFLINE).
"""

import re
from typing import Any

from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import HUB
from sret_jax.parallel.distributed import agreed, gather_texts

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # the files of a repository that are read
NAME = re.compile(rf"{HUB}([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
NO_PICKLES = (
    "; pickles such as pytorch_model.bin are not read from the hub, because they could run code"
)


class Repository:
    """Weights on the hub at one commit. In several processes it is opened by all of them.

    Attributes:
      place: the name, hf://owner/name@revision.
      commit: 40 hexadecimal digits, equal in all processes.

    Raises:
      UserError: huggingface_hub is missing, or the name or the network or the repository is wrong.
    """

    def __init__(self, name: epath.PathLike):
        self.place = epath.Path(name)
        with agreed():
            self._hub = _import_hub(self.place)
            self._name, self._revision = _parts(str(name))
            # The cache is CACHE/models--owner--name/snapshots/COMMIT/config.json.
            self.commit = self._fetch(CONFIG, self._revision).parent.name
        commits = gather_texts(self.commit)
        if len(set(commits)) > 1:
            raise UserError(
                f"{name} is {' or '.join(dict.fromkeys(commits))} in different processes; give "
                f"one of them, such as {self.pinned}"
            )

    @property
    def pinned(self) -> str:
        """The name with the commit, which always means these weights."""
        return f"{HUB}{self._name}@{self.commit}"

    def file(self, name: str) -> epath.Path:
        """Downloads a file, unless the cache has it.

        Raises:
          UserError: there is no such file, or it cannot be downloaded.
        """
        return self._fetch(name, self.commit)

    def _fetch(self, file: str, revision: str) -> epath.Path:
        errors = self._hub.errors
        page = f"https://huggingface.co/{self._name}"
        try:
            path = self._hub.hf_hub_download(self._name, file, revision=revision)
        except errors.GatedRepoError as e:
            problem = f"accept its terms at {page}, and log in with `hf auth login`"
            raise UserError(f"{self.place} is gated; {problem}") from e
        except errors.RepositoryNotFoundError as e:
            raise UserError(
                f"{self.place}: the hub has no {self._name}, or it is private; correct the name, "
                "or log in with `hf auth login`"
            ) from e
        except errors.RevisionNotFoundError as e:
            raise UserError(
                f"{self.place}: {self._name} has no revision {revision}; give a branch, tag or "
                f"commit of {page}/commits/main"
            ) from e
        except errors.LocalEntryNotFoundError as e:
            raise self._unreachable(file, revision, e) from e
        except errors.EntryNotFoundError as e:
            raise UserError(
                f"{self.place} has no {file}{NO_PICKLES if file == WEIGHTS else ''}; give a "
                f"repository that has {CONFIG} and {WEIGHTS}"
            ) from e
        except Exception as e:  # the hub, the network and the disk have exceptions of their own
            raise UserError(f"{self.place}: {file} cannot be downloaded ({_reason(e)})") from e
        return epath.Path(path)

    def _unreachable(self, file: str, revision: str, error: Exception) -> UserError:
        """The error for a file that is not in the cache, when the hub cannot be asked."""
        constants = self._hub.constants
        if constants.HF_HUB_OFFLINE:
            why, fix = "HF_HUB_OFFLINE is set", "unset it to download the file"
        else:
            why = f"the hub cannot be reached ({_reason(error.__cause__ or error)})"
            fix = "check the network, or copy the cache of another machine"
        return UserError(
            f"{self.place}: {file} of revision {revision} is not in the cache, "
            f"{constants.HF_HUB_CACHE}, and {why}; {fix}{NO_PICKLES if file == WEIGHTS else ''}"
        )


def _parts(name: str) -> tuple[str, str]:
    """Splits hf://owner/name@revision into owner/name and the revision, which may be left out."""
    if not (match := NAME.fullmatch(name)):
        raise UserError(
            f"{name} should read like hf://timm/deit_tiny_patch16_224.fb_in1k, or "
            "hf://OWNER/NAME@REVISION with a branch, tag or commit"
        )
    return match[1], match[2] or "main"


def _import_hub(place: epath.Path) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as e:
        raise UserError(
            f"{place} is on the Hugging Face hub, which huggingface_hub reads; "
            "pip install huggingface_hub"
        ) from e
    return huggingface_hub


def _reason(error: BaseException) -> str:
    """The first line of an error, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
