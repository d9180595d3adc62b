"""Opens the evaluation split with the labels of trained weights, matching classes by name."""

from etils import epath
from ml_collections import ConfigDict

from sret_jax.data.sources.classes import are_labels, check_known
from sret_jax.data.sources.imagenet import assumed_ids
from sret_jax.data.sources.source import Source
from sret_jax.data.sources.splits import open_split
from sret_jax.errors import UserError
from sret_jax.settings.saved_config import CLASSES_FILE
from sret_jax.weights.loading import class_names


def open_labelled(config: ConfigDict, workdir: epath.Path, logits: int) -> tuple[Source, str]:
    """Opens the evaluation split so that label k means logit k.

    The data may have fewer classes than the weights, and in another order.

    Args:
      config: names the data.
      workdir: folder of the weights, with class_names.json if they have class names.
      logits: number of logits of the weights.

    Returns:
      The data, and a sentence if names were assumed or not compared, otherwise "".

    Raises:
      UserError: the weights lack a class of the data, or the numbers of classes differ.
    """
    source = open_split(config, workdir, config.data.eval_split)
    names, remark = _names_of_logits(config.data.name, source.class_names, workdir, logits)
    check_known(names, source.classes_here, str(workdir), "give data of its classes")
    if names != source.class_names:
        source = open_split(config, workdir, config.data.eval_split, names)
    return source, remark


def _names_of_logits(
    data: str, own: list[str], workdir: epath.Path, logits: int
) -> tuple[list[str], str]:
    """The class names stored with the weights, or assumed names and a sentence that says so.

    Args:
      data: name of the data set.
      own: class names of the data set.
      workdir: folder of the weights.
      logits: number of logits of the weights.
    """
    kept = class_names(workdir)
    if kept and len(kept) > logits:
        raise UserError(
            f"{workdir / CLASSES_FILE} has {len(kept):,} names for {logits:,} logits; correct it"
        )
    if kept and are_labels(own) and len(own) == logits and not {*own} <= {*kept}:
        return own, (
            f"The classes of {data} are numbers, so they are taken for the labels: 0 for "
            f"{kept[0]!r} to {len(kept) - 1} for {kept[-1]!r}."
        )
    if kept:
        return kept, ""
    if assumed := assumed_ids(logits, own):
        return assumed, f"{workdir} keeps no class names; its 1,000 are taken for ImageNet's."
    if len(own) != logits:
        raise UserError(
            f"{workdir} keeps no class names, and {data} has {len(own):,} classes for its "
            f"{logits:,} logits; give data with as many classes, or put a "
            f"{CLASSES_FILE} there, a list of the names"
        )
    return own, (
        f"{workdir} keeps no class names, so names are not compared: its logits are numbered as "
        f"{data} numbers its classes, 0 for {own[0]!r} to {logits - 1} for {own[-1]!r}."
    )
