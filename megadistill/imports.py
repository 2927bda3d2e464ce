"""Importing torch and what stands on it without what no process of a run needs."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(*unused: str) -> Iterator[None]:
    """Import large packages inside: a third faster, and not scanned for garbage ever after.

    `unused` are packages that others import where they are installed and can do without.
    """
    for name in unused:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
    # Importing allocates millions of objects that stay until the end: collecting meanwhile, or
    # scanning them later, costs seconds and frees nothing.
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
