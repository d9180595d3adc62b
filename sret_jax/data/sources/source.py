"""Random-access sources of encoded images: TFDS data sets, and folders with class folders."""

import contextlib
import io
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict

import tensorflow_datasets as tfds
from etils import epath

from sret_jax.data.sources.classes import labels_of
from sret_jax.data.sources.folders import FolderSplit, read_split
from sret_jax.data.sources.image_files import IMAGE_SUFFIXES, name_of_file, passed_over
from sret_jax.errors import UserError, did_you_mean, quoted
from sret_jax.files import check_storage, is_remote

RANDOM_ACCESS = "array_record"
PREPARE = "python -m sret_jax.tools.prepare"
LARGEST_FILE = 2 << 30  # bytes; any image small enough to be decoded is smaller
IMAGENET_NICKNAMES = ("imagenet", "imagenet1k", "imagenet_1k", "imagenet-1k", "ilsvrc2012")


class Record(TypedDict):
    """One stored example: the file's bytes and its class."""

    image: bytes
    label: int


class Source(Protocol):
    """A random-access split of a classification data set.

    Attributes:
      class_names: names of the labels: those that the source was opened with, or its own.
      classes_here: the class names that this split contains, as far as known without reading it.
      remarks: sentences about data that are left out.
    """

    class_names: list[str]
    classes_here: list[str]
    remarks: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def record_name(self, index: int) -> str:
        """A name of record `index` for people: a file name, or the split and number."""
        ...

    def file_name(self, index: int) -> str:
        """The name or path of the file of record `index`; "" if it is unknown."""
        ...

    def identities(self) -> Iterator[str]:
        """A name for each record in its data set, in order; it is the same on every machine."""
        ...


class TfdsSource:
    """A split of a prepared TFDS data set, read from ArrayRecord without TensorFlow."""

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, classes: list[str] | None = None
    ):
        self.image_key, self.label_key = classification_keys(builder)
        self.remarks: list[str] = []
        self._title = f"{builder.info.full_name} {split}"
        self.classes_here = _class_names(builder.info.features[self.label_key])
        self.class_names = self.classes_here if classes is None else list(classes)
        self._labels = labels_of(self.classes_here, self.class_names, repr(self._title))
        try:
            self._records: Sequence[dict[str, Any]] = builder.as_data_source(
                split, decoders={self.image_key: tfds.decode.SkipDecoding()}
            )
            len(self._records)  # only this call rejects a slice that ends before it starts
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
        self._parts = _parts(builder.info, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._record(index)
        label = int(record[self.label_key])
        known = 0 <= label < len(self._labels)  # in a split without labels all are -1
        return {"image": record[self.image_key], "label": self._labels[label] if known else label}

    def record_name(self, index: int) -> str:
        """See `Source`."""
        return f"{self._title} record {index} {self.file_name(index)}".rstrip()

    def file_name(self, index: int) -> str:
        """See `Source`."""
        return _text(self._record(index).get("file_name", b""))

    def identities(self) -> Iterator[str]:
        """See `Source`."""
        return (f"{name} {record}" for name, records in self._parts for record in records)

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except RuntimeError as e:  # wrong checksum
            reason = str(e).splitlines()[0]
            raise UserError(
                f"record {index} of {self._title} is damaged ({reason}); prepare the data set again"
            ) from e


class FolderSource:
    """A split of a folder; see `folders` for the layout.

    The class names are those it is opened with, or else the names of the class folders in the
    splits that are used, in label order. A file that cannot be read yields no bytes, and so counts
    as an unreadable image.

    Raises:
      UserError: `read_split` raises it, a class of its own has no images, or a class is not among
        those that it is opened with.
    """

    def __init__(
        self,
        root: epath.Path,
        split: str,
        classes: list[str] | None = None,
        slices: str = "stratified",
    ):
        found = read_split(root, split, slices)
        if classes is None and found.empty_classes:
            raise UserError(
                f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)}) of the class "
                f"{quoted(found.empty_classes)} in its split {split!r}; add some or remove the "
                "folder"
            )
        here = {name for _, name in found.files}
        self.classes_here = [name for name in found.class_names if name in here]
        self.class_names = found.class_names if classes is None else list(classes)
        where = f"the split {split!r} of {root}"
        labels = labels_of(self.classes_here, self.class_names, where)
        label = dict(zip(self.classes_here, labels, strict=True))
        self._files = [(file, label[name]) for file, name in found.files]
        self._root = root
        self.remarks = _left_out(found)

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

    def identities(self) -> Iterator[str]:
        """See `Source`."""
        inside = len(os.fspath(self._root))
        return (name_of_file(file[inside:]) for file, _ in self._files)


class SyntheticSource:
    """Has the length of a data set, but its examples are never read: for `SyntheticLoader`."""

    def __init__(self, length: int, classes: int):
        self.class_names = self.classes_here = [str(label) for label in range(classes)]
        self.remarks: list[str] = []
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

    def identities(self) -> Iterator[str]:
        """See `Source`; there are no identities."""
        return iter(())


def open_source(
    name: str,
    split: str,
    data_dir: epath.Path | None,
    classes: list[str] | None = None,
    *,
    folder_slices: str = "stratified",
) -> Source:
    """Opens a split of a data set, given by its TFDS name or by the path of a folder.

    Args:
      name: a TFDS classification data set ("imagenet2012", "cifar10", "digits"), or the path of
        a folder with the layout ROOT/SPLIT/CLASS/IMAGE or ROOT/CLASS/IMAGE.
      split: in TFDS's slicing syntax, e.g. "train[:99%]".
      data_dir: where TFDS data is prepared. None: TFDS's default, which is `TFDS_DATA_DIR` or
        ~/tensorflow_datasets.
      classes: class names that define the labels, e.g. those of the training split or of a model;
        None: the split's own. The split may contain fewer classes.
      folder_slices: how slices of a folder are taken; see `folder_slices.take`.

    Raises:
      UserError: the name or split is unknown, the data are missing, unprepared or stored as
        TFRecord, the data set does not have one image and one class label, or a class is not among
        `classes`.
    """
    source: Source
    if is_folder(name):
        check_storage(name)
        root = epath.Path(name).expanduser()
        if not root.is_dir():
            raise UserError(f"the data folder {name} does not exist; correct config.data.name")
        source = FolderSource(root, split, classes, folder_slices)
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
    """Finds the TFDS builder with that name and sets it to write ArrayRecord.

    Raises:
      UserError: TFDS has no such data set.
    """
    from sret_jax.data.sources import digits  # noqa: F401, registers the built-in data set

    if name.lower() in IMAGENET_NICKNAMES:  # nearest by letters would be imagenette
        raise UserError(f"unknown data set {name!r}; did you mean 'imagenet2012'?")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            # Only here: TFDS raises if a format is forced on data prepared in another format.
            builder = tfds.builder(name, data_dir=data_dir, file_format=RANDOM_ACCESS)
    except tfds.core.DatasetNotFoundError as e:
        sentence = did_you_mean("data set", name, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"{sentence} (a folder of images is named by its path, as ./{name})") from e
    except (ValueError, AssertionError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"TFDS cannot open {name!r} ({reason}); name it DATASET, DATASET/CONFIG or "
            "DATASET:VERSION"
        ) from e
    # TFDS can read the formats that a conversion added, but does not list them.
    for added in set(builder.info.as_proto.alternative_file_formats):
        if added not in {f.value for f in builder.info.alternative_file_formats}:
            builder.info.add_alternative_file_format(added)
    return builder


def classification_keys(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """The names of the image and of the label among a data set's features.

    Raises:
      UserError: the supervised keys of the data set are not one image and one class label.
    """
    features = builder.info.features
    if builder.info.supervised_keys and len(builder.info.supervised_keys) == 2:
        image_key, label_key = builder.info.supervised_keys
        is_image = isinstance(features[image_key], tfds.features.Image)
        if is_image and isinstance(features[label_key], tfds.features.ClassLabel):
            return image_key, label_key
    raise UserError(
        f"{builder.info.full_name} is not an image classification data set: its supervised keys "
        f"are {builder.info.supervised_keys}, expected an Image and a ClassLabel"
    )


def is_folder(name: str) -> bool:
    """Whether a data set's name is a path (/data, ./data, ~/data, gs://data), not a TFDS name."""
    return name.startswith(("/", ".", "~")) or "://" in name


def prepare_embedded(name: str, data_dir: epath.Path | None) -> None:
    """Prepares the built-in digits unless they are prepared; ignores any other data set."""
    if name != "digits":
        return
    builder = find_builder(name, data_dir)
    if not builder.is_prepared():
        print(f"Preparing the handwritten digits in {builder.data_dir}", flush=True)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS would print that it downloads
            builder.download_and_prepare()


def _parts(info: tfds.core.DatasetInfo, split: str) -> list[tuple[str, range]]:
    """The records that a split takes from each whole split, with that split's name."""
    parts = []
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(info.splits):
        of = info.splits[part.splitname]
        records = range(*slice(part.from_, part.to).indices(of.num_examples))
        parts.append((f"{info.full_name} {part.splitname} of {of.num_bytes} bytes", records))
    return parts


def _left_out(found: FolderSplit) -> list[str]:
    """Sentences about the files in a split's folders that are not read."""
    remarks = []
    for images in found.left_out:
        if images.files:
            remarks.append(
                f"{images.folder}: {len(images.files):,} images are outside the class folders and "
                "are left out."
            )
        if images.passed_over:
            remarks.append(f"{images.folder}: {passed_over(images)}.")
    return remarks


def _class_names(label: tfds.features.ClassLabel) -> list[str]:
    return list(label.names or map(str, range(label.num_classes)))


def _read(file: str) -> bytes:
    """The bytes of a file; empty if it is unreadable or not a regular file, such as a pipe."""
    try:
        if not is_remote(file):
            status = pathlib.Path(file).stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                return b""
        return epath.Path(file).read_bytes()
    except OSError:
        return b""


def _text(name: bytes) -> str:
    """Converts a name from bytes to text that can be printed and stored."""
    return name.decode(errors="backslashreplace")
