"""Weight files are recognised by content, whatever their names, wrappers and prefixes."""

import argparse
import collections
import fractions
import pathlib

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save, save_file

from sret_jax.errors import UserError
from sret_jax.weights.weight_files import read_weight_file, without_shared_prefix

ARRAYS = {
    "pos_embed": np.arange(4, dtype=np.float32),
    "head.weight": np.ones((2, 3), np.float32),
    "head.bias": np.zeros(2, np.float32),
}
NAMES = ("w.pth.tar", "w.bin", "w.ckpt", "w.pt", "w.pth", "w.safetensors", "w")


def write_torch(path, content, **options):
    torch = pytest.importorskip("torch", reason="torch files need torch")
    torch.save(content, path, **options)
    return epath.Path(path)


def tensors(factor=1.0, prefix=""):
    torch = pytest.importorskip("torch", reason="torch files need torch")
    return {prefix + name: torch.from_numpy(factor * array) for name, array in ARRAYS.items()}


def assert_holds(path, factor=1.0, **options):
    found = read_weight_file(epath.Path(path), **options)
    assert found.state_dict.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.state_dict[name], factor * array, err_msg=name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_told_by_its_content_not_its_name(name, tmp_path):
    for zipped in (True, False):
        options = {"_use_new_zipfile_serialization": zipped}
        assert_holds(write_torch(tmp_path / name, {"state_dict": tensors()}, **options))
    save_file(ARRAYS, tmp_path / name)
    assert_holds(tmp_path / name)


def test_safetensors_whose_first_byte_is_that_of_a_pickle(tmp_path):
    data = next(
        data
        for pad in range(0, 512, 8)
        if (data := save(ARRAYS, metadata={"pad": "x" * pad}))[0] == 0x80
    )
    (tmp_path / "w").write_bytes(data)
    assert_holds(tmp_path / "w")


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>\n\x1b[2J"]
)
def test_what_is_no_weight_file_is_said_with_how_it_begins(data, tmp_path):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(UserError, match="neither a torch file nor safetensors .it begins") as error:
        read_weight_file(epath.Path(tmp_path / "w.pth"))
    assert str(error.value).isprintable() and repr(data[:32]) in str(error.value)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "backbone.", "model.", "module._orig_mod.backbone."]
)
def test_a_prefix_that_all_names_share_is_removed(prefix, tmp_path):
    save_file({prefix + name: array for name, array in ARRAYS.items()}, tmp_path / "w")
    assert_holds(tmp_path / "w")


def test_what_is_no_shared_prefix_stays():
    for names in (["head.weight", "head.bias"], ["module.a.b", "other.a.b"], ["pos_embed"], []):
        assert list(without_shared_prefix(dict.fromkeys(names))) == names
    alone = without_shared_prefix(dict.fromkeys(["module.head.weight", "module.head.bias"]))
    assert list(alone) == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("state_dict", "ema_state_dict"),
    ],
)
def test_of_raw_and_averaged_weights_the_wanted_ones_are_taken_and_named(raw, average, tmp_path):
    torch = pytest.importorskip("torch", reason="torch files need torch")
    averaged = {**tensors(2.0, "module."), "n_averaged": torch.tensor(7)}
    path = write_torch(tmp_path / "w", {average: averaged, "epoch": 3, raw: tensors()})
    assert assert_holds(path).taken == f"{path} holds {raw} and {average}: {raw} is taken."
    found = assert_holds(path, 2.0, ema=True)
    assert found.taken == f"{path} holds {average} and {raw}: {average} is taken."


def test_averaged_weights_that_are_not_there_are_a_sentence(tmp_path):
    path = write_torch(tmp_path / "w", {"model": tensors()})
    assert assert_holds(path).taken == ""
    with pytest.raises(UserError, match=r"no averaged weights \(model_ema, .*leave out ema"):
        read_weight_file(path, ema=True)
    alone = write_torch(tmp_path / "alone", {"model_ema": tensors(2.0)})
    assert_holds(alone, 2.0, ema=True)


def test_what_training_scripts_keep_beside_weights_is_harmless(tmp_path):
    kept = {
        "best": np.float64(76.0),
        "step": np.int64(3),
        "history": np.arange(3, dtype=np.int16),
        "out": pathlib.Path("runs") / "a",
        "windows": pathlib.PureWindowsPath("C:/a"),
        "meters": collections.defaultdict(list, {"loss": [1.0]}),
        "counts": collections.OrderedDict(collections.defaultdict(int, a=1)),
        "args": argparse.Namespace(lr=np.float32(0.1), out=pathlib.Path("x"), seen={1}),
    }
    for zipped in (True, False):
        options = {"_use_new_zipfile_serialization": zipped}
        assert_holds(write_torch(tmp_path / "w", {**kept, "model": tensors()}, **options))


def test_what_is_refused_is_named_by_its_type_in_a_line_without_terminal_codes(tmp_path):
    for zipped in (True, False):
        options = {"_use_new_zipfile_serialization": zipped}
        content = {"model": tensors(), "ratio": fractions.Fraction(1, 3)}
        path = write_torch(tmp_path / "w", content, **options)
        with pytest.raises(UserError, match="holds a fractions.Fraction, which could") as error:
            read_weight_file(path)
        assert str(error.value).isprintable()
