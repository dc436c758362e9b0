"""Which exporter a watch has: that of one process, or that of several workers with a directory in common."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from session_watch.sinks.metrics import Exporter, SingleProcess
from session_watch.sinks.multiprocess import Multiprocess

if TYPE_CHECKING:
    from session_watch.watch import SessionWatch

# The environment variable of prometheus_client.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# The watches that write to the directory: one per process, for what two had counted would be added up.
_writing: weakref.WeakSet[SessionWatch] = weakref.WeakSet()


def chosen(watch: SessionWatch) -> Exporter:
    """The exporter for this watch, as the environment has it now."""
    directory = os.environ.get(VARIABLE, "")
    if not directory or any(other.attached for other in _writing if other is not watch):
        return SingleProcess(watch)
    _writing.add(watch)
    return Multiprocess(watch, directory)
