"""Trains or evaluates SReT: python main.py --config=configs/sret_s.py --workdir=DIR."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sret_jax.tools.train", run_name="__main__")
