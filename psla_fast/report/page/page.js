// The page: what is chosen (a run, a kind of result, hidden groups), and the charts that show it.

const hidden = new Set();
const kindsKnown = Object.keys(data.kinds).filter((kind) => data.runs.some((run) => run.ap[kind]));
const state = {
  run: Math.max(0, data.runs.findIndex((run) => run.confusion)),
  kind: kindsKnown.includes("ensemble") ? "ensemble" : kindsKnown[0],
};
const redraws = [];

/** Lines of epochs: each run, thin where its group has several, and then their mean. */
function epochSeries(name, label, dashed) {
  return data.groups.flatMap((group, number) => {
    if (hidden.has(number)) return [];
    const several = group.members.length > 1;
    const title = label ? `${group.name}, ${label}` : group.name;
    const lines = group.members.map((member) => ({
      name: label ? `${data.runs[member].name}, ${label}` : data.runs[member].name, group: number, dashed, faint: several, silent: several,
      points: data.runs[member].epochs[name].map((y, n) => [n + 1, y]),
    }));
    if (!several) return lines;
    const longest = Math.max(...lines.map((line) => line.points.length));
    const points = Array.from({ length: longest }, (_, n) => {
      const values = lines.map((line) => (line.points[n] || [])[1]).filter(known);
      return [n + 1, values.length === lines.length ? mean(values) : null];
    });
    return [...lines, { name: `${title} (mean)`, group: number, dashed, points }];
  });
}

function stepSeries(name) {
  return data.runs.filter((run) => !hidden.has(run.group) && run.steps[name]).map((run) => ({
    name: run.name, group: run.group, faint: data.runs.length > 4 && name !== "lr",
    points: run.steps[name].map((y, n) => [run.steps.x[n], y]),
  }));
}

function chartCard(host, title, unit, key, getSeries, options) {
  if (!getSeries().some((one) => one.points.some(([, y]) => known(y)))) return;
  const plot = el("div", { class: "chart" });
  const styles = key.map(([name, dashed]) => el("span", { class: "key" }, el("i", { class: dashed ? "stroke dashed" : "stroke" }), name));
  host.append(el("div", { class: options.wide ? "card wide" : "card" }, el("h3", { text: `${title} ` }, el("small", { text: unit }), el("span", { class: "keys" }, ...styles)), plot));
  redraws.push(lineChart(plot, getSeries, { label: `${title}, ${unit}`, ...options }));
}

function buildCurves() {
  const host = document.getElementById("curve-charts");
  const epochs = { xLabel: "epoch", whole: true, heading: (x) => `epoch ${x}`, tipFormat: fixed(4) };
  const steps = { xLabel: "epochs", fromZero: true, heading: (x) => `${x.toFixed(2)} epochs`, tipFormat: short };
  const both = [["each epoch", false], ["ensemble so far", true]];
  chartCard(host, "mAP", `on ${data.role}`, both, () => [...epochSeries("map", "", false), ...epochSeries("map_ensemble", "ensemble", true)], { ...epochs, wide: true, height: 300 });
  chartCard(host, "AUC", `on ${data.role}`, both, () => [...epochSeries("auc", "", false), ...epochSeries("auc_ensemble", "ensemble", true)], epochs);
  chartCard(host, "Loss", "mean of the epoch", [["train", false], ["val", true]],
    () => [...epochSeries("train_loss", "train", false), ...epochSeries("val_loss", "val", true)], { ...epochs, zero: true });
  chartCard(host, "Training loss", "by step", [], () => stepSeries("loss"), { ...steps, zero: true });
  chartCard(host, "Learning rate", "by step", [], () => stepSeries("lr"), { ...steps, zero: true });
  if (!host.childElementCount) host.append(el("p", { class: "card muted", text: "These runs have no curves: neither result.csv nor metrics.jsonl holds any." }));
  const speed = document.getElementById("speed-charts");
  chartCard(speed, "Throughput", "clips/s", [], () => stepSeries("clips_per_second"), { ...steps, zero: true });
  chartCard(speed, "Waiting for data", "share of the time", [], () => stepSeries("loader_wait"), { ...steps, zero: true, yFormat: percent, tipFormat: percent });
  chartCard(speed, "GPU memory", "GB, peak", [], () => stepSeries("gpu_memory_gb"), { ...steps, zero: true });
  chartCard(speed, "GPU utilisation", "share of the time", [], () => stepSeries("gpu_utilisation"), { ...steps, zero: true, top: 1, yFormat: percent, tipFormat: percent });
  if (!speed.childElementCount) speed.append(el("p", { class: "card muted", text: "metrics.jsonl tells no speed." }));
}

function buildLegend() {
  const host = document.getElementById("legend");
  if (data.groups.length < 2) { host.hidden = true; return; }
  data.groups.forEach((group, number) => {
    const button = el("button", { type: "button", "aria-pressed": "true", title: "Show or hide" },
      el("i", { class: `dot ${colour(number)}` }), el("span", { text: group.name, dir: "auto" }),
      group.members.length > 1 ? el("small", { text: `${group.members.length} seeds` }) : null);
    button.addEventListener("click", () => {
      if (!hidden.delete(number)) hidden.add(number);
      button.setAttribute("aria-pressed", String(!hidden.has(number)));
      redraws.forEach((redraw) => redraw());
    });
    host.append(button);
  });
}

function buildConfusion() {
  const node = document.getElementById("pair-table");
  if (!node) return () => {};
  const table = sortableTable(node);
  const name = (index) => data.classes[index].name;
  const columns = [
    { label: "Clips of", text: true, value: (row) => name(row.labelled), show: (row) => breakable(name(row.labelled)) },
    { label: "heard as", text: true, value: (row) => name(row.other), show: (row) => breakable(name(row.other)) },
    { label: "score", value: (row) => row.score, show: (row) => fixed(3)(row.score) },
    { label: "elsewhere", value: (row) => row.elsewhere, show: (row) => fixed(3)(row.elsewhere) },
    { label: "clips", value: (row) => row.clips, show: (row) => count(row.clips) },
  ];
  return () => {
    const confusion = data.runs[state.run].confusion || { pairs: [], classes: [], cells: [], highest: 0 };
    table.update(columns, confusion.pairs, { column: 2, falling: true });
    heatMap(document.getElementById("heat"), document.getElementById("heat-legend"), confusion);
  };
}

function buildChoices(show) {
  const picks = [...document.querySelectorAll(".run-pick")];
  for (const pick of picks) {
    data.runs.forEach((run, number) => pick.append(el("option", { value: number, text: run.name })));
    pick.closest(".pick").hidden = data.runs.length < 2;
    pick.addEventListener("change", () => { state.run = Number(pick.value); show(); });
  }
  const kinds = document.getElementById("kind-pick");
  if (kinds) {
    for (const kind of kindsKnown) kinds.append(el("option", { value: kind, text: data.kinds[kind].toLowerCase() }));
    kinds.value = state.kind;
    kinds.closest(".pick").hidden = kindsKnown.length < 2;
    kinds.addEventListener("change", () => { state.kind = kinds.value; show(); });
  }
  return () => picks.forEach((pick) => { pick.value = String(state.run); });
}

const parts = [];
const choose = buildChoices(() => parts.forEach((part) => part()));
const bars = document.getElementById("bars");
if (bars) resultBars(bars);
buildLegend();
buildCurves();
parts.push(choose, buildClasses(state), buildConfusion(), buildExamples(state));
parts.forEach((part) => part());
