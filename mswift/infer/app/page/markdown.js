// Markdown as a tree, and the tree as elements. Text of a model can only become text: parse() makes nodes of the tags
// in TAGS, the one attribute is an href of http, https or mailto, and build() creates elements and text nodes, never HTML.

export const TAGS = new Set([
  "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote",
  "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td",
]);
const MAX_DEPTH = 12;

const node = (tag, children, more) => ({ tag, children, ...more });

// The address that a link may have, or null.
export function safeUrl(text) {
  if (!/^(https?:\/\/|mailto:)/i.test(text)) return null;
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*?))?(?: +#+)? *$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;

// Blocks of a text: a list of nodes.
export function parse(text, depth = 0) {
  return blocks(String(text).replace(/\r\n?/g, "\n").split("\n"), depth);
}

function blocks(lines, depth) {
  const found = [];
  let words = [];
  const end = () => {
    if (words.length) found.push(node("p", inline(words.join("\n"))));
    words = [];
  };
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const special = line.trim() === "" ? null : block(lines, at, depth);
    if (line.trim() === "") {
      end();
      at += 1;
    } else if (special) {
      end();
      found.push(special.node);
      at = special.next;
    } else {
      words.push(line.trim());
      at += 1;
    }
  }
  end();
  return found;
}

// The block other than a paragraph that begins at a line, and where the next one begins; null for a paragraph.
function block(lines, at, depth) {
  const line = lines[at];
  let match = FENCE.exec(line);
  if (match && !(match[1][0] === "`" && match[2].includes("`"))) return fence(lines, at, match[1]);
  if (RULE.test(line)) return { node: node("hr", []), next: at + 1 };
  if ((match = HEADING.exec(line))) return { node: node(`h${match[1].length}`, inline(match[2] ?? "")), next: at + 1 };
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  if (line.includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1])) return table(lines, at);
  return null;
}

function fence(lines, at, mark) {
  const code = [];
  let next = at + 1;
  for (; next < lines.length; next += 1) {
    const close = lines[next].trim();
    if (close.length >= mark.length && close === mark[0].repeat(close.length)) break;
    code.push(lines[next]);
  }
  return { node: node("pre", [node("code", [code.join("\n")])]), next: next + 1 };
}

function quote(lines, at, depth) {
  const inside = [];
  let next = at;
  for (let match; next < lines.length && (match = QUOTE.exec(lines[next])); next += 1) inside.push(match[1]);
  return { node: node("blockquote", blocks(inside, depth + 1)), next };
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const match = ITEM.exec(lines[next]);
    if (!match || match[1].length > first[1].length + 1 || /\d/.test(match[2]) !== ordered) break;
    if (match[1].length < first[1].length || RULE.test(lines[next])) break;
    const inside = [match[4]];
    const indent = match[1].length + 2;
    for (next += 1; next < lines.length; next += 1) {
      const blank = lines[next].trim() === "";
      const own = lines[next].length - lines[next].trimStart().length;
      if (blank ? !isInside(lines[next + 1], indent) : own < indent) break;
      inside.push(blank ? "" : lines[next].slice(Math.min(own, match[1].length + match[2].length + 1)));
    }
    while (next < lines.length && lines[next].trim() === "" && ITEM.test(lines[next + 1] ?? "")) next += 1;
    const content = blocks(inside, depth + 1);
    items.push(node("li", content.length === 1 && content[0].tag === "p" ? content[0].children : content));
  }
  return { node: node(ordered ? "ol" : "ul", items), next };
}

const isInside = (line, indent) => line !== undefined && line.trim() !== "" && line.search(/\S/) >= indent;

function table(lines, at) {
  const rows = [];
  let next = at;
  for (; next < lines.length && lines[next].includes("|"); next += 1) {
    if (next === at + 1) continue;
    const cells = lines[next].trim().replace(/^\||\|$/g, "").split("|");
    const tag = next === at ? "th" : "td";
    rows.push(node("tr", cells.map((cell) => node(tag, inline(cell.trim())))));
  }
  const body = rows.length > 1 ? [node("tbody", rows.slice(1))] : [];
  return { node: node("table", [node("thead", rows.slice(0, 1)), ...body]), next };
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const BARE = /https?:\/\/[^\s<>"'`()[\]{}|\\^]+/y;
const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);

// What stands in a line: strings and nodes.
function inline(text, depth = 0, inLink = false) {
  const found = [];
  const seen = new Map(); // where each mark comes next: looked for once, so that the time is linear
  let plain = "";
  const add = (item) => {
    if (plain) found.push(plain);
    plain = "";
    found.push(item);
  };
  for (let at = 0; at < text.length; ) {
    const one = span(text, at, depth, seen, inLink);
    if (one) {
      add(one.node);
      at = one.next;
    } else if (text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  if (plain) found.push(plain);
  return found;
}

function span(text, at, depth, seen, inLink) {
  const character = text[at];
  if (character === "\n") return { node: node("br", []), next: at + 1 };
  if (character === "`") return code(text, at, seen);
  if (character === "[" && depth < MAX_DEPTH && !inLink) return link(text, at, depth, seen);
  if (character === "h" && !inLink && !isWord(text[at - 1])) return bare(text, at);
  if (depth >= MAX_DEPTH) return null;
  for (const [mark, tag] of MARKS) {
    if (character !== mark[0] || !text.startsWith(mark, at)) continue;
    const one = marked(text, at, mark, tag, depth, seen, inLink);
    if (one) return one;
  }
  return null;
}

function find(text, wanted, from, seen) {
  const last = seen.get(wanted);
  if (last === -1 || last >= from) return last;
  const at = text.indexOf(wanted, from);
  seen.set(wanted, at);
  return at;
}

function code(text, at, seen) {
  let length = 1;
  while (text[at + length] === "`") length += 1;
  const mark = "`".repeat(length);
  const close = find(text, mark, at + length, seen);
  if (close < 0) return { node: mark, next: at + length };
  const inside = text.slice(at + length, close);
  return { node: node("code", [inside.trim() === "" ? inside : inside.replace(/^ (.*) $/s, "$1")]), next: close + length };
}

function marked(text, at, mark, tag, depth, seen, inLink) {
  const start = at + mark.length;
  if (/\s/.test(text[start] ?? " ") || (mark[0] === "_" && isWord(text[at - 1]))) return null;
  const close = closing(text, mark, start + 1, seen);
  if (close < 0 || /\s/.test(text[close - 1]) || (mark[0] === "_" && isWord(text[close + mark.length]))) return null;
  return { node: node(tag, inline(text.slice(start, close), depth + 1, inLink)), next: close + mark.length };
}

// Where a mark is closed: *a **b** c* by the single one, **a *b*** by the last two.
function closing(text, mark, from, seen) {
  let close = find(text, mark, from, seen);
  if (mark.length === 2) return text[close + 2] === mark[0] && close >= 0 ? close + 1 : close;
  for (let tries = 0; close >= 0 && text[close + 1] === mark; tries += 1) {
    if (tries === 8) return -1;
    let end = close + 1;
    while (end - close < 8 && text[end] === mark) end += 1;
    close = text.indexOf(mark, end);
  }
  return close;
}

function link(text, at, depth, seen) {
  const middle = find(text, "](", at + 1, seen);
  if (middle < 0) return null;
  const close = find(text, ")", middle + 2, seen);
  if (close < 0 || middle - at > 2000) return null;
  const href = safeUrl(text.slice(middle + 2, close).trim().split(/\s/)[0]);
  if (href === null) return null;
  return { node: node("a", inline(text.slice(at + 1, middle), depth + 1, true), { href }), next: close + 1 };
}

function bare(text, at) {
  BARE.lastIndex = at;
  const match = BARE.exec(text);
  if (!match) return null;
  const shown = match[0].replace(/[.,:;!?*_~]+$/, "");
  const href = safeUrl(shown);
  return href === null ? null : { node: node("a", [shown], { href }), next: at + shown.length };
}

// A fragment of elements. Raises an error for a tag that is not known.
export function build(nodes, document) {
  const fragment = document.createDocumentFragment();
  for (const one of nodes) fragment.append(typeof one === "string" ? document.createTextNode(one) : element(one, document));
  return fragment;
}

function element(one, document) {
  if (!TAGS.has(one.tag)) throw new Error(`no such tag: ${one.tag}`);
  const made = document.createElement(one.tag);
  if (one.href !== undefined) {
    made.href = safeUrl(one.href) ?? "#";
    made.title = made.href; // what the text says may be another address
    made.target = "_blank";
    made.rel = "noopener noreferrer nofollow";
  }
  made.append(build(one.children, document));
  return made;
}
