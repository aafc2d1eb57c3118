"""Ctrl-C and SIGTERM: noted while a step is computed, acted upon between two, and never a traceback."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dpsyngen.errors import Interrupted

GO_ON = "run the same command again to go on"
_SECOND_THOUGHT = 1.0
"""Seconds: a launcher sends its processes the Ctrl-C that the terminal has sent them already, and that is not a second one."""

_Handler = Callable[[int, FrameType | None], None]


@contextmanager
def signals_raised() -> Iterator[None]:
    """While open, SIGTERM and Ctrl-C raise Interrupted wherever the program is; files are complete or absent all the same."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"interrupted; {GO_ON}", number)

    with _handling(stop):
        yield


@contextmanager
def signals_deferred() -> Iterator[Callable[[], int]]:
    """While open, SIGTERM and the first Ctrl-C are only noted; a Ctrl-C more than a second later interrupts at once.

    Yields a function that returns the number of the signal that came, 0 before one has. A signal that nobody acted upon raises
    Interrupted at the end.
    """
    noted, since = 0, 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted, since
        if noted and number == signal.SIGINT and time.monotonic() - since > _SECOND_THOUGHT:
            raise Interrupted(f"interrupted; {GO_ON}", number)
        noted, since = noted or number, since or time.monotonic()

    with _handling(note):
        yield lambda: noted
    if noted:
        raise Interrupted(f"interrupted; {GO_ON}", noted)


@contextmanager
def _handling(handler: _Handler) -> Iterator[None]:
    """Install a handler for both signals, where they aren't ignored (as by nohup) and this thread may; put the old ones back at the end."""
    able = threading.current_thread() is threading.main_thread()
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if able and signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
