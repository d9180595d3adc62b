"""Prepares a TFDS data set as ArrayRecord, which training reads at random.

python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
python -m sret_jax.tools.prepare cifar10
python -m sret_jax.tools.prepare imagenet2012 --convert    (an existing TFRecord preparation)
python -m sret_jax.tools.prepare imagenet2012 --max_side=512 --copy_to=DIR    (a smaller copy)

Every data set except the digits needs TensorFlow: pip install -r requirements-prepare.txt

After an interruption, give the same command again: a preparation starts over, a conversion or copy
continues with the missing shards.
"""

import argparse
import re
import tarfile

import tensorflow_datasets as tfds
from etils import epath

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.data.sources.downloads import clear_downloads
from sret_jax.data.sources.reencode import (
    ARRAY_RECORD,
    DEFAULT_QUALITY,
    INCOMPLETE,
    Shrinking,
    check_tensorflow,
    read_records,
    reencode,
    shard_paths,
    write_shard,
)
from sret_jax.data.sources.source import find_builder, is_folder
from sret_jax.errors import UserError, few
from sret_jax.terminal import Progress

ARCHIVES = {  # name: published size in bytes
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}
MEGABYTE = 1_000_000
TRAIN_MEMBER = re.compile(r"n\d{8}\.tar")
VALIDATION_MEMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("prepare", __doc__)
    parser.add_argument("name", help="name of the TFDS data set")
    parser.add_argument(
        "--data_dir", type=path_argument, help="default: TFDS_DATA_DIR, or TFDS's own"
    )
    parser.add_argument("--archives", type=path_argument, help="folder of archives you downloaded")
    parser.add_argument("--convert", action="store_true", help="rewrite TFRecord as ArrayRecord")
    parser.add_argument(
        "--max-side", "--max_side", type=int, help="make a copy with no image longer, in pixels"
    )
    parser.add_argument("--quality", type=int, help=f"JPEG quality; default: {DEFAULT_QUALITY}")
    parser.add_argument("--copy_to", type=path_argument, help="data_dir of the copy")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        shrinking = _shrinking(args)
        check_is_no_folder(args.name)
        builder = find_builder(args.name, args.data_dir)
        ready = builder.is_prepared() and ARRAY_RECORD in builder.info.available_file_formats()
        if shrinking:
            builder = reencode(builder, args.copy_to, shrinking)
        elif args.convert and not ready:
            convert(builder)
        elif not ready:
            prepare(builder, args.archives)
        state = "Already there" if ready and not shrinking else "Ready"
        splits = builder.info.splits.values()
        counts = ", ".join(f"{split.num_examples:,} in {split.name}" for split in splits)
        print(f"{state}: {builder.info.full_name} in {builder.data_dir}; examples: {counts}")


def check_is_no_folder(name: str) -> None:
    """Checks that a data set is not a folder of images, which needs no preparation.

    Raises:
      UserError: it is a folder.
    """
    known = name in tfds.list_builders(with_community_datasets=False)
    if is_folder(name) or (not known and epath.Path(name).is_dir()):
        path = name if is_folder(name) else f"./{name}"
        raise UserError(
            f"{name} is a folder, and folders need no preparing; train on it with "
            f"--config.data.name={path}"
        )


def prepare(builder: tfds.core.DatasetBuilder, archives: epath.Path | None) -> None:
    """Downloads a data set or reads its archives, and writes ArrayRecord.

    Raises:
      UserError: archives are missing or wrong, a download failed, or the data set is already
        prepared in another format.
    """
    if builder.is_prepared():
        raise UserError(
            f"{builder.name} is prepared in {builder.data_dir} as "
            f"{builder.info.file_format.value}, which has no random access; add --convert"
        )
    if builder.name == "imagenet2012":
        check_imagenet_archives(archives)
    elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS and archives is None:
        raise UserError(
            f"{builder.name} needs archives you download yourself; give --archives=DIR. "
            + " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        )
    if builder.name != "digits":
        check_tensorflow(f"preparing {builder.name}")
    _remove_leftovers(builder)
    download = tfds.download.DownloadConfig(manual_dir=archives, try_download_gcs=False)
    try:
        with clear_downloads(builder):
            builder.download_and_prepare(download_config=download)
    except tarfile.TarError as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"an archive of {builder.name} is damaged inside ({reason}); download it again"
        ) from e


def check_imagenet_archives(archives: epath.Path | None) -> None:
    """Checks the two ILSVRC 2012 archives; warns of an unexpected size.

    TFDS labels the sorted validation files by their position. A wrong, missing or additional name
    would shift every label after it.

    Raises:
      UserError: an archive is missing or unreadable, or contains other names than the published.
    """
    if archives is None:
        raise UserError(
            f"imagenet2012 needs --archives=DIR with {' and '.join(ARCHIVES)}, from image-net.org"
        )
    for name, size in ARCHIVES.items():
        path = archives / name
        if not path.exists():
            raise UserError(f"{path} is missing; put {' and '.join(ARCHIVES)} in {archives}")
        if path.stat().length != size:
            print(f"Warning: {path} has {path.stat().length:,} bytes, expected {size:,}.")
    train, validation = (archives / name for name in ARCHIVES)
    strange = [n for n in _member_names(train) if not TRAIN_MEMBER.fullmatch(n)]
    if strange:
        raise UserError(
            f"{train} holds {few(strange, 3)}, expected n########.tar only; use the published file"
        )
    names = sorted(_member_names(validation))
    strange = [n for n in names if not VALIDATION_MEMBER.fullmatch(n)]
    if strange:
        raise UserError(
            f"{validation} holds {few(strange, 3)}, expected ILSVRC2012_val_########.JPEG only; "
            "use the published flat file; otherwise every label would shift"
        )
    for rank, name in enumerate(names, start=1):
        if int(name[len("ILSVRC2012_val_") : -len(".JPEG")]) != rank:
            raise UserError(
                f"{validation} holds {name} where number {rank:08d} should be; use the complete "
                "file; otherwise every later label would shift"
            )


def convert(builder: tfds.core.DatasetBuilder) -> None:
    """Writes an ArrayRecord copy of every TFRecord shard beside it, and registers the format.

    Records are copied unchanged. Shards written by an interrupted conversion are kept.

    Raises:
      UserError: there is no preparation to convert.
    """
    if not builder.is_prepared():
        raise UserError(
            f"{builder.name} is not prepared in {builder.data_dir}, so there is nothing to "
            "convert; leave out --convert"
        )
    check_tensorflow(f"reading {builder.info.file_format.value}")
    shards = [
        (old, new)
        for split in builder.info.splits.values()
        for old, new in zip(
            shard_paths(split, builder.info.file_format, builder.data_path),
            shard_paths(split, ARRAY_RECORD, builder.data_path),
            strict=True,
        )
    ]
    there = sum(new.exists() for _, new in shards)
    with Progress("Converting", len(shards), "shards", done=there) as progress:
        for old, new in shards:
            if not new.exists():
                write_shard(new, read_records(old, builder.info.file_format))
                progress.add(1)
    builder.info.add_alternative_file_format(ARRAY_RECORD)
    builder.info.write_to_directory(builder.data_dir)


def _shrinking(args: argparse.Namespace) -> Shrinking | None:
    """How the images of a copy are shrunk; None if no copy is requested."""
    if args.max_side is None:
        if args.quality is not None or args.copy_to is not None:
            raise UserError(
                "--quality and --copy_to belong to a smaller copy; add --max_side=PIXELS"
            )
        return None
    if args.convert:
        raise UserError("--convert and --max_side exclude each other; a copy is converted anyway")
    if args.copy_to is None:
        raise UserError("--max_side stores a smaller copy; add --copy_to=DIR")
    return Shrinking(args.max_side, DEFAULT_QUALITY if args.quality is None else args.quality)


def _member_names(path: epath.Path) -> list[str]:
    members = []
    size = path.stat().length
    try:
        with (
            path.open("rb") as f,
            tarfile.open(fileobj=f, mode="r:") as tar,
            Progress(f"Checking {path.name}", size // MEGABYTE, "MB") as progress,
        ):
            for member in tar:
                members.append(member)
                progress.add(tar.offset // MEGABYTE - member.offset // MEGABYTE)
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"{path} is not a readable tar archive ({e}); download it again") from e
    special = [m.name for m in members if not m.isreg() or m.issparse()]
    if special:
        raise UserError(
            f"{path} holds {few(special, 3)}, expected plain files only; use the published file"
        )
    return [member.name for member in members]


def _remove_leftovers(builder: tfds.core.DatasetBuilder) -> None:
    """Removes the files of an interrupted preparation."""
    folder = builder.data_path.parent
    if folder.exists():
        for leftover in folder.glob(f"{INCOMPLETE}*_{builder.data_path.name}"):
            leftover.rmtree()


if __name__ == "__main__":
    main()
