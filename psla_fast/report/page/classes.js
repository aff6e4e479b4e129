// Classes: the best and the worst, AP against how often a class was trained on, and the table of all.

const RANKED = 10;
const ROLES = ["train", "val", "eval"];

/** AP of each class: of a run, or the mean over a group's runs; null where it isn't known. */
const apOf = (run, kind) => (run.ap[kind] || []);

function groupAp(group, kind, index) {
  const values = group.members.map((member) => apOf(data.runs[member], kind)[index]).filter(known);
  return values.length ? mean(values) : null;
}

function classColumns(kind) {
  const one = data.groups.length === 1;
  const counts = ROLES.filter((role) => data.positives[role]).map((role) => ({
    label: role, title: `Clips of ${role} that carry the class`,
    value: (index) => data.positives[role][index], show: (index) => count(data.positives[role][index]),
  }));
  const kinds = Object.keys(data.kinds).filter((name) => data.runs.some((run) => run.ap[name]));
  const shown = one
    ? kinds.map((name) => ({ label: `AP, ${data.kinds[name].toLowerCase()}`, kind: name, group: 0 }))
    : data.groups.map((group, number) => ({ label: group.name, kind, group: number }));
  const figures = shown.map(({ label, kind: name, group }) => ({
    label, title: one ? null : `AP, ${data.kinds[name].toLowerCase()}${data.groups[group].members.length > 1 ? ", mean of the seeds" : ""}`,
    value: (index) => groupAp(data.groups[group], name, index),
    show: (index) => fixed(3)(groupAp(data.groups[group], name, index)), bar: group,
  }));
  if (data.groups.length === 2) {
    const value = (index) => {
      const [a, b] = data.groups.map((group) => groupAp(group, kind, index));
      return known(a) && known(b) ? b - a : null;
    };
    const show = (index) => { const d = value(index); return known(d) ? `${d < 0 ? "−" : "+"}${Math.abs(d).toFixed(3)}` : "–"; };
    figures.push({ label: "difference", title: `${data.groups[1].name} minus ${data.groups[0].name}`, value, show });
  }
  return [
    { label: "Class", text: true, value: (index) => data.classes[index].name, show: (index) => breakable(data.classes[index].name) },
    { label: "mid", text: true, value: (index) => data.classes[index].mid, show: (index) => data.classes[index].mid },
    ...counts, ...figures,
  ];
}

function rankClasses(host, run, kind, best) {
  const ap = apOf(run, kind);
  const ranked = data.classes.map((_, index) => index).filter((index) => known(ap[index]));
  const clips = data.positives[data.role] || [];
  ranked.sort((a, b) => (best ? ap[b] - ap[a] : ap[a] - ap[b]) || clips[b] - clips[a] || a - b);
  host.replaceChildren(...ranked.slice(0, RANKED).map((index) =>
    el("div", { class: "rank", title: `${data.classes[index].name}: ${count(clips[index])} clips` },
      el("span", { class: "label", text: data.classes[index].name, dir: "auto" }),
      el("span", { class: "clips", text: `${count(clips[index])} ${clips[index] === 1 ? "clip" : "clips"}` }),
      el("span", { class: "figure", text: fixed(3)(ap[index]) }),
      el("span", { class: `track ${colour(run.group)}`, "--ap": ap[index] }))));
}

function buildClasses(state) {
  const tableNode = document.getElementById("class-table");
  if (!tableNode) return () => {};
  const counter = document.getElementById("class-count");
  const table = sortableTable(tableNode, (shown, all) => { counter.textContent = shown === all ? `${all} classes` : `${shown} of ${all} classes`; });
  document.getElementById("class-search").addEventListener("input", (event) => table.search(event.target.value));
  const base = data.positives.train ? "train" : data.role;
  document.getElementById("scatter-title").append("AP by number of clips ", el("small", { text: `in ${base}` }));
  const redraw = scatterChart(document.getElementById("scatter"), () => {
    const run = data.runs[state.run], ap = apOf(run, state.kind), clips = data.positives[base];
    return data.classes.map((one, index) => ({
      x: clips[index], y: ap[index], name: one.name,
      lines: [{ text: "AP", value: fixed(3)(ap[index]), group: run.group }, { text: `clips in ${base}`, value: count(clips[index]) }],
    })).filter((point) => known(point.y) && point.x > 0);
  }, { label: "AP of each class over its clips", xLabel: `clips in ${base}, logarithmic`, yFormat: short, group: () => data.runs[state.run].group });
  const all = data.classes.map((_, index) => index);
  let first = true;
  return () => {
    const run = data.runs[state.run];
    const columns = classColumns(state.kind);
    const start = columns.findIndex((column) => !column.text && (column.label.startsWith("AP") || column.label === data.groups[0].name));
    table.update(columns, all, first && start > 0 ? { column: Math.max(start, data.groups.length === 1 ? columns.length - 1 : start), falling: true } : null);
    first = false;
    rankClasses(document.getElementById("best-classes"), run, state.kind, true);
    rankClasses(document.getElementById("worst-classes"), run, state.kind, false);
    const missing = all.filter((index) => !known(apOf(run, state.kind)[index])).length;
    document.getElementById("class-note").textContent = missing
      ? `${missing} classes have no clip in ${data.role}, so they have no AP. ` : "";
    redraw();
  };
}
