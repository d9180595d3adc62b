"""One training step: loss and gradient of a batch, update, moving average."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sret_jax.data.views.mixing import Mixing, Targets, row_keys
from sret_jax.distillation.soft_targets import marginal_smoothing
from sret_jax.distillation.teacher import Teacher
from sret_jax.models.apply import normalise
from sret_jax.models.loops import with_loops
from sret_jax.models.model import Model
from sret_jax.models.read_out import mean_of_heads
from sret_jax.models.variables import Variables, is_head
from sret_jax.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from sret_jax.training.hyperparameters import Hyperparameters
from sret_jax.training.losses import LabelLoss, in_top_k
from sret_jax.training.mixed_depth import DEEP_ONLY, MixedDepth
from sret_jax.training.state import TrainState

MODEL_STREAM = 0  # the other stream is mixing.AUGMENT_STREAM
Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


def examples(
    batch: Batch, mixing: Mixing, model: Model, *, in_turn: bool = False
) -> tuple[jax.Array, Targets]:
    """What a step trains on, before a teacher labels it.

    Args:
      batch: "image" (B, H, W, 3) uint8, "label" (B,), "key" (B,) from `row_keys`, and stored soft
        labels if there are any; see `make_train_step`.
      mixing: erasing, mixup, cutmix and label smoothing.
      model: has N classes, and the pixel statistics that images are normalised with.
      in_turn: as in `Mixing`.

    Returns:
      The normalised, mixed images (B, H, W, 3), and their targets (B, N): "hard", and "soft" if
      there are stored soft labels.
    """
    targets = {"hard": mixing.hard_targets(batch["label"], model.num_classes)}
    if "soft" in batch:
        stored = batch["soft"], batch.get("soft_classes")
        targets["soft"] = marginal_smoothing(*stored, model.num_classes)
    images = normalise(model, batch["image"])
    return mixing(images, targets, batch["key"], in_turn=in_turn)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    *,
    mixing: Mixing,
    grad_accum: int,
    label_loss: LabelLoss,
    teacher: Teacher | None = None,
    loops: int | None = None,
    mixed_depth: MixedDepth = DEEP_ONLY,
    head_only: bool = False,
) -> jax.stages.Wrapped:
    """Builds the jitted step (state, batch, hyperparameters) -> (state, metrics).

    The batch is sharded over both mesh axes, the state by `shardings`; the state's buffers are
    donated. Loss and BatchNorm's statistics, if any, are over the global batch. Model randomness
    depends on seed and step alone, augmentation on seed and position in the stream.

    With a teacher, the step takes the teacher's variables as fourth argument, and the teacher
    labels the same augmented images that the student sees. A batch may instead contain soft labels:
    "soft" (B, K), or (B, k) for the classes in "soft_classes" (B, k); they are mixed like the
    images. With neither, labels are hard.

    With `grad_accum` A > 1, gradients are averaged over A micro-batches. Micro-batch a consists of
    the a-th part of every device's rows, so no row moves between devices. BatchNorm normalises
    each micro-batch by itself, and its running statistics average over micro-batches.

    A step whose loss or gradient is not finite updates nothing but the counters.

    Args:
      model: from `create_model`.
      optimizer: turns the gradient into a direction d; then params <- params - lr * d. lr is a
        function of the step, so steps that update nothing do not delay the schedule.
      mesh: from `make_mesh`.
      shardings: shardings of the state, from `state_shardings`.
      mixing: erasing, mixup, cutmix and label smoothing, applied to the normalised images.
      grad_accum: micro-batches per step; must divide the number of rows per device.
      label_loss: loss of the logits of the student's heads and their targets.
      teacher: from `open_teacher`.
      loops: applications of each block in this step, with the weights of `with_loops`; None: those
        of the model.
      mixed_depth: adds the losses of exits, or of a path with fewer loops.
      head_only: trains the classification head alone. The backbone is frozen and runs in evaluation
        mode: no drop path, fixed permutations, BatchNorm's running statistics, which are not
        updated.

    Returns:
      The step. Its metrics are scalars: loss (nats); top1 (fraction of the batch whose predicted
      class is that of the larger part of the image); with soft labels teacher_top1 (fraction whose
      most probable soft label is that class); with mixed depth top1_exit1, ..., that of each other
      path; grad_norm; lr; bad_images (images of the batch that
      could not be read); and bad_streak (as in the state; 0 if this step updated it).
    """
    model = model.clone(mesh=mesh)
    optimizer = optax.with_extra_args_support(optimizer)
    # XLA:CPU would draw noise for all images, and again at every use of an image.
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"

    def labelled_examples(batch: Batch, teacher_variables: Any) -> tuple[jax.Array, Targets]:
        """The images the student sees, and its targets {"hard": y, optionally "soft": p}."""
        images, targets = examples(batch, mixing, model, in_turn=one_cpu)
        if teacher:
            targets["soft"] = teacher.probabilities(teacher_variables, images, model)
        return images, targets

    loops = loops or model.loops

    def loss_fn(params: Any, statistics: Any, images: jax.Array, targets: Targets, key: jax.Array):
        if head_only:
            head = {name: part for name, part in params.items() if is_head(name)}
            params = {**jax.lax.stop_gradient(params), **head}
        student, variables = model, {"params": params, **statistics}
        if loops != model.loops:
            student, variables = with_loops(model, variables, loops)
        heads, paths, statistics = mixed_depth.forward(
            student, variables, images, key, train=not head_only
        )
        loss = mixed_depth.loss(heads, paths, targets, label_loss)
        main_class = targets["hard"].argmax(-1)  # (B,)
        metrics = {"loss": loss}
        for name, logits in (
            ("top1", heads),
            *((f"top1_{path.name}", path.heads) for path in paths),
        ):
            metrics[name] = in_top_k(mean_of_heads(logits), main_class, 1).mean()
        if "soft" in targets:
            metrics["teacher_top1"] = in_top_k(targets["soft"], main_class, 1).mean()
        return loss, (statistics, metrics)

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def gradients(variables: Variables, batch: Batch, teacher_variables: Any, key: jax.Array):
        """Mean gradient and metrics over the micro-batches, and the last BatchNorm statistics."""
        before = {name: tree for name, tree in variables.items() if name != "params"}

        def micro_step(statistics: Any, inputs: tuple[Batch, jax.Array]):
            micro_batch, key = inputs
            images, targets = labelled_examples(micro_batch, teacher_variables)
            grads, (statistics, metrics) = grad_fn(
                variables["params"], statistics, images, targets, key
            )
            return statistics, (grads, metrics)

        if grad_accum == 1:
            statistics, (grads, metrics) = micro_step(before, (batch, key))
            return grads, statistics, metrics

        def accumulate(carry, inputs):
            statistics, total = carry
            statistics, (grads, metrics) = micro_step(statistics, inputs)
            return (statistics, jax.tree.map(jnp.add, total, grads)), metrics

        inputs = (micro_batches(batch, grad_accum, mesh), jax.random.split(key, grad_accum))
        zeros = jax.tree.map(jnp.zeros_like, variables["params"])
        (statistics, total), metrics = jax.lax.scan(accumulate, (before, zeros), inputs)
        grads = jax.tree.map(lambda x: x / grad_accum, total)
        return grads, statistics, jax.tree.map(lambda x: x.mean(0), metrics)

    def train_step(
        state: TrainState,
        batch: Batch,
        hyperparameters: Hyperparameters,
        teacher_variables: Any = None,
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(hyperparameters.seed), MODEL_STREAM)
        key = jax.random.fold_in(key, state.step)
        row_key = row_keys(hyperparameters.seed, state.step, len(batch["label"]))
        batch = {**batch, "key": jax.lax.with_sharding_constraint(row_key, batch_sharding(mesh))}
        grads, statistics, metrics = gradients(state.variables, batch, teacher_variables, key)
        params = state.variables["params"]
        direction, opt_state = optimizer.update(
            grads, state.opt_state, params, weight_decay=hyperparameters.weight_decay
        )
        lr = hyperparameters.schedule(state.step)
        params = optax.apply_updates(params, optax.tree.scale(-lr, direction))
        variables = {"params": params, **statistics}
        updated = TrainState(
            step=state.step + 1,
            bad_streak=jnp.zeros_like(state.bad_streak),
            variables=variables,
            ema=optax.incremental_update(
                variables, state.ema, hyperparameters.ema_rate_at(state.step)
            ),
            opt_state=opt_state,
        )
        skipped = state.replace(step=state.step + 1, bad_streak=state.bad_streak + 1)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, skipped)
        return state, {
            **metrics,
            "grad_norm": grad_norm,
            "lr": lr,
            "bad_images": batch["bad"].sum(),
            "bad_streak": state.bad_streak,
        }

    constants = (teacher.shardings,) if teacher else ()
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh), *constants),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def abstract_batch(
    batch_size: int, image_size: int, labels: Mapping[str, np.dtype] = MappingProxyType({})
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, to compile before data exist; `labels` are dtypes of stored labels."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((batch_size, image_size, image_size, 3), jnp.uint8),
        "label": ((batch_size,), jnp.int32),
        "bad": ((batch_size,), jnp.bool_),
        "real": ((batch_size,), jnp.bool_),
    }
    shapes |= {name: ((batch_size, *of.shape), of.base) for name, of in labels.items()}
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}


def micro_batches(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """Splits a batch into `parts`; each contains an equal number of every device's rows.

    Shapes: (B, ...) -> (parts, B / parts, ...), the second axis sharded over the mesh.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(mesh.size, parts, -1, *x.shape[1:])  # (devices, parts, rows, ...)
        x = x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(split, batch)
