"""Every rank but the first: loads its part, then does what the first one does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from ...runtime.backend import BackendUnavailableError
from ..checkpoint import open_checkpoint
from ..load import load_part
from .backend import follow
from .group import RankGroup

__all__ = ["main"]

_LOAD_ERRORS = (ValueError, OSError, MemoryError, BackendUnavailableError)


def main() -> int:
    """Follows the first rank of the group that the environment names.

    Returns:
        The exit code: 0 when the first rank has ended well.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first rank's
    logging.getLogger("llamac").setLevel(logging.ERROR)  # it says the same
    group, setup = RankGroup.join()
    try:
        checkpoint = open_checkpoint(setup.pop("source"), adapter=setup.pop("adapter"))
        group.connect(setup["device"])
        backend, _ = load_part(checkpoint, group, **setup)
    except _LOAD_ERRORS as error:
        group.fail(str(error) or type(error).__name__)
        return 1
    with group.guarded():
        follow(backend, group)
    group.close()
    return 0


def _end_with_leader() -> None:
    """Until it has found the others, a rank has nothing but its standard input to miss them by."""
    os.read(0, 1)  # not of Python's stream, which is locked while it waits
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_leader, daemon=True).start()
    sys.exit(main())
