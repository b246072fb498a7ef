// The kinds of jobs: what the form shows for each, and the body that it makes of it.

import { $ } from "./dom.js";

const REGEX = /[\\^$.|?*+()[\]{}]/;

/** For each kind: what must be given, and the fields of the form that its own words mean. */
const KINDS = {
  "base-to-pissa": {
    lead: "Split a checkpoint into its residual base model and the initial PiSSA adapter.",
    needs: { model: "which model?" },
    fields: { rank: "rank", target_modules: "targets" },
    others: "advanced",
    options: () => ({ pissa: config() }),
  },
  "pissa-to-lora": {
    lead: "Turn a trained PiSSA adapter into plain LoRA for the original model.",
    needs: { trained: "which adapter?" },
    fields: { rank: "lora-rank", tolerance: "tolerance", uniform: "uniform" },
    options: () => ({ lora: loraOptions() }),
  },
  "pissa-to-base": {
    lead: "Merge an adapter into its residual model; a plain model comes out.",
    needs: { residual: "which residual model?", adapter: "which adapter?" },
    options: () => ({}),
  },
  verify: {
    lead: "Check that a converted model is what it says and gives the original back.",
    needs: { original: "which model was converted?", converted: "which model came out?" },
    options: () => ({}),
  },
};
const REFERENCES = ["model", "trained", "initial", "residual", "adapter", "original", "converted"];

const chosen = () => $("kind").value;
const shown = (node) => !node.closest("[data-kinds][hidden]");

/** Show what belongs to the chosen kind, and nothing else. */
export function showKind() {
  for (const node of document.querySelectorAll("[data-kinds]")) {
    node.hidden = !node.dataset.kinds.split(" ").includes(chosen());
  }
  $("lead").textContent = KINDS[chosen()].lead;
}

export function readForm() {
  const { needs, options } = KINDS[chosen()];
  const body = { kind: chosen() };
  for (const name of [...REFERENCES, "output"]) {
    const value = $(name).value.trim();
    if (shown($(name)) && value) body[name] = value;
  }
  for (const [name, words] of Object.entries(needs)) {
    if (!body[name]) throw Object.assign(new Error(words), { field: name });
  }
  return { ...body, ...options() };
}

/** The form's field for a place in the body, ["pissa", "rank"]; null if it has none. */
export function fieldOf(path) {
  const { fields = {}, others = null } = KINDS[chosen()];
  if (["pissa", "lora"].includes(path[0])) return fields[path[1]] ?? others;
  const field = [...REFERENCES, "output"].find((name) => name === path[0]);
  return field && shown($(field)) ? field : null;
}

function config() {
  const read = {};
  if ($("rank").value.trim()) read.rank = Number($("rank").value);
  if ($("targets").value.trim()) read.target_modules = targets($("targets").value.trim());
  const advanced = $("advanced").value.trim();
  return advanced ? { ...read, ...parseAdvanced(advanced) } : read;
}

function loraOptions() {
  const read = {};
  if ($("lora-rank").value.trim()) read.rank = Number($("lora-rank").value);
  if ($("tolerance").value.trim()) read.tolerance = Number($("tolerance").value);
  if ($("uniform").checked) read.uniform = true;
  return read;
}

/** all-linear and regular expressions stay strings; names with commas become a list. */
function targets(text) {
  if (text === "all-linear" || (REGEX.test(text) && !text.includes(","))) return text;
  return text.split(",").map((name) => name.trim()).filter(Boolean);
}

function parseAdvanced(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw Object.assign(new Error(`not JSON: ${error.message}`), { field: "advanced" });
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw Object.assign(new Error("an object in braces is needed"), { field: "advanced" });
  }
  return value;
}
