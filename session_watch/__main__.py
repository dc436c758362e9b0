"""``python -m session_watch`` is ``session-watch``."""

from __future__ import annotations

import sys

from session_watch.cli import main

sys.exit(main())
