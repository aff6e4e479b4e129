// Results as bars, a block for each kind of result: groups of runs, their seeds, and PSLA's where it is comparable.

const BAR = 22;

function resultBlocks() {
  return Object.entries(data.kinds).map(([kind, name]) => {
    const rows = data.groups.map((group, number) => {
      const seeds = group.members.map((member) => (data.runs[member].results[kind] || [null])[0]).filter(known);
      return seeds.length ? { name: group.name, group: number, value: mean(seeds), spread: deviation(seeds), seeds } : null;
    }).filter(Boolean);
    const published = rows.length ? data.published.filter((row) => known(row[kind])) : [];
    for (const row of published) rows.push({ name: `PSLA, ${row.data}`, value: row[kind], seeds: [], published: true });
    return { name, rows };
  }).filter((block) => block.rows.length);
}

function resultBars(host) {
  keepDrawn(host, (width) => {
    const blocks = resultBlocks();
    const rows = blocks.flatMap((block) => block.rows);
    const narrow = width < 480;
    const longest = Math.max(...rows.map((row) => row.name.length));
    const left = narrow ? 0 : Math.min(200, 16 + 7.2 * longest);
    const step = narrow ? BAR + 18 : BAR + 6;
    const height = blocks.reduce((sum, block) => sum + 30 + step * block.rows.length + 8, 0) + 34;
    const highest = Math.max(...rows.map((row) => Math.max(row.value + (row.spread || 0), ...row.seeds)));
    const marks = ticks(0, highest, 5);
    const room = rows.some((row) => known(row.spread)) ? 126 : 62;
    const x = (value) => left + (value / marks[marks.length - 1]) * (width - left - room);
    const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "mAP of each kind of result" });
    for (const mark of marks) {
      svg.append(draw("line", { class: mark ? "grid" : "axis", x1: x(mark), x2: x(mark), y1: 4, y2: height - 32 }));
      svg.append(draw("text", { class: "tick", x: x(mark), y: height - 16, "text-anchor": "middle", text: short(mark) }));
    }
    svg.append(draw("text", { class: "unit", x: width, y: height - 16, "text-anchor": "end", text: "mAP" }));
    let top = 4;
    for (const block of blocks) {
      svg.append(draw("text", { class: "block", x: narrow ? 4 : left + 6, y: top + 17, text: block.name }));
      top += 28;
      for (const row of block.rows) {
        if (narrow) { svg.append(draw("text", { class: "name", x: 4, y: top + 12, text: clip(row.name, width - 20) })); top += 16; }
        else svg.append(draw("text", { class: "name", x: left - 10, y: top + 16, "text-anchor": "end", text: clip(row.name, left - 14) }));
        svg.append(bar(row, block.name, x, top));
        top += step - (narrow ? 16 : 0);
      }
      top += 10;
    }
    host.replaceChildren(svg);
  });
}

const clip = (text, width) => {
  const letters = Math.floor(width / 7);
  return text.length > letters ? `${text.slice(0, Math.max(1, letters - 1))}…` : text;
};

function bar(row, kind, x, top) {
  const middle = top + BAR / 2;
  const value = fixed(3)(row.value) + (known(row.spread) ? ` ± ${fixed(3)(row.spread)}` : "");
  const bounds = draw("g", { class: row.published ? "bar published" : `bar ${colour(row.group)}` });
  bounds.append(draw("rect", { x: x(0), y: top, width: Math.max(1, x(row.value) - x(0)), height: BAR, rx: 3 }));
  let end = x(row.value);
  if (known(row.spread)) {
    const [from, to] = [row.value - row.spread, row.value + row.spread].map(x);
    bounds.append(draw("path", { class: "whisker", d: `M${from} ${middle}H${to}M${from} ${middle - 4}v8M${to} ${middle - 4}v8` }));
    for (const seed of row.seeds) bounds.append(draw("circle", { class: "seed", cx: x(seed), cy: middle, r: 3 }));
    end = Math.max(to, ...row.seeds.map(x));
  }
  bounds.append(draw("text", { class: "value", x: end + 8, y: middle + 5, text: value }));
  const lines = row.seeds.length > 1 ? row.seeds.map((seed, n) => ({ text: `run ${n + 1}`, value: fixed(3)(seed) })) : [];
  const tell = (event) => showTip(event.clientX, event.clientY, row.name, [{ text: `${kind}, mAP`, value, group: row.group }, ...lines]);
  bounds.addEventListener("pointermove", tell);
  bounds.addEventListener("pointerleave", hideTip);
  return bounds;
}
