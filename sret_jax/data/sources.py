"""Random-access sources of encoded images: TFDS data sets and folders of class folders."""

import contextlib
import io
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict

import tensorflow_datasets as tfds
from etils import epath

from sret_jax.errors import UserError, did_you_mean, few
from sret_jax.files import is_remote

RANDOM_ACCESS = "array_record"
PREPARE = "python -m sret_jax.tools.prepare"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LARGEST_FILE = 2 << 30  # bytes, beyond those of any image that would be decoded

# By split the path and label of each; strings, for a million of them travel to every worker.
Files = dict[str, list[tuple[str, int]]]


class Record(TypedDict):
    """One stored example: the file's bytes and its class."""

    image: bytes
    label: int


class Source(Protocol):
    """A random-access split of a classification data set.

    Attributes:
      class_names: of the labels: those it was opened with, or its own.
      classes_here: those of them that this split has, as far as is known without reading it.
    """

    class_names: list[str]
    classes_here: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def record_name(self, index: int) -> str:
        """What a person calls record `index`: a file name, or the split and number."""
        ...

    def file_name(self, index: int) -> str:
        """The name or path of the file that record `index` was; "" where that is not known."""
        ...


class TfdsSource:
    """A split of a prepared TFDS data set, read from ArrayRecord without TensorFlow."""

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, classes: list[str] | None = None
    ):
        self.image_key, self.label_key = classification_keys(builder)
        self._title = f"{builder.info.full_name} {split}"
        self.classes_here = _class_names(builder.info.features[self.label_key])
        self.class_names = self.classes_here if classes is None else list(classes)
        self._labels = _labels_by_name(self.classes_here, self.class_names, repr(self._title))
        try:
            self._records: Sequence[dict[str, Any]] = builder.as_data_source(
                split, decoders={self.image_key: tfds.decode.SkipDecoding()}
            )
            len(self._records)  # a slice that ends before it starts only fails here
        except (NotImplementedError, ValueError, AssertionError) as e:
            formats = [file_format.value for file_format in builder.info.available_file_formats()]
            if RANDOM_ACCESS not in formats:
                raise UserError(
                    f"{builder.info.full_name} in {builder.data_dir} is stored as "
                    f"{builder.info.file_format.value}, which has no random access; convert it "
                    f"with: {PREPARE} {builder.info.name} --data_dir={builder.data_dir_root} "
                    "--convert"
                ) from e
            known = ", ".join(builder.info.splits)
            raise UserError(
                f"{builder.info.full_name} has no split {split!r}; it has: {known}"
            ) from e

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._record(index)
        label = int(record[self.label_key])
        known = 0 <= label < len(self._labels)  # a split without labels has -1
        return {"image": record[self.image_key], "label": self._labels[label] if known else label}

    def record_name(self, index: int) -> str:
        """See `Source`."""
        return f"{self._title} record {index} {self.file_name(index)}".rstrip()

    def file_name(self, index: int) -> str:
        """See `Source`."""
        return _text(self._record(index).get("file_name", b""))

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except RuntimeError as e:  # a sum that does not fit
            reason = str(e).splitlines()[0]
            raise UserError(
                f"record {index} of {self._title} is damaged ({reason}); prepare the data set anew"
            ) from e


class FolderSource:
    """A split of a folder laid out as `tfds.ImageFolder` expects: ROOT/SPLIT/CLASS/IMAGE.

    The classes are the sorted names of the class folders of the splits that are used, unless it is
    opened with others. Images may lie in subfolders of their class; hidden files and folders, and
    files that are no images, are passed over. A file that cannot be read holds no bytes, and so
    counts as an unreadable image.

    Raises:
      UserError: no images at all; none of some class of its own; a class that is not among those
        it is opened with; a split that is not there; a folder that cannot be listed, or that a
        class holds twice.
    """

    def __init__(self, root: epath.Path, split: str, classes: list[str] | None = None):
        with _listing(root):
            own, files = _list_images(root, split)
        names = [name_of_file(name) for name in own]
        if not any(files.values()):
            raise UserError(
                f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)}); lay it out as "
                f"{root}/SPLIT/CLASS/IMAGE.jpg"
            )
        filled = {label for of in files.values() for _, label in of}
        empty = [name for label, name in enumerate(names) if label not in filled]
        if empty and classes is None:
            raise UserError(
                f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)}) of the class "
                f"{few([repr(name) for name in empty])} in its split {split!r}; add some or remove "
                "the folder"
            )
        chosen = [file for part in _parts(split, files) for file in part]
        here = sorted({label for _, label in chosen})
        self.class_names = names if classes is None else list(classes)
        self.classes_here = [names[label] for label in here]
        where = f"the split {split!r} of {root}"
        labels = _labels_by_name(self.classes_here, self.class_names, where)
        label_of = dict(zip(here, labels, strict=True))
        self._files = [(file, label_of[label]) for file, label in chosen]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file, label = self._files[index]
        return {"image": _read(file), "label": label}

    def record_name(self, index: int) -> str:
        """See `Source`."""
        return self.file_name(index)

    def file_name(self, index: int) -> str:
        """See `Source`."""
        return name_of_file(self._files[index][0])


class SyntheticSource:
    """As many examples as a data set has, none of which is ever read: for `SyntheticLoader`."""

    def __init__(self, length: int, classes: int):
        self.class_names = self.classes_here = [str(label) for label in range(classes)]
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        raise IndexError(f"synthetic data hold no record {index}")

    def record_name(self, index: int) -> str:
        """See `Source`."""
        return f"synthetic record {index}"

    def file_name(self, index: int) -> str:
        """See `Source`."""
        return ""


def open_source(
    name: str, split: str, data_dir: epath.Path | None, classes: list[str] | None = None
) -> Source:
    """Opens a split of a data set by TFDS name or by the path of a folder.

    Args:
      name: a TFDS classification data set ("imagenet2012", "cifar10", "digits"), or the path of
        a folder laid out as ROOT/SPLIT/CLASS/IMAGE.
      split: in TFDS's slicing syntax, e.g. "train[:99%]".
      data_dir: where TFDS data is prepared; None is TFDS's own default, `TFDS_DATA_DIR` or
        ~/tensorflow_datasets.
      classes: names that the labels number, where they are not to be the split's own: those of the
        training split, or of a model. The split may have fewer.

    Raises:
      UserError: unknown name, missing or unprepared data, TFRecord data, unknown split, a data set
        without one image and one class label, or a class that is not among `classes`.
    """
    source: Source
    if is_folder(name):
        try:
            root = epath.Path(name).expanduser()
            exists = root.is_dir()
        except KeyError as e:
            raise UserError(f"config.data.name={name}: there is no storage {e}; use gs://") from e
        if not exists:
            raise UserError(f"the data folder {name} does not exist; correct config.data.name")
        source = FolderSource(root, split, classes)
    else:
        builder = find_builder(name, data_dir)
        if not builder.is_prepared():
            archives = " --archives=DIR" if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else ""
            raise UserError(
                f"{name} is not prepared in {builder.data_dir}; prepare it with: "
                f"{PREPARE} {name} --data_dir={builder.data_dir_root}{archives}"
            )
        source = TfdsSource(builder, split, classes)
    if not len(source):
        raise UserError(f"the split {split!r} of {name} is empty; choose a larger slice")
    return source


def find_builder(name: str, data_dir: epath.Path | None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of that name, set to write ArrayRecord.

    Raises:
      UserError: TFDS knows no such data set.
    """
    from sret_jax.data import digits  # noqa: F401, registers the embedded data set

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            # Only here: forcing a format on data prepared in another makes TFDS raise.
            builder = tfds.builder(name, data_dir=data_dir, file_format=RANDOM_ACCESS)
    except tfds.core.DatasetNotFoundError as e:
        sentence = did_you_mean("data set", name, tfds.list_builders())
        raise UserError(f"{sentence} (a folder of images is named by its path, as ./{name})") from e
    except (ValueError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"TFDS cannot open {name!r} ({reason}); name it DATASET, DATASET/CONFIG or "
            "DATASET:VERSION"
        ) from e
    # TFDS reads the formats a conversion added, but forgets to offer them.
    for added in set(builder.info.as_proto.alternative_file_formats):
        if added not in {f.value for f in builder.info.alternative_file_formats}:
            builder.info.add_alternative_file_format(added)
    return builder


def classification_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Names of the image and the label among a data set's features.

    Raises:
      UserError: its supervised keys are not one image and one class label.
    """
    features = builder.info.features
    if builder.info.supervised_keys and len(builder.info.supervised_keys) == 2:
        image_key, label_key = builder.info.supervised_keys
        is_image = isinstance(features[image_key], tfds.features.Image)
        if is_image and isinstance(features[label_key], tfds.features.ClassLabel):
            return image_key, label_key
    raise UserError(
        f"{builder.info.full_name} is no image classification data set: its supervised keys are "
        f"{builder.info.supervised_keys}, expected an Image and a ClassLabel"
    )


def is_folder(name: str) -> bool:
    """Whether a data set's name is a path (/data, ./data, ~/data, gs://data), not a TFDS name."""
    return name.startswith(("/", ".", "~")) or "://" in name


def prepare_embedded(name: str, data_dir: epath.Path | None) -> None:
    """Prepares the embedded digits where they are not yet; other data sets are left alone."""
    if name != "digits":
        return
    builder = find_builder(name, data_dir)
    if not builder.is_prepared():
        print(f"Preparing the handwritten digits in {builder.data_dir}", flush=True)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS would speak of a download
            builder.download_and_prepare()


def images_in(folder: epath.Path) -> list[str]:
    """The paths of the images of a folder and of those below it, sorted.

    Hidden files and folders, and files that are no images, are passed over.

    Raises:
      UserError: a folder that cannot be listed, or that leads back to one it lies in.
    """
    with _listing(folder):
        return [os.fspath(path) for path in _images_in(folder, set(_place(folder).parents))]


def name_of_file(path: str) -> str:
    """A path as text that can be printed and stored, whatever bytes are in it."""
    return _text(os.fsencode(path))


@contextlib.contextmanager
def _listing(root: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{e.filename or root} cannot be listed ({e.strerror or e}); mend or remove it"
        ) from e


def _labels_by_name(here: list[str], classes: list[str], where: str) -> list[int]:
    """The numbers that the names `here` have among `classes`.

    Raises:
      UserError: one is not among them; a name that differs in case or blanks alone is suggested.
    """
    number = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in here if name not in number]
    if unknown:
        alike = {_plain(name): name for name in classes}
        twins = [(name, alike[_plain(name)]) for name in unknown if _plain(name) in alike]
        hint = "".join(f"; {name!r} may be {twin!r}" for name, twin in twins[:1])
        known = ", ".join(map(repr, classes[:4])) + (", ..." if len(classes) > 4 else "")
        raise UserError(
            f"{where} has the classes {few([repr(name) for name in unknown])}, which are not among "
            f"the {len(classes):,} that were trained on ({known}){hint}; rename or remove them"
        )
    return [number[name] for name in here]


def _plain(name: str) -> str:
    """A name without what is easily mistyped: case, blanks, and how accents are encoded."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def _class_names(label: tfds.features.ClassLabel) -> list[str]:
    return list(label.names or map(str, range(label.num_classes)))


def _parts(split: str, files: Files) -> list[list[tuple[str, int]]]:
    """What a split in TFDS's syntax, e.g. "train[:99%]" or "train+val", takes of each folder."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[len(of)], num_bytes=0)
        for name, of in files.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (NotImplementedError, ValueError, AssertionError) as e:
        raise UserError(
            f"cannot read the split {split!r}; write it as TFDS does, e.g. 'train[:99%]', with "
            f"the folders there are: {', '.join(files)}"
        ) from e
    return [files[part.splitname][part.from_ : part.to] for part in parts]


def _used_folders(root: epath.Path, split: str) -> list[str]:
    """The folders that a split such as "train[:99%]+val" names; for "all", those there are.

    Raises:
      UserError: one that is not there.
    """
    folders = sorted(d.name for d in root.iterdir() if _is_visible_dir(d))
    used = []
    for part in split.split("+"):
        name = part.partition("[")[0].strip()
        if not re.fullmatch(r"[\w-]+", name):  # no split at all, as is said later
            continue
        if name == "all":
            used += folders
        elif name in folders:
            used.append(name)
        elif folders:
            raise UserError(
                f"{root} has no folder {name!r} but {', '.join(map(repr, folders))}; set "
                "config.data.train_split and config.data.eval_split to two of them, or make "
                f"{root / name} with a folder of images for each class"
            )
    return list(dict.fromkeys(used)) or folders


def _list_images(root: epath.Path, split: str) -> tuple[list[str], Files]:
    """The sorted names of the classes, and the images, of every folder that a split uses."""
    folders = {name: root / name for name in _used_folders(root, split)}
    classes = sorted({c.name for d in folders.values() for c in d.iterdir() if _is_visible_dir(c)})
    files = {
        split: [
            (os.fspath(file), label)
            for label, name in enumerate(classes)
            for file in _images_in(folder / name, set(_place(folder / name).parents))
        ]
        for split, folder in folders.items()
    }
    return classes, files


def _is_visible_dir(path: epath.Path) -> bool:
    return not path.name.startswith(".") and path.is_dir()


def _place(path: epath.Path) -> pathlib.PurePath:
    """Where a path leads; in a bucket there are no links."""
    return path if is_remote(path) else pathlib.Path(os.path.realpath(path))  # of circles too


def _images_in(folder: epath.Path, seen: set[pathlib.PurePath]) -> Iterator[epath.Path]:
    """The images of a folder and those below it; adds the folders to those seen."""
    if not folder.is_dir():
        return
    place = _place(folder)
    if place in seen:
        raise UserError(
            f"{folder} leads to {place}, which it lies in or which is read already; remove the link"
        )
    seen.add(place)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _images_in(path, seen)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


def _read(file: str) -> bytes:
    """The bytes of a file; none of what is no file (a pipe would be waited for) or unreadable."""
    try:
        if not is_remote(file):
            status = pathlib.Path(file).stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                return b""
        return epath.Path(file).read_bytes()
    except OSError:
        return b""


def _text(name: bytes) -> str:
    """A name of bytes as text that can be printed and stored."""
    return name.decode(errors="backslashreplace")
