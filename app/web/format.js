// Numbers and times as people read them.

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

export function bytes(count) {
  if (count === null || count === undefined) return "";
  let unit = 0;
  while (count >= 1000 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count.toLocaleString(undefined, { maximumFractionDigits: count < 10 && unit ? 1 : 0 })} ${UNITS[unit]}`;
}

export function seconds(count) {
  if (count === null || count === undefined) return "";
  if (count < 1) return `${Math.round(count * 1000)} ms`;
  if (count < 10) return `${count.toFixed(1)} s`;
  if (count < 120) return `${Math.round(count)} s`;
  const minutes = Math.round(count / 60);
  return minutes < 120 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}

export function percent(share) {
  return typeof share === "number" ? `${(share * 100).toFixed(1)} %` : "";
}

export function small(number) {
  return typeof number === "number" ? number.toExponential(1) : "";
}

export function count(number) {
  return number?.toLocaleString() ?? "";
}

export function clock(text) {
  return new Date(text).toLocaleTimeString();
}

export function ago(text) {
  const passed = (Date.now() - new Date(text).getTime()) / 1000;
  if (passed < 60) return "just now";
  if (passed < 86400) return `${seconds(passed)} ago`;
  return new Date(text).toLocaleDateString();
}

// What a job of any kind is about, and what is to become of it.
export function subject(request) {
  return request.model ?? request.trained ?? request.residual ?? request.original ?? "";
}

export function wish(request) {
  const output = request.output?.ref ?? "files kept by the service";
  if (request.kind === "verify") return `verify ${request.converted}`;
  if (request.kind === "pissa-to-base") return `merged with ${request.adapter} → ${output}`;
  if (request.kind === "pissa-to-lora") return `${loraForm(request.lora ?? {})} → ${output}`;
  return `rank ${request.pissa?.rank ?? "?"} → ${output}`;
}

function loraForm({ rank, tolerance }) {
  const limits = [rank && `rank ≤ ${rank}`, tolerance && `loss ≤ ${tolerance}`].filter(Boolean);
  return `LoRA, ${limits.join(", ") || "exact"}`;
}
