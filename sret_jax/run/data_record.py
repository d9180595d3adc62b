"""data.json: a description of a run's images, which shows at the next start if they changed."""

import json
from typing import Any

from etils import epath

from sret_jax.data.sources.source import Source
from sret_jax.data.sources.splits import digest
from sret_jax.files import write_json

DATA_FILE = "data.json"


def record_images(train: Source, test: Source, workdir: epath.Path, *, resumes: bool) -> list[str]:
    """Writes data.json: {"train": {"images", "digest"}, "eval": {...}}.

    Args:
      train: training data of this start.
      test: test data of this start.
      workdir: folder of the run.
      resumes: whether the run has taken steps before.

    Returns:
      For a run that resumes, the sentences of `changed_images`.
    """
    now = {
        name: {"images": len(source), "digest": digest(source)}
        for name, source in (("train", train), ("eval", test))
    }
    sentences = changed_images(load_record(workdir), now) if resumes else []
    write_json(workdir / DATA_FILE, now)
    return sentences


def load_record(workdir: epath.Path) -> dict[str, Any] | None:
    """The contents of a workdir's data.json; None if it is missing or unreadable."""
    try:
        record = json.loads((workdir / DATA_FILE).read_text(encoding="utf-8"))
        return {
            name: {k: record[name][k] for k in ("images", "digest")} for name in ("train", "eval")
        }
    except (OSError, ValueError, TypeError, KeyError):
        return None


def changed_images(then: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Sentences about changes of the images between two starts, and their consequences."""
    if then is None:
        return [
            f"There is no {DATA_FILE} of an earlier start, so it is unknown whether the images are "
            "the same as then."
        ]
    sentences = []
    if then["train"] != now["train"]:
        sentences.append(
            f"The training images have changed: {_both(then['train'], now['train'])}. From here "
            "on they come in another order, so some are seen once more or once less in this epoch."
        )
    if then["eval"] != now["eval"]:
        sentences.append(
            f"The test images have changed: {_both(then['eval'], now['eval'])}. Accuracies from "
            "here on are not comparable with earlier ones."
        )
    if len(sentences) == 2:
        sentences.append(
            "If both are slices of one folder, images may have moved from one to the other, "
            "so that some test images have been trained on."
        )
    return sentences


def _both(then: dict[str, Any], now: dict[str, Any]) -> str:
    if then["images"] == now["images"]:
        return f"{now['images']:,} as at the last start, but some are others or renamed"
    return f"{then['images']:,} at the last start, {now['images']:,} now"
