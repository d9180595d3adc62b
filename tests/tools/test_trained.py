"""The class names that a command shows for the logits of given weights."""

import argparse
import contextlib
import json
import shutil

import jax.numpy as jnp
import pytest
from etils import epath

import sret_jax
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.data.sources.imagenet import imagenet_ids
from sret_jax.errors import UserError
from sret_jax.tools.trained import add_arguments, open_trained


def names_of(checkpoint, *flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = [f"--checkpoint={checkpoint}", *flags]
    return open_trained(parser.parse_args([str(a) for a in args])).classes


def test_weights_of_1000_classes_without_names_show_imagenet_s_and_say_so(
    saved_run, tmp_path, capsys
):
    _, variables = sret_jax.load(saved_run)
    variables["params"]["head"] = {"kernel": jnp.zeros((32, 1000)), "bias": jnp.zeros(1000)}
    with contextlib.closing(Checkpoints(epath.Path(tmp_path))) as checkpoints:
        checkpoints.save(0, {"model": variables})
    shutil.copy(saved_run / "config.json", tmp_path)
    assert names_of(tmp_path)[:2] == ["tench", "goldfish"]
    assert "keeps no class names; its 1,000 are taken for ImageNet's" in capsys.readouterr().out


def test_a_file_of_names_is_read_whatever_editor_wrote_it(saved_run, tmp_path):
    names = [f"klasse ä{i}" for i in range(10)]
    for content in (
        "\ufeff" + "\r\n".join(names) + "\r\n",
        "\n".join(names),
        "\n\n".join([*names, " "]),
    ):
        (tmp_path / "names.txt").write_bytes(content.encode())
        assert names_of(saved_run, f"--classes={tmp_path / 'names.txt'}") == names
    (tmp_path / "names.txt").write_bytes("\n".join(names).encode("utf-16"))
    with pytest.raises(UserError, match="cannot be read .* give a UTF-8 text file"):
        names_of(saved_run, f"--classes={tmp_path / 'names.txt'}")


def test_the_run_s_own_names_in_another_order_are_refused(saved_run, tmp_path):
    names = json.loads((saved_run / "class_names.json").read_text())
    (tmp_path / "names.txt").write_text("\n".join(sorted(names, reverse=True)))
    with pytest.raises(UserError, match="another order: class 0 is 'digit 0' there and 'digit 9'"):
        names_of(saved_run, f"--classes={tmp_path / 'names.txt'}")


def test_weights_without_names_are_shown_by_number(saved_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(saved_run, run)
    (run / "class_names.json").unlink()
    assert names_of(run) == [str(i) for i in range(10)]
    assert "classes are shown by number; --classes=FILE gives names" in capsys.readouterr().out


def test_a_run_on_wordnet_ids_shows_their_names(saved_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved_run, run)
    (run / "class_names.json").write_text(json.dumps(imagenet_ids()[:10]))
    assert names_of(run)[:2] == ["tench", "goldfish"]
