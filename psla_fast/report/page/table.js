// A table that is sorted by its headings (click, or Enter on one) and searched.

/**
 * columns: {label, title, value(row), show(row) -> text or node, text: it isn't numbers}. Unknown values stay last.
 * Gives {update(columns, rows), search(text)}; `counted(shown, all)` is told how many rows are left.
 */
function sortableTable(table, counted) {
  let columns = [], entries = [], sorted = { column: 0, falling: false }, wanted = "";
  const head = el("thead"), body = el("tbody");
  table.replaceChildren(head, body);

  const arrange = () => {
    const { column, falling } = sorted;
    const of = columns[column].value;
    const compare = (a, b) => {
      const [x, y] = [of(a.row), of(b.row)];
      if (!known(x) || !known(y)) return Number(!known(x)) - Number(!known(y)) || a.number - b.number;
      const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true, sensitivity: "base" }) : x - y;
      return (falling ? -order : order) || a.number - b.number;
    };
    entries.sort(compare);
    body.append(...entries.map((entry) => entry.line));
    [...head.rows[0].cells].forEach((cell, index) =>
      cell.setAttribute("aria-sort", index !== column ? "none" : falling ? "descending" : "ascending"));
  };

  const filter = () => {
    let shown = 0;
    for (const entry of entries) {
      const found = entry.words.includes(wanted);
      entry.line.hidden = !found;
      shown += Number(found);
    }
    if (counted) counted(shown, entries.length);
  };

  const choose = (index) => {
    const falling = sorted.column === index ? !sorted.falling : !columns[index].text;
    sorted = { column: index, falling };
    arrange();
  };

  const update = (newColumns, rows, start) => {
    columns = newColumns;
    if (start) sorted = start;
    if (sorted.column >= columns.length) sorted = { column: 0, falling: false };
    head.replaceChildren(el("tr", {}, ...columns.map((column, index) =>
      el("th", { scope: "col", class: column.text ? "" : "num", title: column.title },
        el("button", { type: "button", onclick: () => choose(index) }, el("span", { text: column.label, dir: "auto" }))))));
    entries = rows.map((row, number) => {
      const cells = columns.map((column, index) => {
        const shown = column.show(row);
        const tag = index ? "td" : "th";
        const cell = el(tag, { class: column.text ? "" : "num", scope: index ? null : "row", dir: column.text ? "auto" : null });
        cell.append(shown);
        return cell;
      });
      const words = columns.filter((column) => column.text).map((column) => column.value(row)).join(" ").toLowerCase();
      return { row, number, words, line: el("tr", {}, ...cells) };
    });
    body.replaceChildren();
    arrange();
    filter();
  };
  return { update, search: (text) => { wanted = text.trim().toLowerCase(); filter(); } };
}
