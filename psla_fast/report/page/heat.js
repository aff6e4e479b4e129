// The heat map of confused classes: rows are labels that clips carry, columns classes that they don't.

const [SMALLEST, LARGEST] = [17, 28];

function heatMap(host, legend, confusion) {
  const names = confusion.classes.map((index) => data.classes[index].name);
  legend.replaceChildren();
  if (!names.length) { host.replaceChildren(el("p", { class: "muted", text: "No class scores on clips without it." })); return; }
  const room = host.parentNode.clientWidth;
  const cut = (name) => { const most = room < 480 ? 14 : 20; return name.length > most ? `${name.slice(0, most - 1)}…` : name; };
  const lengths = names.map((name) => cut(name).length);
  const left = 14 + 7.1 * Math.max(...lengths), top = 14 + 6.2 * Math.max(...lengths);
  const right = Math.max(4, ...lengths.map((length, n) => 3.7 * length - SMALLEST * (names.length - n - 0.5)));
  const size = Math.floor(Math.max(SMALLEST, Math.min(LARGEST, (room - left - right) / names.length)));
  const width = left + size * names.length + right, height = top + size * names.length + 4;
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Heat map of confused classes" });
  const tell = (event, row, column) => {
    const value = confusion.cells[row][column];
    const line = row === column
      ? { text: "mean score on its own clips", value: fixed(3)(value) }
      : { text: `${names[column]}, not labelled, scores`, value: fixed(3)(value) };
    showTip(event.clientX, event.clientY, `Clips of ${names[row]}`, [line]);
  };
  names.forEach((name, row) => {
    const y = top + size * row, x = left + size * row;
    svg.append(draw("text", { class: "name", x: left - 8, y: y + size / 2 + 3, "text-anchor": "end", text: cut(name) }));
    svg.append(draw("text", { class: "name", transform: `translate(${x + size / 2 + 3} ${top - 8}) rotate(-60)`, text: cut(name) }));
    names.forEach((_, column) => {
      const value = confusion.cells[row][column];
      const strength = known(value) ? Math.min(1, value / (confusion.highest || 1)) : 0;
      const kind = row === column ? "cell own" : known(value) ? "cell" : "cell none";
      const cell = draw("rect", { class: kind, x: left + size * column, y, width: size - 2, height: size - 2, rx: 3, "--strength": row === column ? null : strength.toFixed(3) });
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
