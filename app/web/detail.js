// One job: what it is at, what happened, what came out.

import * as api from "./api.js";
import { $, ask, bar, el, figures, notify } from "./dom.js";
import * as format from "./format.js";
import { doing } from "./list.js";
import { filesView, manifestView } from "./result.js";

const EVENTS_KEPT = 300;
const FINAL = ["succeeded", "failed", "cancelled"];
let watching = null;

export function closeDetail() {
  watching?.abort();
  watching = null;
  $("detail").hidden = true;
  $("detail").replaceChildren();
}

export async function openDetail(id) {
  closeDetail();
  const watch = new AbortController();
  watching = watch;
  const parts = { head: el("section", { class: "card" }), events: el("ol", { class: "events" }) };
  parts.result = el("div", { class: "detail" });
  parts.request = el("pre", { class: "request", tabindex: 0, "aria-label": "the request" });
  $("detail").replaceChildren(
    el("a", { href: "#/" }, "← All jobs"),
    parts.head,
    parts.result,
    el("div", { class: "split" },
      el("section", { class: "card" }, el("h2", {}, "Events"), parts.events),
      el("section", { class: "card" }, el("h2", {}, "Request"), parts.request)));
  $("detail").hidden = false;
  $("main").focus();
  await watchJob(id, parts, watch.signal);
}

async function watchJob(id, parts, signal) {
  let drawn = "";
  let stale = true;
  const redraw = async () => {
    const job = await api.getJob(id);
    if (signal.aborted) return job;
    parts.request.textContent = JSON.stringify(job.request, null, 2);
    const state = JSON.stringify(job);
    if (state !== drawn) drawHead(parts.head, job, () => openDetail(id));
    drawn = state;
    return job;
  };
  const job = await redraw();
  showResult(job, parts, signal);
  const events = api.follow(id, (event) => {
    stale = true;
    addEvent(parts.events, event);
  }, signal).catch(notify);
  // Events say that something changed; the job is asked at most once a second.
  const timer = setInterval(async () => {
    if (!stale || document.hidden) return;
    stale = false;
    try {
      const now = await redraw();
      if (FINAL.includes(now.status)) showResult(now, parts, signal);
      else stale = true;
    } catch (error) {
      notify(error);
    }
  }, 1000);
  signal.addEventListener("abort", () => clearInterval(timer));
  await events;
}

function drawHead(head, job, reopen) {
  const { matrices, shards, bytes } = job.progress;
  head.replaceChildren(...[
    el("div", { class: "row" },
      el("span", { class: `pill ${job.status}`, role: "status" }, job.status),
      el("span", { class: "mono" }, job.id)),
    el("h1", {}, format.subject(job.request) || job.kind),
    el("p", { class: "lead" }, format.wish(job.request)),
    job.status === "running" && el("p", { class: "lead" }, doing(job)),
    job.status !== "succeeded" && el("div", { class: "bars" },
      bar("Matrices", matrices.done, matrices.total, `${matrices.done} of ${matrices.total || "?"}`),
      bar("Shards", shards.done, shards.total, `${shards.done} of ${shards.total || "?"}`),
      bar("Bytes", bytes.done, bytes.total,
        `${format.bytes(bytes.done)} of ${bytes.total ? format.bytes(bytes.total) : "?"}`)),
    job.error && el("div", { class: "notice", role: "alert" },
      el("p", {}, el("strong", {}, `${job.error.code}: `), job.error.message),
      job.error.hint && el("p", {}, job.error.hint)),
    (job.result?.notes ?? []).map((note) => el("p", { class: "help" }, `Note: ${note}`)),
    figures([
      ["Kind", job.kind],
      ["Output", job.result?.output ?? job.request.output?.ref
        ?? (job.kind === "verify" ? "" : "kept by the service")],
      ["Verdict", { true: "passed", false: "not passed" }[job.result?.passed]],
      ["Submitted", new Date(job.created_at).toLocaleString()],
      ["Took", format.seconds(job.result?.seconds)],
      ["Matrices", job.result && format.count(job.result.matrices)],
      ["Peak memory", format.bytes(job.result?.peak_memory_bytes)],
      ["Energy captured", format.percent(job.result?.energy)],
      ["Most missed", format.small(job.result?.max_missed)],
      ["Worst recombination", format.small(job.result?.max_recombination_error)],
      ["Most lost of an update", format.small(job.result?.max_lost)],
      ["Ranks", job.result?.ranks && [...new Set(job.result.ranks)].join("–")],
      ["Attempts", job.attempts],
    ]),
    el("div", { class: "actions" }, actions(job, reopen)),
  ].flat().filter(Boolean));
}

function actions(job, reopen) {
  const act = (work) => async () => {
    notify(null);
    try {
      await work();
    } catch (error) {
      notify(error);
    }
  };
  const cancel = act(async () => {
    const answer = await ask({
      title: "Cancel this job?", yes: "Cancel the job",
      text: "Finished shards are kept, so that it can be resumed.",
      option: "throw away finished shards, too",
    });
    if (answer) await api.cancel(job.id, answer.option).then(reopen);
  });
  const resume = act(() => api.resume(job.id).then(reopen));
  const remove = act(async () => {
    const answer = await ask({
      title: "Delete this job?", yes: "Delete the job",
      text: job.request.output ? "Its result stays where it is." : "The files kept for it go, too.",
    });
    if (!answer) return;
    await api.remove(job.id);
    location.hash = "#/";
  });
  if (!FINAL.includes(job.status)) {
    return [el("button", { type: "button", onclick: cancel, disabled: job.status === "cancelling" },
      "Cancel")];
  }
  return [
    job.status !== "succeeded" && el("button", { type: "button", class: "primary", onclick: resume },
      "Resume"),
    el("button", { type: "button", class: "danger", onclick: remove }, "Delete"),
  ].filter(Boolean);
}

function addEvent(list, event) {
  const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  list.append(el("li", {}, el("time", { datetime: event.at }, format.clock(event.at)),
    el("span", {}, event.type.replaceAll("_", " ")),
    el("span", { class: "about" }, about(event.data))));
  while (list.children.length > EVENTS_KEPT) list.firstChild.remove();
  if (follows) list.scrollTop = list.scrollHeight;
}

const SAID_ALONE = ["tensor", "module", "shard", "message"];
const SAID_AS = { seconds: format.seconds, energy: (share) => `energy ${format.percent(share)}`,
  bytes: format.bytes, resumed: () => "taken up from an earlier attempt" };

function about(data) {
  return Object.entries(data)
    // What is nested, absent or false needs no words.
    .filter(([, value]) => value && ["string", "number", "boolean"].includes(typeof value))
    .map(([name, value]) => {
      if (SAID_ALONE.includes(name)) return value;
      return SAID_AS[name]?.(value) ?? `${name.replaceAll("_", " ")} ${value}`;
    })
    .join(" · ");
}

async function showResult(job, parts, signal) {
  if (!FINAL.includes(job.status) || parts.result.childElementCount) return;
  const shown = await Promise.all([manifestView(job), filesView(job)]);
  if (!signal.aborted) parts.result.replaceChildren(...shown.flat().filter(Boolean));
}
