// node render.mjs PAGE < list of texts: the tree that the page makes of each, the seconds that it took, and its tags.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { documentOf, tree } from "./dom.mjs";

const { build, parse, TAGS } = await import(pathToFileURL(`${process.argv[2]}/markdown.js`));
const document = documentOf("");
const found = JSON.parse(readFileSync(0, "utf8")).map((text) => {
  const start = process.cpuUsage();
  const made = build(parse(text), document);
  const { user, system } = process.cpuUsage(start);
  return { tree: tree(made), text: made.textContent, seconds: (user + system) / 1e6 };
});
console.log(JSON.stringify({ tags: [...TAGS], found }));
