// The page: shows the list with the form, or one job, as the address says.

import * as api from "./api.js";
import { closeDetail, openDetail } from "./detail.js";
import { $, notify } from "./dom.js";
import { setUpForm } from "./form.js";
import { refreshList, setUpList } from "./list.js";

const LIST_EVERY_MS = 2000;
const READY_EVERY_MS = 10000;

function route() {
  const match = location.hash.match(/^#\/jobs\/([\w.-]+)$/);
  notify(null);
  $("home").hidden = Boolean(match);
  if (match) {
    openDetail(match[1]).catch(notify);
  } else {
    closeDetail();
    refreshList().catch(notify);
  }
}

async function showReadiness() {
  const [line, state, words] = await api.readiness().then(
    ({ workers }) => {
      const busy = workers.filter((worker) => worker.busy).length;
      if (!workers.length) return [$("ready"), "idle", "ready, no worker yet: jobs will wait"];
      return [$("ready"), "up", `${workers.length} worker${workers.length > 1 ? "s" : ""}, ${busy} busy`];
    },
    (error) => [$("ready"), "down", error.message],
  );
  line.className = `ready ${state}`;
  if (line.textContent !== words) line.textContent = words;
}

function setUpKey() {
  $("key").value = api.apiKey();
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.setApiKey($("key").value.trim());
    route();
  });
}

function keepFresh() {
  setInterval(() => {
    if (document.hidden || $("home").hidden) return;
    // A passing fault shows in the line at the top; it must not cover what is being typed.
    refreshList().catch((error) => {
      if (error.status === 401) notify(error);
    });
  }, LIST_EVERY_MS);
  setInterval(() => document.hidden || showReadiness(), READY_EVERY_MS);
}

setUpKey();
setUpList();
setUpForm((job) => {
  location.hash = `#/jobs/${job.id}`;
});
window.addEventListener("hashchange", route);
route();
showReadiness();
keepFresh();
