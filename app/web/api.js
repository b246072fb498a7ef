// The service's REST API. The key lives in this tab's session and nowhere else.

const KEY = "pissa-api-key";

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail ?? `the service answered ${status}`);
    this.status = status;
    this.code = body.code;
    this.hint = body.hint;
    this.errors = body.errors ?? [];
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const all = { Accept: "application/json", ...headers };
  if (apiKey()) all.Authorization = `Bearer ${apiKey()}`;
  if (body !== undefined) all["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method, headers: all, signal, cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "the service does not answer", hint: "is it running?" });
  }
  if (!answer.ok && answer.status !== 304) {
    throw new Problem(answer.status, await answer.json().catch(() => ({})));
  }
  return answer;
}

const json = async (...request) => (await send(...request)).json();
const job = (id) => `/v1/jobs/${encodeURIComponent(id)}`;
const withToken = (token) => (token ? { "X-Hub-Token": token } : {});

export const readiness = () => json("/readyz");
export const submit = (body, token, idempotencyKey) => json("/v1/jobs", {
  method: "POST", body, headers: { ...withToken(token), "Idempotency-Key": idempotencyKey },
});
export const plan = (body, token) => json("/v1/plans", {
  method: "POST", body, headers: withToken(token),
});
export const getJob = (id) => json(job(id));
export const cancel = (id, discard) => json(`${job(id)}/cancel`, {
  method: "POST", body: { discard },
});
export const resume = (id) => json(`${job(id)}/resume`, { method: "POST" });
export const remove = (id) => send(job(id), { method: "DELETE" });
export const manifest = (id) => json(`${job(id)}/manifest`);
export const files = async (id) => (await json(`${job(id)}/files`)).files;
export const fileUrl = (id, path) =>
  `${job(id)}/files/${path.split("/").map(encodeURIComponent).join("/")}`;
export const fileBlob = async (id, path, type) => {
  const answer = await send(fileUrl(id, path), { headers: { Accept: "*/*" } });
  return new Blob([await answer.arrayBuffer()], { type });
};

export function list({ status, after }) {
  const query = new URLSearchParams({ limit: "30" });
  if (status) query.set("status", status);
  if (after) query.set("after", after);
  return json(`/v1/jobs?${query}`);
}

/** Call `onEvent` for each event of a job, from the first on, until it ends or is aborted. */
export async function follow(id, onEvent, signal) {
  let last = "";
  while (!signal.aborted) {
    try {
      const answer = await send(`${job(id)}/events`, {
        signal, headers: { Accept: "text/event-stream", "Last-Event-ID": last },
      });
      if (answer.status === 204) return;
      for await (const event of messages(answer.body)) {
        last = event.id;
        onEvent(event);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status >= 400 && error.status < 500) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}

async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
    }
  }
}
