"""Exports a trained model as StableHLO, which runs without this package, on CPU, GPU and TPU.

python -m sret_jax.tools.export --checkpoint=RUN OUT
python OUT/run.py photo.jpg

OUT contains model.stablehlo (with the weights), labels.json, preprocess.json, README.md, run.py and
requirements.txt, which lists the packages that run it.
The model maps uint8 RGB images (B, S, S, 3), for any B, to float32 logits (B, classes). With
--exit=RULE each image leaves the last block after its own number of loops, which the model gives as
well: int32 (B,). The program stops applying the block when all images of the batch have left.
"""

import importlib.metadata
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax import export

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.data.views.images import EvalTransform
from sret_jax.errors import UserError
from sret_jax.files import write_json, write_text
from sret_jax.models.apply import evaluation_logits, exited_logits, normalise
from sret_jax.models.halting import ExitRule
from sret_jax.models.registry import title
from sret_jax.tools import exported
from sret_jax.tools.trained import (
    Trained,
    add_arguments,
    add_exit_argument,
    exit_rule,
    open_trained,
)

PLATFORMS = ("cpu", "cuda", "tpu")
MODEL, LABELS, PREPROCESS = "model.stablehlo", "labels.json", "preprocess.json"
REQUIREMENTS = "requirements.txt"

README = """\
# An exported image classifier: {title}

`{model}` was written by `jax.export` {jax} for {platforms}. It maps uint8 RGB images
({batch}, {size}, {size}, 3), for any {batch}, to {output}, and
normalises the images itself. `{preprocess}` describes how an image is resized to that size.
`{labels}` lists the class of each logit.

    pip install -r {requirements}
    python run.py IMAGE...

It needs Python {python}. `{requirements}` contains the version of jax that wrote the model, which
can certainly read it. For a GPU or TPU, also install jax[cuda13], jax[cuda12] or jax[tpu] of that
version. JAX promises that releases of the following six months can read the model too. An older
release may not; `run.py` then says so.
"""

REQUIREMENTS_TEXT = """\
jax=={jax}
flatbuffers>=24.3.25
numpy>=2.0,<3
pillow>=11
"""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("export", __doc__)
    parser.add_argument("target", metavar="OUT", type=path_argument, help="a new folder")
    add_arguments(parser)
    add_exit_argument(parser)
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        if args.target.exists():
            raise UserError(f"{args.target} exists already; give another OUT or remove it")
        trained = open_trained(args)
        write_export(trained, args.target, exit_rule(args, trained.model))
    print(f"Written: {args.target} ({title(trained.model, trained.variant)})")


def write_export(trained: Trained, folder: epath.Path, rule: ExitRule | None = None) -> None:
    """Writes the model and all that its users need; the folder appears only when it is complete.

    Args:
      trained: the model.
      folder: a new folder.
      rule: when an image leaves the last block; None: after all loops.

    Raises:
      UserError: the folder cannot be written.
    """
    program = export_model(trained.model, trained.variables, rule)
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        (temporary / MODEL).write_bytes(program.serialize())
        write_json(temporary / LABELS, trained.classes)
        write_json(temporary / PREPROCESS, preprocessing(trained, rule))
        write_text(temporary / REQUIREMENTS, REQUIREMENTS_TEXT.format(jax=jax.__version__))
        write_text(temporary / "README.md", _readme(trained, rule))
        write_text(temporary / "run.py", pathlib.Path(exported.__file__).read_text("utf-8"))
        temporary.rename(folder)
    except OSError as e:
        raise UserError(f"{folder} cannot be written ({e.strerror or e}); fix the storage") from e


def export_model(
    model: Any, variables: dict[str, Any], rule: ExitRule | None = None
) -> export.Exported:
    """Exports uint8 images (b, S, S, 3), any b -> float32 logits (b, classes), for all platforms.

    With a rule it gives (logits, loops), the loops int32 (b,).

    It contains no fused TPU kernels, because these are compiled for one batch size and do not run
    on older TPUs.
    """
    model = model.clone(attention="xla", mlp="xla")
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, model.image_size, model.image_size, 3), jnp.uint8)

    def function(images: jax.Array) -> Any:
        images = normalise(model, images)
        if rule:
            return exited_logits(model, variables, images, rule)
        return evaluation_logits(model, variables, images)

    return export.export(jax.jit(function), platforms=PLATFORMS)(images)


def preprocessing(trained: Trained, rule: ExitRule | None = None) -> dict[str, Any]:
    """Describes by name what is done to an image before the model and inside it."""
    size = trained.model.image_size
    return {
        "resize_shorter_side": EvalTransform(size, trained.test_crop).shorter_side,
        "resample": "bicubic",
        "center_crop": size,
        "channels": "RGB",
        "layout": "NHWC",
        "dtype": "uint8",
        "inside_the_model": {
            "scale": 1 / 255,
            "mean": trained.model.mean,
            "std": trained.model.std,
        },
        "output": "logits" if rule is None else "(logits, loops)",
    }


def _readme(trained: Trained, rule: ExitRule | None) -> str:
    logits = f"float32 logits (b, {trained.model.num_classes})"
    loops = (
        f"and the number of loops of each image, int32 (b,), which leaves the last block by the "
        f"rule {rule}"
    )
    return README.format(
        title=title(trained.model, trained.variant),
        model=MODEL,
        labels=LABELS,
        preprocess=PREPROCESS,
        requirements=REQUIREMENTS,
        jax=jax.__version__,
        python=importlib.metadata.metadata("jax")["Requires-Python"].replace(">=", "")
        + " or newer",
        platforms=", ".join(PLATFORMS),
        batch="b",
        size=trained.model.image_size,
        output=f"{logits} {loops}" if rule else logits,
    )


if __name__ == "__main__":
    main()
