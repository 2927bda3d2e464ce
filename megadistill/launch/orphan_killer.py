"""Kills a node's processes when the node process itself is killed.

Run by path as a process of its own. Reads `add PID` and `drop PID` lines from the node process;
at the end of that input, which a SIGKILL of the node process brings as well, every process group
still on the list gets SIGKILL. Parent-death signals would miss the children of an engine.
"""

import os
import signal
import sys


def main() -> None:
    """Follow standard input to its end, then kill what is left."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        verb, _, group = line.partition(" ")
        if verb == "add":
            groups.add(int(group))
        else:
            groups.discard(int(group))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
