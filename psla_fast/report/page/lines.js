// Charts of lines and of points: axes with units, a cross-hair that tells values, by pointer or arrow keys.

const MOST_TOLD = 12;

/** Axes of a chart; gives the svg, the scales x and y, and the plot's box. */
function axes(width, height, xs, ys, options) {
  const yTicks = ticks(ys[0], ys[1], 5);
  const xTicks = options.xTicks || ticks(xs[0], xs[1], width < 400 ? 4 : 8).filter((x) => x >= xs[0] && x <= xs[1] && (!options.whole || Number.isInteger(x)));
  const low = Math.min(yTicks[0], ys[0]);
  const high = yTicks[yTicks.length - 1];
  const format = options.yFormat || short;
  const left = 14 + 7 * Math.max(...yTicks.map((y) => format(y).length));
  const box = { left: left + 8, right: width - 22, top: 10, bottom: height - 40 };
  const place = options.log ? Math.log10 : (value) => value;
  const [x0, x1] = xs.map(place);
  const x = (value) => box.left + ((place(value) - x0) / (x1 - x0 || 1)) * (box.right - box.left);
  const y = (value) => box.bottom - ((value - low) / (high - low || 1)) * (box.bottom - box.top);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label });
  for (const value of yTicks) {
    svg.append(draw("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { class: "tick", x: box.left - 8, y: y(value) + 4, "text-anchor": "end", text: format(value) }));
  }
  for (const value of xTicks) {
    svg.append(draw("line", { class: "mark", x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 4 }));
    svg.append(draw("text", { class: "tick", x: x(value), y: box.bottom + 18, "text-anchor": "middle", text: count(value) }));
  }
  svg.append(draw("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  svg.append(draw("text", { class: "unit", x: box.right, y: height - 6, "text-anchor": "end", text: options.xLabel }));
  return { svg, x, y, box };
}

function pathOf(points, x, y) {
  let path = "", pen = "M";
  for (const [px, py] of points) {
    if (!known(py)) { pen = "M"; continue; }
    path += `${pen}${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
    pen = "L";
  }
  return path;
}

/**
 * A chart of series {name, group, dashed, faint, silent, points: [[x, y], …]}; a silent one isn't told.
 * options: label, xLabel, yFormat, zero (the y axis begins at 0), top (it ends there at least), within.
 */
function lineChart(host, getSeries, options) {
  const paint = (width) => {
    const series = getSeries().filter((one) => one.points.some(([, y]) => known(y)));
    const points = series.flatMap((one) => one.points.filter(([, y]) => known(y)));
    if (!points.length) { host.replaceChildren(el("p", { class: "muted", text: "All lines are hidden." })); return; }
    const xs = [Math.min(...points.map(([x]) => x)), Math.max(...points.map(([x]) => x))];
    if (options.fromZero) xs[0] = 0;
    if (xs[0] === xs[1]) { xs[0] -= 0.5; xs[1] += 0.5; }
    const low = Math.min(...points.map(([, y]) => y)), high = Math.max(...points.map(([, y]) => y), options.top || -Infinity);
    const plot = axes(width, options.height || 240, xs, [options.zero ? Math.min(0, low) : low, high], options);
    const { svg, x, y, box } = plot;
    for (const one of [...series].sort((a, b) => Number(!a.faint) - Number(!b.faint))) {
      const style = `line ${colour(one.group)}${one.dashed ? " dashed" : ""}${one.faint ? " faint" : ""}`;
      svg.append(draw("path", { class: style, d: pathOf(one.points, x, y) }));
      if (one.group >= 8 && one.points.length <= 60 && !one.faint) {
        for (const [px, py] of one.points) if (known(py)) svg.append(draw("circle", { class: `point ring ${colour(one.group)}`, cx: x(px), cy: y(py), r: 3 }));
      }
      const alone = one.points.filter(([, py]) => known(py));
      if (alone.length === 1) svg.append(draw("circle", { class: `point ${colour(one.group)}`, cx: x(alone[0][0]), cy: y(alone[0][1]), r: 3.5 }));
    }
    follow(svg, plot, series.filter((one) => !one.silent), options);
    host.replaceChildren(svg);
  };
  return keepDrawn(host, paint);
}

/** Have a cross-hair follow the pointer, or the arrow keys, and tell the values there. */
function follow(svg, { x, y, box }, series, options) {
  const places = [...new Set(series.flatMap((one) => one.points.map(([px]) => px)))].sort((a, b) => a - b);
  const hair = draw("line", { class: "hair", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const dots = draw("g", {});
  svg.append(hair, dots);
  let at = -1;
  const leave = () => { hair.setAttribute("visibility", "hidden"); dots.replaceChildren(); hideTip(); };
  const tell = (index) => {
    at = Math.max(0, Math.min(places.length - 1, index));
    const place = places[at], px = x(place);
    fill(hair, { x1: px, x2: px, visibility: "visible" }, []);
    dots.replaceChildren();
    const near = (places[1] - places[0] || 1) * 1.5;
    const told = [];
    for (const one of series) {
      const point = one.points.reduce((best, candidate) =>
        known(candidate[1]) && (!best || Math.abs(candidate[0] - place) < Math.abs(best[0] - place)) ? candidate : best, null);
      if (!point || Math.abs(point[0] - place) > near) continue;
      told.push({ text: one.name, value: (options.tipFormat || options.yFormat || short)(point[1]), group: one.group, y: point[1] });
      dots.append(draw("circle", { class: `point ${colour(one.group)}`, cx: x(point[0]), cy: y(point[1]), r: 3.5 }));
    }
    told.sort((a, b) => b.y - a.y);
    const rest = told.length - MOST_TOLD;
    const lines = rest > 0 ? [...told.slice(0, MOST_TOLD), { text: `and ${rest} more`, value: "" }] : told;
    const screen = svg.getBoundingClientRect();
    showTip(screen.left + px, screen.top + box.top, options.heading(place), lines);
  };
  svg.addEventListener("pointermove", (event) => {
    const px = event.clientX - svg.getBoundingClientRect().left;
    let nearest = 0;
    places.forEach((place, index) => { if (Math.abs(x(place) - px) < Math.abs(x(places[nearest]) - px)) nearest = index; });
    tell(nearest);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) { if (event.key === "Escape") leave(); return; }
    event.preventDefault();
    tell(at < 0 && move === 1 ? 0 : at + move);
  });
}

/** Points {x, y, name, lines}; hovering tells the nearest. x is logarithmic. */
function scatterChart(host, getPoints, options) {
  const paint = (width) => {
    const points = getPoints();
    if (!points.length) { host.replaceChildren(); return; }
    const most = Math.max(...points.map((point) => point.x)), least = Math.min(...points.map((point) => point.x));
    const xTicks = [1, 10, 100, 1000, 10000, 100000, 1000000].filter((tick) => tick >= least / 2 && tick <= most * 2);
    const xs = [Math.min(least * 0.8, ...xTicks), Math.max(most * 1.25, ...xTicks)];
    const { svg, x, y } = axes(width, 310, xs, [0, 1], { ...options, log: true, xTicks });
    const small = points.length > 150 ? 3 : 4.5;
    const spots = points.map((point) => draw("circle", { class: `spot ${colour(options.group())}`, cx: x(point.x), cy: y(point.y), r: small }));
    svg.append(...spots);
    svg.addEventListener("pointermove", (event) => {
      const screen = svg.getBoundingClientRect();
      const px = event.clientX - screen.left, py = event.clientY - screen.top;
      let nearest = -1, best = 28;
      points.forEach((point, index) => {
        const away = Math.hypot(x(point.x) - px, y(point.y) - py);
        if (away < best) { best = away; nearest = index; }
      });
      spots.forEach((spot, index) => spot.classList.toggle("at", index === nearest));
      if (nearest < 0) { hideTip(); return; }
      showTip(event.clientX, event.clientY, points[nearest].name, points[nearest].lines);
    });
    svg.addEventListener("pointerleave", () => { hideTip(); spots.forEach((spot) => spot.classList.remove("at")); });
    host.replaceChildren(svg);
  };
  return keepDrawn(host, paint);
}
