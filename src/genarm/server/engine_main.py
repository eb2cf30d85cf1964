"""What an engine's process does first; it imports nothing heavy, so that the maker's module comes before libraries.

A command keeps libraries quiet that speak while they are imported, and signals are the server's from the first moment.
"""

from __future__ import annotations

import pickle
import signal
import sys
from multiprocessing.connection import Connection

TURN = 5e-5
"""Seconds after which a thread lets another one have the interpreter.

An engine gives it up for each operation on tensors and has to have it back for the next; with Python's own 5 ms, every
one of them may wait so long for the thread beside it, and a request to begin for the engine.
"""


def main(pipe: Connection, make: bytes) -> None:
    """Make an engine by the pickled `make` and run it until the server closes `pipe`."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service; the server ends this one
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(TURN)
    maker = pickle.loads(make)
    from genarm.server.engine_process import run_engine

    run_engine(pipe, maker)
