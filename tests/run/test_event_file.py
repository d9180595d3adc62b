"""Event files, read by TensorBoard's own reader."""

from etils import epath
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.util.tensor_util import make_ndarray

from sret_jax.run.event_file import EventWriter


def scalars(path):
    """(step, name, value) of each scalar in an event file; the checksums must be right."""
    reader, found = PyRecordReader_New(str(path)), []
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            return found
        event = Event.FromString(reader.record())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name in ("scalars", "")
            found.append((event.step, value.tag, float(make_ndarray(value.tensor))))


def test_tensorboard_reads_each_scalar_once_flushed_and_each_start_has_its_file(tmp_path):
    folder = epath.Path(tmp_path / "tensorboard")
    writer = EventWriter(folder)
    writer.write_scalars(1, {"loss": 0.5, "lr": 0.25})
    writer.flush()
    (file,) = folder.iterdir()
    assert scalars(file) == [(1, "loss", 0.5), (1, "lr", 0.25)]
    writer.write_scalars(2**40, {"loss": 2.0})
    writer.close()
    assert scalars(file)[2:] == [(2**40, "loss", 2.0)]
    EventWriter(folder).close()
    assert len(list(folder.iterdir())) == 2
