"""Which exporter a watch has: that of one process, or that of several workers with a directory in common."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from session_watch.sinks.metrics import Exporter, SingleProcess

if TYPE_CHECKING:
    from session_watch.watch import SessionWatch

# The environment variable of prometheus_client.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# The watches that write to the directory: one per process, for what two had counted would be added up.
_writing: weakref.WeakSet[SessionWatch] = weakref.WeakSet()


def chosen(watch: SessionWatch, before: Exporter | None = None) -> Exporter:
    """The exporter for this watch, as the environment has it now; the one of ``before`` if it still is right."""
    directory = os.environ.get(VARIABLE, "")
    if not directory or any(other.attached for other in _writing if other is not watch):
        return before if isinstance(before, SingleProcess) else SingleProcess(watch)
    # Few processes have such a directory, and this is no small import.
    from session_watch.sinks.multiprocess import Multiprocess

    if isinstance(before, Multiprocess) and before.directory == Path(directory):
        return before  # it knows what it has written
    _writing.add(watch)
    return Multiprocess(watch, directory)
