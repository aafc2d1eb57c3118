"""One script of one cell, in a process that ends when the sweep does: python -m dpsyngen.sweep.child PARENT SCRIPT [ARGUMENTS]."""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for SIGTERM when the sweep dies, even by SIGKILL; then run the script as the command line would.

    Only Linux has that; elsewhere an orphan goes on, and its run directory's lock keeps the next sweep out of it.
    """
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise SystemExit(1)  # it died before it could be watched
    del sys.argv[:2]
    sys.path[0] = os.path.dirname(sys.argv[0])  # noqa: PTH120 - as for a script that is named on the command line
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
