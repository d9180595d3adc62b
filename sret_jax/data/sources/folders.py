"""Folders of images: which files belong to a split, and which class each file has.

The layout is ROOT/SPLIT/CLASS/IMAGE.jpg, or ROOT/CLASS/IMAGE.jpg, which is a single split named
"train". Images may be in subfolders of their class.
"""

import dataclasses
import os
import pathlib
from collections import Counter

from etils import epath

from sret_jax.data.sources.classes import in_order
from sret_jax.data.sources.folder_slices import Classes, splits_of, take
from sret_jax.data.sources.image_files import (
    IMAGE_SUFFIXES,
    Images,
    counted,
    entries,
    images_in,
    listing,
    name_of_file,
)
from sret_jax.errors import UserError, quoted

ONE_SPLIT = "train"  # name of the only split of a folder without split folders
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "eval", "test", "testing")


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The images of a split.

    Attributes:
      files: the path and the class of each image.
      class_names: names of the class folders in the folders that the split uses, in label order.
      empty_classes: the class names without an image in this split.
      left_out: for every folder that the split uses, the images outside its class folders, and the
        number of files that are not read, by suffix.
    """

    files: list[tuple[str, str]]
    class_names: list[str]
    empty_classes: list[str]
    left_out: list[Images]


def read_split(root: epath.Path, split: str, slices: str = "stratified") -> FolderSplit:
    """Lists the images of a split such as "train[:80%]"; see `folder_slices.take`.

    Raises:
      UserError: the split does not exist, has no class folders or no images; a folder cannot be
        listed, or a class contains it twice.
    """
    with listing(root):
        folders = _split_folders(root, split)
        contents = {name: _class_folders(folder) for name, folder in folders.items()}
    without = [name for name, (classes, _) in contents.items() if not _filled(classes)]
    if without and (len(without) == len(contents) or "all" not in splits_of(split, folders)):
        raise _no_images(root, without[0], *contents[without[0]])
    splits = {name: classes for name, (classes, _) in contents.items()}
    names = in_order({name for classes in splits.values() for name in classes})
    filled = {name for classes in splits.values() for name in _filled(classes)}
    return FolderSplit(
        files=take(split, splits, slices),
        class_names=names,
        empty_classes=[name for name in names if name not in filled],
        left_out=[_left_out(classes, loose) for classes, loose in contents.values()],
    )


def _left_out(classes: Classes, loose: Images) -> Images:
    passed_over = sum((images.passed_over for images in classes.values()), loose.passed_over)
    return dataclasses.replace(loose, passed_over=passed_over)


def _split_folders(root: epath.Path, split: str) -> dict[str, str]:
    """The folders of the splits named in e.g. "train[:99%]+val"; "all" means every split."""
    place = _inside_its_twin(os.fspath(root))
    folders = {entry.name: entry.path for entry in entries(place) if entry.is_folder}
    if not folders:
        loose = any(entry.is_image for entry in entries(place))
        raise UserError(
            f"{root} holds {'images but no folders' if loose else 'no folders of images'}; lay it "
            f"out as {root}/SPLIT/CLASS/IMAGE.jpg, or as {root}/CLASS/IMAGE.jpg to be sliced"
        )
    names = splits_of(split, folders)
    if not any(name in folders for name in names) and _are_classes(folders):
        if missing := [name for name in names if name not in (ONE_SPLIT, "all")]:
            raise UserError(
                f"{root} has no folder {missing[0]!r}: its folders ({quoted(folders)}) hold "
                f"images, so they are the classes of one split, {ONE_SPLIT!r}; "
                f"{_slice_it(ONE_SPLIT)}"
            )
        folders = {ONE_SPLIT: place}
    if missing := [name for name in names if name not in (*folders, "all")]:
        two = "set config.data.train_split and config.data.eval_split to two of them"
        raise UserError(
            f"{root} has no folder {missing[0]!r} but {quoted(folders)}; "
            f"{_slice_it(*folders) if len(folders) == 1 else two}, or make {root / missing[0]} "
            "with a folder of images for each class"
        )
    used = folders if "all" in names else names
    return {name: _inside_its_twin(folders[name]) for name in used}


def _inside_its_twin(folder: str) -> str:
    """The folder, or its only subfolder if that has the same name, as unpacking often leaves it."""
    inside = entries(folder)
    if [(e.name, e.is_folder) for e in inside] == [(pathlib.PurePath(folder).name, True)]:
        return inside[0].path
    return folder


def _are_classes(folders: dict[str, str]) -> bool:
    """Whether the folders are classes: they contain images, no folders of images, no splits."""
    kinds = [_holds(folder) for folder in folders.values()]
    is_split = any(name.lower() in SPLIT_NAMES for name in folders)
    return "images" in kinds and "folders of images" not in kinds and not is_split


def _holds(folder: str) -> str:
    inside = entries(folder)
    if any(entry.is_image for entry in inside):
        return "images"
    deeper = (child for entry in inside if entry.is_folder for child in entries(entry.path))
    return "folders of images" if any(child.is_image for child in deeper) else "neither"


def _class_folders(folder: str) -> tuple[Classes, Images]:
    """The images of every class, and the images outside the class folders."""
    inside = entries(folder)
    classes = {name_of_file(e.name): images_in(e.path) for e in inside if e.is_folder}
    files = [e for e in inside if not e.is_folder]
    loose = [e.path for e in files if e.is_image]
    return classes, Images(folder, loose, Counter(e.suffix for e in files if not e.is_image))


def _filled(classes: Classes) -> list[str]:
    return [name for name, images in classes.items() if images.files]


def _slice_it(name: str) -> str:
    return (
        f"slice it, with --config.data.train_split='{name}[:80%]' "
        f"--config.data.eval_split='{name}[80%:]'"
    )


def _no_images(root: epath.Path, split: str, classes: Classes, loose: Images) -> UserError:
    if loose.files:
        return UserError(
            f"{loose.folder} holds {len(loose.files):,} images but no folder for each class; sort "
            f"them into {loose.folder}/CLASS/, or choose another split than {split!r}"
        )
    passed_over = _left_out(classes, loose).passed_over
    others = f" but {counted(passed_over)} files" if passed_over else ""
    return UserError(
        f"{loose.folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){others}; lay it out as "
        f"{root / split}/CLASS/IMAGE.jpg"
    )
