"""Evaluation matches labels to logits by class names."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from sklearn.datasets import load_digits

import sret_jax
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.data.sources.imagenet import imagenet_ids
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.evaluation.labelled import open_labelled
from sret_jax.evaluation.predict import predict
from sret_jax.settings.saved_config import load_config
from sret_jax.training.experiment import open_experiment

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def run(saved_run, tmp_path):
    """A run on digits whose classes are called by words, with a sharp head."""
    _, variables = sret_jax.load(saved_run)
    variables["params"]["head"]["kernel"] *= 30
    workdir = epath.Path(tmp_path) / "run"
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(7, {"model": variables})
    shutil.copy(saved_run / "config.json", workdir)
    (workdir / "class_names.json").write_text(json.dumps(WORDS))
    return workdir


def config_of(run, folder, train="train", test="test"):
    config = load_config(run)
    config.data.update(name=str(folder), train_split=train, eval_split=test)
    config.eval_batch_size = 64
    return config


@pytest.fixture
def digits(tmp_path):
    """Writes scans to ROOT/SPLIT/NAME/INDEX.png, with a name for each digit."""

    def write(names, split="test", each=12):
        target, images = load_digits().target, load_digits().images
        for digit, name in names.items():
            folder = tmp_path / "digits" / split / name
            folder.mkdir(parents=True)
            for index in np.flatnonzero(target == digit % 10)[:each]:
                scan = (images[index] * 15).astype(np.uint8)
                Image.fromarray(scan).save(folder / f"{index}.png")
        return tmp_path / "digits"

    return write


def test_fewer_classes_in_another_order_are_labelled_by_name(run, digits, capsys):
    chosen = {0: "zero", 2: "two", 9: "nine"}
    folder = digits(chosen)
    report = evaluate_checkpoint(config_of(run, folder), run)

    files = sorted((folder / "test").glob("*/*.png"))
    probabilities = predict(*sret_jax.load(run), files, test_crop=0.8)
    labels = np.array([WORDS.index(file.parent.name) for file in files])
    right = probabilities.argmax(-1) == labels
    among = np.full_like(probabilities, -1)
    among[:, list(chosen)] = probabilities[:, list(chosen)]
    right_among = among.argmax(-1) == labels
    assert right.mean() < right_among.mean() < 1  # else little is tested
    assert report["eval"]["top1"] == pytest.approx(right.mean())
    assert report["eval"]["top1_among_present"] == pytest.approx(right_among.mean())
    assert report["classes"] == {"model": 10, "present": 3}
    said = capsys.readouterr().out
    assert "There are images of 3 of the model's 10 classes; top-1, top-5" in said
    assert f"{100 * right.mean():.2f}%" in said and f"{100 * right_among.mean():.2f}%" in said
    assert json.loads((run / "eval.json").read_text()) == report

    per_class = json.loads((run / "per_class.json").read_text())["eval"]["per_class"]
    assert list(per_class) == WORDS
    assert per_class["one"] == {"images": 0, "top1": None}
    assert per_class["nine"]["top1"] == pytest.approx(right[labels == 9].mean())


def test_all_classes_in_another_order_have_no_remark(run, digits):
    source, remark = open_labelled(config_of(run, digits(dict(enumerate(WORDS)))), run, 10)
    assert remark == "" and source.class_names == WORDS
    for index in (0, len(source) - 1):
        folder = epath.Path(source.file_name(index)).parent.name
        assert WORDS[source[index]["label"]] == folder


def test_a_class_that_the_weights_do_not_know_ends_an_evaluation(run, digits):
    config = config_of(run, digits({0: "zero", 2: "tow"}))
    sentence = (
        "was not trained on the class 'tow': class 0 is 'zero' there and 'tow' in the data "
        r"\(10 classes there, 2 in the data; .* only in the data: 'tow'\); give data of its classes"
    )
    with pytest.raises(UserError, match=sentence):
        evaluate_checkpoint(config, run)


def test_numbers_as_names_are_the_labels_and_this_is_said(run, digits):
    folder = digits({digit: str(digit) for digit in range(10)}, each=1)
    source, remark = open_labelled(config_of(run, folder), run, 10)
    assert "are numbers, so they are taken for the labels: 0 for 'zero' to 9 for 'nine'" in remark
    assert source[3]["label"] == 3 and source.file_name(3).split("/")[-2] == "3"


def test_a_run_on_numbers_in_another_order_is_evaluated_by_name(run, digits):
    names = [*"1032547698"]
    (run / "class_names.json").write_text(json.dumps(names))
    folder = digits({digit: str(digit) for digit in range(10)}, each=1)
    source, remark = open_labelled(config_of(run, folder), run, 10)
    assert remark == "" and source.class_names == names
    assert source[3]["label"] == 2 and source.file_name(3).split("/")[-2] == "3"


def test_weights_without_names_take_the_data_s_order_and_this_is_said(run, digits):
    config = config_of(run, digits(dict(enumerate(WORDS)), each=1))
    (run / "class_names.json").unlink()
    _, remark = open_labelled(config, run, 10)
    assert "names are not compared" in remark and "0 for 'eight' to 9 for 'zero'" in remark
    with pytest.raises(UserError, match="10 classes for its 12 logits; .* put a class_names.json"):
        open_labelled(config, run, 12)


def test_1000_logits_without_names_are_imagenet_s_where_the_data_s_names_are(run, digits):
    (run / "class_names.json").unlink()
    ids = imagenet_ids()
    config = config_of(run, digits({3: ids[3], 7: ids[700]}, each=1))
    source, remark = open_labelled(config, run, 1000)
    assert [source[i]["label"] for i in range(2)] == [3, 700]
    assert "its 1,000 are taken for ImageNet's" in remark


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({2: "tow"}, r"'tow': .* \(only there: 'two'; only in the data: 'tow'\); give the data"),
        ({10: "ten"}, r"'ten': .* \(10 classes there, 11 in the data; only in the data: 'ten'\)"),
    ],
)
def test_a_run_does_not_go_on_with_classes_it_does_not_know(changed, sentence, run, digits):
    names = dict(enumerate(WORDS)) | changed
    digits(names, "train", each=1)
    config = config_of(run, digits({0: "zero"}, each=1))
    with pytest.raises(UserError, match=f"{run} was not trained on the class {sentence}"):
        open_experiment(config, run)
    assert json.loads((run / "class_names.json").read_text()) == WORDS


def test_a_run_continues_with_its_own_numbers_whatever_the_order_of_the_data(run, digits):
    digits(dict(enumerate(WORDS)), "train", each=1)
    experiment = open_experiment(config_of(run, digits({0: "zero"}, each=1)), run)
    for source in (experiment.train_source, experiment.eval_source):
        assert source.class_names == WORDS
        for index in range(len(source)):
            folder = epath.Path(source.file_name(index)).parent.name
            assert WORDS[source[index]["label"]] == folder
    assert jax.device_count() == experiment.mesh.size
