"""What a run stores about itself in its workdir: its config, its command line, its classes."""

import copy
import dataclasses
import json
from typing import Any

import flax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.errors import UserError, did_you_mean, few
from sret_jax.files import write_json
from sret_jax.models.model_settings import SPEED_ONLY

CONFIG_FILE, CLASSES_FILE, START_FILE = "config.json", "class_names.json", "start.json"
CONVERTED = "converted_from"  # only the config.json of a converted checkpoint has this setting

# What runs did before a setting existed. Whoever adds a setting adds it here too, with the value
# that means the old behaviour, so that every earlier workdir can still be read. A list stands for a
# tuple, as in JSON. Settings of the model are not listed: one that is missing, or None, has the
# published model's own value.
BEFORE: dict[str, Any] = {
    "ema_images": 25.6e6,  # without effect, because they all have an ema_decay
    "ema_warmup": False,
    "init_from": "",
    "init_ema": False,
    "optim.layer_decay": 1.0,
    "optim.backbone_lr": 1.0,
    "optim.freeze_backbone": False,
    "recursion.train_loops": "fixed",
    "recursion.max_loops": None,
    "recursion.backprop_loops": None,
    "mixed_depth.loops": 0,
    "mixed_depth.weight": 1.0,
    "mixed_depth.exits": [],
    "mixed_depth.exit_weights": [],
    "mixed_depth.labels": "data",
    "data.soft_labels": "",
    "data.crops_per_image": 1,
    "teacher": "",
    "distill.required": False,
    "distill.kind": "soft",
    "distill.temperature": 1.0,
    "distill.hard_weight": 0.0,
    "distill.teacher_ema": False,
    "distill.teacher_groups": None,
    "data.folder_slices": "listed",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """The config given on the command line when a workdir was started, and all changes since.

    Attributes:
      config: name or file of the config, with its arguments after a colon.
      overrides: values of --config.NAME=VALUE, by name.
    """

    config: str
    overrides: dict[str, Any]

    @classmethod
    def read(cls, workdir: epath.Path) -> "Start | None":
        """Reads start.json from a workdir; None if there is none.

        Raises:
          UserError: start.json is damaged.
        """
        path = workdir / START_FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(content["config"]), dict(content["overrides"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
            raise UserError(
                f"{path} is damaged ({_one_line(e)}); move it away and give --config with all "
                "settings that the run should have"
            ) from e

    def is_of(self, config: str) -> bool:
        """Whether `config` has this name and arguments; "s:x" equals "here/s.py:x"."""
        return _name_and_arguments(self.config) == _name_and_arguments(config)

    def with_overrides(self, overrides: dict[str, Any]) -> "Start":
        """Returns a copy with more overrides."""
        return Start(self.config, {**self.overrides, **overrides})


def save_description(
    config: ConfigDict, class_names: list[str], start: Start | None, workdir: epath.Path
) -> None:
    """Writes config.json, class_names.json and, after a command line, start.json to the workdir."""
    write_json(workdir / CONFIG_FILE, config.to_dict())
    write_json(workdir / CLASSES_FILE, class_names)
    if start:
        write_json(workdir / START_FILE, dataclasses.asdict(start))
    else:
        (workdir / START_FILE).unlink(missing_ok=True)


def changed_settings(config: ConfigDict, workdir: epath.Path) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from the config saved in the workdir: {name: (old, new)}.

    For a converted checkpoint, only settings that both configs contain are compared.
    """
    saved = load_config(workdir)
    if saved is None:
        return {}
    old, new = (_flatten(json.loads(json.dumps(c.to_dict()))) for c in (saved, config))
    names = old.keys() | new.keys()
    if is_converted(saved):
        names = {name for name in old.keys() & new.keys() if new[name] is not None}
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(names)
        if old.get(name) != new.get(name)
    }


def load_config(workdir: epath.Path, like: ConfigDict | None = None) -> ConfigDict | None:
    """Reads the config saved in a workdir, if there is one.

    A setting that did not exist when the config was saved gets its value in `BEFORE`. The config of
    a converted checkpoint describes its weights only; all other settings are taken from `like`. Any
    setting of the model is accepted here, because only its family knows which it has.

    Args:
      workdir: folder of a run.
      like: a config with all settings that exist; without it any settings are accepted.

    Raises:
      UserError: config.json is damaged, lacks settings of `like`, or has values of another type.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return None
    fix = "fix it, or move it away and give --config"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"expected an object, found {settings!r:.40}")
        if CONVERTED not in settings:
            add_missing(settings)
        saved = ConfigDict(settings)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} holds no config ({_one_line(e)}); {fix}") from e
    if like is None:
        return saved
    converted = is_converted(saved)
    if converted:
        del saved[CONVERTED]
    known, given = (_flatten(c.to_dict()).keys() for c in (like, saved))
    if unknown := sorted(name for name in given - known if not _of_model(name)):
        raise UserError(f"{path}: {did_you_mean('setting', unknown[0], known)}; {fix}")
    missing = sorted(name for name in known - given if not _of_model(name))
    if missing and not converted:
        raise UserError(f"{path} lacks the settings {few(missing)}; {fix}")
    config = copy.deepcopy(like)
    try:
        with config.unlocked():
            for name in filter(_of_model, known - given):  # `like` may have another family
                if (setting := name.partition(".")[2]) not in SPEED_ONLY:
                    config.model[setting] = None
            config.update(saved)
    except TypeError as e:
        raise UserError(f"{path}: {_one_line(e)}; {fix}") from e
    return config


def is_converted(saved: ConfigDict) -> bool:
    """Whether this is the config.json of a converted checkpoint rather than of a run."""
    return CONVERTED in saved


def add_missing(settings: dict[str, Any]) -> None:
    """Adds missing settings from `BEFORE` to those of a run."""
    for name, value in BEFORE.items():
        *sections, last = name.split(".")
        inner: Any = settings
        for section in sections:
            inner = inner.setdefault(section, {}) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.setdefault(last, value)


def _of_model(name: str) -> bool:
    section, _, setting = name.partition(".")
    return section == "model" and bool(setting) and "." not in setting


def _name_and_arguments(config: str) -> tuple[str, str]:
    file, _, arguments = config.partition(":")
    return epath.Path(file).name.removesuffix(".py"), arguments


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(settings, sep=".")
