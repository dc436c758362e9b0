"""``session-watch doctor``: whether it works here, what is off, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from session_watch.commands.parsing import HEALTHY, PROBLEM
from session_watch.commands.terminal import bold, paragraph
from session_watch.doctor import Check, Section, problems

SCHEMA = 1
DESCRIPTION = """\
Proves on an engine of its own that a finding, its log line and its metric arrive, and looks at versions and \
environment variables. Given an app, it imports it, as a server would, and looks whether the middleware is there and \
outermost, which rules are off, and which pools there are; given a URL, it reads the metrics there. It adds nothing \
to either, and changes nothing.\
"""
EXITS = "Exit status: 0; 1 if something is wrong; 2 for a command line that cannot be read."


def add_doctor(commands: Any) -> None:
    """Add ``doctor`` to the subcommands."""
    doctor = commands.add_parser(
        "doctor",
        help="whether it works here, what is off, and why",
        description=DESCRIPTION,
        epilog=EXITS,
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("target", nargs="?", metavar="module:app or URL", help="what to look at (default: only here)")
    doctor.add_argument("--factory", action="store_true", help="module:app is a factory")
    doctor.add_argument("--app-dir", metavar="DIR", default="", help="where modules are looked for (default: here)")
    doctor.add_argument("--json", action="store_true", help="as a JSON object, for programs")


def _doctor(arguments: argparse.Namespace) -> int:
    sections = _looked_at(arguments)
    found = problems(sections)
    if arguments.json:
        told = {"schema": SCHEMA, "problems": found, "sections": [asdict(section) for section in sections]}
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(_printed(sections)))
    return PROBLEM if found else HEALTHY


def _looked_at(arguments: argparse.Namespace) -> list[Section]:
    from session_watch.doctor import application, installation, proof, served

    target = arguments.target or ""
    is_url = target.startswith(("http://", "https://"))
    here = installation.environment(rules=is_url or not target)  # an app may have settings of its own
    sections = [installation.installation(), here, proof.proof()]
    if is_url:
        sections.append(served.served(target))
    elif target:
        sys.path.insert(0, arguments.app_dir)
        sections.append(application.application(target, factory=arguments.factory))
    return sections


def _printed(sections: Sequence[Section]) -> Iterator[str]:
    for section in sections:
        yield bold(section.title)
        yield from map(_line, section.checks)
        yield ""
    found = problems(sections)
    yield bold("All is well." if not found else "1 problem." if found == 1 else f"{found} problems.")


def _line(check: Check) -> str:
    head, *more = check.what.splitlines()
    lines = [paragraph(head, first=f"  {check.state:<5}  ", rest=" " * 9), *(f"         {line}" for line in more)]
    if check.do:
        lines.append(paragraph(check.do, first="         -> ", rest=" " * 12))
    return "\n".join(lines)
