// The page: one WebSocket brings pictures and news, the rest is fetched. No library, no build step.

const $ = (id) => document.getElementById(id);
const WINDOW = 120; // seconds of the graph
const STALE = 3000; // ms without news, and the server is gone
const OLD = 5000; // ms after which a picture says nothing of what is before the camera
const FORMATS = { bmp: "image/bmp", jpeg: "image/jpeg", jpg: "image/jpeg", png: "image/png", tif: "image/tiff", tiff: "image/tiff", webp: "image/webp" };

const state = {
  threshold: 0.5, scores: [], events: [], now: 0, heard: 0, serverTime: 0, upload: null, started: false,
  connected: false, source: null, result: null, captured: 0, // when the result's frame was, in ms as performance.now()
};

// Requests ---------------------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  const response = await fetch(path, options);
  if (response.status === 401) location.assign("login");
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail || `the server answered ${response.status}`);
  return body;
}

function explain(error) {
  return error instanceof TypeError ? "The server can't be reached." : `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
}

// Live -------------------------------------------------------------------------------------------------------------

let pause = 500;

function connect() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/live`);
  socket.binaryType = "blob";
  let news = null;
  socket.onopen = () => {
    pause = 500;
    state.scores = []; // the server sends what it remembers
    state.events = [];
    $("gallery").replaceChildren();
    $("notices").replaceChildren();
    state.connected = true;
    setChip($("connection"), "good", "connected");
  };
  socket.onmessage = async ({ data }) => {
    state.heard = performance.now();
    if (typeof data === "string") {
      news = JSON.parse(data);
      if (news.picture) return; // shown with it
    } else {
      await showPicture(data);
    }
    show(news);
    if (socket.readyState === WebSocket.OPEN) socket.send("next");
  };
  socket.onclose = ({ code }) => {
    setChip($("connection"), "bad", code === 1013 ? "too many viewers" : "disconnected");
    state.connected = false;
    showVerdict();
    setTimeout(connect, pause);
    pause = Math.min(pause * 2, 5000);
    if (code === 1006) ask("v1/status").catch(() => {}); // a session that has ended leads to the login
  };
}

async function showPicture(blob) {
  const picture = $("picture");
  const before = picture.src;
  picture.src = URL.createObjectURL(blob);
  await picture.decode().catch(() => {});
  picture.hidden = false;
  $("no-picture").hidden = true;
  if (before) URL.revokeObjectURL(before);
}

function show(news) {
  state.now = state.serverTime = news.time;
  state.scores.push(...news.scores);
  const first = state.scores.findIndex(([time]) => time > state.now - WINDOW - 5);
  if (first > 0) state.scores.splice(0, first);
  for (const notice of news.notices) addNotice(notice);
  if (news.status) showStatus(news.status);
  if (news.result) showResult(news.result, news.age_ms);
  showVerdict();
  for (const event of news.events) addEvent(event);
  if (news.events.length && state.started) announce(`Alarm, ${scored(news.events.at(-1))}`);
  state.started = true;
  drawSoon();
}

const VERDICTS = { good: ["good", "✓ Good"], defect: ["bad", "✕ Defect"], unusable: ["bad", "! Unusable"], absent: ["absent", "○ Absent"] };
const UNJUDGED = new Set(["unusable", "absent"]); // their scores say nothing of a part

function verdictOf(result) {
  const name = result.verdict ?? (result.is_anomalous ? "defect" : "good");
  const [mood, word] = VERDICTS[name] ?? ["bad", `! ${capital(name)}`];
  return { name, mood, word };
}

/** What stands beside a verdict: the score, or why it says nothing. */
function scoreOf(result) {
  return UNJUDGED.has(result.verdict) ? result.unusable ?? "" : result.score.toFixed(3);
}

/** An event in words. */
function scored(event) {
  return UNJUDGED.has(event.verdict) ? event.verdict : `score ${event.score.toFixed(3)}`;
}

function altOf(result) {
  const { name } = verdictOf(result);
  return UNJUDGED.has(name) ? name : `${name}, score ${result.score.toFixed(2)}, ${count(result.regions, "region")}`;
}

function showResult(result, age) {
  state.result = result;
  state.age = age;
  state.captured = performance.now() - age;
  $("alarm").hidden = !result.alarm;
  setText($("source"), result.source);
  $("picture").alt = `Heat map of ${result.source}: ${altOf(result)}`;
}

function showVerdict() {
  const gone = whyNone();
  const { mood, word } = gone ?? verdictOf(state.result);
  $("verdict").dataset.state = mood;
  setText($("verdict-word"), word);
  setText($("verdict-score"), gone ? "" : scoreOf(state.result));
  setText($("verdict-note"), gone ? gone.note : state.result.verdict === "absent" ? "The part is not in the picture." : "");
  $("live").classList.toggle("stale", Boolean(gone));
  setText($("veil"), gone?.word ?? "");
}

/** Why the last verdict says nothing of what is before the camera now; null where it does. */
function whyNone() {
  const { connected, heard, source, result, captured } = state;
  const now = performance.now();
  const isFresh = result && now - captured <= OLD;
  if (!connected || now - heard > STALE) return { mood: "warn", word: "No connection", note: "This page hears nothing from the server." };
  if (source && source.state !== "live" && !(isFresh && result.unusable)) { // what is unusable says why itself
    const mood = source.state === "connecting" ? "none" : "warn";
    return { mood, word: `${sourceWord()} ${source.state}`, note: ["No picture to judge", source.message].filter(Boolean).join(": ") };
  }
  if (!source || !result) return { mood: "none", word: "Waiting", note: "No frame yet." };
  if (isFresh) return null;
  return { mood: "warn", word: `No frame for ${Math.round((now - captured) / 1000)} s`, note: "What is before the camera now is not known." };
}

const CAMERA = { live: "good", connecting: "waiting", ended: "idle" }; // whatever else it is, it is not well

function sourceWord() {
  return state.source.live ? "Camera" : "Source";
}

function showStatus(status) {
  setText($("model"), `${status.model.name} · ${status.model.device} · ${status.model.precision}`);
  showBundle(status.model);
  $("logout").hidden = !status.login;
  const pipeline = status.pipeline;
  for (const id of ["live", "history", "verdict", "events", "log", "camera"]) $(id).hidden = !pipeline;
  $("main").classList.toggle("uploads-only", !pipeline);
  if (status.threshold !== state.threshold || !state.tuned) setThreshold(status.threshold);
  if (!pipeline) return;
  state.source = pipeline.source;
  setChip($("camera"), CAMERA[pipeline.source.state] ?? "bad", `${sourceWord().toLowerCase()} ${pipeline.source.state}`);
  const counters = pipeline.source.counters;
  const rows = [
    ["frames per second", fixed(pipeline.fps, 1)],
    ["age", `${fixed(state.age, 0)} ms`],
    ["age, 95 %", `${fixed(pipeline.age_ms?.p95, 0)} ms`],
    ["frames", counters.frames ?? 0],
    ["dropped", counters.dropped ?? 0],
    ["reconnects", counters.reconnects ?? 0],
    ...[["unusable", pipeline.unusable], ["absent", pipeline.absent], ["warm-up", counters.warm_up]].filter(([, value]) => value),
  ];
  const list = $("figures");
  if (rows.some(([name], i) => list.children[i]?.firstChild.textContent !== name)) { // they only ever become more
    list.replaceChildren(...rows.map(([name]) => element("div", {}, element("dt", {}, name), element("dd"))));
  }
  rows.forEach(([, value], i) => setText(list.children[i].lastChild, String(value)));
}

/** What inspects: enough to tell whether it is what was rolled out. */
function showBundle({ name, sha256, memory, calibration }) {
  const made = calibration?.made ? new Date(calibration.made).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "date unknown";
  const facts = [
    ["name", name],
    ["hash", element("code", { title: sha256 }, sha256.slice(0, 12))],
    ["memory", memory ? element("span", {}, element("code", {}, memory.name), `, ${count(memory.good_parts, "good part")}`) : "none"],
    ["calibrated", calibration ? `${made}, ${count(calibration.good_images, "good part")}` : "no"],
  ];
  const told = facts.map(([, value]) => value.textContent ?? value).join();
  if ($("facts").dataset.told === told) return;
  $("facts").dataset.told = told;
  $("facts").replaceChildren(...facts.flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value)]));
}

// Threshold --------------------------------------------------------------------------------------------------------

let wanted = null; // what the person has set and the server not confirmed
let sending = false;

function setThreshold(value) {
  state.threshold = value;
  state.tuned = true;
  if (wanted !== null) return; // a hand is on it
  $("slider").value = $("number").value = value.toFixed(3);
  $("slider").setAttribute("aria-valuetext", value.toFixed(3));
  drawSoon();
}

async function sendThreshold() {
  if (sending) return;
  sending = true;
  try {
    while (wanted !== null && wanted !== state.threshold) {
      const threshold = wanted;
      await ask("v1/threshold", { method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ threshold }) });
      state.threshold = threshold;
      setText($("tuning-error"), "");
    }
    if (state.upload) await inspect(state.upload); // its verdict follows
  } catch (error) {
    setText($("tuning-error"), explain(error));
  } finally {
    sending = false;
    wanted = null;
    setThreshold(state.threshold);
  }
}

function onThreshold({ target }) {
  if (!target.reportValidity()) return;
  wanted = Number(target.value);
  const other = target === $("slider") ? $("number") : $("slider");
  other.value = wanted.toFixed(3);
  $("slider").setAttribute("aria-valuetext", wanted.toFixed(3));
  drawSoon();
  sendThreshold();
}

$("slider").addEventListener("input", onThreshold);
$("number").addEventListener("change", onThreshold);

// Graph ------------------------------------------------------------------------------------------------------------

let drawing = false;

function drawSoon() {
  if (drawing || $("history").hidden) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    draw();
  });
}

function draw() {
  const canvas = $("chart");
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(`--${name}`).trim();
  const box = { left: 34, right: width - 8, top: 8, bottom: height - 22 };
  const x = (time) => box.right - ((state.now - time) / WINDOW) * (box.right - box.left);
  const y = (score) => box.bottom - score * (box.bottom - box.top);
  const threshold = wanted ?? state.threshold;
  const points = state.scores.filter(([time]) => time >= state.now - WINDOW);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `12px ${css.fontFamily || "system-ui"}`;

  context.fillStyle = colour("bad-back");
  for (const [from, to] of alarms(points)) context.fillRect(x(from), box.top, Math.max(x(to) - x(from), 2), box.bottom - box.top);

  context.strokeStyle = colour("grid");
  context.fillStyle = colour("quiet");
  context.textBaseline = "middle";
  for (const level of [0, 0.25, 0.5, 0.75, 1]) {
    line(context, [[box.left, y(level)], [box.right, y(level)]]);
    context.textAlign = "right";
    context.fillText(level.toString(), box.left - 6, y(level));
  }
  for (let ago = 0; ago <= WINDOW; ago += 30) {
    context.textAlign = ago === 0 ? "right" : ago === WINDOW ? "left" : "center";
    context.fillText(ago ? `−${ago} s` : "now", x(state.now - ago), height - 8);
  }

  context.lineWidth = 1.5;
  context.strokeStyle = colour("accent");
  const dot = ([time, score]) => context.fillRect(x(time) - 1.5, y(score) - 1.5, 3, 3);
  context.fillStyle = colour("accent");
  for (const run of runs(points)) {
    line(context, run.map(([time, score]) => [x(time), y(score)]));
    if (run.length === 1) dot(run[0]); // between two gaps
  }
  context.fillStyle = colour("bad");
  for (const point of points) if (point[1] !== null && point[1] >= threshold) dot(point);

  context.strokeStyle = colour("ink");
  context.setLineDash([6, 4]);
  line(context, [[box.left, y(threshold)], [box.right, y(threshold)]]);
  context.setLineDash([]);
  describe(canvas, points, threshold);
}

function line(context, points) {
  context.beginPath();
  points.forEach(([px, py], i) => (i ? context.lineTo(px, py) : context.moveTo(px, py)));
  context.stroke();
}

/** Points that follow each other with a score: the line has a gap where there is none. */
function runs(points) {
  const found = [[]];
  for (const point of points) {
    if (point[1] !== null) found.at(-1).push(point);
    else if (found.at(-1).length) found.push([]);
  }
  return found;
}

function alarms(points) {
  const spans = [];
  let from = null;
  points.forEach(([time, , alarm], i) => {
    if (alarm && from === null) from = time;
    if (from !== null && (!alarm || i === points.length - 1)) {
      spans.push([from, time]);
      from = null;
    }
  });
  return spans;
}

function describe(canvas, points, threshold) {
  if (!points.length) return;
  const highest = points.reduce((most, [, score]) => Math.max(most, score), 0);
  const text = `Now ${points.at(-1)[1]?.toFixed(2) ?? "no score"}, highest ${highest.toFixed(2)}, threshold ${threshold.toFixed(3)}, ${count(alarms(points).length, "alarm")}`;
  if (canvas.getAttribute("aria-label") !== text) canvas.setAttribute("aria-label", text);
}

new ResizeObserver(drawSoon).observe($("chart"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawSoon);

// Upload -----------------------------------------------------------------------------------------------------------

async function inspect(file) {
  const kind = FORMATS[file.name.split(".").pop().toLowerCase()] ?? (file.type || "application/octet-stream");
  state.upload = file;
  $("drop").classList.add("busy");
  $("upload").setAttribute("aria-busy", "true");
  setText($("upload-error"), "");
  try {
    const found = await ask("v1/predict?overlay=1", { method: "POST", headers: { "Content-Type": kind }, body: file });
    if (file === state.upload) showScored(file.name, found);
  } catch (error) {
    $("scored").hidden = true;
    setText($("upload-error"), `${file.name}: ${explain(error)}`);
  } finally {
    $("drop").classList.remove("busy");
    $("upload").removeAttribute("aria-busy");
  }
}

function showScored(name, found) {
  const { name: verdict, mood, word } = verdictOf(found);
  const why = { min_area: "smaller than --min-area", roi: "outside the mask" }[found.overruled];
  const regions = why ?? (UNJUDGED.has(verdict) ? "not judged" : count(found.regions.length, "region"));
  $("scored-picture").src = `data:image/png;base64,${found.overlay_png}`;
  $("scored-picture").alt = `Heat map of ${name}: ${verdict}, ${regions}`;
  const mark = element("span", { class: mood }, found.unusable ? `${word}: ${found.unusable}` : word);
  const line = UNJUDGED.has(verdict) ? "" : `  ${found.score.toFixed(3)}, threshold ${found.threshold.toFixed(3)}`;
  const milliseconds = Object.values(found.timings_ms).reduce((sum, value) => sum + value, 0);
  $("scored-text").replaceChildren(
    element("span", {}, mark, line),
    element("span", { class: "quiet" }, `${name}, ${found.width} × ${found.height}, ${regions}, ${milliseconds.toFixed(0)} ms`),
  );
  $("scored").hidden = false;
}

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) inspect(target.files[0]);
  target.value = ""; // the same file may be chosen again
});
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault()); // else the browser opens it
$("drop").addEventListener("dragover", () => $("drop").classList.add("over"));
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", ({ dataTransfer }) => {
  $("drop").classList.remove("over");
  if (dataTransfer.files.length) inspect(dataTransfer.files[0]);
});

// Events and notices -----------------------------------------------------------------------------------------------

const picture = (event) => `v1/events/${event.id}/picture`;
const KEPT = 60;
let viewed = 0; // index in state.events, newest first

function addEvent(event) {
  state.events.unshift(event);
  $("no-events").hidden = true;
  const text = `Event at ${clock(event.time)}, ${scored(event)}`;
  const button = element(
    "button",
    { type: "button", "aria-label": text },
    element("img", { src: picture(event), alt: "", loading: "lazy" }),
    element("span", {}, element("time", {}, clock(event.time)), element("b", {}, scored(event).replace("score ", ""))),
  );
  button.addEventListener("click", () => view(state.events.indexOf(event)));
  $("gallery").prepend(element("li", {}, button));
  if (state.events.length > KEPT) {
    state.events.pop();
    $("gallery").lastChild.remove();
  }
}

function view(index) {
  if (index < 0 || index >= state.events.length) return;
  viewed = index;
  const event = state.events[index];
  setText($("viewer-title"), `Event ${event.id}, ${new Date(event.time * 1000).toLocaleString()}`);
  $("viewer-picture").src = picture(event);
  $("viewer-picture").alt = `Heat map of ${event.source}, ${scored(event)}`;
  const judged = UNJUDGED.has(event.verdict) ? "" : `, threshold ${event.threshold.toFixed(3)}, ${count(event.regions.length, "region")}`;
  setText($("viewer-text"), `${event.source}: ${scored(event)}${judged}`);
  $("older").disabled = index === state.events.length - 1;
  $("newer").disabled = index === 0;
  if (!$("viewer").open) $("viewer").showModal();
}

$("older").addEventListener("click", () => view(viewed + 1));
$("newer").addEventListener("click", () => view(viewed - 1));
$("viewer").addEventListener("keydown", ({ key }) => {
  if (key === "ArrowLeft") view(viewed + 1);
  if (key === "ArrowRight") view(viewed - 1);
});

const SERIOUS = new Set(["failing", "drifting", "on"]);
const CALM = new Set(["connecting", "ended"]); // of a source; what it may be besides, unknown words too, is serious
const RELIEF = new Set(["live", "working", "steady", "off"]);

const KINDS = { source: "Source", sink: "Output", drift: "Scores", alarm: "Alarm", run: "Run" };

function addNotice(notice) {
  const isSource = notice.kind === "source";
  const isSerious = isSource ? !RELIEF.has(notice.state) && !CALM.has(notice.state) : SERIOUS.has(notice.state);
  const mood = isSerious ? "bad" : RELIEF.has(notice.state) ? "good" : "";
  if (isSource) state.source = { ...state.source, state: notice.state, message: notice.message };
  $("notices").prepend(element("li", { "data-state": mood }, element("time", {}, clock(notice.time)), element("b", {}, `${KINDS[notice.kind] ?? notice.kind} ${notice.state}`), ` ${notice.message}`));
  while ($("notices").childElementCount > 200) $("notices").lastChild.remove();
  if (state.started && mood === "bad" && notice.kind !== "alarm") announce(notice.message);
}

// Small things -----------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children); // strings become text, never HTML
  return made;
}

function setText(target, text) {
  if (target.textContent !== text) target.textContent = text; // screen readers repeat what is set anew
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function setChip(chip, mood, text) {
  chip.dataset.state = mood;
  setText(chip, text);
}

function capital(text) {
  return text && text[0].toUpperCase() + text.slice(1);
}

function announce(text) {
  setText($("announcer"), text);
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString();
}

function fixed(value, digits) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

setInterval(showVerdict, 1000);
connect();
