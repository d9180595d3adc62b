"""metrics.jsonl, whole and damaged."""

import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from sret_jax.run.curves import draw_curves
from sret_jax.run.metrics_file import JsonlWriter, read_metrics

LINES = [{"step": step, "loss": 1.0 / step, "train_seconds": float(step)} for step in (1, 2, 3)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("run"))


def write(workdir, *lines):
    content = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    (workdir / "metrics.jsonl").write_bytes(content)
    return content


def resume(workdir, last_step):
    writer = JsonlWriter(workdir, last_step=last_step)
    writer.write_scalars(last_step + 1, {"loss": 0.5})
    writer.close()


DAMAGED = {
    "cut": b'{"step": 2, "lo',
    "no text": b'\xff\xfe{"step": 2}',
    "zeros": bytes(64),
    "no step": b'{"loss": 1.0}',
    "no number": b'{"step": 2, "loss": "low"}',
    "a broken step": b'{"step": 1.5}',
    "no object": b"[2]",
    "too deep": b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_stops_no_run_and_is_kept_aside(damage, tmp_path, capsys):
    run = epath.Path(tmp_path)
    before = write(run, LINES[0], DAMAGED[damage], LINES[2])
    assert read_metrics(run) == [LINES[0], LINES[2]]
    assert not capsys.readouterr().out  # who only reads is silent
    resume(run, 3)
    assert read_metrics(run) == [LINES[0], LINES[2], {"step": 4, "loss": 0.5}]
    output = capsys.readouterr().out
    assert f"1 of the 3 lines of {run / 'metrics.jsonl'} are damaged and left out" in output
    kept = (run / "metrics_damaged.jsonl").read_text()
    assert kept == before.decode(errors="replace")
    resume(run, 4)
    assert not capsys.readouterr().out  # said once


def test_a_run_that_went_further_loses_the_lines_after_its_checkpoint(tmp_path, capsys):
    run = epath.Path(tmp_path)
    write(run, *LINES)
    resume(run, 1)
    assert read_metrics(run) == [LINES[0], {"step": 2, "loss": 0.5}]
    assert not capsys.readouterr().out and not (run / "metrics_damaged.jsonl").exists()


NUMBERS = st.integers() | st.floats() | st.none() | st.text(max_size=3)
OBJECTS = st.dictionaries(st.sampled_from(["step", "loss", "lr"]), NUMBERS)


@given(st.lists(OBJECTS | st.binary().filter(lambda line: b"\n" not in line), max_size=5))
def test_whatever_the_lines_a_run_goes_on_after_them(workdir, lines):
    write(workdir, *lines)
    resume(workdir, 10**9)
    read = read_metrics(workdir)
    assert {"step": 10**9 + 1, "loss": 0.5} in read
    assert all(isinstance(line["step"], int) for line in read)


def test_curves_are_drawn_of_what_is_readable(tmp_path):
    write(epath.Path(tmp_path), LINES[0], b"damaged", LINES[2])
    assert draw_curves(epath.Path(tmp_path)).exists()
