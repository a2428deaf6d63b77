"use strict";
// Chat with two served policies side by side: hearts go to /v1/feedback, choices to /v1/preferences, scores come from
// /v1/score.
const SCORE_TITLES = { love: "P[Love]", helpfulness: "Helpful", safety: "Safe" };
// Not crypto.randomUUID: browsers offer it on HTTPS only.
const randomId = (prefix) => prefix + crypto.getRandomValues(new Uint32Array(4)).join("-");
const visitorId = (() => {
  const storedId = localStorage.getItem("rluf-visitor");
  if (storedId) return storedId;
  const newId = randomId("visitor-");
  localStorage.setItem("rluf-visitor", newId);
  return newId;
})();
const byId = (id) => document.getElementById(id);
let columns = [];

function showStatus(text) { byId("status").textContent = text; }

async function callService(path, body) {
  const token = byId("token").value;
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = "Bearer " + token;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const reply = await response.json().catch(() => ({}));
  if (!response.ok) {
    if (response.status === 401) byId("access").open = true;
    throw new Error(reply.error ? reply.error.message : "the service returned status " + response.status);
  }
  return reply;
}

function makeElement(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function addColumn(model) {
  const section = makeElement("section", "column");
  const title = makeElement("h2", "", model.id);
  title.id = "title-" + columns.length;
  section.setAttribute("aria-labelledby", title.id);
  const list = makeElement("ol");
  section.append(title, list);
  byId("columns").append(section);
  columns.push({ model: model.id, list, messages: [], conversationId: randomId("chat-") });
}

function addMessage(column, role, text) {
  const item = makeElement("li", "message " + role);
  item.append(makeElement("span", "who", role === "user" ? "You" : column.model), makeElement("span", "text", text));
  column.list.append(item);
  return item;
}

function addHeart(item, column, id) {
  const footer = makeElement("div", "foot");
  const heart = makeElement("button", "heart", "♥");
  heart.type = "button";
  heart.setAttribute("aria-pressed", "false");
  heart.setAttribute("aria-label", "Love this reply of " + column.model);
  heart.addEventListener("click", async () => {
    const isLoved = heart.getAttribute("aria-pressed") !== "true";
    heart.disabled = true;
    try {
      await callService("/v1/feedback", { id, reaction: isLoved ? "love" : null, user: visitorId });
      heart.setAttribute("aria-pressed", String(isLoved));
      showStatus(isLoved ? "Your heart is stored." : "Your heart is removed.");
    } catch (error) { showStatus("Not stored: " + error.message); }
    heart.disabled = false;
    heart.focus();
  });
  footer.append(heart);
  item.append(footer);
  return footer;
}

// Replies to the same messages can be compared; the later turns of two policies rarely can.
function addChoice(replies) {
  const [left, right] = replies;
  if (replies.length !== 2 || left.context !== right.context || left.text === right.text) return;
  if (!left.text.trim() || !right.text.trim()) return;
  const buttons = replies.map((reply, index) => {
    const button = makeElement("button", "choice", "Better");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", "Better reply: " + reply.model);
    button.addEventListener("click", async () => {
      try {
        const choice = { chosen_id: reply.id, rejected_id: replies[1 - index].id, user: visitorId };
        await callService("/v1/preferences", choice);
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        showStatus("Your choice is stored.");
      } catch (error) { showStatus("Not stored: " + error.message); }
    });
    reply.footer.append(button);
    return button;
  });
}

async function showScores(footer, scoreRequest) {
  const reply = await callService("/v1/score", scoreRequest);
  for (const [name, score] of Object.entries(reply.scores)) {
    const label = (SCORE_TITLES[name] || name) + " " + score.value.toFixed(2);
    const scoreElement = makeElement("span", "score", label + " ");
    const bar = makeElement("meter");
    bar.min = 0; bar.max = 1; bar.value = score.value;
    bar.setAttribute("aria-label", label);
    scoreElement.append(bar);
    footer.append(scoreElement);
  }
}

async function takeTurn(column, text) {
  const messages = [...column.messages, { role: "user", content: text }];
  addMessage(column, "user", text);
  const visitor = { user: visitorId, conversation_id: column.conversationId };
  const reply = await callService("/v1/chat/completions", { model: column.model, messages, ...visitor });
  const { message, finish_reason } = reply.choices[0];
  const response = message.content;
  const item = addMessage(column, "assistant", response);
  column.messages = [...messages, { role: "assistant", content: response }];
  // The service does not log blank responses, so they can get no feedback.
  const footer = response.trim() ? addHeart(item, column, reply.id) : null;
  if (footer) await showScores(footer, { messages, response, finish_reason, ...visitor });
  return { id: reply.id, model: column.model, text: response, context: JSON.stringify(messages), footer };
}

async function send(event) {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text) return;
  if (!columns.length) await loadModels();
  byId("send").disabled = true;
  showStatus("Waiting for responses…");
  const results = await Promise.allSettled(columns.map((column) => takeTurn(column, text)));
  const failed = results.filter((result) => result.status === "rejected");
  if (!failed.length) addChoice(results.map((result) => result.value));
  showStatus(failed.length ? "No response: " + failed[0].reason.message : "Done.");
  if (failed.length < columns.length) byId("text").value = "";
  byId("send").disabled = false;
  byId("text").focus();
}

async function loadModels() {
  try {
    const reply = await callService("/v1/models");
    const policies = reply.data.filter((model) => model.kind === "policy");
    byId("access").open = false;
    byId("columns").replaceChildren();
    columns = [];
    policies.slice(0, 2).forEach(addColumn);
    const versions = reply.data.filter((model) => model.kind === "reward").map((model) => model.version).join(", ");
    showStatus(policies.length ? "Scores by reward models " + versions + "." : "No policy is served; set serve.policies.");
  } catch (error) { showStatus("Not ready: " + error.message); }
}

byId("form").addEventListener("submit", send);
byId("again").addEventListener("click", loadModels);
byId("token").addEventListener("change", loadModels);
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); byId("form").requestSubmit(); }
});
loadModels();
