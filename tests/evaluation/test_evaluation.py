"""Evaluation equals a plain count over the logits of one image at a time."""

import contextlib
import json
import os
import pathlib
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.data.sources.source import open_source
from sret_jax.data.views.images import BadImage, EvalTransform
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.evaluation.evaluation import Evaluator
from sret_jax.models.apply import normalise
from sret_jax.models.loops import with_loops
from sret_jax.parallel.mesh import make_mesh, state_shardings
from sret_jax.run.loop import train
from sret_jax.settings.config_model import create_from_config
from tests.run.test_loop import start_main


@pytest.fixture
def model(tiny_config):
    return create_from_config(tiny_config, num_classes=10)


@pytest.fixture
def weights(model):
    """Random weights, sharp enough that no two logits are nearly equal."""
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    variables = jax.jit(model.init)(jax.random.key(1), image)
    variables["params"]["head"]["kernel"] = 30 * variables["params"]["head"]["kernel"]
    return variables


class PlainCount:
    """Counts in NumPy over the logits of one image at a time."""

    def __init__(self, model, weights, config):
        self._view = EvalTransform(model.image_size, config.data.test_crop)
        self._apply = jax.jit(
            lambda image: model.apply(weights, normalise(model, image), train=False)
        )

    def check(self, results, source):
        """Asserts that the results are those of the source."""
        top1, top5, losses = 0, 0, []
        for record in (source[i] for i in range(len(source))):
            try:
                image = self._view(record["image"])
            except BadImage:
                continue
            logits = np.asarray(self._apply(image[None])[0], np.float64)
            better = np.sum(logits > logits[record["label"]])
            top1, top5 = top1 + (better < 1), top5 + (better < 5)
            losses.append(np.log(np.sum(np.exp(logits))) - logits[record["label"]])
        assert results["top1"] == np.float32(top1) / np.float32(len(source))
        assert results["top5"] == np.float32(top5) / np.float32(len(source))
        assert results["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert top1 < top5 < len(source)  # else little is tested


class WithBadRecords:
    """The records of a source; every tenth has unreadable bytes."""

    def __init__(self, source):
        self._source = source
        self.class_names = source.class_names

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = self._source[index]
        return record if index % 10 else {**record, "image": b"no image"}


CASES = {
    "whole batches": ("test[:128]", 64, False),
    "a part of a batch left": ("test[:121]", 64, False),
    "less than one batch": ("test[:7]", 64, False),
    "unreadable images": ("test[:33]", 8, True),
}


def test_evaluation_is_the_plain_count(model, weights, tiny_config, digits_dir, subtests):
    plain = PlainCount(model, weights, tiny_config)
    mesh = make_mesh(tiny_config.fsdp)
    shardings = state_shardings(weights, mesh)
    placed = jax.device_put(weights, shardings)
    for case, (split, batch_size, bad) in CASES.items():
        with subtests.test(case):
            source = open_source("digits", split, digits_dir)
            source = WithBadRecords(source) if bad else source
            tiny_config.eval_batch_size = batch_size
            evaluator = Evaluator(model, tiny_config, source, mesh, shardings)
            with contextlib.closing(evaluator.loader):
                results = evaluator.evaluate({"eval": placed, "again": placed}, lambda: None)
            assert results["eval"] == results["again"]
            plain.check(results["eval"], source)
            counts = evaluator.confusions["eval"].counts
            assert counts.sum() == len(source)
            assert np.trace(counts) == round(results["eval"]["top1"] * len(source))
            assert counts[:, -1].sum() == (4 if bad else 0)


def test_weights_are_evaluated_with_other_loops_than_they_were_trained_with(
    model, weights, tiny_config, digits_dir, tmp_path, capsys
):
    workdir = epath.Path(tmp_path)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(1, {"model": weights})
    tiny_config.model.loops = 3
    report = evaluate_checkpoint(tiny_config, workdir, step=1)
    assert (workdir / "confusion.png").exists()
    said = capsys.readouterr().out
    assert "Evaluating with 3 loops instead of 2 (later loops repeat the last NLL)." in said
    longer, fitted = with_loops(model, weights, 3)
    source = open_source("digits", "test", digits_dir)
    PlainCount(longer, fitted, tiny_config).check(report["eval"], source)


def test_a_batch_that_does_not_fit_the_memory_is_found_before_the_first_step(tiny_config, tmp_path):
    if int(pathlib.Path("/proc/sys/vm/overcommit_memory").read_text()) == 1:
        pytest.skip("this kernel promises any amount of memory")
    images = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (16 * 16 * 3)
    tiny_config.eval_batch_size = 2 * images // 8 * 8
    with pytest.raises(UserError, match=r"images at once does not fit the memory; give fewer"):
        train(tiny_config, epath.Path(tmp_path))


@pytest.mark.slow
def test_evaluation_by_any_number_of_processes_is_the_plain_count(
    model, weights, tiny_config, digits_dir, tmp_path
):
    checkpoints = Checkpoints(epath.Path(tmp_path))
    checkpoints.save(0, {"model": weights})
    checkpoints.close()
    reports = []
    for processes in (1, 2, 4):
        evaluate(tmp_path, processes, digits_dir)
        reports.append(json.loads((tmp_path / "eval.json").read_text())["eval"])
    source = open_source("digits", "test", digits_dir)
    plain = PlainCount(model, weights, tiny_config)
    for report in reports:
        assert (report["top1"], report["top5"]) == (reports[0]["top1"], reports[0]["top5"])
        plain.check(report, source)


def evaluate(workdir, processes, digits_dir):
    """Runs main.py --mode=eval in several processes of two devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    cluster = (f"--coordinator=localhost:{port}", f"--processes={processes}")
    started = [
        start_main(
            workdir,
            "--mode=eval",
            *((*cluster, f"--process_id={i}") if processes > 1 else ()),
            digits_dir=digits_dir,
            devices=2,
        )
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)
