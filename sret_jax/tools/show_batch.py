"""Draws the images that a model is trained on: the first of a config, augmented and mixed.

python -m sret_jax.tools.show_batch --config=sret_t --config.data.data_dir=DATA

The picture is batch.png in the workdir.
"""

import textwrap
from typing import Any

from absl import flags
from etils import epath

from sret_jax.picture import class_caption, picture

FLAGS = flags.FLAGS
SIDE_INCHES, LABEL_INCHES = 2.1, 0.35  # a label has two lines, and more if names are long
MOST_CHARACTERS = 27  # in a line
LAST_STEP = 2**31 - 1


def define_flags() -> None:
    """Defines the command line."""
    from sret_jax.cli import define_config

    define_config()
    flags.DEFINE_integer("step", 0, "The step whose batch is shown.", 0, LAST_STEP)
    flags.DEFINE_integer("rows", 2, "Rows of pictures.", lower_bound=1)
    flags.DEFINE_integer("columns", 4, "Pictures in a row, an even number.", lower_bound=2)
    flags.DEFINE_string("workdir", None, "Where the picture goes; default: runs/NAME.")


def main(argv: list[str]) -> None:
    """Runs the command after the flags are parsed."""
    del argv
    from sret_jax.cli import clear_errors, quiet_libraries
    from sret_jax.files import absolute
    from sret_jax.run.launch import default_workdir

    quiet_libraries()
    config_flag: Any = FLAGS["config"]
    workdir = absolute(FLAGS.workdir or default_workdir(config_flag.config_filename))
    with clear_errors():
        path = show_batch(FLAGS.config, workdir, FLAGS.step, FLAGS.rows, FLAGS.columns)
    print(f"Written: {path}")


def show_batch(config: Any, workdir: epath.Path, step: int, rows: int, columns: int) -> epath.Path:
    """Draws the first rows x columns images of training step `step` to batch.png.

    Args:
      config: config of the experiment.
      workdir: folder that the picture is written to.
      step: number of the training step.
      rows: rows of the grid.
      columns: columns of the grid; images that are mixed with each other are side by side.

    Raises:
      UserError: training would refuse the config, or the number of columns is odd.
    """
    from sret_jax.errors import UserError

    if config.data.synthetic:
        raise UserError("config.data.synthetic=True has no images to show; leave it out")
    if columns % 2:
        raise UserError(f"--columns={columns} must be even, for images are mixed in pairs")
    count = rows * columns
    if count > config.batch_size:
        raise UserError(
            f"--rows={rows} times --columns={columns} is more than the batch of "
            f"{config.batch_size}; show fewer"
        )
    images, targets, names = _augmented(config, workdir, step, count)
    path = workdir / "batch.png"
    _draw(images, [_label(target, names) for target in targets], columns, path)
    return path


def _augmented(config: Any, workdir: epath.Path, step: int, count: int) -> tuple:
    """The first images of a step and their labels, as the train step sees them; class names."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sret_jax.data.sources.imagenet import display_names
    from sret_jax.data.views.mixing import row_keys
    from sret_jax.training.batches import train_samples
    from sret_jax.training.experiment import open_experiment
    from sret_jax.training.step import examples

    experiment = open_experiment(config, workdir)
    if experiment.teacher:
        print("Above each image is its true label; in training config.teacher labels it.")
    source = experiment.train_source
    samples = train_samples(source, config, config.model.image_size, experiment.soft_labels)
    first = step * config.batch_size
    elements = range(first // samples.rows, -(-(first + count) // samples.rows))
    chunks = [samples.chunks(1)[element] for element in elements]
    batch = {name: jnp.concatenate([c[name] for c in chunks])[:count] for name in chunks[0]}
    batch["key"] = row_keys(config.seed, jnp.asarray(step), config.batch_size)[:count]
    augment, model = jax.jit(examples, static_argnums=(1, 2)), experiment.model
    images, targets = augment(batch, experiment.mixing, model)
    pixels = np.asarray(images) * model.std + np.asarray(model.mean)
    labels = np.asarray(targets.get("soft", targets["hard"]))
    return np.clip(pixels, 0, 1), labels, display_names(source.class_names)


def _label(target: Any, names: list[str]) -> str:
    """Formats a target without the part that smoothing gives all classes: 62% cat, 33% dog."""
    smoothing = 1.01 * target.min() if len(target) > 2 else 0.0
    best = [i for i in target.argsort()[::-1][:2] if target[i] > smoothing]
    shares = [f"{target[i]:.0%} {class_caption(names[i])}" for i in best]
    return "\n".join(textwrap.fill(share, MOST_CHARACTERS) for share in shares)


def _draw(images: Any, labels: list[str], columns: int, path: epath.Path) -> None:
    rows = len(images) // columns
    with picture(path, columns * SIDE_INCHES, rows * (SIDE_INCHES + LABEL_INCHES)) as figure:
        for axes, image, label in zip(
            figure.subplots(rows, columns, squeeze=False).flat, images, labels, strict=True
        ):
            axes.imshow(image)
            axes.set_title(label, fontsize=9, parse_math=False)
            axes.axis("off")


if __name__ == "__main__":
    from sret_jax.cli import CONFIG_FLAGS, run_app

    run_app(main, define_flags, "show_batch", f"{__doc__}\n{CONFIG_FLAGS}")
