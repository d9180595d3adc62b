"""What the exit status of main.py tells a launcher.

0: done. 2: bad input, which starting again does not fix. 75: it was asked to stop (SIGTERM, a
preemption notice), saved a checkpoint and ended; start it again. 76: it hung, or waited in vain for
the other processes, and ended itself.
Whatever else is a crash; 134 is JAX's abort when another process of the run is gone.
"""

BAD_INPUT = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
HUNG = 76
