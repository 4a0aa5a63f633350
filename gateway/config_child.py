"""`python -m gateway.config_child FILE`: reads a configuration for `config_reading`.

Writes a pickle: the finished `Config`, or every `Problem` in the file.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
from pathlib import Path


def main(path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # who is told to stop, or waits no more, is our parent: no trace of ours
    gc.disable()  # what is made here is needed until the end, and that is near
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no part of the answer
    from gateway.config import ConfigErrors, load

    answer: object
    try:
        answer = load(path)
    except ConfigErrors as errors:
        answer = errors.problems
    with out:
        pickle.dump(answer, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # taking the interpreter down is a tenth of the time that a starting daemon waits
