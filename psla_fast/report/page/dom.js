// Elements, numbers and the tip. Texts of the data are only ever set as text.

const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const known = (value) => value !== null && value !== undefined;
const fixed = (digits) => (value) => (known(value) ? value.toFixed(digits) : "–");
const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : "–");
const count = (value) => (known(value) ? value.toLocaleString("en") : "–");
const short = (value) => (known(value) ? String(Number(value.toPrecision(3))) : "–");

/** Text that may break after each underscore or slash. */
function breakable(text) {
  const pieces = text.split(/(?<=[_/])(?=.)/u);
  return pieces.length < 2 ? text : el("span", {}, ...pieces.flatMap((piece, n) => (n ? [el("wbr"), piece] : [piece])));
}

const colour = (group) => `c${group % 8}${group < 8 ? "" : " hollow"}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function deviation(values) {
  if (values.length < 2) return null;
  const middle = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
}

/** Round steps of 1, 2 or 5 from at or below `low` to at or above `high`, about `most` of them. */
function ticks(low, high, most) {
  if (!(high > low)) high = low + (Math.abs(low) || 1) * 0.1;
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((size) => size * power >= rough * 0.999) * power;
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

const tip = document.getElementById("tip");

/** Show lines {text, value, group} beside a place on the screen, under a heading. */
function showTip(x, y, heading, lines) {
  tip.replaceChildren(el("b", { text: heading }));
  for (const line of lines) {
    const dot = known(line.group) ? el("i", { class: `dot ${colour(line.group)}` }) : null;
    tip.append(el("div", {}, dot, el("span", { text: line.text }), el("em", { text: line.value })));
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const left = x + 16 + box.width > width - 8 ? x - 16 - box.width : x + 16;
  tip.style.left = `${Math.max(8, Math.min(left, width - box.width - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(y + 12, window.innerHeight - box.height - 8))}px`;
}

const hideTip = () => { tip.hidden = true; };
window.addEventListener("scroll", hideTip, { passive: true });

/** Call `paint(width)` now and whenever the host's width changes. */
function keepDrawn(host, paint) {
  let last = 0;
  const again = () => {
    const width = Math.floor(host.clientWidth);
    if (width && width !== last) { last = width; paint(width); }
  };
  new ResizeObserver(again).observe(host);
  again();
  return () => { last = 0; again(); };
}
