"""The demo's page in a real browser: press a button, and read which line did it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from session_watch.demo import sources
from session_watch.demo.scenarios import LEAKS, PATTERNS, SCENARIOS
from session_watch.demo.sources import FOLDER, excerpt_of, excerpts_at
from session_watch.demo.story import links_of
from tests.browser import Browser, Tab
from tests.test_demo import started

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The demo without traffic of its own, and where it answers."""
    with started("--no-traffic") as (_, url):
        yield url


@pytest.fixture
def page(browser: Browser, demo: str) -> Iterator[Tab]:
    """The demo's page, ready."""
    with browser.tab() as tab:
        tab.go(f"{demo}/")
        tab.wait("document.body.dataset.ready")
        yield tab


def press(page: Tab, scenario: str) -> None:
    """Press a scenario's button."""
    page.js(f"document.querySelector('#{scenario} button').click()")


def test_a_leak_appears_beside_its_line_and_goes(page: Tab) -> None:
    """The finding stands in the leak's card and in the list, its line marked; closed, it is no longer open."""
    press(page, "raw-connection")
    page.wait("document.querySelector('#raw-connection .finding .open')")
    assert page.js("document.querySelector('#raw-connection .rule').textContent") == "connection-left-open"
    marked = page.js("document.querySelector('#raw-connection .finding .marked').textContent")
    assert marked.strip() == "connection = engine.connect()"
    assert page.js("document.querySelector('#feed .work').textContent") == "GET /leaks/raw-connection"
    assert page.js("document.getElementById('held').textContent") == "1"
    page.js("document.getElementById('reset').click()")
    page.wait("document.getElementById('open').textContent === '0'")
    page.wait("document.querySelector('#raw-connection .open') === null")
    assert page.trouble() == []


def test_a_pattern_stays_silent(page: Tab) -> None:
    """A right way says that nothing was found."""
    press(page, "unit-of-work")
    page.wait("document.querySelector('#unit-of-work .silent')")
    assert (
        page.js("document.querySelector('#unit-of-work .answer').textContent") == "answered: 200, and nothing was found"
    )
    assert page.trouble() == []


def test_several_requests_are_sent_where_it_takes_several(page: Tab) -> None:
    """A session that is shared by two requests is found by one press."""
    press(page, "module-session")
    page.wait("document.querySelector('#module-session .rule')")
    assert page.js("document.querySelector('#module-session .rule').textContent") == "shared-across-requests"
    page.wait("document.querySelector('#module-session .answer').textContent === 'answered: 200, 200'")


def test_by_keyboard(page: Tab) -> None:
    """The buttons are reached and pressed without a mouse."""
    page.js("document.querySelector('#dropped-objects button').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#dropped-objects .rule')")
    assert page.js("document.querySelector('#dropped-objects .rule').textContent") == "unflushed"


def test_what_somebody_has_opened_stays_open(page: Tab) -> None:
    """News of other leaks touch no card but their own."""
    press(page, "no-commit")
    page.wait("document.querySelector('#no-commit .finding details')")
    page.js("document.querySelector('#no-commit .finding details').open = true")
    press(page, "next-get-db")
    page.wait("document.querySelector('#next-get-db .finding')")
    assert page.js("document.querySelector('#no-commit .finding details').open") is True


HOSTILE = "<img src=x onerror='document.title=1'><script>document.title=2</script>"


def test_markup_is_shown_as_text(page: Tab) -> None:
    """A route, rule or statement that holds markup is text on the page, and nothing of it runs."""
    finding = {
        **dict.fromkeys(("fingerprint", "rule", "severity", "summary", "silence", "work"), HOSTILE),
        "certain": True,
        "count": 1,
        "open": True,
        "scenario": "gather",
        "code": [{"file": HOSTILE, "first": 1, "lines": [HOSTILE], "marked": [1]}],
    }
    told = {"found": 1, "open": 1, "held": {HOSTILE: 1}, "findings": [finding]}
    page.js(f"show({json.dumps(told)})")
    assert page.js("document.querySelectorAll('main img, main script').length") == 0
    assert page.js("document.querySelector('#gather .finding p').textContent") == HOSTILE
    assert page.js("document.title") == "session-watch demo"
    assert page.trouble() == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_the_screen(page: Tab, width: int) -> None:
    """Nothing is wider than a phone; only code scrolls, within its own frame."""
    page.emulate(width=width)
    page.js("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.js("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(page: Tab, scheme: str) -> None:
    """Text and ground are at least 4.5 to 1 apart, WCAG's AA, for every kind of text on the page."""
    page.emulate(scheme=scheme)
    pairs = page.js(CONTRASTS)
    assert len(pairs) > 8
    assert [pair for pair in pairs if pair[1] < 4.5] == []
    assert (page.js("getComputedStyle(document.body).backgroundColor") == "rgb(23, 21, 19)") == (scheme == "dark")


# The contrast of each kind of element against the first ground below it that is not transparent.
CONTRASTS = """(() => {
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const [r, g, b] = parts(color).map((each) => each / 255)
            .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        const color = getComputedStyle(element).backgroundColor;
        return parts(color)[3] === 0 ? ground(element.parentElement) : color;
    };
    const kinds = ['h1', '.intro p', 'nav a', 'dt', '.leak button', '#patterns button', '.lead', '.where', '.when',
        '.answer', '.rule', '.chips span', 'figcaption', 'pre .l', 'pre .c', 'pre .wrong', '.marked', 'summary'];
    return kinds.map((kind) => document.querySelector(kind)).filter(Boolean).map((element) => {
        const [one, other] = [light(getComputedStyle(element).color), light(ground(element))];
        return [element.className || element.tagName, (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)];
    });
})()"""


def test_nothing_comes_from_another_host(page: Tab, demo: str) -> None:
    """All that the page loads is the demo's own."""
    assert [url for url in page.requested() if not url.startswith((demo, "data:"))] == []
    assert page.trouble() == []


def test_every_scenario_has_a_card_with_its_code(demo: str) -> None:
    """The story has each scenario once, in its order, with the source of its route."""
    told = httpx.get(f"{demo}/story.json", trust_env=False).json()
    assert [card["name"] for card in told["leaks"]] == [scenario.name for scenario in LEAKS]
    assert [card["name"] for card in told["patterns"]] == [scenario.name for scenario in PATTERNS]
    for card in told["leaks"] + told["patterns"]:
        assert f'("/{card["name"]}")' in card["code"]["lines"][0]
    assert {link["path"] for link in told["links"]} >= {"/metrics", "/docs"}


def test_the_live_page_is_linked_where_there_is_one() -> None:
    """Only what the middleware serves is linked."""
    served: Any = SimpleNamespace(metrics_path=None, page_path="/session-watch")
    assert links_of(served) == (("Live page", "/session-watch"), ("API", "/docs"))


@pytest.mark.parametrize("path", ["/", "/story.css", "/story.js", "/story.json", "/story/now.json"])
def test_what_is_served_is_strict(demo: str, path: str) -> None:
    """No answer of the page may be framed, guessed at, kept, or load anything from elsewhere."""
    answer = httpx.get(f"{demo}{path}", trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith(
        "default-src 'none'; script-src 'self'; style-src 'self'"
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_the_page_itself_is_neither_counted_nor_watched(demo: str) -> None:
    """Whoever looks at the page leaves no mark in what it shows."""
    for _ in range(3):
        httpx.get(f"{demo}/story/now.json", trust_env=False).raise_for_status()
    metrics = httpx.get(f"{demo}/metrics", trust_env=False).text
    assert "story" not in metrics


def test_no_file_names_another_host() -> None:
    """The page is plain files of this package, without a link to elsewhere."""
    for path in (FOLDER / "page").iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, path.name


@pytest.mark.parametrize(
    ("site", "shown"),
    [
        pytest.param("session_watch/demo/leaks.py:51 in global_session", True, id="the demo's own"),
        pytest.param("/usr/lib/python3/site-packages/session_watch/demo/leaks.py:51 in f", True, id="installed"),
        pytest.param("demo\\leaks.py:51 in f", True, id="on Windows"),
        pytest.param("session_watch/watch.py:51 in attach", False, id="not of the demo"),
        pytest.param("demo/secrets.py:1 in f", False, id="no such file"),
        pytest.param("demo/../watch.py:1 in f", False, id="a way out"),
        pytest.param("", False, id="nothing"),
    ],
)
def test_excerpts_are_of_the_demo_alone(site: str, shown: bool) -> None:
    """Only code of the demo is shown, whatever a site says."""
    assert bool(excerpts_at([site])) is shown


def test_lines_of_one_function_are_marked_in_one_excerpt() -> None:
    """Two sites in a function are one piece of code; a line of the module stands alone; a long function is cut."""
    whole = excerpt_of("leaks.py", "raw_connection")
    assert whole is not None
    line = whole.first
    both = excerpts_at([f"demo/leaks.py:{line + 3} in f", f"demo/leaks.py:{line + 5} in f"])
    assert [(each.first, each.marked) for each in both] == [(line, (line + 3, line + 5))]
    assert excerpts_at(["demo/leaks.py:1 in <module>"])[0].lines == (sources._lines("leaks.py")[0],)
    longest = max(len(excerpts_at([f"demo/{path.name}:{n} in f"])[0].lines) for path, n in _lines_of_demo())
    assert longest <= 2 * sources.AROUND + 1
    assert len(SCENARIOS) == len({scenario.name for scenario in SCENARIOS})


def _lines_of_demo() -> Iterator[tuple[Path, int]]:
    for path in FOLDER.glob("*.py"):
        for number, _ in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield path, number
