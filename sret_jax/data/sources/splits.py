"""Opens the splits of a run, and checks that they are the same in every process."""

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.data.loader import eval_batch_size
from sret_jax.data.sources.classes import near_duplicates
from sret_jax.data.sources.source import (
    Source,
    SyntheticSource,
    is_folder,
    open_source,
    prepare_embedded,
)
from sret_jax.errors import UserError, quoted
from sret_jax.files import check_storage
from sret_jax.parallel.distributed import agreed, gather_texts, is_leader

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000  # synthetic data imitate ImageNet


def open_split(
    config: ConfigDict, workdir: epath.Path, split: str, classes: list[str] | None = None
) -> Source:
    """Opens a split of config.data; process 0 first prepares the built-in digits if necessary.

    `classes` defines the labels; None: the split's own classes. See `open_source`.

    Raises:
      UserError: the split cannot be opened, or the processes see different images.
    """
    if config.data.synthetic:
        train = split == config.data.train_split
        length = IMAGENET_IMAGES if train else eval_batch_size(config, 1)
        return SyntheticSource(length, config.model.num_classes or IMAGENET_CLASSES)
    name, data_dir = config.data.name, _data_dir(config, workdir)
    with agreed():
        if is_leader():
            prepare_embedded(name, data_dir)
    with agreed():
        source = open_source(
            name, split, data_dir, classes, folder_slices=config.data.folder_slices
        )
    _check_same_everywhere(source, f"the split {split!r} of {name}")
    return source


def digest(source: Source) -> str:
    """A digest of the records' names and their order."""
    total = hashlib.sha256()
    for identity in source.identities():
        total.update(identity.encode() + b"\0")
    return total.hexdigest()


def data_remarks(train: Source, test: Source) -> list[str]:
    """Sentences about data of a run that are left out, missing or doubtful."""
    remarks = list(dict.fromkeys([*train.remarks, *test.remarks]))
    remarks += [
        f"The classes {first!r} and {second!r} differ only in case or blanks, and are two classes."
        for first, second in near_duplicates(train.class_names)
    ]
    for source, what in ((train, "training"), (test, "test")):
        here = set(source.classes_here)
        if missing := [name for name in train.class_names if name not in here]:
            remarks.append(
                f"There are no {what} images of {len(missing):,} of the "
                f"{len(train.class_names):,} classes: {quoted(missing)}."
            )
    seen = set(test.identities())
    if shared := sum(identity in seen for identity in train.identities()):
        remarks.append(
            f"{shared:,} of the {len(test):,} test images are training images too, so the test "
            "accuracy is not that of new images."
        )
    return remarks


def other_slices(config: ConfigDict, changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Describes how a config slices its folder differently from a workdir's config; "" if alike.

    Args:
      config: config that names the folder and its splits.
      changed: settings that differ from the workdir's config, from `changed_settings`.
    """
    sliced = "[" in config.data.train_split + config.data.eval_split
    same_folder = is_folder(config.data.name) and "data.name" not in changed
    if "data.folder_slices" not in changed or not sliced or not same_folder:
        return ""
    old, new = changed["data.folder_slices"]
    return f"other slices of the folder (data.folder_slices: {old} -> {new})"


def _check_same_everywhere(source: Source, where: str) -> None:
    """Raises UserError if processes see different images; the message names a host that differs."""
    if jax.process_count() == 1:
        return
    facts = {"images": len(source), "classes": source.classes_here, "digest": digest(source)}
    texts = gather_texts(json.dumps([socket.gethostname(), facts]))
    everyone = [json.loads(text) for text in texts]
    seen = [json.dumps(facts) for _, facts in everyone]
    usual = seen.index(Counter(seen).most_common(1)[0][0])
    for process, (host, theirs) in enumerate(everyone):
        if theirs != everyone[usual][1]:
            raise UserError(
                f"the processes see different images in {where}: process {process} on {host} has "
                f"{_difference(theirs, everyone[usual][1])} of process {usual} on "
                f"{everyone[usual][0]}; give every host the same data"
            )


def _difference(theirs: dict[str, Any], usual: dict[str, Any]) -> str:
    if theirs["images"] != usual["images"]:
        return f"{theirs['images']:,} images instead of the {usual['images']:,}"
    for name, other in zip(theirs["classes"], usual["classes"], strict=False):
        if name != other:
            return f"the class {name!r} instead of the {other!r}"
    if len(theirs["classes"]) != len(usual["classes"]):
        return f"{len(theirs['classes']):,} classes instead of the {len(usual['classes']):,}"
    return "files with other names than those"


def _data_dir(config: ConfigDict, workdir: epath.Path) -> epath.Path | None:
    """The TFDS folder. The built-in digits go to the workdir unless the config names a folder."""
    if config.data.data_dir:
        check_storage(config.data.data_dir)
        return epath.Path(config.data.data_dir).expanduser()
    if config.data.name == "digits" and "TFDS_DATA_DIR" not in os.environ:
        return workdir / "data"
    return None
