"""Converts weights between published PyTorch files and checkpoint folders, in both directions.

python -m sret_jax.tools.convert SReT_S.pth converted/
python -m sret_jax.tools.convert SReT_T_wo_slice.pth converted/ --unsliced
python -m sret_jax.tools.convert runs/quickstart digits.safetensors
python -m sret_jax.tools.convert hf://timm/deit_tiny_patch16_224.fb_in1k converted/
python -m sret_jax.tools.convert RUN/checkpoints/best FOLDER --hf

The README of github.com/szq0214/SReT links the published PyTorch files; hf://OWNER/NAME is a
repository of the Hugging Face hub, such as timm's. The result contains a description of its model,
its classes and its evaluation view. With --hf it is a folder for the hub: model.safetensors,
config.json, and README.md with the run's results.
"""

import re
from typing import Any

from etils import epath

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries, weights_argument
from sret_jax.errors import UserError
from sret_jax.models.registry import list_models, title
from sret_jax.tools.hub_folder import write_hub_folder
from sret_jax.weights.description import Description
from sret_jax.weights.loading import StoredFolder, find
from sret_jax.weights.packaged import packaged_names
from sret_jax.weights.weight_files import SUFFIXES
from sret_jax.weights.writing import check_free, is_weight_file, write_weights


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("convert", __doc__)
    parser.add_argument(
        "source",
        metavar="IN",
        type=weights_argument,
        help="a weight file, a folder, hf://OWNER/NAME on the Hugging Face hub, or a name: "
        + ", ".join(packaged_names()),
    )
    parser.add_argument(
        "target",
        metavar="OUT",
        type=path_argument,
        help="the other kind: a folder or a weight file",
    )
    parser.add_argument(
        "--model", help=f"one of {', '.join(list_models())}; default: found from what IN holds"
    )
    parser.add_argument(
        "--hf", action="store_true", help="OUT is a new folder to upload to the Hugging Face hub"
    )
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument(
        "--unsliced", action="store_true", help="published weights trained without slices"
    )
    groups.add_argument(
        "--groups",
        metavar="16-14-1",
        help="attention groups per stage, in the first loop of a block",
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        check_free(args.target)
        settings = _groups(args.groups, args.unsliced)
        if args.hf:
            stored = find(args.source, ema=args.ema)
            name = write_hub_folder(stored, args.target, args.model, **settings)
        else:
            name = convert(args.source, args.target, args.model, ema=args.ema, **settings)
    print(f"Written: {args.target} ({name})")
    if args.hf:
        print(
            f"Choose a license in {args.target / 'README.md'}; then "
            f"`hf upload OWNER/NAME {args.target}` puts it on the hub."
        )


def convert(
    source: epath.Path, target: epath.Path, name: str | None, *, ema: bool = False, **settings: Any
) -> str:
    """Writes a weight file, if `target` ends like one, or otherwise a checkpoint folder.

    Args:
      source: a path that `sret_jax.load` reads.
      target: the file or folder to write; it must not exist.
      name: name of the published variant; default: found from what `source` contains.
      ema: converts the moving average of the weights instead of the raw weights.
      **settings: model settings that `source` does not contain, or that replace its own.

    Returns:
      A name for the model; see `title`.

    Raises:
      UserError: `sret_jax.load` raises it, or the storage is full.
    """
    stored = find(source, ema=ema)
    if not is_weight_file(target) and isinstance(stored, StoredFolder):
        raise UserError(
            f"cannot convert {source} to {target}: one must be a weight file, and a file's name is "
            f"to end in {', '.join(SUFFIXES)}"
        )
    model, variables = stored.load(name, **settings)
    variant = name or stored.variant(model)
    description = Description.of(model, variant, stored.class_names, stored.test_crop)
    write_weights(target, model, variables, description, stored.origin)
    return title(model, variant)


def _groups(text: str | None, unsliced: bool) -> dict[str, Any]:
    """The setting that "16-14-1" means: groups in the first loop, plain attention in all others.

    Raises:
      UserError: the text is not such a list.
    """
    if text is None:
        return {"groups": None} if unsliced else {}
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})*", text):
        raise UserError(f"--groups={text} should read like --groups=16-14-1")
    return {"groups": tuple((int(g), 1) for g in text.split("-"))}


if __name__ == "__main__":
    main()
