"""A run of pytest under watch: each test's verdicts, at its teardown, in the summary, across xdist's workers."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from session_watch import baseline, suite_report
from session_watch.baseline import Known
from session_watch.findings import Finding
from session_watch.ledger import Ledger
from session_watch.raising import DEMANDED, SessionLeakError, SessionLeakWarning
from session_watch.rule_names import check_rule
from session_watch.settings import SettingsError
from session_watch.suite_report import Verdict
from session_watch.suite_watch import Charge, Court, SuiteWatch, raised_in, suite_settings, worth_telling

MARK = "session_watch"
NOWHERE = "no test"
NOTHING_RAISED: frozenset[str] = frozenset()
TOLD_AS: dict[type[BaseException], str] = {SessionLeakError: "error", SessionLeakWarning: "warning"}
# What chooses among the tests: a run with one of these proves nothing of the others.
CHOICES = ("keyword", "markexpr", "deselect", "lf", "last_failed", "stepwise")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line or in the ini file."""

    mode: str
    baseline: Path | None = None
    update: bool = False
    report: Path | None = None


class SuiteSession:
    """The plugin's half that is there only when tests are judged."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self.config = config
        self.options = options
        self.is_worker = hasattr(config, "workerinput")
        self.known = _known(options)
        self.court = Court(fails=options.mode == "fail", known=self.known, recording=options.update)
        if not self.is_worker:
            _check_writable(options)
        self.watch = SuiteWatch(_settings()).attach()
        self.allowed: dict[str, frozenset[str]] = {}
        self.ended: list[tuple[Any, Ledger]] = []
        self.late: list[Verdict] = []
        self.verdicts: list[Verdict] = []
        self.judged = 0
        # Of the test that runs.
        self.raised, self.fails_as_expected = NOTHING_RAISED, False
        self.reporting: Reporting | None = None

    def pytest_report_header(self) -> str:
        """Say that tests are judged, and against what."""
        if not self.watch.attached:
            return "session_watch: off, by its environment variables"
        path = self.options.baseline
        known = "" if path is None else f", baseline {path.name} ({len(self.known)} known)"
        return f"session_watch: {self.options.mode}{known}"

    def pytest_unconfigure(self) -> None:
        """Take every listener off again."""
        self.watch.detach()

    # Before any test runs

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Read the markers, and refuse a wrong one."""
        for item in items:
            if rules := _allowed_in(item):
                self.allowed[item.nodeid] = rules

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Refuse a marker in a worker of xdist, too: only an error of its collection reaches the terminal."""
        report = yield
        if self.is_worker:
            try:
                for item in report.result or ():
                    if isinstance(item, pytest.Item):
                        _allowed_in(item)
            except pytest.UsageError as error:
                report.outcome, report.longrepr, report.result = "failed", str(error), []
        return report

    # Judging

    def scope_ended(self, node: Any, ledger: Ledger) -> None:
        """The last fixture of a class, module, package or session is torn down; the test that did it tells of it."""
        self.ended.append((node, ledger))

    def judge(self, item: pytest.Item, ledger: Ledger, failure: BaseException | None) -> None:
        """Judge a test and the scopes that ended with it. Raises SessionLeakError, or warns, as asked.

        Where the teardown has failed by itself (``failure``), that stays what is raised.
        """
        self.watch.settle(ledger)
        allowed = {ledger.label: self.allowed.get(item.nodeid, frozenset()), **self._settle_scopes()}
        verdicts = []
        for charge in worth_telling(self.watch.take()):
            test = _charged(charge, ledger.label)
            if test in allowed:
                raised = self.raised.union(DEMANDED) if test == ledger.label else ()
                verdict = self.court.verdict(charge, test, allowed=allowed[test], raised=raised)
                verdicts.append((self._excused(verdict, ledger.label), charge.finding))
            else:
                self._judge_late(charge)
        DEMANDED.clear()
        self._report(item, [verdict for verdict, _ in verdicts])
        self._tell(item, verdicts, failure)

    def _settle_scopes(self) -> dict[str, frozenset[str]]:
        """Judge the scopes that ended; what the markers of each allow, by its label."""
        ended, self.ended = self.ended, []
        for _, ledger in ended:
            self.watch.settle(ledger)
        return {ledger.label: _allowed_in(node) for node, ledger in ended}

    def _excused(self, verdict: Verdict, label: str) -> Verdict:
        """A test that has failed as it is expected to stays one expected failure."""
        expected = self.fails_as_expected and verdict.test == label
        return replace(verdict, fate="excused") if expected and verdict.fate == "error" else verdict

    def _report(self, item: pytest.Item, verdicts: list[Verdict]) -> None:
        """Have the teardown's report show them. The hook for that costs every test, so it waits for the first."""
        if verdicts and self.reporting is None:
            self.reporting = Reporting()
            self.config.pluginmanager.register(self.reporting, "session_watch_reporting")
        if self.reporting is not None:
            self.reporting.verdicts[item.nodeid] = verdicts

    def _judge_late(self, charge: Charge) -> None:
        """What an earlier test did is told of that test, in the summary: its reports are out."""
        test = charge.test or NOWHERE
        self.late.append(self.court.verdict(charge, test, allowed=self.allowed.get(test, ())))

    def _tell(
        self, item: pytest.Item, verdicts: Sequence[tuple[Verdict, Finding]], failure: BaseException | None
    ) -> None:
        errors = [finding for verdict, finding in verdicts if verdict.fate == "error"]
        if failure is not None and errors:
            item.add_report_section("teardown", MARK, _text(errors))
        elif errors:
            raise SessionLeakError(errors)
        elif self.options.mode == "warn":
            _warn(item, [finding for verdict, finding in verdicts if verdict.fate == "warning"], failure)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        """Note what the test itself has raised."""
        if call.when == "setup":
            self.raised, self.fails_as_expected = NOTHING_RAISED, False
        if call.excinfo is not None and call.when != "teardown":
            self.raised |= raised_in(call.excinfo.value)
            self.fails_as_expected = not isinstance(call.excinfo.value, pytest.skip.Exception)

    def pytest_exception_interact(self, call: pytest.CallInfo[None]) -> None:
        """Pytest comes here for each failure, save those that are expected."""
        if call.when != "teardown":
            self.fails_as_expected = False

    # Telling

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect what tests were told, here or in a worker; what a rerun has forgiven is forgotten."""
        if report.when == "teardown":
            self.judged += 1
            told: Iterable[dict[str, Any]] = getattr(report, "session_watch", ())
            forgiven = str(report.outcome) == "rerun"
            self.verdicts.extend(v for v in (Verdict(**each) for each in told) if not (forgiven and v.fate == "error"))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker has found when its tests were over."""
        output = getattr(node, "workeroutput", None) or {}
        self.late.extend(Verdict(**each) for each in output.get(MARK, ()))

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Judge what outlived the last test, and write the files."""
        result = yield
        scopes = self._settle_scopes()
        for charge in worth_telling(self.watch.take()):
            test = charge.test or NOWHERE
            allowed = scopes.get(test) or self.allowed.get(test, frozenset())
            self.late.append(self.court.verdict(charge, test, allowed=allowed))
        if self.is_worker:
            self.config.workeroutput[MARK] = [asdict(verdict) for verdict in self.late]  # type: ignore[attr-defined]
            return result
        self.verdicts.extend(self.late)
        if any(verdict.fate == "error" for verdict in self.late) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self._write(session)
        return result

    def _write(self, session: pytest.Session) -> None:
        if self.options.report is not None:
            text = suite_report.report(self.options.mode, self.judged, self.verdicts)
            self.options.report.write_text(text, encoding="utf-8")
        if self.options.update and self.options.baseline is not None:
            found = [_as_known(verdict) for verdict in self.verdicts if verdict.fate == "recorded"]
            known = baseline.merged(self.known, found, complete=self.judged > 0 and _is_complete(session))
            baseline.write(self.options.baseline, known)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Tell each cause once; nothing when there is nothing to tell."""
        lines = suite_report.summary(self.verdicts)
        if lines:
            terminalreporter.write_sep("=", "session_watch")
            for line in lines:
                terminalreporter.write_line(line)
        if self.options.update:
            terminalreporter.write_line(f"session_watch: wrote {self.options.baseline}")


class Reporting:
    """Shows in the report of a teardown what the test has left; there from the first such test on."""

    def __init__(self) -> None:
        self.verdicts: dict[str, list[Verdict]] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Show it as people read it, and send it along as data."""
        report = yield
        if call.when == "teardown":
            verdicts = self.verdicts.pop(item.nodeid, [])
            report.session_watch = [asdict(verdict) for verdict in verdicts]  # type: ignore[attr-defined]
            raised = None if call.excinfo is None else TOLD_AS.get(type(call.excinfo.value))
            told = [verdict for verdict in verdicts if verdict.fate == raised]
            if call.excinfo is not None and told:
                _show(report, call.excinfo, told)
                _keep_failed(report, told, item)
        return report


def _known(options: Options) -> dict[str, Known]:
    path = options.baseline
    if options.update and path is None:
        raise pytest.UsageError(
            "--session-watch-update-baseline needs the file to write: --session-watch-baseline=FILE."
        )
    if path is None or (options.update and not path.exists()):
        return {}
    try:
        return baseline.read(path)
    except OSError as error:
        raise pytest.UsageError(
            f"--session-watch-baseline: cannot read {path} ({error.strerror}); "
            "--session-watch-update-baseline writes it."
        ) from None
    except ValueError as error:
        raise pytest.UsageError(f"--session-watch-baseline: {error}") from None


def _check_writable(options: Options) -> None:
    """Try now what would else fail when every test has run."""
    wanted = (("--session-watch-report", options.report), ("--session-watch-baseline", options.baseline))
    for name, path in wanted[: 1 + options.update]:
        if path is not None:
            try:
                _try_to_write(path)
            except OSError as error:
                raise pytest.UsageError(f"{name}: cannot write {path} ({error.strerror}).") from None


def _try_to_write(path: Path) -> None:
    """Leave what is there as it is, and nothing where nothing was."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8"):
        pass
    if is_new:
        path.unlink()


def _settings() -> Any:
    try:
        return suite_settings()
    except SettingsError as error:
        raise pytest.UsageError(str(error)) from None


def _allowed_in(node: Any) -> frozenset[str]:
    return frozenset(rule for mark in node.iter_markers(MARK) for rule in _allowed_by(mark, node))


def _allowed_by(mark: pytest.Mark, node: Any) -> Iterator[str]:
    """The rules a marker allows. Raises pytest.UsageError that names the test and what is accepted."""
    place = f"@pytest.mark.session_watch of {node.nodeid}"
    rules = mark.kwargs.get("allow")
    given = set(mark.kwargs) - {"allow", "reason"}
    if mark.args or given or not isinstance(rules, list | tuple) or not rules:
        raise pytest.UsageError(f'{place}: accepted is allow=["left-open", ...], reason="...".')
    if not isinstance(mark.kwargs.get("reason"), str) or not mark.kwargs["reason"].strip():
        raise pytest.UsageError(f"{place}: reason={mark.kwargs.get('reason')!r}; a sentence that says why is accepted.")
    for rule in rules:
        try:
            yield check_rule(rule, field=f"{place}, allow")
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def _charged(charge: Charge, running: str) -> str | None:
    """Who is charged: the test the work ran in. A server that knows of no test serves the one that runs."""
    if charge.test is None and charge.finding.work_kind != "outside":
        return running
    return charge.test


def _text(findings: Iterable[Finding]) -> str:
    return "\n\n".join(suite_report.told(finding.as_dict()) for finding in findings)


def _warn(item: pytest.Item, findings: Iterable[Finding], failure: BaseException | None) -> None:
    """Warn at the line of each finding. Where warnings are errors the first is raised, when all are told."""
    raised = None
    for finding in findings:
        path, line = suite_report.place_of(suite_report.site_of(finding.as_dict()))
        message = SessionLeakWarning(f"[{finding.rule} {finding.fingerprint}] {finding.summary}")
        try:
            warnings.warn_explicit(message, None, path or str(item.path), line)
        except SessionLeakWarning as warning:
            raised = raised or warning
    if raised is not None and failure is None:
        raise raised


def _show(report: pytest.TestReport, excinfo: pytest.ExceptionInfo[BaseException], errors: Sequence[Verdict]) -> None:
    """Put what happened, and its lines, where pytest would show where in this plugin it was raised."""
    shown: Any = excinfo.getrepr(style="value")
    crash, first = shown.reprcrash, errors[0].finding
    crash.path, crash.lineno = suite_report.place_of(suite_report.site_of(first))
    crash.message = f"{first['rule']}: {first['summary']}"
    text = "\n\n".join(suite_report.told(verdict.finding) for verdict in errors)
    shown.reprtraceback.reprentries[0].lines[:] = text.splitlines()
    report.longrepr = shown


def _keep_failed(report: pytest.TestReport, verdicts: Iterable[Verdict], item: pytest.Item) -> None:
    """A test that is expected to fail is no excuse for the module or class that ends with it."""
    if hasattr(report, "wasxfail") and any(verdict.test != item.nodeid for verdict in verdicts):
        del report.wasxfail
        report.outcome = "failed"


def _as_known(verdict: Verdict) -> Known:
    return Known(rule=verdict.finding["rule"], where=verdict.where, fingerprint=verdict.cause)


def _is_complete(session: pytest.Session) -> bool:
    """Whether every test of the suite was to run, and did."""
    config = session.config
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    chosen = any(config.getoption(name, None) for name in CHOICES)
    ran = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return ran and not (named or chosen or session.shouldfail or session.shouldstop)
