// The page: takes a recording, sends it, shows the answer. All names are set as text, never as HTML.

import { Chart, clock, readable } from "/chart.js";
import { needsBrowser, startRecording, toWav } from "/sound.js";

const $ = (id) => document.getElementById(id);
const audio = $("audio");
const chart = new Chart(audio);
let about = null;
let request = null; // of the recording that is on its way
let recording = null;
let urls = [];

function say(text) {
  $("status").textContent = text;
}

function fail(text) {
  idle();
  $("error").textContent = text;
  $("error").scrollIntoView({ block: "nearest" });
}

function idle() {
  request = null;
  $("busy").hidden = true;
  $("choose").disabled = $("record").disabled = false;
  say("");
}

function begin(text) {
  $("error").textContent = "";
  $("busy").hidden = false;
  $("choose").disabled = $("record").disabled = true;
  $("progress").removeAttribute("value");
  say(text);
  $("drop").scrollIntoView({ block: "nearest" });
}

/** Tags a file, or a recording as a blob with a name. */
async function tag(file) {
  if (request || recording) return;
  if (!about) return fail("The server can't be reached. Is it still running?");
  let upload = file;
  request = { abort() { this.aborted = true; } };
  const mine = request;
  begin(`Reading ${file.name} …`);
  if (needsBrowser(file)) {
    try {
      upload = await toWav(file, about.sample_rate, about.max_seconds);
    } catch {
      upload = file; // the server may know it
    }
    if (mine.aborted) return;
  }
  if (upload.size > about.max_mb * 2 ** 20) {
    return fail(`${file.name} has ${(upload.size / 2 ** 20).toFixed(1)} MB; ${about.max_mb} are allowed. Cut or compress it.`);
  }
  send(file, upload);
}

function send(file, upload) {
  const form = new FormData();
  form.append("file", upload, file.name);
  const sending = new XMLHttpRequest();
  request = sending;
  sending.open("POST", "/api/tag?picture=1");
  sending.upload.onprogress = (event) => {
    $("progress").value = event.loaded / event.total;
    say(`Sending ${file.name}: ${Math.round((100 * event.loaded) / event.total)} %`);
  };
  sending.upload.onload = () => {
    $("progress").removeAttribute("value");
    say(`Listening to ${file.name} …`);
  };
  sending.onerror = () => fail("The server can't be reached, or broke off. Is it still running?");
  sending.onload = () => {
    let answer = {};
    try {
      answer = JSON.parse(sending.responseText);
    } catch {
      answer = { error: `The server answered ${sending.status} without saying why.` };
    }
    if (sending.status !== 200) {
      return fail(`${file.name}: ${answer.error || `The server answered ${sending.status}.`}`);
    }
    idle();
    show(answer, file);
  };
  sending.send(form);
}

function show(answer, file) {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [];
  $("result").hidden = false;
  $("name").textContent = file.name;
  document.title = `${file.name} – psla_fast`;
  const length = answer.seconds < 60 ? `${answer.seconds.toFixed(2)} s` : clock(answer.seconds);
  $("facts").textContent = `${length}, tagged in ${answer.tagged_in_seconds.toFixed(2)} s`;
  $("unplayable").hidden = true;
  audio.hidden = false;
  audio.src = link(file);
  showClasses(answer);
  chart.show(answer);
  const stem = file.name.replace(/\.[^.]*$/, "");
  const { picture, ...plain } = answer;
  offer("json", `${stem}.json`, `${JSON.stringify(plain, null, 1)}\n`, "application/json");
  offer("csv", `${stem}.csv`, toCsv(answer), "text/csv");
  const best = answer.top[0];
  say(`Done: ${readable(best.name)}, ${best.score.toFixed(2)}`);
  const isBelow = $("result").getBoundingClientRect().top > 0.6 * innerHeight;
  if (isBelow) $("result").scrollIntoView({ block: "start" });
}

function link(blob) {
  const url = URL.createObjectURL(blob);
  urls.push(url);
  return url;
}

function offer(id, name, text, type) {
  $(id).href = link(new Blob([text], { type }));
  $(id).download = name;
}

function showClasses(answer) {
  const there = answer.labels && new Set(answer.labels.map((label) => label.mid));
  $("classes").replaceChildren(...answer.top.map((entry) => {
    const item = document.createElement("li");
    const [label, score, bar, fill] = ["span", "span", "div", "div"].map((tag) => document.createElement(tag));
    label.className = "label";
    label.textContent = readable(entry.name);
    label.title = entry.mid;
    if (there && there.has(entry.mid)) {
      const mark = document.createElement("span");
      mark.className = "there";
      mark.textContent = " ✓ heard";
      mark.title = "above its threshold";
      label.append(mark);
    }
    score.className = "score";
    score.textContent = entry.score.toFixed(3);
    bar.className = "bar";
    fill.style.width = `${100 * Math.min(1, Math.max(0, entry.score))}%`;
    bar.append(fill);
    item.append(label, score, bar);
    return item;
  }));
}

/** A row a class: mid, name, score, and its activity at each step of time. */
function toCsv(answer) {
  const { top, timeline } = answer;
  const steps = timeline ? timeline.activity[0].map((_, i) => `${(i * timeline.step_seconds).toFixed(2)} s`) : [];
  const rows = top.map((entry, i) => [entry.mid, entry.name, entry.score, ...(timeline ? timeline.activity[i] : [])]);
  return [["mid", "name", "score", ...steps], ...rows].map((row) => `${row.map(cell).join(",")}\n`).join("");
}

function cell(value) {
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value); // no formulas
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

async function toggleRecording() {
  if (recording) return recording.stop();
  if (!about) return fail("The server can't be reached. Is it still running?");
  $("error").textContent = "";
  $("record").disabled = true;
  try {
    recording = await startRecording(about.max_seconds, (seconds, level) => {
      $("recorded").textContent = clock(Math.floor(seconds));
      $("level").style.width = `${100 * level}%`;
    });
  } catch (error) {
    return fail(error.message);
  }
  $("record").disabled = false;
  setRecording(true);
  const blob = await recording.done;
  recording = null;
  setRecording(false);
  begin("Reading the recording …");
  try {
    const now = new Date();
    const two = (number) => String(number).padStart(2, "0");
    const name = `recording ${two(now.getHours())}.${two(now.getMinutes())}.${two(now.getSeconds())}.wav`;
    const wav = await toWav(blob, about.sample_rate, about.max_seconds);
    await tag(new File([wav], name, { type: "audio/wav" }));
  } catch {
    fail("The recording holds no sound. Try again.");
  }
}

function setRecording(on) {
  $("recording").hidden = !on;
  $("choose").disabled = on;
  $("record").classList.toggle("on", on);
  $("record-text").textContent = on ? "Stop" : "Record";
  $("recorded").textContent = "0:00";
  say(on ? "Recording" : "");
}

function take(files) {
  if (files.length > 1) return fail(`${files.length} files at once are too many. Give one; psla-fast tag takes folders.`);
  if (files.length) tag(files[0]);
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take([...$("file").files]);
  $("file").value = "";
});
$("record").addEventListener("click", toggleRecording);
$("cancel").addEventListener("click", () => {
  request?.abort();
  idle();
});
audio.addEventListener("error", () => {
  audio.hidden = true;
  $("unplayable").hidden = false;
  chart.follow();
});
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  addEventListener(name, (event) => {
    if (name === "drop" || !event.relatedTarget) $("drop").classList.remove("over");
  });
}
addEventListener("drop", (event) => {
  event.preventDefault();
  if (request || recording) return;
  const files = [...event.dataTransfer.files];
  if (files.length) take(files);
  else fail("That is no file. Drop a recording from a folder.");
});

try {
  about = await (await fetch("/api/about")).json();
  $("about").textContent = `${about.model}, ${about.num_classes} classes`;
  const length = about.max_seconds < 120 ? `${about.max_seconds} seconds` : `${Math.floor(about.max_seconds / 60)} minutes`;
  $("hint").textContent = `WAV, FLAC, MP3, OGG, AIFF and what this browser plays; up to ${about.max_mb} MB and ${length}.`;
} catch {
  fail("The server can't be reached. Is it still running?");
}
