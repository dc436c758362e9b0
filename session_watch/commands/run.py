"""``session-watch run module:app``: any ASGI app on uvicorn, under watch, with its code unchanged."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from session_watch.commands.parsing import USAGE, lacks

NEEDS = ("uvicorn", "click")
SERVED = "session_watch.commands.served:app"
MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"

DESCRIPTION = """\
Serves an ASGI app on uvicorn as "uvicorn module:app" would, with SessionWatchMiddleware around it. The app is \
imported under watch, and its code is not changed. Every option that is not listed here is uvicorn's own: \
--factory, --workers, --reload, --host, --port, --app-dir, --env-file and the others that "uvicorn --help" lists. \
With --workers it sets PROMETHEUS_MULTIPROC_DIR to a fresh directory, removed at the end, unless it is set already.\
"""
EXITS = """\
Exit status: the server's own; 2 for a command line that cannot be read, or a server that is not installed; 3 if \
the app could not be loaded or started.\
"""


def add_run(commands: Any) -> None:
    """Add ``run`` to the subcommands."""
    run = commands.add_parser(
        "run",
        help="any ASGI app under watch, its code unchanged",
        usage="session-watch run [--metrics-path PATH] [--page-path PATH] module:app [uvicorn's own options]",
        description=DESCRIPTION,
        epilog=EXITS,
        allow_abbrev=False,
    )
    run.hands_on = True
    run.set_defaults(run=_run)
    run.add_argument(
        "--metrics-path",
        metavar="PATH",
        default="/metrics",
        help='where the metrics are answered; "none" exposes nothing (default: %(default)s)',
    )
    run.add_argument(
        "--page-path", metavar="PATH", default="none", help="where the live page is answered (default: %(default)s)"
    )


def _run(arguments: argparse.Namespace) -> int:
    if lacks("run", "run", NEEDS):
        return USAGE
    import click
    from uvicorn.main import main as uvicorn

    try:
        with uvicorn.make_context("session-watch run", list(arguments.handed_on)) as context:
            return _serve(context, arguments)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code


def _serve(context: Any, arguments: argparse.Namespace) -> int:
    """Have uvicorn do what its own command would, but with our app, which imports theirs."""
    options = context.params
    if options.get("interface", "auto") not in ("auto", "asgi3"):
        print(f"session-watch run: --interface {options['interface']} cannot be watched: asgi3 can.", file=sys.stderr)
        return USAGE
    os.environ.update(_told_to_workers(options, arguments))
    options.update(app=SERVED, factory=False)
    with _multiprocess_directory(_workers(options)):
        context.command.invoke(context)
    return 0


def _told_to_workers(options: Mapping[str, Any], arguments: argparse.Namespace) -> Mapping[str, str]:
    return {
        "SESSION_WATCH_APP": options["app"],
        "SESSION_WATCH_FACTORY": str(int(options["factory"])),
        "SESSION_WATCH_METRICS_PATH": arguments.metrics_path,
        "SESSION_WATCH_PAGE_PATH": arguments.page_path,
    }


def _workers(options: Mapping[str, Any]) -> int:
    """As uvicorn counts them."""
    given = options.get("workers") or os.environ.get("WEB_CONCURRENCY", "1")
    return int(given) if str(given).isdecimal() else 1


@contextmanager
def _multiprocess_directory(workers: int) -> Iterator[None]:
    """A directory in which several workers add up their metrics; it must be known before they start."""
    given = os.environ.get(MULTIPROC)
    if workers < 2 or given:
        if given:
            os.makedirs(given, exist_ok=True)
        yield
        return
    with tempfile.TemporaryDirectory(prefix="session-watch-metrics-", ignore_cleanup_errors=True) as directory:
        os.environ[MULTIPROC] = directory
        try:
            yield
        finally:
            del os.environ[MULTIPROC]
