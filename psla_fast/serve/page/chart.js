// Chart: an answer's picture and timeline on canvases, with a cursor that follows the sound.

const ROW = 26;
const PICTURE_HEIGHT = 132;
const MAGMA = [[0, 0, 4], [40, 17, 89], [114, 31, 129], [182, 54, 121], [241, 96, 93], [254, 175, 119], [252, 253, 191]];
const $ = (id) => document.getElementById(id);

/** Writes seconds as 1:02, or 1:02.5 with so many decimals. */
export function clock(seconds, decimals = 0) {
  const rounded = Number(seconds.toFixed(decimals));
  const rest = (rounded % 60).toFixed(decimals).padStart(decimals ? decimals + 3 : 2, "0");
  return `${Math.floor(rounded / 60)}:${rest}`;
}

/** Writes a class's name as people do: FSD50K's have underscores. */
export function readable(name) {
  return name.replaceAll("_", " ");
}

function mix(stops, share) {
  const at = Math.max(0, Math.min(1, share)) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
}

function heatStops() {
  const style = getComputedStyle(document.documentElement);
  return [0, 1, 2, 3].map((i) => {
    const hex = style.getPropertyValue(`--heat-${i}`).trim().slice(1);
    return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
  });
}

function sized(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

export class Chart {
  constructor(audio) {
    this.audio = audio;
    this.plots = $("plots");
    new ResizeObserver(() => this.draw()).observe(this.plots);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.plots.addEventListener("pointermove", (event) => this.hover(event));
    this.plots.addEventListener("pointerleave", () => this.leave());
    this.plots.addEventListener("click", (event) => this.play(this.timeAt(event)));
    this.plots.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["timeupdate", "seeked", "pause", "loadedmetadata"]) {
      audio.addEventListener(name, () => this.follow());
    }
    audio.addEventListener("play", () => this.run());
  }

  show(answer) {
    this.answer = answer;
    this.bitmap = null;
    const { timeline, picture } = answer;
    $("timeline").hidden = !timeline;
    $("result").classList.toggle("flat", !timeline);
    if (!timeline) return;
    $("names").replaceChildren(...timeline.classes.map((name) => {
      const row = document.createElement("div");
      row.textContent = row.title = readable(name);
      return row;
    }));
    $("mels").classList.toggle("gone", !picture);
    $("picture").hidden = !picture;
    if (picture) {
      this.bitmap = paintPicture(picture);
      $("mels").firstElementChild.textContent = hertz(picture.high_hz);
      $("mels").lastElementChild.textContent = hertz(picture.low_hz);
    }
    this.plots.setAttribute("aria-valuemax", answer.seconds.toFixed(1));
    this.draw();
    this.follow();
  }

  draw() {
    if (!this.answer || !this.answer.timeline || !this.plots.clientWidth) return;
    const { seconds, timeline, picture } = this.answer;
    const width = this.plots.clientWidth;
    if (this.bitmap) {
      const context = sized($("picture"), PICTURE_HEIGHT);
      const span = (this.bitmap.width * picture.step_seconds) / seconds;
      context.imageSmoothingEnabled = true;
      context.fillRect(0, 0, width, PICTURE_HEIGHT);
      context.drawImage(this.bitmap, 0, 0, Math.max(span, 1 - picture.step_seconds / seconds) * width, PICTURE_HEIGHT);
    }
    const context = sized($("activity"), ROW * timeline.classes.length);
    const stops = heatStops();
    timeline.activity.forEach((values, row) => values.forEach((value, step) => {
      const from = (step * timeline.step_seconds) / seconds;
      if (from >= 1) return;
      const to = step === values.length - 1 ? 1 : Math.min(1, ((step + 1) * timeline.step_seconds) / seconds);
      context.fillStyle = `rgb(${mix(stops, value).join(" ")})`;
      context.fillRect(from * width, row * ROW + 1, (to - from) * width + 0.6, ROW - 2);
    }));
    this.drawTicks(seconds, width);
    const scale = $("scale").getContext("2d");
    for (let x = 0; x < 160; x++) {
      scale.fillStyle = `rgb(${mix(stops, x / 159).join(" ")})`;
      scale.fillRect(x, 0, 1, 10);
    }
  }

  drawTicks(seconds, width) {
    const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200];
    const step = steps.find((value) => (value / seconds) * width >= 64) || 36000;
    const ticks = [];
    for (let at = 0; at < seconds && ticks.length < 60; at += step) {
      const tick = document.createElement("span");
      tick.textContent = clock(at, step < 1 ? 1 : 0);
      tick.style.left = `${(100 * at) / seconds}%`;
      tick.classList.toggle("last", at > 0 && (1 - at / seconds) * width < 20);
      ticks.push(tick);
    }
    $("ticks").replaceChildren(...ticks);
  }

  timeAt(event) {
    const box = this.plots.getBoundingClientRect();
    return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * this.answer.seconds;
  }

  hover(event) {
    if (!this.answer || !this.answer.timeline) return;
    const { timeline } = this.answer;
    const time = this.timeAt(event);
    const box = this.plots.getBoundingClientRect();
    const row = Math.floor((event.clientY - $("activity").getBoundingClientRect().top) / ROW);
    const values = timeline.activity[row];
    let text = clock(time, 1);
    if (values) {
      const step = Math.min(values.length - 1, Math.floor(time / timeline.step_seconds));
      text = `${clock(time, 1)}  ${values[step].toFixed(2)}  ${readable(timeline.classes[row])}`;
    }
    [...$("names").children].forEach((name, i) => name.classList.toggle("at", i === row));
    const tip = $("tip");
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = "0";
    tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, event.clientY - box.top - 44)}px`;
  }

  leave() {
    $("tip").hidden = true;
    [...$("names").children].forEach((name) => name.classList.remove("at"));
  }

  seek(time) {
    if (!Number.isFinite(this.audio.duration)) return;
    this.audio.currentTime = Math.max(0, Math.min(time, this.answer.seconds));
    this.follow();
  }

  play(time) {
    this.seek(time);
    if (Number.isFinite(this.audio.duration)) this.audio.play().catch(() => this.follow());
  }

  key(event) {
    const step = Math.max(0.5, this.answer.seconds / 100);
    const now = this.audio.currentTime;
    const targets = { ArrowLeft: now - step, ArrowRight: now + step, Home: 0, End: this.answer.seconds };
    if (event.key in targets) this.seek(targets[event.key]);
    else if (event.key !== " ") return;
    else if (this.audio.paused) this.play(now);
    else this.audio.pause();
    event.preventDefault();
  }

  follow() {
    if (!this.answer) return;
    const time = Math.min(this.audio.currentTime, this.answer.seconds);
    const cursor = $("cursor");
    cursor.hidden = !Number.isFinite(this.audio.duration);
    cursor.style.left = `${(100 * time) / this.answer.seconds}%`;
    this.plots.setAttribute("aria-valuenow", time.toFixed(1));
    this.plots.setAttribute("aria-valuetext", `${time.toFixed(1)} of ${this.answer.seconds.toFixed(1)} seconds`);
  }

  run() {
    this.follow();
    if (!this.audio.paused) requestAnimationFrame(() => this.run());
  }
}

function hertz(value) {
  return value < 1000 ? `${Math.round(value)} Hz` : `${Number((value / 1000).toFixed(1))} kHz`;
}

function paintPicture(picture) {
  const pixels = Uint8Array.from(atob(picture.pixels), (char) => char.charCodeAt(0));
  const mels = picture.num_mels;
  const columns = pixels.length / mels;
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = mels;
  const colours = Array.from({ length: 256 }, (_, i) => mix(MAGMA, i / 255));
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, mels);
  pixels.forEach((value, i) => {
    const at = 4 * ((mels - 1 - (i % mels)) * columns + Math.floor(i / mels));
    image.data.set(colours[value], at);
    image.data[at + 3] = 255;
  });
  context.putImageData(image, 0, 0);
  return canvas;
}
