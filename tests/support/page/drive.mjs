// node drive.mjs PAGE URL < list of actions: the page's own code as a browser would run it, over real HTTP.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { documentOf, tree } from "./dom.mjs";

const [page, url] = process.argv.slice(2);
const { start } = await import(pathToFileURL(`${page}/chat.js`));
const document = documentOf(await (await fetch(`${url}/`)).text());
const get = (id) => document.getElementById(id);
const kept = new Map();
const storage = { getItem: (name) => kept.get(name) ?? null, setItem: (name, value) => kept.set(name, value) };
const browser = (path, options) => fetch(url + path, { ...options, headers: { ...options.headers, origin: url } });

await start(document, browser, storage);
const seen = [];
const actions = {
  set: (id, value) => (get(id).value = value),
  submit: (id) => get(id).fire("submit"),
  click: (id) => get(id).fire("click"),
  enter: (id, more) => get(id).fire("keydown", { key: "Enter", ...more }),
  // Send, and click as soon as the answer has some text.
  interrupt: async (id) => {
    const sent = get("form").fire("submit");
    const last = () => get("log").childNodes.at(-1)?.childNodes.at(-1)?.textContent ?? "";
    while (get("log").childNodes.length % 2 || last().length < 5) await new Promise((next) => setTimeout(next, 5));
    get(id).fire("click");
    await sent;
  },
  look: () =>
    seen.push({
      models: get("model").childNodes.map((one) => one.value),
      system: get("system").value,
      locked: !get("lock").hidden,
      status: get("status").textContent,
      log: get("log").childNodes.map((one) => [one.className, one.childNodes[1].textContent]),
      trees: get("log").childNodes.map((one) => tree(one.childNodes[1])),
    }),
};
for (const [name, ...given] of JSON.parse(readFileSync(0, "utf8"))) await actions[name](...given);
console.log(JSON.stringify(seen));
