"""Draws loss, accuracy and learning rate of a run over its steps."""

from etils import epath

from sret_jax.picture import picture
from sret_jax.run.metrics_file import read_metrics

CURVES_FILE = "curves.png"
CAPTION = (
    "The training curves are measured on augmented images. The training loss includes label "
    "smoothing and a teacher's labels where the config has them; the test loss does not."
)


def draw_curves(workdir: epath.Path) -> epath.Path:
    """Draws the workdir's metrics.jsonl to curves.png and returns its path."""
    lines = read_metrics(workdir)
    path = workdir / CURVES_FILE
    with picture(path, 12, 3.6) as figure:
        losses, accuracies, rates = figure.subplots(1, 3)
        panels = (
            (
                losses,
                {"loss": "train", "eval/loss": "test", "eval_ema/loss": "test, EMA"},
                1,
            ),
            (
                accuracies,
                {"top1": "train", "eval/top1": "test", "eval_ema/top1": "test, EMA"},
                100,
            ),
            (rates, {"lr": "learning rate"}, 1),
        )
        for axes, names, scale in panels:
            for name, label in names.items():
                points = [(line["step"], scale * line[name]) for line in lines if name in line]
                if points:
                    axes.plot(*zip(*points, strict=True), label=label, marker=".", markersize=3)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(frameon=False)
        losses.set_title("loss (nats)")
        accuracies.set_title("top-1 (%)")
        rates.set_title("learning rate")
        figure.supxlabel(CAPTION, fontsize="small")
    return path
