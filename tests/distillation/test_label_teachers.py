"""A small real ONNX model as a teacher: used as its flags specify, refused if it does not fit."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from sret_jax.distillation.label_teachers import OnnxTeacher, batch_rows, label
from sret_jax.distillation.soft_labels import open_soft_labels
from sret_jax.errors import UserError
from sret_jax.files import absolute
from tests.tools.test_soft_labels import command, fails

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIDE, CLASSES = 16, 10
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def write_model(path, *, layout="NCHW", batch="batch", side=SIDE, softmax=False, outputs=1):
    """logits = W mean of x over the positions (H, W), optionally followed by softmax."""
    from onnx import TensorProto, helper

    shape = {"NCHW": [batch, 3, side, side], "NHWC": [batch, side, side, 3]}[layout]
    axes = [2, 3] if layout == "NCHW" else [1, 2]
    weights = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=-1),
    ]
    names = [["p"] if softmax else ["logits"], ["logits", "p"]][outputs - 1]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, CLASSES]) for n in names],
        [
            helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True),
            helper.make_tensor("axes", TensorProto.INT64, [2], axes),
        ],
    )
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return weights


def open_model(path, **changes):
    settings = dict(
        classes=CLASSES,
        size=None,
        mean=MEAN,
        std=STD,
        layout="NCHW",
        probabilities=False,
        temperature=1.0,
    )
    return OnnxTeacher(epath.Path(path), **{**settings, **changes})


def expected(images, weights, temperature=1.0):
    x = (images / 255 - MEAN) / STD
    return np.asarray(jax.nn.softmax(jnp.asarray(x.mean(axis=(1, 2)) @ weights) / temperature))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("batch", ["batch", 4])
@pytest.mark.parametrize("softmax", [False, True])
def test_a_model_is_fed_as_its_flags_say(layout, batch, softmax, tmp_path):
    weights = write_model(tmp_path / "m.onnx", layout=layout, batch=batch, softmax=softmax)
    images = np.random.default_rng(1).integers(0, 256, (10, SIDE, SIDE, 3), np.uint8)
    for temperature in (1.0, 2.5):
        teacher = open_model(
            tmp_path / "m.onnx", layout=layout, probabilities=softmax, temperature=temperature
        )
        found = label(teacher, images, rows=6)
        np.testing.assert_allclose(found, expected(images, weights, temperature), atol=1e-4)


def test_images_are_resized_to_the_models_own_size(tmp_path):
    write_model(tmp_path / "m.onnx", side=24)
    teacher = open_model(tmp_path / "m.onnx")
    assert teacher.image_size == 24
    assert teacher(np.full((2, 16, 16, 3), 100, np.uint8)).shape == (2, CLASSES)
    write_model(tmp_path / "m.onnx", side="side")
    with pytest.raises(UserError, match="does not include a size; give --teacher_size"):
        open_model(tmp_path / "m.onnx")
    assert open_model(tmp_path / "m.onnx", size=20).image_size == 20


def test_other_preprocessing_is_another_teacher(tmp_path):
    write_model(tmp_path / "m.onnx", side="side")
    prints = {
        open_model(tmp_path / "m.onnx", **{"size": 16, **changes}).fingerprint
        for changes in ({}, {"size": 20}, {"mean": STD}, {"std": MEAN}, {"probabilities": True})
    }
    assert len(prints) == 5


def test_models_of_another_form_are_refused(tmp_path):
    path = tmp_path / "m.onnx"
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    write_model(path)
    with pytest.raises(UserError, match=r"returns an array \(2, 10\) for 2 images, expected \(2, "):
        open_model(path, classes=12)(images)
    with pytest.raises(UserError, match=r"does not accept images of shape .* --teacher_layout"):
        open_model(path, layout="NHWC", size=SIDE)(images)
    write_model(path, outputs=2)
    with pytest.raises(UserError, match=r"has 2 outputs \(logits, p\), expected one"):
        open_model(path)
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a readable ONNX model"):
        open_model(path)


def test_without_onnxruntime_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    write_model(tmp_path / "m.onnx")
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"onnxruntime is not installed.*pip install 'sret_jax\[onn"
    ):
        open_model(tmp_path / "m.onnx")


def test_the_command_labels_with_it_and_verifies(digits_dir, tmp_path, capsys):
    write_model(tmp_path / "m.onnx")
    flags = [
        "--config=configs/quickstart.py",
        f"--config.data.data_dir={digits_dir}",
        "--config.data.train_split=train[:40]",
        "--config.model.image_size=16",
        "--teacher_mean=0.5,0.4,0.3",
    ]
    out = tmp_path / "store"
    teacher = f"--teacher=onnx:{tmp_path / 'm.onnx'}"
    command("generate", teacher, *flags, "--crops=2", "--keep=full", f"--out={out}")
    assert open_soft_labels(absolute(out)).manifest.teacher.image_size == SIDE
    command("verify", out, *flags)
    difference = capsys.readouterr().out.split("Largest difference of a probability: ")[1]
    assert float(difference.split()[0]) < 5e-4
    assert "used differently" in fails(capsys, ["verify", out, *flags, "--teacher_std=1,1,1"])


@pytest.mark.parametrize(
    ("crops", "rows"), [(1, 256), (3, 255), (130, 130), (256, 256), (257, 129), (500, 250)]
)
def test_a_teacher_sees_the_crops_of_whole_images_or_equal_parts_of_one(crops, rows):
    assert batch_rows(crops) == rows
