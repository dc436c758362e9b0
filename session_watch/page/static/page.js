// The live page. Polls live.json, keeps each line's node by its key, and writes text as text: never as markup.
"use strict";

const POLL_MS = 750;
const ANSWER_MS = 4_000; // then another connection is tried, which another worker may take
const LOST_MS = 4_000;
const FIRST_ROWS = 20;
const SEVERITIES = ["error", "warning", "advice"];
const THEMES = ["system", "light", "dark"];

const COLUMNS = [
  { key: "age", title: "Held for", value: (h) => h.age_seconds, descending: true },
  { key: "work", title: "Work", value: (h) => h.work, descending: false },
  { key: "state", title: "State", value: (h) => h.state, descending: false },
  { key: "now", title: "Stands now at", value: (h) => h.current_site || "", descending: false },
  { key: "opened", title: "Opened at", value: (h) => h.opened_site || "", descending: false },
  { key: "sql", title: "Last statement", value: (h) => h.last_statement || "", descending: false },
];

const $ = (id) => document.getElementById(id);
const view = {
  live: null,
  findings: [],
  findingsVersion: null,
  answeredAt: 0,
  paused: false,
  filter: "",
  sort: { key: "age", descending: true },
  findingSort: "severity",
  all: false,
};

// --- What is remembered --------------------------------------------------------------------------

function remembered(name) {
  try {
    return localStorage.getItem(`session_watch.${name}`);
  } catch {
    return null; // storage is forbidden: the page works without
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`session_watch.${name}`, value);
  } catch {
    // as above
  }
}

let theme = THEMES.includes(remembered("theme")) ? remembered("theme") : "system";
applyTheme(); // before anything is painted

function applyTheme() {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

// --- Small pieces --------------------------------------------------------------------------------

function setText(node, text) {
  const wanted = text === null || text === undefined ? "" : String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

function setTitled(node, text) {
  setText(node, text);
  if (node.title !== (text || "")) node.title = text || "";
}

function setPill(node, word) {
  setText(node, word);
  if (node.dataset.is !== word) node.dataset.is = word;
}

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

function clone(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

function seconds(value) {
  if (value === null || value === undefined) return "";
  if (value < 9.95) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 172_800) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86_400)} days`;
}

function clockTime(iso) {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return iso || "";
  const today = at.toDateString() === new Date().toDateString();
  return today ? at.toLocaleTimeString() : at.toLocaleString();
}

function many(count, one, several) {
  return `${count.toLocaleString()} ${count === 1 ? one : several}`;
}

// Keep one node for each item: made once, brought up to date, moved only if its place is another.
function keyed(parent, items, keyOf, make, update) {
  const known = parent.nodesByKey || (parent.nodesByKey = new Map());
  const wanted = new Map(items.map((item) => [keyOf(item), item]));
  for (const [key, node] of known) {
    if (!wanted.has(key)) {
      node.remove();
      known.delete(key);
    }
  }
  const focused = document.activeElement;
  let place = parent.firstElementChild;
  for (const [key, item] of wanted) {
    let node = known.get(key);
    if (!node) known.set(key, (node = make(item)));
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
    node.item = item;
    update(node, item);
  }
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

// Term and description, one pair for each that has a value. Written anew only when something has changed.
function describe(list, pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  const print = JSON.stringify(shown);
  if (list.print === print) return;
  list.print = print;
  list.replaceChildren(
    ...shown.flatMap(([name, value]) => [element("dt", name), Object.assign(element("dd", value), { className: "mono" })]),
  );
}

// --- What is asked -------------------------------------------------------------------------------

async function ask(name) {
  const answer = await fetch(`${document.body.dataset.base}${name}`, {
    credentials: "same-origin",
    cache: "no-store",
    redirect: "error",
    signal: AbortSignal.timeout(ANSWER_MS),
  });
  if (answer.status === 401 || answer.status === 429) {
    location.reload(); // the form is there
    return null;
  }
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer.json();
}

async function poll() {
  try {
    const live = await ask("live.json");
    if (live === null) return;
    if (live.findings_version !== view.findingsVersion) {
      const found = await ask("findings.json");
      if (found === null) return;
      view.findings = found.findings;
      view.findingsVersion = live.findings_version;
    }
    view.live = live;
    view.answeredAt = Date.now();
    show();
  } catch {
    // nobody answers: showStatus says since when
  }
  showStatus();
}

let timer = null;
function next() {
  clearTimeout(timer);
  if (view.paused || document.hidden) return;
  const begun = Date.now();
  poll().finally(() => {
    timer = setTimeout(next, Math.max(50, POLL_MS - (Date.now() - begun)));
  });
}

// --- What is shown -------------------------------------------------------------------------------

function show() {
  const { workers } = view.live;
  const held = workers.flatMap((worker) => worker.held.map((each) => ({ ...each, worker })));
  showPlace();
  showSums(workers);
  showWorkers(workers);
  showPools(workers);
  showHeld(held, workers);
  showFindings(workers.length > 1);
}

function showStatus() {
  const late = Date.now() - view.answeredAt;
  const is = view.paused ? "paused" : late > LOST_MS ? "lost" : "live";
  const words = { paused: "paused", live: "live", lost: view.answeredAt ? `no answer for ${seconds(late / 1000)}` : "no answer" };
  if ($("status").dataset.is !== is) $("status").dataset.is = is;
  setText($("status").lastElementChild, words[is]);
}

function showPlace() {
  const { process, all_workers: all, workers } = view.live;
  const own = process.number === null ? `one of ${process.of}` : `${process.number} of ${process.of}`;
  setText($("process"), `pid ${process.pid} · worker ${own}${workers.length > 1 ? " · all shown" : ""}`);
  setText($("version"), `session_watch ${workers[0].version}`);
  const notice = $("notice");
  notice.hidden = all;
  if (!all) setText(notice, `This is one of ${process.of} workers. With SESSION_WATCH_DIR set, the page shows all of them.`);
}

function sum(workers, count) {
  return workers.reduce((total, worker) => total + (worker.status === "dead" ? 0 : count(worker)), 0);
}

function showSums(workers) {
  const waiting = sum(workers, (worker) => worker.pools.reduce((total, pool) => total + pool.waiting, 0));
  const open = view.findings.reduce((total, finding) => total + finding.open, 0);
  const counts = {
    held: sum(workers, (worker) => worker.held_total),
    waiting,
    open,
    works: sum(workers, (worker) => Object.values(worker.works).reduce((total, count) => total + count, 0)),
  };
  for (const item of $("sums").children) {
    const name = item.dataset.sum;
    setText(item.querySelector("b"), counts[name].toLocaleString());
    item.classList.toggle("bad", (name === "waiting" || name === "open") && counts[name] > 0);
  }
}

function workerKey(worker) {
  return `${worker.host} ${worker.pid} ${worker.started_at}`;
}

function showWorkers(workers) {
  $("workers").hidden = workers.length < 2;
  keyed($("worker-list"), workers.length < 2 ? [] : workers, workerKey, () => clone("worker"), (node, worker) => {
    const [pill, pid, what, when] = node.children;
    setPill(pill, worker.status);
    setText(pid, `pid ${worker.pid}`);
    setTitled(what, whatOf(worker));
    setText(when, worker.status === "running" ? `up ${seconds(worker.written_at - worker.started_at)}` : `last written ${seconds(worker.silent_seconds)} ago`);
    node.classList.toggle("stale", worker.status === "dead");
  });
}

function whatOf(worker) {
  const holds = many(worker.held_total, "connection held", "connections held");
  if (worker.status === "blocked") {
    return `${holds} · its event loop has stood still for ${seconds(worker.blocked_seconds)}${worker.blocked_at ? ` at ${worker.blocked_at}` : ""}`;
  }
  if (worker.status === "dead") return `it has ended; ${many(worker.held_total, "connection", "connections")} held when it last wrote`;
  if (worker.status === "silent") return `${holds} when it last wrote; it is alive, and writes nothing`;
  return holds;
}

function showPools(workers) {
  const pools = workers.flatMap((worker) => (worker.status === "dead" ? [] : worker.pools.map((pool) => ({ ...pool, worker }))));
  $("no-pools").hidden = pools.length > 0;
  keyed($("pool-list"), pools, (pool) => `${workerKey(pool.worker)} ${pool.pool}`, () => clone("pool"), (node, pool) => {
    const [name, bar, numbers, waiters] = node.children;
    const whole = pool.max || Math.max(pool.used + pool.idle, pool.peak, 1);
    setTitled(name.firstElementChild, pool.pool);
    setText(name.lastElementChild, workers.length > 1 ? `pid ${pool.worker.pid}` : "");
    node.classList.toggle("exhausted", pool.max !== null && pool.used >= pool.max);
    setBar(bar, pool, whole);
    setNumbers(numbers, pool);
    showWaiters(waiters, pool);
  });
}

function setBar(bar, pool, whole) {
  const parts = { used: pool.used, idle: pool.idle, peak: pool.peak };
  for (const [name, count] of Object.entries(parts)) {
    bar.style.setProperty(`--${name}`, `${Math.min(100, (100 * count) / whole)}%`);
  }
  bar.setAttribute("aria-label", `Connections used of pool ${pool.pool}`);
  bar.setAttribute("aria-valuenow", pool.used);
  bar.setAttribute("aria-valuemax", whole);
}

function setNumbers(numbers, pool) {
  if (!numbers.firstChild) {
    numbers.append(element("b"), element("span"), Object.assign(element("span"), { className: "waiting" }));
  }
  const [used, rest, waiting] = numbers.children;
  setText(used, pool.max === null ? `${pool.used}` : `${pool.used} of ${pool.max}`);
  setText(rest, ` used · ${pool.idle} idle · peak ${pool.peak}`);
  setText(waiting, pool.waiting ? ` · ${pool.waiting} waiting` : "");
}

function showWaiters(details, pool) {
  details.hidden = pool.waiting === 0;
  const longest = pool.waiters.length ? seconds(pool.waiters[0].wait_seconds) : "";
  setText(details.firstElementChild, `${many(pool.waiting, "work waits", "works wait")}, the longest for ${longest}`);
  const left = pool.waiting - pool.waiters.length;
  const lines = pool.waiters.map((w) => `${w.work} for ${seconds(w.wait_seconds)}${w.request_id ? ` (${w.request_id})` : ""}`);
  if (left > 0) lines.push(`and ${left} more`);
  keyed(details.lastElementChild, lines.map((text, place) => ({ text, place })), (line) => line.place, () => element("li"), (node, line) => setText(node, line.text));
}

// --- What is held --------------------------------------------------------------------------------

function heldText(held) {
  return [held.work, held.state, held.pool, held.request_id, held.session_id, held.opened_site, held.current_site, held.last_statement, `pid ${held.worker.pid}`]
    .join(" ")
    .toLowerCase();
}

function matches(text) {
  return view.filter.split(/\s+/).every((word) => text.includes(word));
}

function sorted(several, value, descending) {
  const order = descending ? -1 : 1;
  const compare = (a, b) => (typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0);
  return [...several].sort((a, b) => order * compare(value(a), value(b)));
}

function showHeld(held, workers) {
  const chosen = view.filter ? held.filter((each) => matches(heldText(each))) : held;
  const column = COLUMNS.find((each) => each.key === view.sort.key);
  const rows = sorted(chosen, column.value, view.sort.descending);
  const shown = view.all ? rows : rows.slice(0, FIRST_ROWS);
  const total = sum(workers, (worker) => worker.held_total);
  setText($("held-count"), view.filter ? `${chosen.length.toLocaleString()} of ${total.toLocaleString()}` : total.toLocaleString());
  $("held").hidden = shown.length === 0;
  $("no-held").hidden = shown.length > 0;
  setText($("no-held"), view.filter && held.length ? "Nothing that is held matches the filter." : "No connection is held at the moment.");
  $("more").hidden = rows.length <= FIRST_ROWS;
  setText($("more"), view.all ? `Show the first ${FIRST_ROWS} only` : `Show all ${rows.length.toLocaleString()}`);
  keyed($("held-rows"), shown, (each) => `${workerKey(each.worker)} ${each.id}`, makeRow, updateRow);
}

function makeRow() {
  const row = clone("row");
  const button = row.querySelector("button");
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    row.lastElementChild.hidden = !open;
    updateRow(row, row.item);
  });
  return row;
}

function updateRow(row, held) {
  const [age, work, state, now, opened, sql, more] = row.children;
  setText(age.firstElementChild.firstElementChild, seconds(held.age_seconds));
  setTitled(work, held.work);
  setPill(state.firstElementChild, held.state);
  setTitled(now, held.current_site || "–");
  now.classList.toggle("unknown", !held.current_site);
  setTitled(opened, held.opened_site);
  setTitled(sql, held.last_statement);
  row.classList.toggle("stale", held.worker.status === "dead");
  if (!more.hidden) describe(more, rowPairs(held));
}

function rowPairs(held) {
  return [
    ["work", held.work],
    ["request id", held.request_id],
    ["stands now at", held.current_site],
    ["opened at", held.opened_site],
    ["last statement", held.last_statement],
    ["idle for", seconds(held.idle_seconds)],
    ["statements", `${held.statements}, ${many(held.writes, "write", "writes")}`],
    ["pool", held.pool],
    ["session", held.session_id],
    ["database pid", held.db_pid],
    ["worker", `pid ${held.worker.pid} on ${held.worker.host}, ${held.worker.status}`],
  ];
}

function makeHead() {
  const row = Object.assign(element("div"), { className: "row" });
  row.setAttribute("role", "row");
  for (const column of COLUMNS) {
    const cell = element("div");
    cell.setAttribute("role", "columnheader");
    const button = Object.assign(element("button", column.title), { type: "button" });
    button.addEventListener("click", () => {
      const same = view.sort.key === column.key;
      view.sort = { key: column.key, descending: same ? !view.sort.descending : column.descending };
      showSort();
    });
    cell.append(button);
    row.append(cell);
    const option = element("option", column.title.toLowerCase());
    option.value = column.key;
    $("held-sort").append(option);
  }
  $("held-head").append(row);
  $("held-sort").addEventListener("change", () => {
    const column = COLUMNS.find((each) => each.key === $("held-sort").value);
    view.sort = { key: column.key, descending: column.descending };
    showSort();
  });
}

function showSort() {
  [...$("held-head").firstElementChild.children].forEach((cell, place) => {
    const mine = COLUMNS[place].key === view.sort.key;
    if (mine) cell.setAttribute("aria-sort", view.sort.descending ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
  $("held-sort").value = view.sort.key;
  if (view.live) show();
}

// --- What was found ------------------------------------------------------------------------------

const FACTS = [
  ["work", "work"],
  ["request_id", "request id"],
  ["trace_id", "trace id"],
  ["status", "status"],
  ["phase", "phase"],
  ["holder_route", "held by"],
  ["created_site", "session made at"],
  ["opened_site", "opened at"],
  ["last_site", "last statement at"],
  ["current_site", "stands now at"],
  ["closed_site", "closed at"],
  ["last_statement", "last statement"],
  ["error", "error"],
  ["pool", "pool"],
  ["session_id", "session"],
  ["db_pid", "database pid"],
  ["started_by", "started by"],
];

function findingText(finding) {
  return Object.values(finding)
    .map((value) => (typeof value === "object" ? JSON.stringify(value) : String(value)))
    .join(" ")
    .toLowerCase();
}

const FINDING_ORDERS = {
  severity: (f) => [SEVERITIES.indexOf(f.severity), f.open ? 0 : 1, reversed(f.first_seen)],
  last: (f) => [reversed(f.last_seen)],
  count: (f) => [-f.count],
};

function reversed(iso) {
  return -(Date.parse(iso) || 0);
}

function inOrder(one, other) {
  const order = FINDING_ORDERS[view.findingSort];
  const [a, b] = [order(one), order(other)];
  const place = a.findIndex((value, index) => value !== b[index]);
  if (place >= 0) return a[place] - b[place];
  return one.fingerprint < other.fingerprint ? -1 : 1;
}

function showFindings(several) {
  const chosen = view.filter ? view.findings.filter((each) => matches(findingText(each))) : view.findings;
  const rows = [...chosen].sort(inOrder);
  const total = view.findings.length;
  setText($("finding-count"), view.filter ? `${many(rows.length, "cause", "causes")} of ${total}` : many(total, "cause", "causes"));
  $("finding-list").hidden = rows.length === 0;
  $("no-findings").hidden = rows.length > 0;
  setText($("no-findings"), view.filter && total ? "No finding matches the filter." : "Nothing was found so far.");
  keyed($("finding-list"), rows, (each) => each.fingerprint, makeFinding, (node, finding) => updateFinding(node, finding, several));
}

function makeFinding() {
  const node = clone("finding");
  node.addEventListener("toggle", () => updateFinding(node, node.item, view.live.workers.length > 1));
  return node;
}

function updateFinding(node, finding, several) {
  if (node.dataset.severity !== finding.severity) node.dataset.severity = finding.severity;
  const [pill, rule, where, site, open, times, seen] = node.firstElementChild.children;
  setPill(pill, finding.severity);
  setTitled(rule, finding.rule);
  setTitled(where, finding.work);
  setTitled(site, finding.opened_site || finding.last_site || finding.created_site || "");
  setText(open, finding.open ? `${finding.open} open` : "");
  setText(times, `${finding.count.toLocaleString()} ×`);
  setTitled(seen, clockTime(finding.last_seen));
  if (node.open) updateFull(node.lastElementChild, finding, several);
}

function updateFull(full, finding, several) {
  const [summary, hint, silence, facts, others, docs] = full.children;
  setText(summary, finding.summary);
  setText(hint, finding.summary.includes(finding.hint) ? "" : finding.hint);
  hint.hidden = !hint.textContent;
  const pairs = FACTS.map(([key, name]) => [name, finding[key]]);
  describe(facts, [
    ...pairs,
    ["held for", seconds(finding.held_seconds)],
    ["idle for", seconds(finding.idle_seconds)],
    ["statements", finding.statements === undefined ? "" : `${finding.statements}, ${many(finding.writes || 0, "write", "writes")}`],
    ["pending", finding.pending ? Object.entries(finding.pending).map(([name, count]) => `${count} ${name}`).join(", ") : ""],
    ["stack", (finding.stack || []).join("\n← ")],
    ["first seen", clockTime(finding.first_seen)],
    ["last seen", `${clockTime(finding.last_seen)}, ${many(finding.count, "time", "times")} in all`],
    ["worker", several ? finding.pids.map((pid) => `pid ${pid}`).join(", ") : ""],
    ["fingerprint", finding.fingerprint],
  ]);
  others.hidden = !(finding.others || []).length;
  const lines = (finding.others || []).map((other, place) => ({ place, text: otherText(other) }));
  keyed(others.lastElementChild, lines, (line) => line.place, () => element("li"), (node, line) => setText(node, line.text));
  silence.hidden = !finding.silence;
  setText(silence.lastElementChild, finding.silence);
  showDocs(docs, finding.docs);
}

function otherText(other) {
  const known = ["role", "work", "name", "state", "site"].filter((key) => other[key]).map((key) => other[key]);
  const rest = [other.age_seconds === undefined ? "" : seconds(other.age_seconds), other.request_id, other.last_statement].filter(Boolean);
  return [...known, ...rest].join(" · ");
}

function showDocs(link, target) {
  link.hidden = !target;
  const isAddress = /^https?:\/\//.test(target || "");
  if (isAddress) link.href = target;
  else link.removeAttribute("href");
  setText(link, isAddress ? "About this rule" : `More: ${target || ""}`);
}

// --- What people do ------------------------------------------------------------------------------

function togglePause() {
  view.paused = !view.paused;
  $("pause").setAttribute("aria-pressed", String(view.paused));
  setText($("pause"), view.paused ? "Resume" : "Pause");
  showStatus();
  next();
}

function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  remember("theme", theme);
  applyTheme();
  showTheme();
}

function showTheme() {
  setText($("theme"), `Theme: ${theme}`);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape" && event.target === $("filter")) {
    $("filter").value = "";
    filterBy("");
    $("filter").blur();
  } else if (!typing && event.key === "/") {
    event.preventDefault();
    $("filter").focus();
    $("filter").select();
  } else if (!typing && event.key === "p") togglePause();
  else if (!typing && event.key === "t") nextTheme();
}

function filterBy(text) {
  view.filter = text.trim().toLowerCase();
  if (view.live) show();
}

document.addEventListener("DOMContentLoaded", () => {
  makeHead();
  showSort();
  showTheme();
  $("pause").addEventListener("click", togglePause);
  $("theme").addEventListener("click", nextTheme);
  $("more").addEventListener("click", () => {
    view.all = !view.all;
    show();
  });
  $("filter").addEventListener("input", () => filterBy($("filter").value));
  $("finding-sort").addEventListener("change", () => {
    view.findingSort = $("finding-sort").value;
    if (view.live) show();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", next);
  setInterval(showStatus, 1000);
  next();
});
