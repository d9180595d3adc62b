"""Makes a smaller copy of a prepared data set: shrinks large images and stores them as JPEG."""

import concurrent.futures
import copy
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.core import dataset_info, file_adapters
from tensorflow_datasets.proto import tf_example_pb2

from sret_jax.data.sources.source import classification_keys
from sret_jax.data.views.images import BadImage, decode
from sret_jax.errors import UserError
from sret_jax.files import absolute, write_json
from sret_jax.terminal import Progress

DEFAULT_QUALITY = 90
PROVENANCE = "reencoded.json"
INCOMPLETE = "incomplete."
ARRAY_RECORD = file_adapters.FileFormat.ARRAY_RECORD


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """How large images are shrunk.

    Attributes:
      max_side: longest side of an image in pixels; images that are no larger stay as they are.
      quality: JPEG quality of a shrunk image, 1 to 100.

    Raises:
      UserError: a number is out of range.
    """

    max_side: int
    quality: int = DEFAULT_QUALITY

    def __post_init__(self):
        if self.max_side < 1:
            raise UserError(f"--max_side={self.max_side} must be at least 1 pixel")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality={self.quality} must be a JPEG quality from 1 to 100")

    def __call__(self, data: bytes) -> bytes | None:
        """Returns the file of the shrunk image; None if the image is small enough.

        Raises:
          BadImage: unreadable bytes.
        """
        image = decode(data)
        if max(image.size) <= self.max_side:
            return None
        # Without `reducing_gap` this is a single antialiased resize, like the training crop's.
        image.thumbnail((self.max_side,) * 2, Image.Resampling.BICUBIC, reducing_gap=None)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality)
        return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of the data set, and the file of the copy that its records go to."""

    split: str
    file_format: file_adapters.FileFormat
    source: epath.Path
    copy: epath.Path


def reencode(
    builder: tfds.core.DatasetBuilder, copy_to: epath.Path, shrinking: Shrinking
) -> tfds.core.DatasetBuilder:
    """Makes a smaller copy of a prepared data set, in ArrayRecord files, and prints what it did.

    Records keep their order. Of their features only the bytes of shrunk images change. The copy
    gets its final name when it is complete; an interrupted copy continues with the missing shards.

    Args:
      builder: builder of the prepared data set.
      copy_to: data_dir of the copy.
      shrinking: how images are shrunk.

    Returns:
      The builder of the copy.

    Raises:
      UserError: nothing is prepared, the data set has no images and class labels, or `copy_to`
        already contains it, unchanged or shrunk with other settings.
    """
    if not builder.is_prepared():
        raise UserError(
            f"{builder.name} is not prepared in {builder.data_dir}; prepare it first, without "
            "--max_side"
        )
    if ARRAY_RECORD not in builder.info.available_file_formats():
        check_tensorflow(f"reading {builder.info.file_format.value}")
    if absolute(copy_to) == absolute(builder.data_dir_root):
        raise UserError(f"--copy_to={copy_to} contains the data set itself; give another folder")
    target = absolute(copy_to) / builder.info.full_name
    if not target.exists():
        partial = target.with_name(INCOMPLETE + target.name)
        _fill(partial, builder, shrinking)
        partial.replace(target)
    elif not (target / PROVENANCE).exists():
        raise UserError(f"{target} holds another preparation; give --copy_to another folder")
    _print_totals(_read_counts(target, shrinking))
    return tfds.builder_from_directory(target)


def check_tensorflow(task: str) -> None:
    """Checks that TensorFlow is installed, which TFDS needs for some tasks.

    Raises:
      UserError: TensorFlow is missing.
    """
    try:
        importlib.import_module("tensorflow")
    except ImportError as e:
        raise UserError(
            f"{task} needs TensorFlow, which is not installed; "
            "pip install -r requirements-prepare.txt"
        ) from e


def shard_paths(
    split: tfds.core.SplitInfo, file_format: file_adapters.FileFormat, folder: epath.Path
) -> list[epath.Path]:
    """The paths of a split's files in that format and folder."""
    template = split.filename_template.replace(
        filetype_suffix=file_format.file_suffix, data_dir=folder
    )
    return [epath.Path(path) for path in split.replace(filename_template=template).filepaths]


def read_records(path: epath.Path, file_format: file_adapters.FileFormat) -> Iterator[bytes]:
    """The serialized examples of a shard in order."""
    if file_format == ARRAY_RECORD:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        with ArrayRecordDataSource(os.fspath(path)) as records:
            yield from records
    else:
        adapter = file_adapters.ADAPTER_FOR_FORMAT[file_format]
        for record in adapter.make_tf_data(path):
            yield record.numpy()


def write_shard(path: epath.Path, records: Iterable[bytes]) -> None:
    """Writes an ArrayRecord file; it appears only when it is complete."""
    temporary = path.with_name(INCOMPLETE + path.name)
    adapter = file_adapters.ADAPTER_FOR_FORMAT[ARRAY_RECORD]
    adapter.write_examples(temporary, enumerate(records))
    temporary.replace(path)


def _fill(folder: epath.Path, builder: tfds.core.DatasetBuilder, shrinking: Shrinking) -> None:
    """Writes every file that `folder` needs to be a complete copy and does not have."""
    image_key, _ = classification_keys(builder)
    counts = _read_counts(folder, shrinking)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(builder, folder)
    left = [shard for shard in shards if shard.copy.name not in counts]
    _write_counts(folder, shrinking, counts)
    with Progress("Re-encoding", len(shards), "shards", done=len(counts)) as progress:
        for shard, done in progress.counted(_reencode_all(left, image_key, shrinking)):
            counts[shard.copy.name] = done
            _write_counts(folder, shrinking, counts)
    sizes = Counter[str]()
    for shard in shards:
        sizes[shard.split] += counts[shard.copy.name]["bytes_after"]
    _write_info(folder, builder.info, sizes)


def _shards(builder: tfds.core.DatasetBuilder, folder: epath.Path) -> list[Shard]:
    random_access = ARRAY_RECORD in builder.info.available_file_formats()
    file_format = ARRAY_RECORD if random_access else builder.info.file_format
    return [
        Shard(split.name, file_format, source, smaller)
        for split in builder.info.splits.values()
        for source, smaller in zip(
            shard_paths(split, file_format, builder.data_path),
            shard_paths(split, ARRAY_RECORD, folder),
            strict=True,
        )
    ]


def _reencode_all(
    shards: list[Shard], image_key: str, shrinking: Shrinking
) -> Iterator[tuple[Shard, dict[str, int]]]:
    """Re-encodes shards on all cores; yields each finished shard with its counts."""
    pool = concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        tasks = {pool.submit(_reencode_shard, s, image_key, shrinking): s for s in shards}
        for task in concurrent.futures.as_completed(tasks):
            yield tasks[task], task.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker at once on Ctrl-C, and when the command that started it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch():
        parent.join()
        os._exit(1)  # an orphan would write at the same time as the restarted command

    threading.Thread(target=watch, daemon=True).start()


def _reencode_shard(shard: Shard, image_key: str, shrinking: Shrinking) -> dict[str, int]:
    counts = dict.fromkeys(("shrunk", "copied", "unreadable", "bytes_before", "bytes_after"), 0)

    def smaller_records() -> Iterator[bytes]:
        for record in read_records(shard.source, shard.file_format):
            outcome, smaller = _reencode_record(record, image_key, shrinking)
            counts[outcome] += 1
            counts["bytes_before"] += len(record)
            counts["bytes_after"] += len(smaller)
            yield smaller

    write_shard(shard.copy, smaller_records())
    return counts


def _reencode_record(record: bytes, image_key: str, shrinking: Shrinking) -> tuple[str, bytes]:
    """What happened to the image ("shrunk", "copied" or "unreadable"), and the new record."""
    example = tf_example_pb2.Example.FromString(record)
    image = example.features.feature[image_key].bytes_list.value
    try:
        smaller = shrinking(image[0])
    except BadImage:
        return "unreadable", record
    if smaller is None:
        return "copied", record
    image[0] = smaller
    return "shrunk", example.SerializeToString()


def _read_counts(folder: epath.Path, shrinking: Shrinking) -> dict[str, dict[str, int]]:
    """The recorded counts of each shard that a copy already has.

    Raises:
      UserError: the copy was begun with other settings, or the record is damaged.
    """
    path = folder / PROVENANCE
    if not path.exists():
        return {}
    try:
        provenance = json.loads(path.read_text())
        begun, shards = Shrinking(**provenance["settings"]), dict(provenance["shards"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); remove {folder} and make the copy again") from e
    if begun != shrinking:
        raise UserError(
            f"the copy in {folder} was begun with --max_side={begun.max_side} "
            f"--quality={begun.quality}; give the same, or --copy_to another folder"
        )
    return shards


def _write_counts(
    folder: epath.Path, shrinking: Shrinking, counts: dict[str, dict[str, int]]
) -> None:
    settings = dataclasses.asdict(shrinking)
    write_json(folder / PROVENANCE, {"settings": settings, "shards": counts})


def _write_info(folder: epath.Path, info: tfds.core.DatasetInfo, sizes: Counter[str]) -> None:
    """Writes what TFDS needs to open the folder as ArrayRecord with splits of those sizes."""
    info.write_to_directory(folder)
    proto = copy.deepcopy(info.as_proto)
    proto.file_format = ARRAY_RECORD.value
    proto.ClearField("alternative_file_formats")
    for split in proto.splits:
        split.num_bytes = sizes[split.name]
    dataset_info.write_dataset_info_proto(proto, dataset_info_dir=folder)


def _print_totals(counts: dict[str, dict[str, int]]) -> None:
    total = Counter[str]()
    for of_shard in counts.values():
        total.update(of_shard)
    print(
        f"Images: {total['shrunk']:,} shrunk, {total['copied']:,} copied, "
        f"{total['unreadable']:,} unreadable and copied too; "
        f"{total['bytes_before']:,} bytes became {total['bytes_after']:,}"
    )
