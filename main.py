"""Trains SReT, or evaluates what was trained: python main.py --config=sret_s --workdir=DIR."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sret_jax.tools.train", run_name="__main__")
