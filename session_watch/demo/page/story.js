// The demo's page: buttons that send requests, and what session-watch found, asked for once a moment.
"use strict";

const PAUSE = 600; // milliseconds between two questions
const cards = new Map();
let shown = "";

// All text is set as text, so whatever a route or statement holds is never read as markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const by = (id) => document.getElementById(id);

const isWrong = (text) => text.trimStart().startsWith("# Wrong:");

function codeOf(excerpt) {
  const code = make("code");
  excerpt.lines.forEach((text, index) => {
    const number = excerpt.first + index;
    const at = text.trimStart().startsWith("#") ? 0 : text.indexOf("  # ");
    const line = make("span", { class: excerpt.marked.includes(number) ? "l marked" : "l", "data-n": number });
    if (at < 0) line.append(text);
    else line.append(text.slice(0, at), make("span", { class: isWrong(text) ? "c wrong" : "c" }, text.slice(at)));
    line.append("\n");
    code.append(line);
  });
  return make("figure", {}, make("figcaption", {}, excerpt.file),
    make("pre", { tabindex: "0", "aria-label": `${excerpt.file}, from line ${excerpt.first}` }, code));
}

// A title that begins with code stays as it is.
function headingOf(title) {
  return /[(.]/.test(title.split(" ", 1)[0]) ? title : title[0].toUpperCase() + title.slice(1);
}

function cardOf(scenario, isLeak) {
  const word = isLeak ? "Trigger" : "Try it";
  const button = make("button", { type: "button", "aria-label": `${word}: ${scenario.title}` }, word);
  const answer = make("p", { class: "answer", role: "status" });
  const findings = make("div");
  const code = scenario.code === null ? null
    : make("details", {}, make("summary", {}, "Its code"), codeOf(scenario.code));
  const card = make("article", { class: isLeak ? "card leak" : "card", id: scenario.name },
    make("div", { class: "top" },
      make("div", {},
        make("h3", {}, headingOf(scenario.title)),
        make("p", { class: "where" }, `${scenario.method} ${scenario.path}`),
        scenario.when && make("p", { class: "when" }, scenario.when)),
      button),
    answer, code, findings);
  button.addEventListener("click", () => send(scenario, isLeak, button, answer));
  cards.set(scenario.name, { card, findings, answer, isLeak, before: "" });
  return card;
}

async function request(scenario) {
  const leaving = new AbortController();
  const timer = scenario.leaves_after === null ? 0
    : setTimeout(() => leaving.abort(), scenario.leaves_after * 1000);
  try {
    const response = await fetch(scenario.path, { method: scenario.method, signal: leaving.signal, cache: "no-store" });
    await response.text();
    return String(response.status);
  } catch (error) {
    return error.name === "AbortError" ? "the client has left" : "no answer";
  } finally {
    clearTimeout(timer);
  }
}

async function send(scenario, isLeak, button, answer) {
  button.disabled = true;
  answer.className = "answer";
  answer.textContent = "sent, waiting for the answer ...";
  const answers = [];
  for (let turn = 0; turn < scenario.requests; turn += 1) {
    answers.push(...await Promise.all(Array.from({ length: scenario.at_once }, () => request(scenario))));
  }
  answer.textContent = `answered: ${answers.join(", ")}`;
  button.disabled = false;
  await look();
  if (!isLeak && cards.get(scenario.name).findings.childElementCount === 0) {
    answer.className = "answer silent";
    answer.textContent += ", and nothing was found";
  }
}

// Two findings of one card often have the same line; it is shown once.
function isNew(excerpt, told) {
  const key = JSON.stringify(excerpt);
  return !told.has(key) && told.add(key);
}

function findingOf(finding, told) {
  const state = finding.open ? "still open" : "";
  const times = finding.count > 1 ? `${finding.count} times` : "once";
  return make("div", { class: `finding ${finding.severity}` },
    make("div", { class: "chips" },
      make("b", { class: "rule" }, finding.rule),
      make("span", {}, finding.severity + (finding.certain ? ", certain" : ", a suspicion")),
      make("span", {}, times),
      state && make("span", { class: "state open" }, state)),
    make("p", {}, finding.summary),
    ...finding.code.filter((excerpt) => isNew(excerpt, told)).map(codeOf),
    finding.silence && make("details", {}, make("summary", {}, "To silence this one alone"),
      make("p", { class: "silence" }, finding.silence)));
}

function show(told) {
  by("found").textContent = told.found;
  by("open").textContent = told.open;
  by("open").className = told.open ? "some" : "";
  by("held").textContent = Object.values(told.held).reduce((sum, count) => sum + count, 0);
  by("held").title = Object.entries(told.held).map(([pool, count]) => `${pool}: ${count}`).join(", ");
  by("nothing").hidden = told.findings.length > 0;
  by("feed").replaceChildren(...told.findings.map((finding) => make("li", {},
    make(finding.scenario ? "a" : "div", finding.scenario ? { href: `#${finding.scenario}` } : {},
      make("span", { class: finding.open ? "state open" : "state" }, finding.open ? "open" : `× ${finding.count}`),
      make("b", { class: `rule ${finding.severity}` }, finding.rule),
      make("span", { class: "work" }, finding.work)))));
  for (const [name, card] of cards) showIn(card, told.findings.filter((finding) => finding.scenario === name));
}

// A card is touched only if something of its own has changed: what somebody has opened or selected there stays.
function showIn(card, findings) {
  const worst = ["error", "warning", "advice"].find((each) => findings.some((finding) => finding.severity === each));
  const now = JSON.stringify(findings);
  if (now === card.before) return;
  card.before = now;
  const told = new Set();
  const opened = [...card.findings.querySelectorAll("details")].map((details) => details.open);
  card.findings.replaceChildren(...findings.map((finding) => findingOf(finding, told)));
  card.findings.querySelectorAll("details").forEach((details, index) => { details.open = opened[index] || false; });
  card.card.className = `card ${card.isLeak ? "leak" : ""} ${worst ? `told ${worst}` : ""}`;
}

async function look() {
  try {
    const response = await fetch("story/now.json", { cache: "no-store" });
    const text = await response.text();
    if (!response.ok) throw new Error(response.status);
    if (text !== shown) show(JSON.parse(text));
    shown = text;
    by("lost").hidden = true;
  } catch {
    by("lost").hidden = false;
  }
}

async function keepLooking() {
  if (!document.hidden) await look();
  setTimeout(keepLooking, PAUSE);
}

async function begin() {
  const story = await (await fetch("story.json")).json();
  by("links").append(...story.links.map((link) => make("a", { href: link.path }, link.text)));
  by("leaks").append(...story.leaks.map((scenario) => cardOf(scenario, true)));
  by("patterns").append(...story.patterns.map((scenario) => cardOf(scenario, false)));
  by("notes").append(...story.notes.map((note) => make("p", {}, note)));
  by("reset").addEventListener("click", async () => {
    await fetch("reset", { method: "POST" });
    await look();
  });
  document.addEventListener("visibilitychange", look);
  await keepLooking();
  document.body.dataset.ready = "yes";
}

begin();
