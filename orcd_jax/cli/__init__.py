"""``orcd``: a client for people and scripts. Runs jobs on a worker and shows how it is.

Nothing that takes time is imported here: the first characters of an answer are worth it.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from orcd_jax.errors import ExitCode


def run() -> NoReturn:
    """The entry point: runs ``orcd`` with the process's own arguments and ends the process with its exit code."""
    try:
        code = _main()
    except KeyboardInterrupt:  # while modules are imported; later ones are handled where there is a job to cancel
        code = ExitCode.INTERRUPTED
    try:
        sys.stdout.flush()
    except OSError:
        # The reader is gone, which is no news. Python would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _main() -> ExitCode:
    import io
    import logging

    from orcd_jax.cli.main import main

    logging.getLogger().addHandler(logging.NullHandler())  # libraries report to the caller, not to the terminal
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding does not
    return main(sys.argv[1:])
