"""README.md of weights for the Hugging Face hub: what they are, and what was measured of them."""

import json
import pathlib
import shlex
from collections.abc import Mapping

import jax

from sret_jax.evaluation.evaluation import percent
from sret_jax.models.flops import model_macs
from sret_jax.models.model import Model
from sret_jax.models.registry import title
from sret_jax.models.variables import abstract_variables
from sret_jax.run.metrics_file import read_metrics
from sret_jax.settings.saved_config import Start, is_converted
from sret_jax.text import markdown_table
from sret_jax.weights.array_names import why_in_flax
from sret_jax.weights.loading import StoredFolder
from sret_jax.weights.stored import Stored

WEIGHTS_IN_WORDS = {"eval": "raw weights", "eval_ema": "moving average of the weights"}

CARD = """\
---
library_name: sret_jax
pipeline_tag: image-classification
# license: choose one before you upload, https://huggingface.co/docs/hub/repositories-licenses
tags:
- image-classification
- jax
- flax
- {tag}
{results}---

# {title}

{facts}

{measured}

## Use

```python
import sret_jax  # needs huggingface_hub too

name = "hf://OWNER/NAME"  # where you put this folder; or its path
model, variables = sret_jax.load(name)
probabilities = sret_jax.predict(
    model, variables, ["photo.jpg"], test_crop=sret_jax.test_crop(name)
)
```

{names}
`config.json` describes the model, and the view of its evaluation: {size}x{size} pixels, {crop:.4g}
of the shorter side.
{command}
## License

None is stated yet: choose one, and write it into the first lines of this file. The data, and the
weights that training started from, may limit the choice.
"""

RESULTS = """\
model-index:
- name: {title}
  results:
  - task:
      type: image-classification
    dataset:
      name: {data}
      type: {data}
      split: {split}
    metrics:
    - type: accuracy
      name: top-1
      value: {top1}
"""

COMMAND = """
## Training

```sh
{command}
```
"""


def model_card(model: Model, stored: Stored, variant: str, test_crop: float) -> str:
    """The text of README.md.

    Args:
      model: the model, as it is written.
      stored: the weights, after they were read.
      variant: the published variant that the model is, or was derived from.
      test_crop: fraction of an image's shorter side that evaluation shows.
    """
    params, size = abstract_variables(model)["params"], model.image_size
    macs = model_macs(model)
    unit, one = ("GMACs", 1e9) if macs >= 1e9 else ("MMACs", 1e6)
    rows = {
        "family": type(model).__name__,
        "parameters": f"{sum(x.size for x in jax.tree.leaves(params)):,}",
        f"{unit} per {size}x{size} image": f"{macs / one:.4g}",
        "classes": f"{model.num_classes:,}",
    }
    measured, results, command = f"Converted from {stored.origin}.", "", ""
    name = title(model, variant)
    if isinstance(stored, StoredFolder) and stored.config and not is_converted(stored.config):
        data = pathlib.PurePath(stored.config.data.name).name  # a folder's without those above it
        split = stored.config.data.eval_split
        which = "eval_ema" if stored.ema else "eval"
        rows |= {"trained on": data, "step": f"{stored.step:,}", "weights": WEIGHTS_IN_WORDS[which]}
        top1 = _accuracies(stored)
        rows |= {f"top-1, {WEIGHTS_IN_WORDS[n]}": percent(share) for n, share in top1.items()}
        measured = f"The accuracies were measured in training at this step, on {split} of {data}."
        if model != stored.model():
            measured = "The model has other settings than in training, and was not evaluated so."
        elif which in top1:
            quoted = {"title": name, "data": data, "split": split}
            quoted = {key: json.dumps(text) for key, text in quoted.items()}  # as YAML has strings
            results = RESULTS.format(**quoted, top1=top1[which])
        else:
            measured = "The run was not evaluated at this step."
        if start := Start.read(stored.workdir):
            command = COMMAND.format(command=_command(start))
    return CARD.format(
        tag=type(model).__name__.lower(),
        results=results,
        title=name,
        facts=markdown_table(("", ""), rows.items()),
        measured=measured,
        names=_names(model),
        size=size,
        crop=test_crop,
        command=command,
    )


def _accuracies(stored: StoredFolder) -> Mapping[str, float]:
    """The top-1 that the run measured at the step of the weights, by name of the weights."""
    return {
        name: line[f"{name}/top1"]
        for line in read_metrics(stored.workdir)
        for name in WEIGHTS_IN_WORDS
        if line["step"] == stored.step and f"{name}/top1" in line
    }


def _command(start: Start) -> str:
    settings = [f"--config.{name}={value}" for name, value in start.overrides.items()]
    return shlex.join(["python", "main.py", f"--config={start.config}", *settings])


def _names(model: Model) -> str:
    """A sentence about the names of the arrays."""
    if reason := why_in_flax(model):
        return (
            "`model.safetensors` has the arrays under their names and shapes in Flax, because "
            f"{reason}."
        )
    return "`model.safetensors` has the arrays under their published names in torch."
