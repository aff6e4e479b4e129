// The heat map of confused classes: rows are labels that clips carry, columns classes that they don't.

const CELL = 24;

function heatMap(host, legend, confusion) {
  const names = confusion.classes.map((index) => data.classes[index].name);
  legend.replaceChildren();
  if (!names.length) { host.replaceChildren(el("p", { class: "muted", text: "No class scores on clips without it." })); return; }
  const longest = Math.max(...names.map((name) => Math.min(name.length, 24)));
  const left = 12 + 6.6 * longest, top = 12 + 5.2 * longest;
  const width = left + CELL * names.length + 0.62 * 6.6 * longest, height = top + CELL * names.length + 4;
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Heat map of confused classes" });
  const tell = (event, row, column) => {
    const value = confusion.cells[row][column];
    const line = row === column
      ? { text: "mean score on its own clips", value: fixed(3)(value) }
      : { text: `${names[column]}, not labelled, scores`, value: fixed(3)(value) };
    showTip(event.clientX, event.clientY, `Clips of ${names[row]}`, [line]);
  };
  names.forEach((name, row) => {
    const y = top + CELL * row, x = left + CELL * row;
    svg.append(draw("text", { class: "name", x: left - 8, y: y + 16, "text-anchor": "end", text: cut(name) }));
    svg.append(draw("text", { class: "name", transform: `translate(${x + 16} ${top - 8}) rotate(-50)`, text: cut(name) }));
    names.forEach((_, column) => {
      const value = confusion.cells[row][column];
      const strength = known(value) ? Math.min(1, value / (confusion.highest || 1)) : 0;
      const kind = row === column ? "cell own" : known(value) ? "cell" : "cell none";
      const cell = draw("rect", { class: kind, x: left + CELL * column, y, width: CELL - 2, height: CELL - 2, rx: 3, "--strength": row === column ? null : strength.toFixed(3) });
      cell.addEventListener("pointermove", (event) => tell(event, row, column));
      cell.addEventListener("pointerleave", hideTip);
      svg.append(cell);
    });
  });
  host.replaceChildren(svg);
  legend.append(
    el("span", { text: "0" }), el("i", { class: "scale" }), el("span", { text: fixed(2)(confusion.highest) }),
    el("span", { class: "muted", text: "mean score; rows: labelled, columns: not labelled; grey: the class itself" }));
}

const cut = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);
