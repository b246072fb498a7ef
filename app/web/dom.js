// Small helpers for the document: text is always set as text, never as HTML.

export const $ = (id) => document.getElementById(id);

/** Make an element: el("a", {href: "#/"}, "text", child). Falsy children are left out. */
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child || child === 0));
  return node;
}

/** A module's path, with leave to break the line behind its dots. */
export function dotted(path) {
  return path.split(/(?<=\.)/).flatMap((part) => [part, document.createElement("wbr")]);
}

const LONG = 24; // characters, beyond which a value gets two columns

/** A definition list of figures: pairs of name and value; empty values are left out. */
export function figures(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", { class: "figures" },
    shown.map(([name, value]) => el("div", { class: String(value).length > LONG && "wide" },
      el("dt", {}, name), el("dd", {}, value))));
}

/** A bar with its words above it. */
export function bar(name, done, total, words) {
  const label = `${name}: ${words}`;
  return el("div", {},
    el("div", { class: "row" }, el("span", {}, name), el("span", {}, words)),
    el("progress", { max: total || 1, value: total ? done : 0, "aria-label": label }));
}

/** Show an error of the API, or hide the notice with null. */
export function notify(error) {
  const box = $("notice");
  box.hidden = !error;
  if (!error) return;
  box.replaceChildren(
    el("p", {}, el("strong", {}, error.code ? `${error.code}: ` : ""), error.message),
    error.hint && el("p", {}, error.hint),
  );
}

/** Ask before something that cannot be undone. Resolves to null, or {option: boolean}. */
export function ask({ title, text, yes, option }) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = yes;
  $("ask-option-row").hidden = !option;
  $("ask-option-text").textContent = option ?? "";
  $("ask-option").checked = false;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes" ? { option: $("ask-option").checked } : null);
    }, { once: true });
  });
}
