"""A data set that TFDS downloads, from servers with faults."""

import functools
import hashlib
import http.server
import importlib
import sys
import threading

import pytest
from etils import epath

from sret_jax.data.sources.source import open_source
from sret_jax.tools import prepare
from tests.archives import encode, photographs

DATA_SET = """
import tensorflow_datasets as tfds

class DownloadedPhoto(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.download(URL))}

    def _generate_examples(self, path):
        yield 0, {"image": path, "label": 1}
"""


@pytest.fixture
def server(tmp_path):
    """The folder and the address of a web server."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
        ("localhost", 0), functools.partial(Handler, directory=folder)
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://localhost:{running.server_port}", running
        running.shutdown()


def test_a_download_that_fails_is_one_sentence_and_one_that_works_is_read(
    server, tmp_path, monkeypatch, capsys
):
    folder, address, running = server
    photo = encode(photographs(1, seed=0)[0])
    url = f"{address}/photo.jpg"
    package = tmp_path / "downloaded_photo"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "downloaded_photo.py").write_text(f"URL = {url!r}\n{DATA_SET}")
    checksum = hashlib.sha256(photo).hexdigest()
    (package / "checksums.tsv").write_text(f"{url}\t{len(photo)}\t{checksum}\tphoto.jpg\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    importlib.import_module("downloaded_photo.downloaded_photo")

    def fails(data_dir):
        with pytest.raises(SystemExit) as stop:
            prepare.main(["downloaded_photo", f"--data_dir={tmp_path / data_dir}"])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]  # after TFDS's progress

    moved = fails("data")
    assert f"Error: downloaded_photo cannot be downloaded: Failed to get url {url}" in moved
    assert "HTTP code: 404" in moved and "a newer TFDS may know the new one" in moved

    (folder / "photo.jpg").write_bytes(photo[:-100])
    changed = fails("data")
    assert f"Error: what {url} gives is not the published file of downloaded_photo" in changed

    (folder / "photo.jpg").write_bytes(photo)
    prepare.main(["downloaded_photo", f"--data_dir={tmp_path / 'data'}"])
    source = open_source("downloaded_photo", "train", epath.Path(tmp_path / "data"))
    assert source[0] == {"image": photo, "label": 1}

    running.socket.close()
    gone = f"Error: downloaded_photo is downloaded from {address.removeprefix('http://')}, which"
    assert gone in fails("other data")
    (tmp_path / "more data" / "downloads" / "another").mkdir(parents=True)
    assert gone in fails("more data")
