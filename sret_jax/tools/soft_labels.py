r"""Stores a teacher's soft labels of crops of every training image (Fast Knowledge Distillation).

python -m sret_jax.tools.soft_labels generate --config=sret_lt:fkd --teacher=RUN \
  --crops=500 --keep=topk5 --out=DIR
python -m sret_jax.tools.soft_labels generate ... --teacher=onnx:model.onnx
python -m sret_jax.tools.soft_labels generate ... --shards=8 --shard=0    (one of eight hosts)
python -m sret_jax.tools.soft_labels import FOLDER --config=sret_lt:fkd --out=DIR
python -m sret_jax.tools.soft_labels inspect DIR
python -m sret_jax.tools.soft_labels verify DIR --config=sret_lt:fkd

Then: python main.py --config=sret_lt:fkd --config.data.soft_labels=DIR

After an interruption, give the same command again; it continues with the missing shards. `import`
reads the labels that FKD published, one torch file per image.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from absl import flags
from etils import epath

from sret_jax.cli import (
    CONFIG_FLAGS,
    Parser,
    clear_errors,
    define_config,
    parse_flags,
    path_argument,
    quiet_libraries,
)
from sret_jax.data.loader import train_transform
from sret_jax.data.sources.source import Source
from sret_jax.data.sources.splits import open_split
from sret_jax.distillation.fkd_files import FkdFolder
from sret_jax.distillation.label_generation import generate, verify
from sret_jax.distillation.label_manifest import CropLaw, Manifest, TeacherFacts, kept_classes
from sret_jax.distillation.label_teachers import (
    LAYOUTS,
    ONNX,
    CheckpointTeacher,
    LabelTeacher,
    OnnxTeacher,
)
from sret_jax.distillation.label_writing import pack, write_store
from sret_jax.distillation.soft_labels import finished_shards, open_soft_labels, read_manifest
from sret_jax.distillation.stored_labels import check_same_data, crop_law, data_facts
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.models.model import IMAGENET_MEAN, IMAGENET_STD
from sret_jax.run.launch import default_workdir
from sret_jax.training.checks import check_numbers
from sret_jax.training.experiment import make_label_loss


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("soft_labels", __doc__)
    what = parser.add_subparsers(dest="what", required=True)
    generating = what.add_parser("generate", help="label", epilog=CONFIG_FLAGS)
    generating.add_argument("--teacher", required=True, help=f"a run, a file, or {ONNX}FILE")
    generating.add_argument("--crops", type=int, required=True, help="crops per image")
    generating.add_argument("--keep", required=True, help="topk5, topk10 or full")
    _add_teacher_flags(generating)
    _add_store_flags(generating)
    generating.set_defaults(run=run_generate)
    importing = what.add_parser("import", help="FKD's", epilog=CONFIG_FLAGS)
    importing.add_argument("folder", type=path_argument, help="folder of FKD's torch files")
    _add_store_flags(importing)
    importing.set_defaults(run=run_import)
    inspecting = what.add_parser("inspect", help="describe a store")
    inspecting.add_argument("store", type=path_argument)
    inspecting.set_defaults(run=run_inspect)
    verifying = what.add_parser("verify", help="label some images again", epilog=CONFIG_FLAGS)
    verifying.add_argument("store", type=path_argument)
    verifying.add_argument("--teacher", help="default: the path recorded in the store")
    verifying.add_argument("--images", type=int, default=64, help="number of images to label")
    _add_teacher_flags(verifying)
    verifying.set_defaults(run=run_verify)
    args, rest = parser.parse_known_args(argv)
    quiet_libraries()
    with clear_errors():
        args.run(parser, args, rest)


def run_generate(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Labels the images whose shards are missing."""
    config, source = _open(parser, rest)
    if args.crops < 1:
        raise UserError(f"--crops={args.crops} must be at least 1")
    kept_classes(args.keep, len(source.class_names))
    transform = train_transform(config.augment, config.model.image_size)
    teacher = _teacher(args.teacher, args, config, source)
    begun = read_manifest(args.out)
    fingerprint = _fingerprint(teacher, begun.teacher.fingerprint if begun else None, args.out)
    manifest = Manifest(
        data=data_facts(config, source),
        teacher=TeacherFacts(args.teacher, fingerprint, teacher.image_size),
        law=crop_law(config),
        temperature=config.distill.temperature,
        keep=args.keep,
        crops=args.crops,
    )
    generate(source, transform, teacher, manifest, args.out, hosts=args.shards, host=args.shard)
    _print_outcome(args.out)


def run_import(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Imports published labels."""
    config, source = _open(parser, rest)
    folder = FkdFolder(args.folder, source)
    first = folder[0]
    manifest = Manifest(
        data=data_facts(config, source),
        teacher=TeacherFacts(str(args.folder), None, None),
        law=CropLaw(config.model.image_size),
        temperature=config.distill.temperature,
        keep=first.keep,
        crops=len(first.crops),
    )

    def records(numbers: range) -> Iterator[bytes]:
        for number in numbers:
            labels = folder[number]
            if (labels.keep, len(labels.crops)) != (manifest.keep, manifest.crops):
                raise UserError(
                    f"the labels of {source.record_name(number)} are {labels.keep} of "
                    f"{len(labels.crops)} crops, those of the first image {manifest.keep} of "
                    f"{manifest.crops}; import files that are alike"
                )
            yield pack(manifest, labels.crops, labels.soft, labels.classes)

    write_store(args.out, manifest, records, hosts=args.shards, host=args.shard)
    _print_outcome(args.out)


def run_inspect(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Describes a store, complete or not."""
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    manifest = read_manifest(args.store)
    if manifest is None:
        raise UserError(f"{args.store} holds no soft labels; give the --out of a generate")
    sizes = finished_shards(args.store, manifest)
    images = sum(len(manifest.shard_range(shard)) for shard in sizes)
    data, teacher, law = manifest.data, manifest.teacher, manifest.law
    complete = "complete" if manifest.shard_bytes else "not complete, not to be trained on yet"
    rows = {
        "data set": f"{data.name} {data.split}, {data.examples:,} images, {data.classes:,} classes",
        "coverage": f"{images:,} images ({images / data.examples:.1%}), {len(sizes):,} of "
        f"{manifest.shards:,} shards; {complete}",
        "crops": f"{manifest.crops} per image, at {law.image_size} pixels",
        "law": f"crop_scale {law.crop_scale}, crop_ratio {law.crop_ratio}, flip {law.flip}, "
        f"seed {law.seed}"
        if law.crop_scale
        else "imported",
        "keep": f"{manifest.keep}, temperature {manifest.temperature}",
        "teacher": f"{teacher.path}, {_size(teacher.image_size)}",
        "bytes": f"{sum(sizes.values()):,}, {manifest.crops * manifest.layout.itemsize:,} an image",
    }
    for title, text in rows.items():
        print(f"{title:9} {text}")


def run_verify(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Compares a store with its teacher and with the true classes."""
    if args.images < 1:
        raise UserError(f"--images={args.images} must be at least 1")
    labels = open_soft_labels(args.store)
    config, source = _open(parser, rest)
    check_same_data(labels, source, config)
    made = labels.manifest.teacher
    path = args.teacher or (made.path if made.fingerprint else None)
    teacher = None
    if path:
        config.distill.temperature = labels.manifest.temperature
        teacher = _teacher(path, args, config, source)
        if made.fingerprint not in (None, _fingerprint(teacher, made.fingerprint, args.store)):
            raise UserError(
                f"{path} is not the teacher of {args.store}, or is used differently (its weights, "
                "settings, size or preprocessing differ); give --teacher and its flags as before"
            )
    found = verify(labels, source, teacher, args.images)
    print(f"Compared {found['crops']:,} crops of {found['images']:,} images.")
    if teacher:
        print(f"Largest difference of a probability: {found['difference']:.2g}")
    print(f"The teacher's best class is the true one: {found['accuracy']:.2%} of crops")


def _add_store_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=path_argument, required=True, help="folder of the store")
    parser.add_argument("--shards", type=int, default=1, help="hosts that share the work")
    parser.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")


def _add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    onnx = parser.add_argument_group(f"for a teacher {ONNX}FILE")
    onnx.add_argument("--teacher_size", type=int, help="image size in pixels; default: the file's")
    for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        onnx.add_argument(
            f"--teacher_{name}",
            type=_three_numbers,
            default=default,
            metavar="R,G,B",
            help=f"its input is (x / 255 - mean) / std; default: {','.join(map(str, default))}",
        )
    onnx.add_argument("--teacher_layout", choices=LAYOUTS, default="NCHW")
    onnx.add_argument("--teacher_output", choices=("logits", "probabilities"), default="logits")


def _three_numbers(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != 3:
        raise ValueError(text)
    return numbers


def _open(parser: argparse.ArgumentParser, rest: list[str]) -> tuple[Any, Source]:
    """The config in `rest`, and its training images."""
    parse_flags(define_config, [parser.prog, *rest])
    config = flags.FLAGS.config
    check_numbers(config)
    make_label_loss(config)  # checks the temperature
    config_flag: Any = flags.FLAGS["config"]
    workdir = absolute(default_workdir(config_flag.config_filename))
    source = open_split(config, workdir, config.data.train_split)
    for remark in source.remarks:
        print(remark, flush=True)
    return config, source


def _teacher(path: str, args: argparse.Namespace, config: Any, source: Source) -> LabelTeacher:
    classes = len(source.class_names)
    if not path.startswith(ONNX):
        return CheckpointTeacher(path, config, source.class_names)
    return OnnxTeacher(
        epath.Path(path.removeprefix(ONNX)).expanduser(),
        classes,
        size=args.teacher_size,
        mean=args.teacher_mean,
        std=args.teacher_std,
        layout=args.teacher_layout,
        probabilities=args.teacher_output == "probabilities",
        temperature=config.distill.temperature,
    )


def _fingerprint(teacher: LabelTeacher, made: str | None, store: epath.Path) -> str:
    """The teacher's fingerprint; for an older store, in the form that was used then."""
    if isinstance(teacher, CheckpointTeacher) and made in teacher.earlier_fingerprints:
        print(
            f"The fingerprint of the teacher in {store} has an older form, which does not include "
            "all of family, heads, dim, nll_every and permutation; they are assumed to be this "
            "teacher's."
        )
        return made
    return teacher.fingerprint


def _print_outcome(folder: epath.Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    if manifest.shard_bytes:
        print(f"Complete: {folder}, {sum(manifest.shard_bytes):,} bytes")
    else:
        there = len(finished_shards(folder, manifest))
        print(
            f"This host's shards are in {folder}; {there} of {manifest.shards} are there, and the "
            "other hosts' are still to come."
        )


def _size(image_size: int | None) -> str:
    return f"at {image_size} pixels" if image_size else "imported labels"


if __name__ == "__main__":
    main()
