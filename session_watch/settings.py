"""What may be tuned: every setting with its default, where it may come from, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeVar, cast

from session_watch.rule_names import OPT_IN, RULE_NAMES, check_rule, nearest, refusal

LogFormat = Literal["json", "console"]

PREFIX = "SESSION_WATCH_"
"""A field's variable is this and the field's name in capitals."""

NOT_FIELDS: tuple[str, ...] = ("LOG", "TOKEN", "HOSTS", "DIR", "APP", "FACTORY", "METRICS_PATH", "PAGE_PATH")
"""Variables, without the prefix, that are known and are no setting."""

LIVE_RULES: frozenset[str] = frozenset({"held-too-long", "idle-in-transaction", "held-after-response"})
"""The rules whose threshold ``Ignore(up_to=...)`` may raise."""

# Kubernetes gives every pod such variables for a service that happens to be called "session-watch".
_KUBERNETES = ("PORT", "SERVICE_")

_BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "WEBSOCKET")

_T = TypeVar("_T")


class SettingsError(ValueError):
    """A setting has a value that is not accepted."""


class SessionWatchConfigWarning(UserWarning):
    """The environment has a ``SESSION_WATCH_*`` variable that means nothing."""


def _refused(name: str, given: object, accepted: str, *, among: Iterable[str] = ()) -> SettingsError:
    return SettingsError(refusal(name, given, accepted, among=among))


# --- Globs ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _pattern(glob: str) -> re.Pattern[str]:
    """``glob`` for ``fullmatch``: ``*`` is any text, ``?`` any one character, everything else is itself.

    A path comes from outside, so matching must not be made slow by one: a part between two stars is
    taken at its first place and not tried at another (a lookahead never backtracks), which is enough.
    """
    first, *rest = map(_between_stars, glob.split("*"))
    if not rest:
        return re.compile(first, re.DOTALL)
    inner = "".join(f"(?=(?P<p{n}>.*?{part}))(?P=p{n})" for n, part in enumerate(rest[:-1]))
    return re.compile(f"{first}{inner}.*{rest[-1]}", re.DOTALL)


def _between_stars(text: str) -> str:
    return "".join("." if char == "?" else re.escape(char) for char in text)


def _fits(glob: str, text: str) -> bool:
    return glob == "*" or _pattern(glob).fullmatch(text) is not None


def _has_wild_card(text: str) -> bool:
    return "*" in text or "?" in text


# --- Checks: (name for the message, value) -> the value as it is kept -----------------------------

_Check = Callable[[str, object], object]


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refused(name, value, f"True or False, in the environment one of {', '.join(_BOOLEANS)}")
    return value


def _seconds(name: str, value: object) -> float:
    # bool is an int to Python; ``pool_wait=True`` is a slip to everybody else.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_positive_and_finite(value):
        raise _refused(name, value, "a finite number of seconds above 0, such as 1.5")
    return value


def _is_positive_and_finite(value: float) -> bool:
    try:
        return value > 0 and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _count(least: int) -> _Check:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _refused(name, value, f"a whole number, {least} or more")
        return value

    return check


def _one_of(*accepted: str) -> _Check:
    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in accepted:
            raise _refused(name, value, ", ".join(map(repr, accepted)), among=accepted)
        return value

    return check


def _each(check: _Check, example: str) -> _Check:
    """A tuple or list of what ``check`` accepts, kept as a tuple."""

    def check_all(name: str, value: object) -> tuple[object, ...]:
        if not isinstance(value, (tuple, list)):
            raise _refused(name, value, f"a tuple, such as ({example},): mind the comma")
        return tuple(check(name, item) for item in value)

    return check_all


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refused(name, value, "text")
    return value


def check_text(name: str, value: object) -> str:
    """``value`` if it is text that is not empty; ``name`` is what the message calls it. Raises SettingsError."""
    if not isinstance(value, str) or not value.strip():
        raise _refused(name, value, "text that is not empty")
    return value


def _rule(name: str, value: object) -> str:
    try:
        return check_rule(cast("str", value), field=name)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _opt_in_rule(name: str, value: object) -> str:
    rule = _rule(name, value)
    if rule not in OPT_IN:
        raise _refused(name, rule, f"{', '.join(sorted(OPT_IN))} (every other rule is on already)")
    return rule


def _path_glob(name: str, value: object) -> str:
    glob = check_text(name, value)
    if not glob.startswith(("/", "*", "?")):
        among = (f"/{glob}",)
        raise _refused(name, glob, "a path that starts with '/', with * and ? as wild cards", among=among)
    return glob


def _package(name: str, value: object) -> str:
    package = check_text(name, value)
    if not all(part.isidentifier() for part in package.split(".")):
        among = (package.replace("-", "_"),) if "-" in package else ()
        raise _refused(name, package, "a package as it is imported, such as 'shop' or 'shop.db'", among=among)
    return package


def _header(name: str, value: object) -> str:
    header = check_text(name, value)
    if re.fullmatch(r"[0-9A-Za-z!#$%&'*+.^_`|~-]+", header) is None:
        raise _refused(name, header, "the name of an HTTP header, such as 'x-request-id'")
    return header.lower()  # ASGI tells header names in lower case


def _ignore(name: str, value: object) -> Ignore:
    if not isinstance(value, Ignore):
        raise _refused(name, value, "Ignore(...)")
    return value


# --- Readers: (variable, its text) -> a value for the check ---------------------------------------
# What cannot be read is handed on as it is: the check refuses it and says what would be accepted.

_Read = Callable[[str, str], object]


def _read_text(_variable: str, text: str) -> str:
    return text


def _read_boolean(_variable: str, text: str) -> bool | str:
    return _BOOLEANS.get(text.lower(), text)


def _read_float(_variable: str, text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _read_int(_variable: str, text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _read_names(_variable: str, text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _read_ignores(variable: str, text: str) -> tuple[Ignore, ...]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise _refused(variable, text, 'a JSON list such as [{"rule": "left-open", "reason": "..."}]')
    return tuple(_read_ignore(f"{variable}[{n}]", entry) for n, entry in enumerate(entries))


def _read_ignore(place: str, entry: object) -> Ignore:
    if not isinstance(entry, dict):
        raise _refused(place, entry, 'an object such as {"rule": "left-open", "reason": "..."}')
    keys = tuple(f.name for f in fields(Ignore))
    for key in entry:
        if key not in keys:
            raise _refused(place, key, ", ".join(keys), among=keys)
    # A field left out is checked as None, which none that is required accepts.
    given = {**{f.name: None for f in fields(Ignore) if f.default is MISSING}, **entry}
    try:
        return Ignore(**given)
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None


# --- Ignore --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ignore:
    """Findings that are known and accepted. All that is given must match.

    ``rule`` is a rule's name or a glob over the names; ``method``, ``route`` and ``site`` are globs. In a
    glob ``*`` stands for any text and ``?`` for one character; case counts and brackets are only brackets.
    A site is met by its whole text (``app/db.py:41 in get_db``), its path (``app/db.py``) or its function
    (``app.db:get_db``). ``up_to``, in seconds, accepts a live finding only until its age is above it.

    Raises SettingsError (a ValueError) for what could never match and for an empty ``reason``.
    """

    rule: str
    _: KW_ONLY
    fingerprint: str | None = None
    method: str = "*"
    route: str = "*"
    site: str = "*"
    up_to: float | None = None
    reason: str

    def __post_init__(self) -> None:
        rules = _rules_named("Ignore.rule", self.rule)
        _string("Ignore.route", self.route)
        check_text("Ignore.site", self.site)
        check_text("Ignore.reason", self.reason)
        _check_method("Ignore.method", self.method)
        if self.fingerprint is not None:
            object.__setattr__(self, "fingerprint", _fingerprint("Ignore.fingerprint", self.fingerprint))
        if self.up_to is not None:
            check_up_to("Ignore.up_to", self.up_to, rules)

    def matches(
        self, *, rule: str, fingerprint: str, method: str, route: str, sites: Iterable[tuple[str, str]]
    ) -> bool:
        """Whether this is about such a finding; each site is its text and its ``module:function``.

        ``up_to`` plays no part here: it is for whoever knows the finding's age.
        """
        return (
            self.fingerprint in (None, fingerprint)
            and _fits(self.rule, rule)
            and _fits(self.method, method)
            and _fits(self.route, route)
            and (self.site == "*" or any(_fits_site(self.site, *site) for site in sites))
        )

    def line(self) -> str:
        """The source line that makes this again."""
        named = [(f, getattr(self, f.name)) for f in fields(self) if f.name != "rule"]
        given = [f"{f.name}={_source(value)}" for f, value in named if value != f.default]
        return f"Ignore({', '.join([_source(self.rule), *given])})"


def _rules_named(name: str, glob: object) -> frozenset[str]:
    if not isinstance(glob, str) or not _has_wild_card(glob):
        return frozenset({_rule(name, glob)})
    named = frozenset(rule for rule in RULE_NAMES if _fits(glob, rule))
    if not named:
        raise _refused(name, glob, ", ".join(RULE_NAMES), among=RULE_NAMES)
    return named


def _check_method(name: str, value: object) -> None:
    method = _string(name, value)
    if method not in _METHODS and method.upper() in _METHODS:
        raise _refused(name, method, "a method in capitals, or a glob", among=_METHODS)


def _fingerprint(name: str, value: object) -> str:
    if not isinstance(value, str) or re.fullmatch(r"[0-9A-Fa-f]{12}", value) is None:
        raise _refused(name, value, "the 12 hex digits a finding shows as its fingerprint")
    return value.lower()


def check_up_to(name: str, value: object, rules: frozenset[str]) -> None:
    """Raise SettingsError unless ``value`` is seconds, and each of ``rules`` has a threshold to raise."""
    seconds = _seconds(name, value)
    if not rules <= LIVE_RULES:
        others = ", ".join(sorted(rules - LIVE_RULES))
        raise _refused(name, seconds, f"only with {', '.join(sorted(LIVE_RULES))}, not with {others}")


def _fits_site(glob: str, text: str, function: str) -> bool:
    return _fits(glob, text) or _fits(glob, text.partition(":")[0]) or _fits(glob, function)


def _source(value: object) -> str:
    """``value`` as Python source, in double quotes where that takes no escaping."""
    source = repr(value)
    if isinstance(value, str) and "'" not in value and '"' not in value:
        return f'"{source[1:-1]}"'
    return source


# --- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """How a sort of setting is checked, and read from the environment."""

    check: _Check
    read: _Read


_SWITCH = _Kind(_boolean, _read_boolean)
_SECONDS = _Kind(_seconds, _read_float)
_COUNT = _Kind(_count(1), _read_int)
_COUNT_OR_NONE = _Kind(_count(0), _read_int)
_RULES_OFF = _Kind(_each(_rule, '"left-open"'), _read_names)
_RULES_ON = _Kind(_each(_opt_in_rule, '"not-request-scoped"'), _read_names)
_IGNORES = _Kind(_each(_ignore, 'Ignore("left-open", reason="...")'), _read_ignores)
_PATHS = _Kind(_each(_path_glob, '"/health"'), _read_names)
_PACKAGES = _Kind(_each(_package, '"shop"'), _read_names)
_HEADER = _Kind(_header, _read_text)


def _choice(*accepted: str) -> _Kind:
    return _Kind(_one_of(*accepted), _read_text)


def _setting(default: _T, kind: _Kind, doc: str) -> _T:
    return field(default=default, metadata={"doc": doc, "kind": kind})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may be tuned. Each field's meaning and unit stand in its metadata, under ``doc``.

    Made directly, a field is what the code gives or the default, and the environment is not looked at;
    ``from_env`` looks. Lists are kept as tuples and ``request_id_header`` in lower case.

    Raises SettingsError (a ValueError) naming the field, what was given and what is accepted.
    """

    enabled: bool = _setting(
        True,
        _SWITCH,
        "Whether anything is watched. SESSION_WATCH_ENABLED=0 beats every other place and leaves no listener,"
        " wrap or thread.",
    )
    action: Literal["report", "raise"] = _setting(
        "report",
        _choice("report", "raise"),
        '"raise": the work that closes raises one SessionLeakError for its own certain errors, after all'
        " sinks; for tests and development, as the response is already sent.",
    )
    held_too_long: float = _setting(30.0, _SECONDS, "Seconds a checkout may be out before held-too-long fires.")
    idle_in_transaction: float = _setting(
        10.0,
        _SECONDS,
        "Seconds a checkout in a transaction may execute nothing before idle-in-transaction fires.",
    )
    held_after_response: float = _setting(
        2.0,
        _SECONDS,
        "Seconds a request's checkout may stay out, idle, once the response has started, before"
        " held-after-response fires.",
    )
    pool_wait: float = _setting(
        1.0, _SECONDS, "Seconds a checkout may wait for a connection before pool-exhausted warns."
    )
    pool_wait_on_loop: float = _setting(
        0.5,
        _SECONDS,
        "Seconds a synchronous wait for a connection may block a running event loop before"
        " pool-wait-on-event-loop fires.",
    )
    sweep_interval: float = _setting(1.0, _SECONDS, "Seconds between looks at what is open.")
    rules_off: tuple[str, ...] = _setting(
        (), _RULES_OFF, "Rules that are not judged. In the environment: names with commas between."
    )
    rules_on: tuple[str, ...] = _setting(
        (),
        _RULES_ON,
        "Opt-in rules that are judged: not-request-scoped, commit-after-disconnect. In the environment: names"
        " with commas between.",
    )
    ignore: tuple[Ignore, ...] = _setting(
        (),
        _IGNORES,
        "Findings that are known and accepted, each an Ignore(...). In the environment: a JSON list of"
        " objects with Ignore's fields.",
    )
    exclude_paths: tuple[str, ...] = _setting(
        (),
        _PATHS,
        "Paths that are not watched; * stands for any text, slashes too, and ? for one character. In the"
        " environment: globs with commas between.",
    )
    app_packages: tuple[str, ...] = _setting(
        (),
        _PACKAGES,
        "Packages that count as yours wherever they are installed. By default that is what lies outside the"
        " environment's libraries, and the packages of the app's endpoints. In the environment: names with"
        " commas between.",
    )
    helper_packages: tuple[str, ...] = _setting(
        (),
        _PACKAGES,
        "Packages that are yours but never to blame, such as a base repository: the next frame is named. In"
        " the environment: names with commas between.",
    )
    evidence: Literal["auto", "site", "stack"] = _setting(
        "auto",
        _choice("auto", "site", "stack"),
        '"site": one application frame; "stack": up to 12 frames; "auto": stacks for routes with a finding in'
        " the last hour.",
    )
    statements: Literal["dialect", "off"] = _setting(
        "dialect",
        _choice("dialect", "off"),
        'How statements are seen. "off": not at all; the rules that need them say so at start.',
    )
    sql: Literal["summary", "text", "off"] = _setting(
        "summary",
        _choice("summary", "text", "off"),
        'What is told of a statement. "summary": verb and table; "text": the statement with literals masked;'
        ' "off": nothing. Parameters are never told.',
    )
    log_max_per_minute: int = _setting(
        20, _COUNT_OR_NONE, "Findings logged per minute at most; 0 logs none. What is left out is counted."
    )
    recent: int = _setting(1000, _COUNT, "Number of newest findings that are kept.")
    max_routes: int = _setting(
        200, _COUNT, "Number of routes that have a metric label of their own; the others are <other>."
    )
    max_pools: int = _setting(
        50, _COUNT, "Number of pools that have a metric label of their own; the others are <other>."
    )
    request_id_header: str = _setting(
        "x-request-id",
        _HEADER,
        "Request header with the request's id. Without it: the id in structlog's or asgi-correlation-id's context.",
    )

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _kinds()}
        for name, value in _checked(given, {}).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **code: object) -> Settings:
        """Take each field from ``code``, else from ``SESSION_WATCH_<FIELD>``, else its default.

        ``environ`` is the process's environment unless another mapping is given. A variable that is empty
        counts as not set, and one that ``code`` overrules is not read. With SESSION_WATCH_ENABLED=0 nothing
        else is read and the result is not enabled, whatever ``code`` says.

        Raises SettingsError (a ValueError) for a wrong value, TypeError for an argument that is no field.
        Warns with SessionWatchConfigWarning of a SESSION_WATCH_* variable that means nothing.
        """
        environ = os.environ if environ is None else environ
        _refuse_unknown_arguments(code)
        if switched_off(environ):
            return cls(**_as_arguments({**code, "enabled": False}))
        _warn_of_unknown_variables(environ)
        read = _read(environ, without=code)
        return cls(**_as_arguments(_checked({**read, **code}, {name: variable(name) for name in read})))

    def active_rules(self) -> frozenset[str]:
        """The names of the rules that are judged."""
        return self._active_rules

    def excluded(self, path: str) -> bool:
        """Whether ``path``, a request's as it came, is not to be watched."""
        patterns = self._excluded_patterns
        return bool(patterns) and any(pattern.fullmatch(path) for pattern in patterns)

    @cached_property
    def _active_rules(self) -> frozenset[str]:
        return (frozenset(RULE_NAMES) - OPT_IN | frozenset(self.rules_on)) - frozenset(self.rules_off)

    @cached_property
    def _excluded_patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_pattern(glob) for glob in self.exclude_paths)


def variable(name: str) -> str:
    """The environment variable of the field ``name``."""
    return f"{PREFIX}{name.upper()}"


def switched_off(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``environ`` (the process's) says SESSION_WATCH_ENABLED=0, which beats settings made in code.

    Raises SettingsError (a ValueError) if the variable is neither yes nor no.
    """
    return _read_variable("enabled", _SWITCH, environ) is False


def log_format(environ: Mapping[str, str] | None = None) -> LogFormat | None:
    """The log format SESSION_WATCH_LOG in ``environ`` (the process's) asks for; None if it is not set.

    Raises SettingsError (a ValueError) if it is neither "json" nor "console".
    """
    return cast("LogFormat | None", _read_variable("log", _choice("json", "console"), environ))


def check_environment() -> None:
    """Look at every variable of the process, so that a wrong one is told before anything depends on it.

    With SESSION_WATCH_ENABLED=0 no other is looked at, nor by the command ``session-watch``, which tells of wrong ones
    itself. Raises SettingsError (a ValueError) for a wrong value; warns with SessionWatchConfigWarning of a
    SESSION_WATCH_* variable that means nothing.
    """
    if not _is_our_command() and Settings.from_env().enabled:
        log_format()


def _is_our_command() -> bool:
    """Whether the process is ``session-watch``, or ``python -m session_watch``."""
    program = sys.argv[0] if sys.argv else ""
    by_module = program == "-m" and "session_watch" in sys.orig_argv
    return by_module or os.path.splitext(os.path.basename(program))[0] == "session-watch"


def _read_variable(name: str, kind: _Kind, environ: Mapping[str, str] | None) -> object:
    """The checked value of one variable; None if it is not set or empty."""
    text = (os.environ if environ is None else environ).get(variable(name), "").strip()
    return kind.check(variable(name), kind.read(variable(name), text)) if text else None


def _read(environ: Mapping[str, str], *, without: Iterable[str]) -> dict[str, object]:
    kinds = {name: kind for name, kind in _kinds().items() if name not in without}
    values = {name: _read_variable(name, kind, environ) for name, kind in kinds.items()}
    return {name: value for name, value in values.items() if value is not None}


def _kinds() -> dict[str, _Kind]:
    return {f.name: f.metadata["kind"] for f in fields(Settings)}


def _checked(values: Mapping[str, object], called: Mapping[str, str]) -> dict[str, object]:
    """``values`` as they are kept; ``called`` is what messages call a field that the code did not give."""
    kinds = _kinds()
    kept = {name: kinds[name].check(called.get(name, name), value) for name, value in values.items()}
    _refuse_both_off_and_on(kept, called)
    return kept


def _refuse_both_off_and_on(kept: Mapping[str, object], called: Mapping[str, str]) -> None:
    off, on = (called.get(name, name) for name in ("rules_off", "rules_on"))
    rules_on = cast("tuple[str, ...]", kept.get("rules_on", ()))
    for rule in cast("tuple[str, ...]", kept.get("rules_off", ())):
        if rule in rules_on:
            raise _refused(f"{off} and {on}", rule, "a rule in one of the two, not in both")


def _refuse_unknown_arguments(code: Mapping[str, object]) -> None:
    names = tuple(_kinds())
    for name in code:
        if name not in names:
            raise TypeError(refusal("Settings", name, ", ".join(names), among=names))


def _as_arguments(values: Mapping[str, object]) -> dict[str, Any]:
    return dict(values)  # checked when they are used, so a type checker need not


def _warn_of_unknown_variables(environ: Mapping[str, str]) -> None:
    known = (*(name.upper() for name in _kinds()), *NOT_FIELDS)
    for name in sorted(_names_without_prefix(environ)):
        if name not in known and not name.startswith(_KUBERNETES):
            # The value is not told: it may be a token whose variable was misspelt.
            warnings.warn(_unknown_variable(name, known), SessionWatchConfigWarning, stacklevel=3)


def _names_without_prefix(environ: Mapping[str, str]) -> list[str]:
    return [name[len(PREFIX) :] for name in environ if name.startswith(PREFIX)]


def _unknown_variable(name: str, known: tuple[str, ...]) -> str:
    guess = nearest(name, known)
    hint = f"did you mean {PREFIX}{guess}?" if guess else f"known after {PREFIX} are {', '.join(known)}."
    return f"{PREFIX}{name} is not a variable of session_watch and has no effect; {hint}"
