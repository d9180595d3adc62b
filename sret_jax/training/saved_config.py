"""The config and the class names that a run keeps in its workdir."""

import copy
import json
from typing import Any

import flax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.errors import UserError, did_you_mean, few
from sret_jax.files import write_json

CONFIG_FILE, CLASSES_FILE = "config.json", "class_names.json"


def save_description(config: ConfigDict, class_names: list[str], workdir: epath.Path) -> None:
    """Writes config.json and class_names.json beside the checkpoints."""
    write_json(workdir / CONFIG_FILE, config.to_dict())
    write_json(workdir / CLASSES_FILE, class_names)


def changed_settings(config: ConfigDict, workdir: epath.Path) -> dict[str, str]:
    """What this config changes of the one saved in the workdir: {name: "old -> new"}."""
    saved = load_config(workdir)
    if saved is None:
        return {}
    old, new = (_flatten(json.loads(json.dumps(c.to_dict()))) for c in (saved, config))
    return {
        name: f"{old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def load_config(workdir: epath.Path, like: ConfigDict | None = None) -> ConfigDict | None:
    """The config saved in a workdir, if there is one.

    Args:
      workdir: of a run.
      like: a config with all the settings there are; without it any are taken.

    Raises:
      UserError: config.json is damaged, or has not the settings of `like`, or values of another
        kind.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return None
    mend = "mend it, or move it away and give --config"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"expected an object, found {settings!r:.40}")
        saved = ConfigDict(settings)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} holds no config ({_one_line(e)}); {mend}") from e
    if like is None:
        return saved
    known, given = (_flatten(c.to_dict()).keys() for c in (like, saved))
    if unknown := sorted(given - known):
        raise UserError(f"{path}: {did_you_mean('setting', unknown[0], known)}; {mend}")
    if missing := sorted(known - given):
        raise UserError(f"{path} lacks the settings {few(missing)}; {mend}")
    config = copy.deepcopy(like)
    try:
        config.update(saved)
    except TypeError as e:
        raise UserError(f"{path}: {_one_line(e)}; {mend}") from e
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(settings, sep=".")
