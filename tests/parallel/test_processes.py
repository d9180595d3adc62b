import multiprocessing
import os
import signal
import threading
import time

from sret_jax.parallel.processes import shield_spawned


def test_a_shielded_process_that_starts_outlives_a_signal_to_its_group():
    shield_spawned("shielded-")
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(name="shielded-process", target=time.sleep, args=(0,))
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join()
    os.kill(process.pid, signal.SIGTERM)  # Python itself is still starting in it
    process.join()
    assert process.exitcode == 0
