// A table that is sorted by its headings (click, or Enter on one) and searched.

const inOrder = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/**
 * columns: {label, title, value(row), show(row) -> text or node, text: it isn't numbers, bar: the group whose colour
 * a bar of the value has}. Unknown values stay last.
 * Gives {update(columns, rows), search(text)}; `counted(shown, all)` is told how many rows are left.
 */
function sortableTable(table, counted) {
  let columns = [], entries = [], sorted = { column: 0, falling: false }, wanted = "";
  const head = el("thead"), body = el("tbody");
  table.replaceChildren(head, body);

  const arrange = () => {
    const { column, falling } = sorted;
    for (const entry of entries) entry.key = columns[column].value(entry.row);
    entries.sort((a, b) => {
      if (!known(a.key) || !known(b.key)) return Number(!known(a.key)) - Number(!known(b.key)) || a.number - b.number;
      const order = columns[column].text ? inOrder.compare(a.key, b.key) : a.key - b.key;
      return (falling ? -order : order) || a.number - b.number;
    });
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
        if (column.text) return el(tag, { scope: index ? null : "row", dir: "auto" }, shown);
        if (column.bar === undefined) return el(tag, { class: "num" }, shown);
        return el(tag, { class: `num ap ${colour(column.bar)}`, "--ap": column.value(row) || 0 }, shown);
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
