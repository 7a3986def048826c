"""Run one command and let nothing of it survive: ``python guard.py CONTROL_FD COMMAND...``.

The guard stands between a launcher and a process tree (a vLLM engine starts several processes). It ends the whole tree,
with SIGINT, then SIGTERM, then SIGKILL, as soon as its control pipe is closed: when the launcher says so, and also when
the launcher itself was killed without a chance to say anything. Orphans of the tree become children of the guard (it
is a subreaper), so that a process that moved to a session of its own is found too.

It uses the standard library only and is run as a file, so that it starts in a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# How long the tree may take after each signal, seconds.
STEPS = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
STOP_SECONDS = sum(seconds for _, seconds in STEPS)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _die_with_guard() -> None:
    """In the child before exec: belt and braces for a guard that is itself killed with SIGKILL."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(root: int, *, zombies: bool = False) -> list[int]:
    """Return the pids of all processes below one, children before grandchildren.

    Args:
        root: The pid to start from; not part of the result.
        zombies: Name those that ended but were not collected, too.

    Returns:
        Their pids.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if zombies or state not in "ZX":
            children.setdefault(int(parent), []).append(int(entry.name))
    found = list(children.get(root, []))
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _reap() -> None:
    """Collect orphans that ended; the command itself is collected by its Popen."""
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if info is None or info.si_pid == _COMMAND.pid:
            return
        os.waitpid(info.si_pid, os.WNOHANG)


def _signal_tree(number: int) -> None:
    for pid in descendants(os.getpid()):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _stop_tree() -> None:
    """End everything below this process, politely at first."""
    for number, seconds in STEPS:
        deadline = time.monotonic() + seconds
        if number == signal.SIGINT and _COMMAND.poll() is None:
            os.kill(_COMMAND.pid, number)  # the command tells its own children
        else:
            _signal_tree(number)
        while time.monotonic() < deadline:
            _COMMAND.poll()
            _reap()
            if not descendants(os.getpid(), zombies=True):
                return
            if number == signal.SIGKILL:
                _signal_tree(number)  # a fork may have slipped through
            time.sleep(0.02)
            if number == signal.SIGINT and _COMMAND.returncode is not None:
                break  # only stragglers are left: no need to wait ten seconds for them


def main() -> int:
    """Run the command until it ends or the control pipe closes.

    Returns:
        The command's exit status (128 + signal number when a signal ended it).
    """
    global _COMMAND
    control = int(sys.argv[1])
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # interrupts the select below
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _COMMAND = subprocess.Popen(sys.argv[2:], preexec_fn=_die_with_guard, process_group=0)  # noqa: PLW1509 - no threads here
    stopping = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    while _COMMAND.poll() is None:
        ready, _, _ = select.select([control, wakeup_read], [], [])
        if control in ready and os.read(control, 64) == b"":
            break
        if wakeup_read in ready and stopping & set(os.read(wakeup_read, 64)):
            break
        _reap()
    _stop_tree()
    code = _COMMAND.poll()
    return 137 if code is None else code if code >= 0 else 128 - code


_COMMAND: subprocess.Popen[bytes]

if __name__ == "__main__":
    sys.exit(main())
