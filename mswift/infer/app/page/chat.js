// The page: a conversation, its settings, and one answer at a time.

import { build, parse } from "./markdown.js";
import { events, failure, piece, requestBody } from "./stream.js";

const SETTINGS = ["temperature", "top_p", "max_tokens", "seed", "top_k", "repetition_penalty"];
const KEY = "mswift-app-key";

// document and fetch: the browser's; storage: where the page's key lives until the tab is closed.
export function start(document, fetch, storage) {
  const get = (id) => document.getElementById(id);
  const soon = globalThis.requestAnimationFrame ?? ((call) => setTimeout(call, 0));
  let messages = [];
  let stopper = null; // of the answer that is under way

  function call(path, options = {}) {
    const headers = { ...options.headers };
    const key = storage.getItem(KEY);
    if (key) headers.authorization = `Bearer ${key}`;
    return fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  }

  function say(text) {
    get("status").textContent = text;
  }

  function bubble(role) {
    const box = document.createElement("article");
    box.className = role;
    const name = document.createElement("h2");
    name.textContent = role;
    const content = document.createElement("div");
    box.append(name, content);
    get("log").append(box);
    return content;
  }

  function show(content, text, thought) {
    const log = get("log");
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    content.replaceChildren();
    if (thought) {
      const details = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = "thinking";
      details.append(summary, document.createTextNode(thought));
      content.append(details);
    }
    content.append(build(parse(text), document));
    if (follow) log.scrollTop = log.scrollHeight;
  }

  function busy(controller) {
    stopper = controller;
    get("send").disabled = controller !== null;
    get("stop").disabled = controller === null;
  }

  async function connect() {
    const response = await call("/v1/models");
    get("lock").hidden = response.status !== 401;
    if (!response.ok) return say(response.status === 401 ? "" : await failure(response));
    const { data } = await response.json();
    const options = data.map((model) => {
      const option = document.createElement("option");
      option.value = option.textContent = String(model.id);
      return option;
    });
    get("model").replaceChildren(...options);
    const settings = await (await call("/settings")).json();
    if (!get("system").value) get("system").value = settings.system;
    say("");
  }

  async function answer() {
    const content = bubble("assistant");
    const own = messages; // Clear begins another list
    const controller = new AbortController();
    let text = "";
    let thought = "";
    let end = null;
    let waiting = false;
    const draw = () => {
      waiting = false;
      show(content, text, thought);
    };
    busy(controller);
    say("…");
    try {
      const settings = Object.fromEntries(SETTINGS.map((name) => [name, get(name).value]));
      const body = requestBody(get("model").value, get("system").value, own, settings);
      const response = await call("/v1/chat/completions", {
        method: "POST", body: JSON.stringify(body), signal: controller.signal,
        headers: { "content-type": "application/json" },
      });
      if (!response.ok) throw new Error(await failure(response));
      for await (const event of events(response.body)) {
        const more = piece(event);
        text += more.text;
        thought += more.thought;
        end = more.end ?? end;
        if (!waiting) {
          waiting = true;
          soon(draw);
        }
      }
      say(end === "length" ? "cut: max_tokens" : end === null ? "the answer broke off" : "");
    } catch (error) {
      say(controller.signal.aborted ? "stopped" : String(error.message ?? error));
    }
    draw();
    if (text) own.push({ role: "assistant", content: text });
    else {
      own.pop(); // nothing answers it
      content.parentNode?.remove();
    }
    busy(null);
  }

  async function send() {
    const text = get("prompt").value;
    if (!text.trim() || stopper) return;
    get("prompt").value = "";
    messages.push({ role: "user", content: text });
    bubble("user").textContent = text;
    await answer();
  }

  function clear() {
    stopper?.abort();
    messages = [];
    get("log").replaceChildren();
    say("");
  }

  async function unlock() {
    storage.setItem(KEY, get("key").value.trim());
    get("key").value = "";
    await connect();
  }

  get("form").addEventListener("submit", (event) => {
    event.preventDefault();
    return send();
  });
  get("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    return send();
  });
  get("stop").addEventListener("click", () => stopper?.abort());
  get("clear").addEventListener("click", clear);
  get("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    return unlock();
  });
  busy(null);
  return connect().catch((error) => say(String(error.message ?? error)));
}
