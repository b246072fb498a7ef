// The list of jobs, kept fresh while it is looked at.

import * as api from "./api.js";
import { $, el, notify } from "./dom.js";
import * as format from "./format.js";

let older = null; // cursor of the next page
let tail = []; // pages the reader asked for, behind the first

export function share(job) {
  const { bytes, matrices } = job.progress;
  if (job.status === "succeeded") return 1;
  if (bytes.total) return bytes.done / bytes.total;
  return matrices.total ? matrices.done / matrices.total : 0;
}

export function doing(job) {
  if (job.status !== "running") return job.status;
  const { done, total } = job.progress.matrices;
  const matrices = total ? `, ${done} of ${total} matrices` : "";
  const left = job.eta_s ? `, ${format.seconds(job.eta_s)} left` : "";
  return `${job.phase}${matrices}${left}`;
}

function entry(job) {
  const active = ["running", "cancelling"].includes(job.status);
  return el("li", {}, el("a", { href: `#/jobs/${job.id}` },
    el("span", { class: "model" }, format.subject(job.request) || job.id),
    el("span", { class: "when" }, el("span", { class: `pill ${job.status}` }, job.status)),
    el("span", { class: "meta" }, format.wish(job.request)),
    el("time", { class: "when", datetime: job.created_at }, format.ago(job.created_at)),
    active && el("progress", { max: 1, value: share(job), "aria-label": doing(job) }),
    active && el("span", { class: "meta" }, doing(job)),
    job.error && el("span", { class: "why" }, `${job.error.code}: ${job.error.message}`)));
}

export async function refreshList() {
  const page = await api.list({ status: $("status-filter").value });
  if (!tail.length) older = page.next;
  const seen = new Set(page.jobs.map((job) => job.id));
  draw([...page.jobs, ...tail.filter((job) => !seen.has(job.id))]);
}

function draw(jobs) {
  // A redraw must not take the focus away from who walks through the list by keyboard.
  const focused = document.activeElement?.closest?.("#jobs a")?.getAttribute("href");
  $("jobs").replaceChildren(...jobs.map(entry));
  if (focused) $("jobs").querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  $("no-jobs").hidden = jobs.length > 0;
  $("more").hidden = !older;
}

export function setUpList() {
  $("status-filter").addEventListener("change", () => {
    tail = [];
    refreshList().catch(notify);
  });
  $("more").addEventListener("click", async () => {
    try {
      const page = await api.list({ status: $("status-filter").value, after: older });
      tail.push(...page.jobs);
      older = page.next;
      await refreshList();
    } catch (error) {
      notify(error);
    }
  });
}
