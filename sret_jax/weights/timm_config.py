"""The config.json that timm writes beside model.safetensors on the hub, in both directions."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from sret_jax.errors import UserError, few
from sret_jax.models.model import Model
from sret_jax.models.registry import create_model, of_timm, to_timm
from sret_jax.weights.description import Description

CHANNELS = 3
TRAINING_ARGS = ("drop_rate", "drop_path_rate")  # ends of arguments that matter in training only


def from_timm(content: Any, place: epath.Path) -> tuple[Description, str]:
    """Reads a config.json of timm.

    Its keys are architecture, num_classes, global_pool, model_args, label_names, and pretrained_cfg
    with input_size (3, S, S), mean, std, crop_pct, crop_mode and interpolation.

    Args:
      content: the JSON.
      place: the file, for messages.

    Returns:
      The description, and sentences about what is done otherwise here than the file says; or "".

    Raises:
      UserError: it is another file, no family here has that architecture, or the model differs from
        the published one in more than classes and image size.
    """
    try:
        trained = content["pretrained_cfg"]
        classes = content.get("num_classes", trained.get("num_classes", 1000))
        arguments = {**content.get("model_args", {})}
        arguments.setdefault("global_pool", content.get("global_pool"))
        channels, height, width = trained["input_size"]
        mean, std = (tuple(map(float, trained[name])) for name in ("mean", "std"))
        crop = float(trained["crop_pct"])
        if not isinstance(classes, int) or not 0 < crop <= 1:
            raise TypeError(f"num_classes={classes!r}, crop_pct={crop}")
        names, remark = _class_names(content.get("label_names"), classes)
        name, settings, pool = of_timm(content["architecture"])
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(
            f"{place} describes no model of timm ({type(e).__name__}: {e}); give a repository of "
            "timm's, or one that was exported here"
        ) from e
    except ValueError as e:
        raise UserError(f"{place}: {e}") from e
    if not classes:
        raise UserError(f"{place} says num_classes=0; weights without a classifier are not read")
    if (channels, height) != (CHANNELS, width):
        raise UserError(f"{place} says input_size={trained['input_size']}, expected [3, S, S]")
    same = {
        "num_classes": [classes],
        "in_chans": [CHANNELS],
        "img_size": [height, [height, width]],
        "global_pool": [pool],
    }
    if changed := _changed(arguments, same):
        raise UserError(
            f"{place} changes timm's {content['architecture']} by {few(changed)}, which is not "
            "read here"
        )
    try:
        model = create_model(
            name, num_classes=classes, image_size=height, mean=mean, std=std, **settings
        )
    except ValueError as e:
        raise UserError(f"{place}: {e}") from e
    remarks = [f"{place} {remark}." for remark in (remark, _view(trained)) if remark]
    return Description.of(model, name, names, crop), " ".join(remarks)


def to_timm_config(
    model: Model, variant: str, class_names: Sequence[str] | None, test_crop: float
) -> dict[str, Any]:
    """What timm's keys say about a model; `from_timm` describes them."""
    names = {} if class_names is None else {"label_names": list(class_names)}
    architecture, pool = to_timm(model, variant)
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.stages[-1].width,
        "global_pool": pool,
        **names,
        "pretrained_cfg": {
            "input_size": [CHANNELS, model.image_size, model.image_size],
            "interpolation": "bicubic",
            "crop_pct": test_crop,
            "crop_mode": "center",
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": model.num_classes,
        },
    }


def _changed(arguments: Mapping[str, Any], same: Mapping[str, Sequence[Any]]) -> list[str]:
    """The arguments of timm's model that are not in `same` and matter outside training."""
    return [
        f"{name}={value}"
        for name, value in arguments.items()
        if value is not None
        and value not in same.get(name, ())
        and not name.endswith(TRAINING_ARGS)
    ]


def _class_names(labels: Any, classes: int) -> tuple[list[str] | None, str]:
    """The name of each class; None if not all have one, with the end of a sentence if some have."""
    if isinstance(labels, Mapping):  # from numbers
        labels = [labels.get(str(number)) for number in range(classes)]
    if labels is None:
        return None, ""
    if len(labels) != classes or not all(isinstance(label, str) for label in labels):
        return None, f"does not name each of {classes:,} classes, so its label_names are left out"
    return list(labels), ""


def _view(trained: Mapping[str, Any]) -> str:
    """The end of a sentence if its images were resized or cut in another way than ours; or ""."""
    ours = {"interpolation": "bicubic", "crop_mode": "center"}
    theirs = {name: trained.get(name, value) for name, value in ours.items()}
    if theirs == ours:
        return ""
    return (
        "says {interpolation} interpolation and crop mode {crop_mode} for evaluation, which has "
        "bicubic interpolation and the central crop here"
    ).format(**theirs)
