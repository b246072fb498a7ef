// What a job made: one row a matrix, the pictures, the files.

import * as api from "./api.js";
import { dotted, el } from "./dom.js";
import * as format from "./format.js";

const ROWS_SHOWN = 500;
// Where a key is needed a file must pass through this page's memory to be saved.
const MOST_BYTES_IN_MEMORY = 500e6;

const COLUMNS = [
  ["Module", (row) => dotted(row.module), false],
  ["Shape", (row) => row.shape?.join(" × "), false],
  ["Rank", (row) => row.rank, true],
  ["Energy", (row) => format.percent(row.energy), true],
  ["Missed", (row) => format.small(row.missed), true],
  ["Recombination", (row) => format.small(row.recombination_error), true],
  ["Lost", (row) => format.small(row.lost), true],
  ["Method", (row) => row.method, false],
];

export async function manifestView(job) {
  const manifest = await api.manifest(job.id).catch(() => null);
  if (!manifest?.matrices?.length) return null;
  // Each kind of job measures something else: a column nobody fills is left out.
  const columns = COLUMNS.filter(([, value]) =>
    manifest.matrices.some((row) => ![undefined, null, ""].includes(value(row))));
  const body = el("tbody", {});
  const show = (rows) => body.append(...rows.map((row) => el("tr", {},
    columns.map(([, value, number]) => el("td", { class: number && "number" }, value(row) ?? "")))));
  show(manifest.matrices.slice(0, ROWS_SHOWN));
  const rest = manifest.matrices.slice(ROWS_SHOWN);
  const more = rest.length > 0 && el("button", {
    type: "button",
    onclick: (event) => {
      show(rest);
      event.target.remove();
    },
  }, `Show ${rest.length} more`);
  return el("section", { class: "card" },
    el("h2", {}, `Matrices (${format.count(manifest.matrices.length)})`),
    await pictures(job, manifest),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "matrices" },
      el("table", { id: "matrices" },
        el("thead", {}, el("tr", {}, columns.map(([name, , number]) =>
          el("th", { scope: "col", class: number && "number" }, name)))),
        body)),
    more);
}

async function pictures(job, manifest) {
  const paths = Object.keys(manifest.files ?? {}).filter((path) => path.endsWith(".svg"));
  const images = await Promise.all(paths.map(async (path) => {
    const blob = await api.fileBlob(job.id, path, "image/svg+xml").catch(() => null);
    // As an image an SVG runs no script and loads nothing.
    return blob && el("img", {
      src: URL.createObjectURL(blob), alt: path.replace(/^.*\/|\.svg$/g, ""),
    });
  }));
  const shown = images.filter(Boolean);
  return shown.length > 0 && el("div", { class: "pictures" }, shown);
}

export async function filesView(job) {
  if (job.status !== "succeeded") return null;
  const files = await api.files(job.id).catch(() => []);
  if (!files.length) return null;
  return el("section", { class: "card" },
    el("h2", {}, `Files (${files.length})`),
    el("p", { class: "lead" }, "All of them with checksums: ",
      el("code", {}, `pissa fetch ${job.id} FOLDER`)),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "files" },
      el("table", {},
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "File"),
          el("th", { scope: "col", class: "number" }, "Size"),
          el("th", { scope: "col" }, "sha256"))),
        el("tbody", {}, files.map((file) => el("tr", {},
          el("td", {}, link(job, file)),
          el("td", { class: "number" }, format.bytes(file.size)),
          el("td", { class: "mono", title: file.sha256 }, `${file.sha256.slice(0, 12)}…`)))))));
}

function link(job, file) {
  if (!api.apiKey()) {
    return el("a", { href: api.fileUrl(job.id, file.path), download: true }, file.path);
  }
  if (file.size > MOST_BYTES_IN_MEMORY) return file.path;
  return el("a", { href: "#", onclick: (event) => save(event, job, file) }, file.path);
}

async function save(event, job, file) {
  event.preventDefault();
  const blob = await api.fileBlob(job.id, file.path, "application/octet-stream");
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: file.path.split("/").pop() }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
