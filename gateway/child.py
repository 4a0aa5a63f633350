"""Python in a process of its own, for what takes libraries that a daemon need not hold once it has the answer.

The child is this interpreter and this code; its answer is what it writes to standard output, its log goes where ours
does. Knows nothing of what is asked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from gateway.errors import LinesideError

_ROOT: Final = Path(__file__).resolve().parent.parent


class ChildError(LinesideError):
    """The child gave no answer: it could not be started, was ended, failed, or took too long."""


class Child:
    """`python -m MODULE ARGUMENT...`, running since this was made; `answer` waits for it. Raises ChildError."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._module = module
        try:
            self._process = subprocess.Popen(
                _command(module, arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=_environment()
            )
        except OSError as error:
            raise _not_started(module, error) from error

    def answer(self, timeout_s: float) -> bytes:
        """All that it wrote. Raises ChildError."""
        try:
            answer, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise _too_slow(self._module, timeout_s) from None
        finally:
            if self._process.returncode is None:
                self._process.kill()
                self._process.wait()
        return _checked(self._module, self._process.returncode, answer)


async def ask(module: str, *arguments: str, timeout_s: float) -> bytes:
    """As Child, without holding the loop. The child ends with the task that asks."""
    import asyncio  # not at the top: a start begins its child before it has imported that

    try:
        process = await asyncio.create_subprocess_exec(
            *_command(module, arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=_environment(),
        )
    except OSError as error:
        raise _not_started(module, error) from error
    try:
        async with asyncio.timeout(timeout_s):
            answer, _ = await process.communicate()
    except TimeoutError:
        raise _too_slow(module, timeout_s) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()  # until it is gone, and its pipe with it
    assert process.returncode is not None
    return _checked(module, process.returncode, answer)


def _command(module: str, arguments: tuple[str, ...]) -> list[str]:
    # -P: `-m` would have modules looked for in the working directory first, wherever that is.
    return [sys.executable, "-P", "-m", module, *arguments]


def _environment() -> dict[str, str]:
    """Ours, with this very code before any other of the same name."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))}


def _checked(module: str, status: int, answer: bytes) -> bytes:
    if status == 0:
        return answer
    if status > 0:
        raise ChildError(f"the child process {module} failed with exit status {status}")
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    why = "; is there memory enough?" if -status == signal.SIGKILL else ""
    raise ChildError(f"the child process {module} was ended by {name}{why}")


def _not_started(module: str, error: OSError) -> ChildError:
    return ChildError(f"the child process {module} could not be started: {error.strerror or error}")


def _too_slow(module: str, timeout_s: float) -> ChildError:
    return ChildError(f"the child process {module} gave no answer within {timeout_s:g} s")
