"use strict";
// Chat with each served policy in a column of its own; hearts go to /v1/feedback, scores come from /v1/score.
const NAMES = { love: "P[Love]", helpfulness: "Helpful", safety: "Safe" };
const drawn = (prefix) => prefix + crypto.getRandomValues(new Uint32Array(4)).join("-"); // randomUUID wants HTTPS
const visitor = (() => {
  const kept = localStorage.getItem("rluf-visitor");
  if (kept) return kept;
  const made = drawn("visitor-");
  localStorage.setItem("rluf-visitor", made);
  return made;
})();
const byId = (id) => document.getElementById(id);
let columns = [];

function say(text) { byId("status").textContent = text; }

async function call(path, body) {
  const token = byId("token").value;
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = "Bearer " + token;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    if (answer.status === 401) byId("access").open = true;
    throw new Error(told.error ? told.error.message : "the service answered " + answer.status);
  }
  return told;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function addColumn(model) {
  const section = make("section", "column");
  const title = make("h2", "", model.id);
  title.id = "title-" + columns.length;
  section.setAttribute("aria-labelledby", title.id);
  const list = make("ol");
  section.append(title, list);
  byId("columns").append(section);
  columns.push({ model: model.id, list, messages: [], conversation: drawn("chat-") });
}

function addMessage(column, role, text) {
  const item = make("li", "message " + role);
  item.append(make("span", "who", role === "user" ? "You" : column.model), make("span", "text", text));
  column.list.append(item);
  return item;
}

function addHeart(item, column, id) {
  const foot = make("div", "foot");
  const heart = make("button", "heart", "♥");
  heart.type = "button";
  heart.setAttribute("aria-pressed", "false");
  heart.setAttribute("aria-label", "Love this reply of " + column.model);
  heart.addEventListener("click", async () => {
    const loved = heart.getAttribute("aria-pressed") !== "true";
    heart.disabled = true;
    try {
      await call("/v1/feedback", { id, reaction: loved ? "love" : null });
      heart.setAttribute("aria-pressed", String(loved));
      say(loved ? "Your heart is stored." : "Your heart is taken back.");
    } catch (error) { say("Not stored: " + error.message); }
    heart.disabled = false;
    heart.focus();
  });
  foot.append(heart);
  item.append(foot);
  return foot;
}

async function showScores(foot, messages, response) {
  const told = await call("/v1/score", { messages, response });
  for (const [name, score] of Object.entries(told.scores)) {
    const part = make("span", "score", (NAMES[name] || name) + " " + score.value.toFixed(2) + " ");
    const bar = make("meter");
    bar.min = 0; bar.max = 1; bar.value = score.value;
    bar.setAttribute("aria-label", (NAMES[name] || name) + " " + score.value.toFixed(2));
    part.append(bar);
    foot.append(part);
  }
}

async function turn(column, text) {
  const messages = [...column.messages, { role: "user", content: text }];
  addMessage(column, "user", text);
  const told = await call("/v1/chat/completions",
    { model: column.model, messages, user: visitor, conversation_id: column.conversation });
  const response = told.choices[0].message.content;
  const item = addMessage(column, "assistant", response);
  column.messages = [...messages, { role: "assistant", content: response }];
  if (response.trim()) await showScores(addHeart(item, column, told.id), messages, response);
}

async function send(event) {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text) return;
  if (!columns.length) await look();
  byId("send").disabled = true;
  say("Waiting for answers…");
  const ended = await Promise.allSettled(columns.map((column) => turn(column, text)));
  const failed = ended.filter((one) => one.status === "rejected");
  say(failed.length ? "No answer: " + failed[0].reason.message : "Answered.");
  if (failed.length < columns.length) byId("text").value = "";
  byId("send").disabled = false;
  byId("text").focus();
}

async function look() {
  try {
    const told = await call("/v1/models");
    const policies = told.data.filter((model) => model.kind === "policy");
    byId("access").open = false;
    byId("columns").replaceChildren();
    columns = [];
    policies.slice(0, 2).forEach(addColumn);
    const rewards = told.data.filter((model) => model.kind === "reward").map((model) => model.version).join(", ");
    say(policies.length ? "Scores by reward models " + rewards + "." : "No policy is served; set serve.policies.");
  } catch (error) { say("Not ready: " + error.message); }
}

byId("form").addEventListener("submit", send);
byId("again").addEventListener("click", look);
byId("token").addEventListener("change", look);
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); byId("form").requestSubmit(); }
});
look();
