import signal
import socket
import time

from tests.conftest import run_python


def test_a_process_whose_peers_never_come_is_ended_by_jax_after_the_start_timeout(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start = time.monotonic()
    done = run_python(
        "main.py",
        f"--workdir={tmp_path}",
        f"--coordinator=localhost:{port}",
        "--processes=2",
        "--process_id=0",
        "--start_timeout=5",
    )
    assert done.returncode == -signal.SIGABRT, done.stdout + done.stderr
    assert time.monotonic() - start < 60
    assert not list(tmp_path.iterdir())
