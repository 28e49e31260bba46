// What a neuron or head stands for: the places of a corpus where it matters most.

function showContexts(box, list, layer, part, name) {
  box.replaceChildren();
  if (part === null || !(list.name === "neuron" || isLabelled(list))) return;
  const say = (...words) => box.append(make("p", { class: "caption" }, ...words));
  box.append(make("h3", {}, "What it stands for"));
  if (!isLabelled(list)) {
    say(...missing("No corpus was read for it.", "out.explore(path, labels=lxt.neurons.load(folder))"));
    return;
  }
  const found = labelOf(list, layer, part);
  if (!found) {
    const reason = "its layer was not labelled, or others matter more here. ";
    say(`The contexts of ${name} are not on this page: ${reason}`, make("code", {}, `labels[${layer}, ${part}]`));
    return;
  }
  box.append(make("p", {}, make("bdi", { class: "strong" }, found.label || "no distinctive token")));
  const quality = "how well the name tells held-out contexts from random places; 0.5 is chance.";
  say(`${data.labelled.about}.${found.auroc === null ? "" : ` AUROC ${found.auroc.toFixed(2)}: ${quality}`}`);
  found.contexts.forEach(({ kind, shown: lines }, place) => {
    const unit = kind.endsWith("relevance") ? ", in logits" : "";
    const title = make("summary", { class: "kind" }, `${capital(kind)}${unit}`);
    const items = make("ul", { class: "contexts" }, ...lines.map(contextLine));
    box.append(make("details", { open: place === 0 && "" }, title, items));
  });
}

function contextLine([score, before, peak, after, document]) {
  const word = peak.trimStart() || peak;
  const space = peak.slice(0, peak.length - word.length);
  const text = make("bdi", { title: document }, before + space, make("mark", {}, word), after);
  return make("li", {}, make("span", { class: "number" }, signed(score)), text);
}
