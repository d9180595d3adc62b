"""Classifies images: prints the five most probable classes of each, with their probabilities.

python -m sret_jax.tools.predict --checkpoint=RUN photo.jpg other.png
python -m sret_jax.tools.predict --checkpoint=RUN FOLDER --json=FILE --csv=FILE --sheet=FILE.png
python -m sret_jax.tools.predict --checkpoint=RUN FOLDER --exit=entropy:0.4

Folders are searched with their subfolders; files that are not images are counted by suffix. Images
are preprocessed as in the run's evaluation. If some cannot be read, they are listed, the others are
predicted, and the exit status is 2. With --exit, each image leaves the model's last block after its
own number of loops.
"""

import contextlib
import csv
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.data.sources.image_files import IMAGE_SUFFIXES, images_in, name_of_file, passed_over
from sret_jax.errors import UserError, few
from sret_jax.evaluation.predict import UnreadableImage, predict_each
from sret_jax.files import check_storage, written_whole
from sret_jax.models.flops import exit_macs, model_macs
from sret_jax.models.model import Model
from sret_jax.tools.prediction_sheet import MOST_PICTURES, draw_sheet
from sret_jax.tools.trained import (
    Trained,
    add_arguments,
    add_exit_argument,
    exit_rule,
    open_trained,
)

TOP = 5

# {"image": PATH} and either "top": [{"label", "class", "probability"}, ...] or "error": REASON.
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("predict", __doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file or a folder of them")
    add_arguments(parser)
    parser.add_argument(
        "--json", type=path_argument, metavar="FILE", help="a list, one image per line"
    )
    parser.add_argument(
        "--csv", type=path_argument, metavar="FILE", help="a table, one image per line"
    )
    parser.add_argument(
        "--sheet",
        type=path_argument,
        metavar="FILE",
        help=f"a PNG of the first {MOST_PICTURES} images and their classes",
    )
    add_exit_argument(parser)
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors(), contextlib.ExitStack() as files:
        paths = find_images(args.images)
        trained = open_trained(args)
        exit_rule(args, trained.model)  # its errors appear before files are opened
        loops: list[int] = []
        writers: list[Callable[[Row], None]] = [print_row, lambda row: loops.extend(loops_of(row))]
        if args.json:
            writers.append(files.enter_context(json_writer(args.json)))
        if args.csv:
            table = csv_writer(args.csv, with_loops=bool(args.exit))
            writers.append(files.enter_context(table))
        first, unreadable = predict_files(trained, paths, writers, args.exit)
        files.close()
        if loops:
            print(cost_of(loops, trained.model))
        if args.sheet:
            draw_sheet(trained, first, args.sheet)
        for file in filter(None, (args.json, args.csv, args.sheet)):
            print(f"Written: {file}")
        if unreadable:
            raise UserError(
                f"{len(unreadable):,} of {len(paths):,} images cannot be read: {few(unreadable)}; "
                "fix or remove them"
            )


def find_images(names: list[str]) -> list[str]:
    """The files among `names`, and the images in the folders among them.

    Raises:
      UserError: a path does not exist, or a folder contains no images.
    """
    paths = []
    for name in names:
        check_storage(name)
        place = epath.Path(name).expanduser()
        if not place.is_dir():
            if not place.exists():
                raise UserError(f"there is no image or folder {name}; correct the path")
            paths.append(str(place))
            continue
        images = images_in(place)
        if images.passed_over:
            print(f"{name}: {passed_over(images)}", flush=True)
        if not images.files:
            raise UserError(
                f"{name} holds no images ({', '.join(IMAGE_SUFFIXES)}); give a folder of images"
            )
        paths += images.files
    return paths


def predict_files(
    trained: Trained, paths: list[str], writers: list[Callable[[Row], None]], exit: str | None
) -> tuple[list[Row], list[str]]:
    """Passes the prediction for each image to every writer; see `predict` for `exit`.

    Returns:
      The first rows, as many as a sheet can show, and "PATH (REASON)" for each unreadable image.
    """
    first: list[Row] = []
    unreadable: list[str] = []
    found = predict_each(
        trained.model, trained.variables, paths, test_crop=trained.test_crop, exit=exit
    )
    for path, prediction in zip(paths, found, strict=True):
        row: Row = {"image": name_of_file(path)}
        if isinstance(prediction, UnreadableImage):
            row["error"] = prediction.reason
            unreadable.append(f"{row['image']} ({prediction.reason})")
        else:
            row |= {"loops": prediction.loops} if exit else {}
            row["top"] = top_classes(prediction.probabilities, trained.classes)
            if len(first) < MOST_PICTURES:
                first.append(row | {"path": path})
        for write in writers:
            write(row)
    return first, unreadable


def top_classes(probabilities: np.ndarray, classes: list[str]) -> list[dict[str, Any]]:
    """The most probable classes, TOP at most, in descending order."""
    best = np.argsort(-probabilities, kind="stable")[:TOP]
    return [
        {"label": int(i), "class": classes[i], "probability": float(probabilities[i])} for i in best
    ]


def print_row(row: Row) -> None:
    """Prints a row: "PATH: 98.1% cat, 1.2% dog, ... (after 2 loops)"."""
    shown = row.get("error") or ", ".join(
        f"{100 * one['probability']:.1f}% {one['class']}" for one in row["top"]
    )
    after = "".join(f" (after {n} loop{'s' * (n > 1)})" for n in loops_of(row))
    print(f"{row['image']}: {shown}{after}", flush=True)


def loops_of(row: Row) -> list[int]:
    """The number of loops in a row, if it says one."""
    return [row["loops"]] if "loops" in row else []


def cost_of(loops: list[int], model: Model) -> str:
    """A sentence on the mean number of loops, and their cost.

    Args:
      loops: the number of each image.
      model: the model that they left early.
    """
    macs = exit_macs(model)
    mean = statistics.mean(macs[number - 1] for number in loops)
    return (
        f"Images left after {statistics.mean(loops):.2f} of {model.loops} loops on average, at "
        f"{mean / 1e9:.3g} of {model_macs(model) / 1e9:.3g} GMACs. (A batch is computed "
        "until its last image has left.)"
    )


@contextlib.contextmanager
def json_writer(path: epath.Path) -> Iterator[Callable[[Row], None]]:
    """Writes rows as a JSON list, one row per line."""
    with written_whole(path) as file:
        separators = itertools.chain(["[\n"], itertools.repeat(",\n"))

        def write(row: Row) -> None:
            file.write(next(separators) + json.dumps(row, ensure_ascii=False))

        yield write
        file.write("\n]\n")


@contextlib.contextmanager
def csv_writer(path: epath.Path, *, with_loops: bool) -> Iterator[Callable[[Row], None]]:
    """Writes rows as CSV: image, class_1, probability_1, ..., class_5, probability_5, error."""
    ranks = [f"{what}_{rank}" for rank in range(1, TOP + 1) for what in ("class", "probability")]
    columns = ["image", *ranks, *(["loops"] if with_loops else []), "error"]
    with written_whole(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()

        def write(row: Row) -> None:
            cells: Row = {key: row[key] for key in ("image", "loops", "error") if key in row}
            for rank, one in enumerate(row.get("top", []), start=1):
                cells[f"class_{rank}"] = one["class"]
                cells[f"probability_{rank}"] = f"{one['probability']:.6g}"
            writer.writerow(cells)

        yield write


if __name__ == "__main__":
    main()
