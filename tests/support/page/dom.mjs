// As much of a document as the page uses. Elements hold nodes only: there is no way to give them HTML.

class Node {
  constructor() {
    this.childNodes = [];
    this.parentNode = null;
  }
  append(...nodes) {
    for (const one of nodes) {
      if (!(one instanceof Node)) throw new Error(`no node: ${one}`);
      const added = one instanceof Fragment ? one.childNodes.splice(0) : [one];
      for (const each of added) each.parentNode = this;
      this.childNodes.push(...added);
    }
  }
  replaceChildren(...nodes) {
    this.childNodes = [];
    this.append(...nodes);
  }
  get textContent() {
    return this.childNodes.map((one) => one.textContent).join("");
  }
  set textContent(text) {
    this.replaceChildren(new Text(text));
  }
}

class Text extends Node {
  constructor(text) {
    super();
    this.data = String(text);
  }
  get textContent() {
    return this.data;
  }
}

class Fragment extends Node {}

class Element extends Node {
  constructor(tag) {
    super();
    this.tagName = tag;
    this.value = "";
    this.listeners = {};
    this.scrollTop = this.scrollHeight = this.clientHeight = 0;
    for (const name of ["innerHTML", "outerHTML", "srcdoc", "src"]) {
      Object.defineProperty(this, name, { set() { throw new Error(`${name} was set`); } });
    }
  }
  replaceChildren(...nodes) {
    super.replaceChildren(...nodes);
    if (this.tagName === "select") this.value = nodes[0]?.value ?? "";
  }
  remove() {
    this.parentNode.childNodes = this.parentNode.childNodes.filter((one) => one !== this);
  }
  addEventListener(name, call) {
    this.listeners[name] = call;
  }
  fire(name, more = {}) {
    return this.listeners[name]({ preventDefault() {}, ...more });
  }
}

// A document with the elements of index.html that have an id.
export function documentOf(html) {
  const byId = {};
  for (const [, tag, attributes] of html.matchAll(/<(\w+)([^>]*)>/g)) {
    const id = /\bid="(\w+)"/.exec(attributes);
    if (id) byId[id[1]] = new Element(tag);
  }
  return {
    getElementById: (id) => byId[id] ?? null,
    createElement: (tag) => new Element(tag),
    createTextNode: (text) => new Text(text),
    createDocumentFragment: () => new Fragment(),
  };
}

// An element as [tag, {attributes}, ...children], text as a string.
export function tree(node) {
  if (node instanceof Text) return node.data;
  const attributes = {};
  for (const name of ["href", "title", "target", "rel"]) if (node[name] !== undefined) attributes[name] = node[name];
  return [node.tagName ?? "", attributes, ...node.childNodes.map(tree)];
}
