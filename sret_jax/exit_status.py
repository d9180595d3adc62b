"""The exit statuses of main.py, for launchers.

0: done. 2: bad input; starting again does not help. 75: the run was asked to stop (SIGTERM, a
preemption notice), saved a checkpoint and ended; start it again. 76: the run hung, or waited in
vain for the other processes, and ended itself.
Any other status is a crash. 134 is JAX's abort after another process of the run was lost.
"""

BAD_INPUT = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h
HUNG = 76
