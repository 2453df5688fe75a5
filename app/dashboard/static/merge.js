// A merge's page: copying, and what is live while the merge goes on. Without it the page loads itself anew (noscript).
const page = document.getElementById("merge");

// ── copying ──

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => copy(button));
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  let copied;
  if (navigator.clipboard) {
    copied = await navigator.clipboard.writeText(source.textContent).then(() => true, () => false);
  } else { // not offered over plain http from another machine
    getSelection().selectAllChildren(source);
    copied = document.execCommand("copy");
  }
  const before = button.textContent;
  button.textContent = copied ? "Copied" : "Press Ctrl+C";
  if (!copied) getSelection().selectAllChildren(source);
  setTimeout(() => { button.textContent = before; }, 2000);
}

// ── live ──

const WINDOW = 15; // seconds that the speed is taken over
const ENDS = ["succeeded", "failed", "cancelled"];
const HAPPENS = ["claimed", "stage", "retried", "worker_lost", "handed_back", "cancel_requested", "waiting_for_disk"];

if (page.dataset.events) follow(page.dataset.events);

function follow(url) {
  const source = new EventSource(url);
  const opened = Date.now();
  let seen = [];
  let attempt = null;
  source.addEventListener("progress", (event) => {
    const now = JSON.parse(event.data);
    if (ENDS.includes(now.status)) return reload();
    if (now.attempt !== attempt) seen = [];
    attempt = now.attempt;
    seen.push([Date.now() / 1000, now.bytes_done]);
    while (seen.length > 2 && seen.at(-1)[0] - seen[0][0] > WINDOW) seen.shift();
    show(now, seen);
  });
  // What happened before the page was made is in it already: only what comes later is news.
  let due = null;
  const news = (event) => {
    if (Date.parse(JSON.parse(event.data).at) < Date.parse(page.dataset.now)) return;
    clearTimeout(due);
    due = setTimeout(refresh, 150);
  };
  for (const type of HAPPENS) source.addEventListener(type, news);
  for (const type of ENDS) source.addEventListener(type, reload);

  function reload() {
    source.close();
    location.reload();
  }
}

function show(now, seen) {
  const bar = document.getElementById("bar");
  if (!bar) return;
  bar.value = now.fraction;
  put("done", size(now.bytes_done));
  put("total", size(now.bytes_total));
  put("fraction", percent(now.fraction));
  const [[then, before], [last, done]] = [seen[0], seen.at(-1)];
  const speed = last > then ? (done - before) / (last - then) : 0;
  if (speed > 0) {
    put("speed", `${size(speed)}/s`);
    put("left", `about ${duration((now.bytes_total - done) / speed)} left`);
  }
}

// The server writes the page: what is new is taken from it, so that both say the same.
async function refresh() {
  const answer = await fetch(location.href, { headers: { accept: "text/html" } }).catch(() => null);
  if (!answer?.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of page.querySelectorAll("[data-live]")) {
    const other = fresh.querySelector(`[data-live="${part.dataset.live}"]`);
    if (other && !part.contains(document.activeElement)) part.replaceWith(other);
  }
}

function put(id, text) {
  const element = document.getElementById(id);
  if (element && element.textContent !== text) element.textContent = text;
}

function size(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return unit === "B" ? `${Math.round(count)} B` : `${count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}
