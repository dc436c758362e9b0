"""The settings: defaults, where a value may come from, what is refused and how the refusal reads."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import pytest

from session_watch.rule_names import OPT_IN, RULE_NAMES, check_rule, nearest
from session_watch.settings import (
    LIVE_RULES,
    NOT_FIELDS,
    Ignore,
    SessionWatchConfigWarning,
    Settings,
    SettingsError,
    log_format,
    switched_off,
    variable,
)

DEFAULTS = {
    "enabled": True,
    "action": "report",
    "held_too_long": 30,
    "idle_in_transaction": 10,
    "held_after_response": 2,
    "pool_wait": 1,
    "pool_wait_on_loop": 0.5,
    "sweep_interval": 1.0,
    "rules_off": (),
    "rules_on": (),
    "ignore": (),
    "exclude_paths": (),
    "app_packages": (),
    "helper_packages": (),
    "evidence": "auto",
    "statements": "dialect",
    "sql": "summary",
    "log_max_per_minute": 20,
    "recent": 1000,
    "max_routes": 200,
    "max_pools": 50,
    "request_id_header": "x-request-id",
}
SECONDS = (
    "held_too_long",
    "idle_in_transaction",
    "held_after_response",
    "pool_wait",
    "pool_wait_on_loop",
    "sweep_interval",
)
KNOWN = Ignore("left-open", reason="known")
FOUND: dict[str, Any] = {
    "rule": "left-open",
    "fingerprint": "0123456789ab",
    "method": "GET",
    "route": "/users/{user_id}",
    "sites": (
        ("app/db.py:41 in get_db", "app.db:get_db"),
        ("app/api/users.py:7 in read", "app.api.users:read"),
    ),
}


def only(name: str, value: Any) -> Settings:
    """Settings made in code with this one field given."""
    return Settings(**{name: value})


def from_env(variables: Mapping[str, str], **code: object) -> Settings:
    """Settings out of an environment that holds just these variables, named without their prefix."""
    return Settings.from_env({f"SESSION_WATCH_{name}": text for name, text in variables.items()}, **code)


# --- Names of rules ------------------------------------------------------------------------------


def test_there_are_23_rules_of_which_two_are_opt_in() -> None:
    """No name stands twice, and what is opt-in or has a threshold is a rule."""
    assert (len(RULE_NAMES), len(set(RULE_NAMES)), len(OPT_IN)) == (23, 23, 2)
    assert set(RULE_NAMES) >= OPT_IN | LIVE_RULES


@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_rule_is_known_by_its_name(name: str) -> None:
    """A known name is handed back."""
    assert check_rule(name, field="rules_off") == name


@pytest.mark.parametrize(
    ("given", "guess"),
    [
        pytest.param("left_open", " Did you mean 'left-open'?", id="underscore for hyphen"),
        pytest.param("LEFT-TO-GC", " Did you mean 'left-to-gc'?", id="in capitals"),
        pytest.param("uncommited", " Did you mean 'uncommitted'?", id="a letter missing"),
        pytest.param(" unflushed", " Did you mean 'unflushed'?", id="a space too many"),
        pytest.param("xyz", "", id="like none of them"),
        pytest.param("", "", id="empty"),
    ],
)
def test_a_name_that_is_no_rule_is_refused(given: str, guess: str) -> None:
    """The message names the field, what was given, the nearest rule and all of them."""
    with pytest.raises(ValueError, match="rules") as refused:
        check_rule(given, field="rules_off")
    accepted = ", ".join(RULE_NAMES)
    assert str(refused.value) == f"rules_off: {given!r} is not accepted.{guess} Accepted: {accepted}."


def test_what_is_not_text_resembles_nothing() -> None:
    """A guess is made about text only."""
    assert nearest(None, RULE_NAMES) is None


# --- Defaults and documentation ------------------------------------------------------------------


def test_the_fields_and_their_defaults_are_the_documented_ones() -> None:
    """Every field, in order, with the default people rely on."""
    assert dataclasses.asdict(Settings()) == DEFAULTS
    assert [f.name for f in dataclasses.fields(Settings)] == list(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_field_is_documented(name: str) -> None:
    """One or more sentences, so that the table of settings can be generated."""
    doc = next(f.metadata["doc"] for f in dataclasses.fields(Settings) if f.name == name)
    assert re.fullmatch(r"\S.*\.", doc)
    assert not re.search(r"\s{2}|[a-z][.;:,][A-Za-z]", doc.replace("SESSION_WATCH_", ""))


@pytest.mark.parametrize("name", SECONDS)
def test_a_time_says_that_it_is_in_seconds(name: str) -> None:
    """The unit is the first word of its documentation."""
    doc = next(f.metadata["doc"] for f in dataclasses.fields(Settings) if f.name == name)
    assert doc.startswith("Seconds ")


@pytest.mark.parametrize("name", ["action", "evidence", "statements", "sql"])
def test_a_choice_accepts_what_its_type_says(name: str) -> None:
    """The type a checker sees and the words accepted at run time are the same."""
    hint = get_type_hints(Settings)[name]
    for word in get_args(hint):
        assert getattr(only(name, word), name) == word
    with pytest.raises(SettingsError, match=", ".join(f"'{word}'" for word in get_args(hint))):
        only(name, "no such word")


def test_settings_are_frozen_and_keyword_only() -> None:
    """Nothing can be set afterwards or given by position."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().recent = 5  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Settings(True)  # type: ignore[call-arg]


def test_settings_are_values() -> None:
    """Equal ones are equal and hash alike, after a look at what is cached, a pickle or a copy too."""
    made = Settings(exclude_paths=("/health",), ignore=(KNOWN,))
    assert made.excluded("/health")
    assert made == pickle.loads(pickle.dumps(made)) == copy.deepcopy(made)
    assert hash(made) == hash(Settings(exclude_paths=("/health",), ignore=(KNOWN,)))
    assert not dataclasses.replace(made, exclude_paths=()).excluded("/health")


# --- Values given in code ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        pytest.param("enabled", False, False, id="off"),
        pytest.param("held_too_long", 60, 60, id="whole seconds"),
        pytest.param("pool_wait", 1e-3, 0.001, id="a millisecond"),
        pytest.param("log_max_per_minute", 0, 0, id="no log lines"),
        pytest.param("recent", 1, 1, id="the least"),
        pytest.param("rules_off", ["left-open"], ("left-open",), id="a list becomes a tuple"),
        pytest.param("rules_off", ("not-request-scoped",), ("not-request-scoped",), id="an opt-in rule off"),
        pytest.param("rules_on", ("not-request-scoped",), ("not-request-scoped",), id="an opt-in rule on"),
        pytest.param("ignore", [KNOWN], (KNOWN,), id="a list of Ignore"),
        pytest.param("exclude_paths", ("/health", "*.css"), ("/health", "*.css"), id="globs"),
        pytest.param("app_packages", ("shop", "shop.db"), ("shop", "shop.db"), id="a package in a package"),
        pytest.param("request_id_header", "X-Correlation-ID", "x-correlation-id", id="a header in capitals"),
    ],
)
def test_a_value_that_is_accepted(name: str, given: object, kept: object) -> None:
    """It is kept as given, but for lists and header names."""
    made = getattr(only(name, given), name)
    assert made == kept
    assert type(made) is type(kept)


NOT_SECONDS = "a finite number of seconds above 0"
REFUSED_IN_CODE = [
    pytest.param({"enabled": 1}, "enabled: 1 is not accepted. Accepted: True or False", id="1 for True"),
    pytest.param({"enabled": "0"}, "enabled: '0' is not accepted", id="text for False"),
    pytest.param({"action": "rise"}, "Did you mean 'raise'? Accepted: 'report', 'raise'.", id="misspelt"),
    pytest.param({"action": None}, "action: None is not accepted. Accepted: 'report', 'raise'.", id="None"),
    pytest.param({"sql": "Text"}, "sql: 'Text' is not accepted. Did you mean 'text'?", id="wrong case"),
    pytest.param({"statements": ["off"]}, "statements: ['off'] is not accepted", id="a list for a word"),
    *[pytest.param({name: 0}, f"{name}: 0 is not accepted. Accepted: {NOT_SECONDS}") for name in SECONDS],
    pytest.param({"pool_wait": -0.5}, "pool_wait: -0.5", id="negative seconds"),
    pytest.param({"pool_wait": float("nan")}, "pool_wait: nan", id="not a number"),
    pytest.param({"pool_wait": float("inf")}, "pool_wait: inf", id="infinite"),
    pytest.param({"pool_wait": 10**400}, NOT_SECONDS, id="beyond any float"),
    pytest.param({"pool_wait": True}, "pool_wait: True", id="a bool for seconds"),
    pytest.param({"pool_wait": "1"}, "pool_wait: '1'", id="text for seconds"),
    pytest.param({"recent": True}, "recent: True is not accepted. Accepted: a whole", id="a bool for a count"),
    pytest.param({"recent": 0}, "recent: 0 is not accepted. Accepted: a whole number, 1 or more.", id="none"),
    pytest.param({"recent": 10.0}, "recent: 10.0", id="a float for a count"),
    pytest.param({"max_routes": 0}, "max_routes: 0", id="no routes"),
    pytest.param({"max_pools": -1}, "max_pools: -1", id="minus one pool"),
    pytest.param({"log_max_per_minute": -1}, "a whole number, 0 or more", id="less than no log lines"),
    pytest.param({"rules_off": "left-open"}, 'such as ("left-open",): mind the comma', id="no comma"),
    pytest.param({"rules_off": {"left-open"}}, "rules_off: {'left-open'}", id="a set"),
    pytest.param({"rules_off": None}, "rules_off: None", id="None for a tuple"),
    pytest.param({"rules_off": ("left-opn",)}, "rules_off: 'left-opn'", id="a misspelt rule"),
    pytest.param({"rules_off": ("left-opn",)}, "Did you mean 'left-open'?", id="a misspelt rule's nearest"),
    pytest.param({"rules_off": ("*",)}, "rules_off: '*'", id="a glob for a rule"),
    pytest.param({"rules_off": (5,)}, "rules_off: 5", id="a number for a rule"),
    pytest.param({"rules_off": (["x"],)}, "rules_off: ['x']", id="a list for a rule"),
    pytest.param({"rules_on": ("left-open",)}, "every other rule is on already", id="already on"),
    pytest.param({"rules_on": ("left-opn",)}, "Did you mean 'left-open'?", id="a misspelt rule on"),
    pytest.param(
        {"rules_off": ("not-request-scoped",), "rules_on": ("not-request-scoped",)},
        "rules_off and rules_on: 'not-request-scoped' is not accepted. Accepted: a rule in one of the two",
        id="both off and on",
    ),
    pytest.param({"ignore": KNOWN}, 'such as (Ignore("left-open", reason="..."),)', id="an Ignore alone"),
    pytest.param({"ignore": ("left-open",)}, "ignore: 'left-open'", id="a name for an Ignore"),
    pytest.param({"exclude_paths": "/health"}, 'such as ("/health",)', id="a path alone"),
    pytest.param({"exclude_paths": ("health",)}, "Did you mean '/health'?", id="no slash"),
    pytest.param({"exclude_paths": ("",)}, "exclude_paths: ''", id="an empty path"),
    pytest.param({"app_packages": "shop"}, 'such as ("shop",)', id="a package alone"),
    pytest.param({"app_packages": ("my-shop",)}, "Did you mean 'my_shop'?", id="a distribution's name"),
    pytest.param({"helper_packages": ("shop/db",)}, "as it is imported", id="a path for a package"),
    pytest.param({"helper_packages": (".db",)}, "helper_packages: '.db'", id="a relative package"),
    pytest.param({"request_id_header": ""}, "request_id_header: ''", id="an empty header"),
    pytest.param({"request_id_header": "x request id"}, "the name of an HTTP header", id="spaces in a header"),
    pytest.param({"request_id_header": b"x-id"}, "request_id_header: b'x-id'", id="bytes for a header"),
]


@pytest.mark.parametrize(("code", "said"), REFUSED_IN_CODE)
def test_a_value_that_is_refused(code: dict[str, Any], said: str) -> None:
    """The message names the field, what was given and what is accepted, whichever way it was made."""
    for make in (Settings, lambda **code: Settings.from_env({}, **code)):
        with pytest.raises(SettingsError, match=re.escape(said)) as refused:
            make(**code)
        assert "Accepted: " in str(refused.value)
        assert str(refused.value).startswith(next(iter(code)))


def test_a_refusal_repeats_only_the_start_of_what_was_given() -> None:
    """A value of any length makes a message that can be read."""
    with pytest.raises(SettingsError, match=r"x\.\.\. is not accepted") as refused:
        Settings(request_id_header=" x" + "x" * 10_000)
    assert len(str(refused.value)) < 250


# --- The environment -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        *[pytest.param("enabled", text, True) for text in ("1", "true", "YES", "On")],
        pytest.param("action", "raise", "raise", id="a choice"),
        pytest.param("evidence", " stack ", "stack", id="spaces around it"),
        *[pytest.param(name, "2.5", 2.5) for name in SECONDS],
        pytest.param("pool_wait", "3", 3.0, id="whole seconds"),
        pytest.param("recent", "50", 50, id="a count"),
        pytest.param("log_max_per_minute", "0", 0, id="no log lines"),
        pytest.param("rules_off", "left-open, left-to-gc,", ("left-open", "left-to-gc"), id="rules"),
        pytest.param("rules_on", "not-request-scoped", ("not-request-scoped",), id="one rule"),
        pytest.param("exclude_paths", "/health,/static/*", ("/health", "/static/*"), id="paths"),
        pytest.param("app_packages", "shop,shop_web", ("shop", "shop_web"), id="packages"),
        pytest.param("helper_packages", ",", (), id="nothing between commas"),
        pytest.param("request_id_header", "X-Id", "x-id", id="a header"),
        pytest.param("ignore", "[]", (), id="an empty list"),
        pytest.param(
            "ignore",
            '[{"rule": "left-open", "reason": "known"}, {"rule": "held-*", "up_to": 60, "reason": "export"}]',
            (KNOWN, Ignore("held-*", up_to=60, reason="export")),
            id="two to ignore",
        ),
        *[pytest.param(name, "", default, id=f"{name} empty") for name, default in DEFAULTS.items()],
    ],
)
def test_a_variable_sets_its_field(name: str, text: str, expected: object) -> None:
    """It is read as what the field is; an empty one counts as not set."""
    assert from_env({name.upper(): text}) == only(name, expected)


def test_code_beats_the_environment_and_the_environment_beats_the_default() -> None:
    """One field of each, and a variable that code overrules is not even read."""
    made = from_env({"RECENT": "5", "MAX_POOLS": "6", "SQL": "nonsense"}, recent=7, sql="off")
    assert (made.recent, made.max_pools, made.max_routes, made.sql) == (7, 6, 200, "off")


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three readers look at the variables of the process."""
    monkeypatch.setenv("SESSION_WATCH_RECENT", "5")
    monkeypatch.setenv("SESSION_WATCH_LOG", "json")
    assert (Settings.from_env().recent, log_format(), switched_off()) == (5, "json", False)
    monkeypatch.setenv("SESSION_WATCH_ENABLED", "0")
    assert (Settings.from_env().enabled, switched_off()) == (False, True)


def test_settings_made_in_code_do_not_look_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed is what one gets; the switch is asked for by ``switched_off``."""
    monkeypatch.setenv("SESSION_WATCH_RECENT", "5")
    monkeypatch.setenv("SESSION_WATCH_ENABLED", "0")
    assert Settings() == Settings(recent=1000, enabled=True)


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF", " off "])
def test_switched_off_beats_everything(text: str) -> None:
    """Code that says enabled loses, and no other variable can stand in the way by being wrong."""
    variables = {"ENABLED": text, "RECENT": "many", "NO_SUCH": "1"}
    assert from_env(variables, enabled=True, recent=5) == Settings(enabled=False, recent=5)
    assert switched_off({"SESSION_WATCH_ENABLED": text})


@pytest.mark.parametrize(
    ("variables", "code", "enabled"),
    [
        pytest.param({}, {}, True, id="nobody says a word"),
        pytest.param({"ENABLED": "1"}, {}, True, id="the environment says on"),
        pytest.param({"ENABLED": "1"}, {"enabled": False}, False, id="the code says off"),
        pytest.param({"ENABLED": ""}, {"enabled": False}, False, id="the environment is empty"),
    ],
)
def test_not_switched_off(variables: dict[str, str], code: dict[str, object], enabled: bool) -> None:
    """Without a plain no in the environment the usual order holds."""
    assert from_env(variables, **code).enabled is enabled
    assert not switched_off({f"SESSION_WATCH_{name}": text for name, text in variables.items()})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        pytest.param("ENABLED", "maybe", "in the environment one of 1, true, yes, on, 0, false", id="maybe"),
        pytest.param("ACTION", "rais", "Did you mean 'raise'?", id="a misspelt choice"),
        pytest.param("SWEEP_INTERVAL", "1s", NOT_SECONDS, id="a unit"),
        pytest.param("SWEEP_INTERVAL", "-1", NOT_SECONDS, id="negative"),
        pytest.param("SWEEP_INTERVAL", "nan", NOT_SECONDS, id="not a number"),
        pytest.param("RECENT", "1.5", "a whole number, 1 or more", id="a broken count"),
        pytest.param("RULES_OFF", "left-open,left-opn", "Did you mean 'left-open'?", id="a misspelt rule"),
        pytest.param("RULES_ON", "left-open", "every other rule is on already", id="on already"),
        pytest.param("EXCLUDE_PATHS", "health", "Did you mean '/health'?", id="no slash"),
        pytest.param("APP_PACKAGES", "my-shop", "Did you mean 'my_shop'?", id="a distribution's name"),
        pytest.param("REQUEST_ID_HEADER", "x id", "the name of an HTTP header", id="a space"),
        pytest.param("IGNORE", "left-open", "a JSON list such as", id="a name to ignore"),
        pytest.param("IGNORE", '{"rule": "left-open"}', "a JSON list such as", id="an object without its list"),
        pytest.param("IGNORE", "[" * 100_000, "a JSON list such as", id="too deep"),
        pytest.param("IGNORE", '["left-open"]', "[0]: 'left-open' is not accepted", id="a list of names"),
        pytest.param("IGNORE", '[{"rule": "left-open"}]', "[0]: Ignore.reason: None", id="no reason"),
        pytest.param("IGNORE", '[{"reason": "x"}]', "[0]: Ignore.rule: None", id="no rule"),
        pytest.param("IGNORE", '[{"ruel": "left-open"}]', "Did you mean 'rule'?", id="a misspelt key"),
        pytest.param(
            "IGNORE",
            '[{"rule": "left-open", "reason": "known"}, {"rule": "left-opn", "reason": "known"}]',
            "[1]: Ignore.rule: 'left-opn' is not accepted. Did you mean 'left-open'?",
            id="the second of two",
        ),
        pytest.param(
            "IGNORE",
            '[{"rule": "held-too-long", "up_to": true, "reason": "export"}]',
            "[0]: Ignore.up_to: True",
            id="a bool for seconds",
        ),
    ],
)
def test_a_wrong_variable_is_refused(name: str, text: str, said: str) -> None:
    """The message starts with the variable's name and says what is accepted."""
    with pytest.raises(SettingsError, match=re.escape(said)) as refused:
        from_env({name: text})
    assert str(refused.value).startswith(f"SESSION_WATCH_{name}")
    assert "Accepted: " in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        pytest.param({"RECENT": "many"}, "SettingsError: SESSION_WATCH_RECENT: 'many'", id="a field"),
        pytest.param({"LOG": "xml"}, "SettingsError: SESSION_WATCH_LOG: 'xml'", id="no field"),
        pytest.param({"RECNT": "5"}, "did you mean SESSION_WATCH_RECENT?", id="a misspelt name"),
        pytest.param({"RECENT": "5", "LOG": "json"}, "", id="nothing wrong"),
        pytest.param({"RECENT": "many", "LOG": "xml", "ENABLED": "0"}, "", id="switched off"),
    ],
)
def test_the_process_environment_is_looked_at_when_the_package_is_imported(
    variables: dict[str, str], said: str
) -> None:
    """A server would otherwise start, and answer each request with an error."""
    environment = {f"SESSION_WATCH_{name}": text for name, text in variables.items()}
    told = subprocess.run(
        [sys.executable, "-c", "import session_watch"], env=environment, capture_output=True, text=True, check=False
    ).stderr
    assert said in told
    assert bool(told) is bool(said)


def test_a_rule_off_by_environment_and_on_in_code_names_both_places() -> None:
    """The reader of the message knows where to look."""
    with pytest.raises(SettingsError, match=r"^SESSION_WATCH_RULES_OFF and rules_on: 'not-request-scoped'"):
        from_env({"RULES_OFF": "not-request-scoped"}, rules_on=("not-request-scoped",))


def test_an_argument_that_is_no_field_is_refused() -> None:
    """As Python would, but with the nearest name."""
    with pytest.raises(TypeError, match=r"'held_to_long' is not accepted\. Did you mean 'held_too_long'\?"):
        from_env({}, held_to_long=3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        pytest.param("SWEEP_INTERVALL", "did you mean SESSION_WATCH_SWEEP_INTERVAL?", id="a letter too many"),
        pytest.param("TOKN", "did you mean SESSION_WATCH_TOKEN?", id="near one that is no field"),
        pytest.param("XYZ", "known after SESSION_WATCH_ are ENABLED, ACTION,", id="near none"),
    ],
)
def test_an_unknown_variable_warns(name: str, hint: str) -> None:
    """The nearest name is told, the value is not: it may be a secret. The rest is read all the same."""
    with pytest.warns(SessionWatchConfigWarning, match=re.escape(hint)) as warned:
        made = from_env({name: "s3cret", "RECENT": "5"})
    assert made.recent == 5
    assert [w.filename for w in warned] == [__file__]
    assert "s3cret" not in str(warned[0].message)


def test_each_unknown_variable_warns_once() -> None:
    """Two variables, two warnings, in the order of their names."""
    with pytest.warns(SessionWatchConfigWarning) as warned:
        from_env({"ZZZ": "1", "EVIDENCES": "1"})
    assert [str(w.message).split()[0] for w in warned] == ["SESSION_WATCH_EVIDENCES", "SESSION_WATCH_ZZZ"]


@pytest.mark.parametrize(
    "name",
    [
        *[f"SESSION_WATCH_{name}" for name in NOT_FIELDS],
        "SESSION_WATCH_PORT",
        "SESSION_WATCH_PORT_8000_TCP",
        "SESSION_WATCH_PORT_8000_TCP_ADDR",
        "SESSION_WATCH_SERVICE_HOST",
        "SESSION_WATCH_SERVICE_PORT_HTTP",
        "SESSION_WATCHER",
        "MY_SESSION_WATCH_RECENT",
        "session_watch_recent",
    ],
)
def test_a_variable_that_is_none_of_ours_to_judge_is_left_alone(name: str) -> None:
    """Not a word about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Settings.from_env({name: "json"}) == Settings()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, None, id="not set"),
        pytest.param({"SESSION_WATCH_LOG": ""}, None, id="empty"),
        pytest.param({"SESSION_WATCH_LOG": "json"}, "json", id="for machines"),
        pytest.param({"SESSION_WATCH_LOG": "console"}, "console", id="for people"),
    ],
)
def test_the_log_format(variables: dict[str, str], expected: str | None) -> None:
    """One of two, or whatever the default is."""
    assert log_format(variables) == expected


@pytest.mark.parametrize("text", ["JSON", "jsn", "xml"])
def test_a_wrong_log_format_is_refused(text: str) -> None:
    """The variable is named, and both formats."""
    with pytest.raises(SettingsError, match=r"^SESSION_WATCH_LOG: .* Accepted: 'json', 'console'"):
        log_format({"SESSION_WATCH_LOG": text})


def test_the_variable_of_a_field() -> None:
    """Documentation and messages name it alike."""
    assert variable("pool_wait_on_loop") == "SESSION_WATCH_POOL_WAIT_ON_LOOP"


# --- Rules and paths -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        pytest.param(Settings(), OPT_IN, id="by default all but the opt-in ones"),
        pytest.param(Settings(rules_on=tuple(OPT_IN)), frozenset(), id="opt-in ones on"),
        pytest.param(Settings(rules_off=("left-open",)), OPT_IN | {"left-open"}, id="one off"),
        pytest.param(Settings(rules_off=("not-request-scoped",)), OPT_IN, id="one off that is off"),
        pytest.param(Settings(rules_off=RULE_NAMES), frozenset(RULE_NAMES), id="all off"),
    ],
)
def test_active_rules(settings: Settings, missing: frozenset[str]) -> None:
    """All, without the opt-in ones nobody asked for and those that are off."""
    assert settings.active_rules() == frozenset(RULE_NAMES) - missing


@pytest.mark.parametrize(
    ("globs", "path", "expected"),
    [
        pytest.param((), "/health", False, id="nothing is excluded"),
        pytest.param(("/health",), "/health", True, id="the very path"),
        pytest.param(("/health",), "/health/", False, id="a slash more"),
        pytest.param(("/health",), "/Health", False, id="case counts"),
        pytest.param(("/health*",), "/health/live", True, id="a star takes slashes"),
        pytest.param(("/static/*",), "/static/", True, id="a star takes nothing"),
        pytest.param(("/static/*",), "/static", False, id="but not the slash before it"),
        pytest.param(("*.css",), "/a/b.css", True, id="a star in front"),
        pytest.param(("*.css",), "/a/b.css.map", False, id="the end must fit"),
        pytest.param(("*.css",), "/a/bxcss", False, id="a dot is a dot"),
        pytest.param(("/v?/ping",), "/v1/ping", True, id="one character"),
        pytest.param(("/v?/ping",), "/v/ping", False, id="not none"),
        pytest.param(("/v?/ping",), "/v12/ping", False, id="not two"),
        pytest.param(("/[ab]",), "/a", False, id="brackets are no set"),
        pytest.param(("/[ab]",), "/[ab]", True, id="brackets are brackets"),
        pytest.param(("/a*b*c",), "/a-b-b-c-c", True, id="two stars"),
        pytest.param(("/a*b*c",), "/a-c-b", False, id="in order"),
        pytest.param(("/**/x",), "/y/z/x", True, id="two stars in a row are one"),
        pytest.param(("/a*aa",), "/aa", False, id="nothing is used twice"),
        pytest.param(("/a*",), "/a\nb", True, id="a line break is a character"),
        pytest.param(("/a?b",), "/a\nb", True, id="one that a question mark takes"),
        pytest.param(("/health",), "/health\n", False, id="also at the end"),
        pytest.param(("/health", "/metrics"), "/metrics", True, id="the second of two"),
    ],
)
def test_excluded(globs: tuple[str, ...], path: str, expected: bool) -> None:
    """A path is excluded when a glob takes the whole of it."""
    assert Settings(exclude_paths=globs).excluded(path) is expected


def fits(glob: str, text: str) -> bool:
    """What a glob means, as plainly as it can be said."""
    if not glob:
        return not text
    if glob[0] == "*":
        return any(fits(glob[1:], text[n:]) for n in range(len(text) + 1))
    return bool(text) and glob[0] in ("?", text[0]) and fits(glob[1:], text[1:])


def test_globs_mean_what_the_plain_definition_says() -> None:
    """Every glob of up to four characters out of four, against every text of up to four out of two."""
    texts = ["/" + "".join(t) for n in range(5) for t in itertools.product("ab", repeat=n)]
    for glob in ("/" + "".join(g) for n in range(5) for g in itertools.product("ab*?", repeat=n)):
        settings = Settings(exclude_paths=(glob,))
        assert [t for t in texts if settings.excluded(t)] == [t for t in texts if fits(glob, t)], glob


def test_a_hostile_path_does_not_make_matching_slow() -> None:
    """Time grows with the path's length, not with its power of the number of stars."""
    settings = Settings(exclude_paths=("/a*/b*/c*/b*/c*/d",))
    started = time.perf_counter()
    assert not settings.excluded("/a" + "/b/c" * 20_000)
    assert time.perf_counter() - started < 1


# --- Ignore --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ignore", "expected"),
    [
        pytest.param(Ignore("left-open", reason="x"), True, id="the rule"),
        pytest.param(Ignore("left-to-gc", reason="x"), False, id="another rule"),
        pytest.param(Ignore("*", reason="x"), True, id="any rule"),
        pytest.param(Ignore("left-*", reason="x"), True, id="rules that start so"),
        pytest.param(Ignore("held-*", reason="x"), False, id="rules that start otherwise"),
        pytest.param(Ignore("*", fingerprint="0123456789ab", reason="x"), True, id="the fingerprint"),
        pytest.param(Ignore("*", fingerprint="0123456789AB", reason="x"), True, id="in capitals"),
        pytest.param(Ignore("*", fingerprint="0123456789ac", reason="x"), False, id="another fingerprint"),
        pytest.param(Ignore("*", method="GET", reason="x"), True, id="the method"),
        pytest.param(Ignore("*", method="*T", reason="x"), True, id="methods that end so"),
        pytest.param(Ignore("*", method="POST", reason="x"), False, id="another method"),
        pytest.param(Ignore("*", method="", reason="x"), False, id="no method at all"),
        pytest.param(Ignore("*", route="/users/{user_id}", reason="x"), True, id="the route's template"),
        pytest.param(Ignore("*", route="/users/*", reason="x"), True, id="routes below"),
        pytest.param(Ignore("*", route="/users/{id}", reason="x"), False, id="another parameter"),
        pytest.param(Ignore("*", route="/users", reason="x"), False, id="only the start of the route"),
        pytest.param(Ignore("*", route="/Users/*", reason="x"), False, id="case counts in a route"),
        pytest.param(Ignore("*", site="app/db.py:41 in get_db", reason="x"), True, id="a site's whole text"),
        pytest.param(Ignore("*", site="app/db.py", reason="x"), True, id="a site's path"),
        pytest.param(Ignore("*", site="app/api/*", reason="x"), True, id="the second site"),
        pytest.param(Ignore("*", site="app.db:get_db", reason="x"), True, id="a site's function"),
        pytest.param(Ignore("*", site="app.api.*:read", reason="x"), True, id="functions of that name"),
        pytest.param(Ignore("*", site="* in get_db", reason="x"), True, id="the function in the text"),
        pytest.param(Ignore("*", site="app", reason="x"), False, id="only the start of a site"),
        pytest.param(Ignore("*", site="app/models.py", reason="x"), False, id="another file"),
        pytest.param(
            Ignore("left-open", method="GET", route="/users/*", site="app/db.py", reason="x"),
            True,
            id="all of several",
        ),
        pytest.param(
            Ignore("left-open", method="GET", route="/orders/*", site="app/db.py", reason="x"),
            False,
            id="all but one of several",
        ),
    ],
)
def test_an_ignore_matches(ignore: Ignore, expected: bool) -> None:
    """All that is given must match the finding."""
    assert ignore.matches(**FOUND) is expected


@pytest.mark.parametrize(
    ("ignore", "changed", "expected"),
    [
        pytest.param(Ignore("left-open", reason="x"), {"sites": ()}, True, id="no site asked for"),
        pytest.param(Ignore("*", site="?*", reason="x"), {"sites": ()}, False, id="a site asked for"),
        pytest.param(Ignore("*", method="", reason="x"), {"method": ""}, True, id="a job's empty method"),
        pytest.param(Ignore("*", route="/f[a]", reason="x"), {"route": "/f[a]"}, True, id="brackets"),
        pytest.param(Ignore("*", route="/f[a]", reason="x"), {"route": "/fa"}, False, id="no set of letters"),
        pytest.param(Ignore("*", route="/f!", reason="x"), {"route": "/f!"}, True, id="other signs"),
        pytest.param(Ignore("*", route="job:*", reason="x"), {"route": "job:mail"}, True, id="a job"),
        pytest.param(Ignore("*", route="<unmatched>", reason="x"), {"route": "<unmatched>"}, True, id="a label"),
        pytest.param(
            Ignore("held-too-long", up_to=60, reason="x"),
            {"rule": "held-too-long"},
            True,
            id="whatever the age: that is for the caller",
        ),
    ],
)
def test_an_ignore_matches_other_findings(ignore: Ignore, changed: dict[str, Any], expected: bool) -> None:
    """Works without method or site, and templates with signs that globs elsewhere would read."""
    assert ignore.matches(**{**FOUND, **changed}) is expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param({"rule": "left-opn"}, "Ignore.rule: 'left-opn' is not accepted. Did", id="misspelt"),
        pytest.param({"rule": "hold-*"}, "Did you mean 'held-too-long'?", id="a glob that takes no rule"),
        pytest.param({"rule": ""}, "Ignore.rule: ''", id="no rule"),
        pytest.param({"rule": None}, "Ignore.rule: None", id="None for a rule"),
        pytest.param({"reason": ""}, "Ignore.reason: ''", id="an empty reason"),
        pytest.param({"reason": " "}, "text that is not empty", id="a blank reason"),
        pytest.param({"reason": 5}, "Ignore.reason: 5", id="a number for a reason"),
        pytest.param({"fingerprint": "0123456789a"}, "the 12 hex digits", id="eleven digits"),
        pytest.param({"fingerprint": "0123456789ax"}, "Ignore.fingerprint", id="no hex digit"),
        pytest.param({"fingerprint": "0123456789ab\n"}, "Ignore.fingerprint", id="a line break"),
        pytest.param({"fingerprint": 12}, "Ignore.fingerprint: 12", id="a number"),
        pytest.param({"method": "get"}, "Ignore.method: 'get' is not accepted. Did you mean 'GET'?", id="get"),
        pytest.param({"method": None}, "Ignore.method: None", id="None for a method"),
        pytest.param({"route": 5}, "Ignore.route: 5", id="a number for a route"),
        pytest.param({"site": ""}, "Ignore.site: ''", id="an empty site"),
        pytest.param({"up_to": 60}, "Ignore.up_to: 60 is not accepted. Accepted: only with", id="not live"),
        pytest.param({"rule": "*", "up_to": 60}, "not with", id="not all live"),
        pytest.param({"rule": "held-too-long", "up_to": 0}, NOT_SECONDS, id="no seconds"),
        pytest.param({"rule": "held-too-long", "up_to": "60"}, "Ignore.up_to: '60'", id="text for seconds"),
    ],
)
def test_an_ignore_that_could_never_work_is_refused(arguments: dict[str, Any], said: str) -> None:
    """The message names the field, what was given and what is accepted."""
    with pytest.raises(SettingsError, match=re.escape(said)):
        Ignore(**{"rule": "left-open", "reason": "known", **arguments})


@pytest.mark.parametrize("rule", sorted(LIVE_RULES))
def test_a_live_rule_takes_a_threshold(rule: str) -> None:
    """It is kept in seconds, as given."""
    assert Ignore(rule, up_to=60, reason="long export").up_to == 60


def test_an_ignore_needs_a_reason_and_takes_only_the_rule_by_position() -> None:
    """Python itself refuses the rest."""
    with pytest.raises(TypeError, match="reason"):
        Ignore("left-open")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        Ignore("left-open", "0123456789ab", reason="x")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("ignore", "line"),
    [
        pytest.param(KNOWN, 'Ignore("left-open", reason="known")', id="the least"),
        pytest.param(
            Ignore("held-too-long", up_to=2.5, reason="export"),
            'Ignore("held-too-long", up_to=2.5, reason="export")',
            id="with a threshold",
        ),
        pytest.param(
            Ignore(
                "left-*",
                fingerprint="0123456789ab",
                method="GET",
                route="/users/{id}",
                site="app/db.py",
                reason="known",
            ),
            'Ignore("left-*", fingerprint="0123456789ab", method="GET", route="/users/{id}",'
            ' site="app/db.py", reason="known")',
            id="with all the rest",
        ),
        pytest.param(
            Ignore("left-open", reason="""it's "known"\\\n"""),
            """Ignore("left-open", reason='it\\'s "known"\\\\\\n')""",
            id="quotes, a backslash and a line break",
        ),
        pytest.param(
            Ignore("left-open", reason="it's \x1b\u2028"),
            r"""Ignore("left-open", reason="it's \x1b\u2028")""",
            id="an apostrophe and signs a terminal would act on",
        ),
    ],
)
def test_the_line_that_makes_it_again(ignore: Ignore, line: str) -> None:
    """It is one line of source, and running it gives the same."""
    assert ignore.line() == line
    assert len(line.splitlines()) == 1
    assert eval(line, {"Ignore": Ignore}) == ignore


def test_an_ignore_comes_back_from_json() -> None:
    """What ``dataclasses.asdict`` writes, the environment reads."""
    ignore = Ignore("held-too-long", route="/export", up_to=60.0, reason="long export")
    assert from_env({"IGNORE": json.dumps([dataclasses.asdict(ignore)])}).ignore == (ignore,)
