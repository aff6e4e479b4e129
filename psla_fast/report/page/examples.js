// Examples: a clip's picture, its labels, and the classes that score highest.

function scoreLine(entry) {
  return el("li", { class: entry.labelled ? "yes" : "no" },
    el("span", { class: "label", text: data.classes[entry.class].name, dir: "auto" }),
    el("span", { class: "figure", text: fixed(3)(entry.score) }),
    el("span", { class: "track", "--ap": Math.min(1, entry.score) }));
}

function picture(example, names) {
  if (!example.picture) return el("p", { class: "muted nothing", text: "No picture: the shards aren’t there." });
  const heard = example.heard / example.seconds;
  const unheard = heard < 0.995
    ? el("span", { class: "unheard", title: "Not heard: the model takes the part before it", "--from": `${100 * heard}%` }, heard < 0.7 ? el("em", { text: "not heard" }) : null) : null;
  return el("figure", {},
    el("div", { class: "fbank" }, el("img", { src: example.picture, alt: `Fbank of a clip of ${names.join(", ")}` }), unheard),
    el("figcaption", {}, el("span", { text: "0 s" }), el("span", { text: "mel bins upwards" }), el("span", { text: `${example.seconds.toFixed(example.seconds < 1 ? 2 : 1)} s` })));
}

function exampleCard(example, run) {
  const names = example.labels.map((index) => data.classes[index].name);
  const view = example.runs[run];
  return el("article", { class: "card example" },
    el("div", { class: "title" },
      el("h3", { dir: "auto" }, breakable(names.join(", ") || "no label")),
      view ? el("span", { class: `verdict ${view.right ? "right" : "wrong"}`, text: view.right ? "right" : "wrong" }) : null),
    picture(example, names),
    view ? el("ol", {}, ...view.scores.map(scoreLine)) : el("p", { class: "muted", text: "This run wasn’t scored on it." }),
    el("p", { class: "muted mono", text: example.key }));
}

function buildExamples(state) {
  const host = document.getElementById("example-cards");
  return () => {
    if (host) host.replaceChildren(...data.examples.map((example) => exampleCard(example, state.run)));
  };
}
