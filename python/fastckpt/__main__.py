"""`fastckpt` and `python -m fastckpt`: the command line.

Law: while modules are imported nothing is at work, and Ctrl-C ends the process without a traceback.
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the process's own command line and return its exit code."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import INTERRUPTED, main

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:  # a second signal, heard when all was put in order already
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
