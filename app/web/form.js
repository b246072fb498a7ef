// The form for a new job, and the preview of its plan.

import * as api from "./api.js";
import { $, dotted, el, figures, notify } from "./dom.js";
import * as format from "./format.js";
import { fieldOf, readForm, showKind } from "./kinds.js";

const ROWS_SHOWN = 200;

function clearErrors() {
  notify(null);
  for (const node of document.querySelectorAll("#job-form .error")) node.textContent = "";
  for (const node of document.querySelectorAll("#job-form [aria-invalid]")) {
    node.removeAttribute("aria-invalid");
  }
}

function markField(field, message) {
  $(`${field}-error`).textContent = message;
  $(field).setAttribute("aria-invalid", "true");
  $(field).closest("details")?.setAttribute("open", "");
  $(field).focus();
}

/** Put each complaint where its field is; what has no field goes to the top. */
function showErrors(error) {
  if (error.field) return markField(error.field, error.message);
  let first = null;
  for (const { loc, msg } of error.errors ?? []) {
    const path = loc.slice(1);
    const field = fieldOf(path);
    if (!field) continue;
    markField(field, field === "advanced" ? `${path.slice(1).join(".")}: ${msg}` : msg);
    first ??= field;
  }
  if (first) $(first).focus();
  else {
    notify(error);
    $("notice").scrollIntoView({ block: "nearest" });
  }
  return undefined;
}

async function whileBusy(button, words, work) {
  const label = button.textContent;
  button.disabled = true;
  button.textContent = words;
  try {
    clearErrors();
    await work();
  } catch (error) {
    showErrors(error);
  } finally {
    button.disabled = false;
    button.textContent = label;
  }
}

function planView(plan) {
  const rows = plan.matrices.slice(0, ROWS_SHOWN);
  const refused = plan.refused.length > 0 && [
    el("h3", {}, "Refused"),
    el("ul", {}, plan.refused.map((item) =>
      el("li", {}, el("strong", {}, item.name), ` ${item.code}: ${item.reason}`))),
  ];
  return [
    el("h3", {}, "The plan"),
    figures([
      ["Model", plan.model_class ?? "not known to transformers"],
      ["Matrices", format.count(plan.matrices.length)],
      ["Trainable parameters", format.count(plan.trainable_parameters)],
      ["Adapter", format.bytes(plan.bytes.adapter)],
      ["Read / written", `${format.bytes(plan.bytes.read)} / ${format.bytes(plan.bytes.written)}`],
      ["Peak memory", format.bytes(plan.peak_memory_bytes)],
      ["Peak disk", format.bytes(plan.peak_disk_bytes)],
      ["Names from", plan.names_from],
      ["Left out", plan.left_out.length ? plan.left_out.join(", ") : null],
    ]),
    refused,
    plan.notes.map((note) => el("p", { class: "help" }, `Note: ${note}`)),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "matrices of the plan" },
      el("table", {},
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Module"),
          el("th", { scope: "col" }, "Shape"), el("th", { scope: "col", class: "number" }, "Rank"))),
        el("tbody", {}, rows.map((row) => el("tr", {}, el("td", {}, dotted(row.module)),
          el("td", {}, row.shape.join(" × ")), el("td", { class: "number" }, row.rank)))))),
    plan.matrices.length > rows.length &&
      el("p", { class: "help" }, `and ${plan.matrices.length - rows.length} more`),
  ].flat().filter(Boolean);
}

export function setUpForm(onSubmitted) {
  $("kind").addEventListener("change", () => {
    clearErrors();
    $("plan").replaceChildren();
    showKind();
  });
  showKind(); // a browser may restore what was chosen before
  // One key for one filled form: a second press, or a lost answer, makes no second job.
  let key = newKey();
  let sent = "";
  $("job-form").addEventListener("submit", (event) => {
    event.preventDefault();
    whileBusy($("submit"), "Submitting…", async () => {
      const body = readForm();
      if (sent && sent !== JSON.stringify(body)) key = newKey();
      sent = JSON.stringify(body);
      const job = await api.submit(body, $("hub-token").value, key);
      [key, sent] = [newKey(), ""];
      $("hub-token").value = "";
      $("plan").replaceChildren();
      onSubmitted(job);
    });
  });
  $("preview").addEventListener("click", () => {
    whileBusy($("preview"), "Planning…", async () => {
      $("plan").replaceChildren();
      const body = readForm();
      $("plan").replaceChildren(...planView(await api.plan(body, $("hub-token").value)));
    });
  });
}

function newKey() {
  // randomUUID exists on https and loopback only; the key needs to be new, not secret.
  return crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
}
