"""Calls of functions of the user's that end within a deadline."""

import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any


class DeadlineExceeded(Exception):
    """A call had not returned when its time was over."""


class _Overdue(BaseException):
    """Raised inside an overdue call: no Exception, so that a function that catches those ends too."""


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns. Raises `DeadlineExceeded` after so many seconds.

    In the main thread the call is made there, where functions may use signals, and signals end it: SIGUSR2 from a
    thread, and SIGVTALRM from the system's timer of processor time for what lets no other thread run (a regular
    expression). So sleeping, waiting for a server, Python code and regular expressions all end; a C function that looks
    for no signal does not. In any other thread the call gets a thread of its own, which is left behind: Python cannot
    end it.
    """
    if threading.current_thread() is threading.main_thread():
        return _interrupted(seconds, call)
    return _left_behind(seconds, call)


def _interrupted(seconds: float, call: Callable[[], Any]) -> Any:
    caller, done, end = threading.get_ident(), threading.Event(), time.monotonic() + seconds

    def interrupt(number, frame):
        if time.monotonic() >= end and not done.is_set():
            raise _Overdue

    def watch():
        if done.wait(seconds):
            return
        while True:  # again and again, for a function that catches everything
            signal.pthread_kill(caller, signal.SIGUSR2)
            if done.wait(1.0):
                return

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGUSR2, signal.SIGVTALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    watcher = threading.Thread(target=watch, name="reward deadline", daemon=True)
    watcher.start()
    try:
        result = call()
        done.set()
        return result
    except _Overdue:
        raise DeadlineExceeded from None
    finally:
        done.set()
        watcher.join()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _left_behind(seconds: float, call: Callable[[], Any]) -> Any:
    found: queue.SimpleQueue = queue.SimpleQueue()

    def work():
        try:
            found.put((True, call()))
        except BaseException as error:  # handed to the caller, whatever it is
            found.put((False, error))

    threading.Thread(target=work, name="reward", daemon=True).start()
    try:
        whole, value = found.get(timeout=seconds)
    except queue.Empty:
        raise DeadlineExceeded from None
    if whole:
        return value
    raise value
