// The panes: what each shows of what is chosen.

const panes = {
  tokens: new Pane(byId("tokens")),
  layers: new Pane(byId("layers")),
  maps: new Pane(byId("maps")),
};
for (const id of ["tokens", "layers", "heads", "maps", "neurons"]) byId(id).className = "panel";

function twoColumns(id, kind) {
  const [left, right] = [make("div"), make("div")];
  byId(id).append(make("div", { class: `columns ${kind}` }, left, right));
  return [left, right];
}
const [headsLeft, headsRight] = twoColumns("heads", "two");
const [neuronsLeft, neuronsRight] = twoColumns("neurons", "even");
Object.assign(panes, {
  heads: new Pane(headsLeft),
  head: new Pane(headsRight, "h3"),
  neurons: new Pane(neuronsLeft),
  neuron: new Pane(neuronsRight, "h3"),
});
const contexts = { head: make("div"), neuron: make("div") };
headsRight.append(contexts.head);
neuronsRight.append(contexts.neuron);

const rowList = new ListView(byId("rows"), "explained predictions", (item) => [
  make("span", { class: "number quiet" }, String(item.place + 1)),
  make("bdi", { class: "cut strong" }, item.row.target),
  make("span", { class: "number" }, item.row.value),
  make("bdi", { class: "cut quiet" }, data.texts.length > 1 ? `… ${item.end}` : item.row.facts.join(" · ")),
]);
const neuronList = new ListView(panes.neurons.body, "neurons", (item, view, theme) => {
  const bar = make("span", { class: "bar-of" });
  bar.style.width = `${view.scale ? 100 * Math.abs(item.score / view.scale) : 0}%`;
  bar.style.background = colorOf(theme, Math.sign(item.score));
  return [
    make("span", { class: "number" }, signed(item.score)),
    make("span", {}, bar),
    make("span", { class: "strong" }, item.name),
    make("bdi", { class: "cut quiet" }, item.text),
  ];
});
const views = {
  tokens: new TextView(panes.tokens.body, "tokens of the prompt"),
  layers: new GridView(panes.layers.body, "layers by tokens"),
  heads: new GridView(panes.heads.body, "layers by heads"),
  head: new TextView(panes.head.body, "tokens of the chosen head", true),
  maps: new GridView(panes.maps.body, "query by key tokens"),
  neuron: new TextView(panes.neuron.body, "tokens of the chosen neuron", true),
};
const controls = {
  stream: new Menu(panes.layers.controls, "which latent", (stream) => choose({ stream })),
  scale: new Switch(panes.layers.controls, "colour scale", (scale) => choose({ scale })),
  parts: new Menu(panes.heads.controls, "which latent", (parts) => choose({ parts })),
  list: new Menu(panes.neurons.controls, "which latent", (list) => choose({ list })),
  map: new Menu(panes.maps.controls, "which latent", (map) => choose({ map })),
};

const headsOf = (maps) =>
  maps.kept.map((key) => ({ layer: maps.layers[Math.floor(key / maps.count)], head: key % maps.count }));

/** The heads whose maps are there, to choose. */
function buttonsOf(maps) {
  return headsOf(maps).flatMap((one) => {
    const button = make("button", { type: "button" }, `L${one.layer}H${one.head}`);
    button.addEventListener("click", () => choose(one));
    return [" ", button];
  });
}

const show = {
  rows(now, theme) {
    const { row } = now;
    document.title = `${row.target} explained`;
    byId("predictions")
      .querySelector("h1")
      .replaceChildren("What speaks for ", make("bdi", {}, row.target), "?");
    byId("facts").textContent = [row.value, ...row.facts].join(" · ");
    byId("rows").hidden = data.rows.length < 2;
    if (data.rows.length < 2) return;
    const items = data.rows.map((one, place) => {
      const { tokens } = data.texts[one.text];
      return { row: one, place, end: tokens.slice(-8).join("") };
    });
    rowList.show({ items, chosen: state.row, pick: (place) => choose({ row: place }) }, theme);
  },

  trail(now) {
    const { row, token, layer, grid, head, list, neuron } = now;
    const go = (id) => () =>
      byId(id).scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    const step = (text, id, chosen) => {
      const button = make("button", { type: "button", class: chosen ? "strong" : "quiet" }, make("bdi", {}, text));
      button.addEventListener("click", go(id));
      return button;
    };
    const steps = [
      step(row.target, "predictions", true),
      step(token === null ? "all tokens" : row.labels[token], "tokens", token !== null),
    ];
    if (token !== null) {
      const clear = make("button", { type: "button", class: "clear", "aria-label": "all tokens" }, "✕");
      clear.addEventListener("click", () => choose({ token: null }));
      steps[1] = make("span", {}, steps[1], clear);
      steps[1].style.whiteSpace = "nowrap";
    }
    if (layer !== null) steps.push(step(`L${layer}`, "layers", state.layer !== null));
    if (head !== null) steps.push(step(grid.label(now.gridPlace, head), "heads", state.head !== null));
    if (neuron !== null) steps.push(step(list.label(now.listPlace, neuron), "neurons", state.neuron !== null));
    byId("trail").replaceChildren(...steps.flatMap((one, place) => (place ? [make("i", {}, "›"), one] : [one])));
  },

  tokens(now, theme) {
    const { row } = now;
    const title = `Relevance of each token for ${row.target}`;
    const view = textView(row, (token) => row.scores[token], title, `row${state.row}-tokens`);
    const note = state.special || !row.note ? "" : `; ${row.note}`;
    panes.tokens.say(
      "Tokens",
      `${row.conserved}${note}. Choose a token: heads and neurons then show what they have at it.`,
      view,
      theme,
    );
    views.tokens.show(view, theme);
  },

  layers(now, theme) {
    const { row, stream, layer } = now;
    controls.scale.show(
      [
        ["map", "one scale"],
        ["layer", "per layer"],
      ],
      state.scale,
    );
    controls.scale.box.hidden = !stream;
    controls.stream.show([...row.streams.keys()], stream ? stream.name : "");
    if (!stream) {
      panes.layers.say("Layers", missing("This explanation has no relevance by layer.", 'latents="residual"'), null, theme);
      return;
    }
    const embed = stream.name === "residual" ? 1 : 0; // below the first layer, what enters it
    const at = (line, token) => (line < embed ? row.scores[token] : stream.at(line - embed, token));
    const lines = stream.layers.length + embed;
    const ends = Array.from({ length: lines }, (_, line) => scaleOver(row, (token) => at(line, token)));
    // The text's scale where the text has one: a colour then means the same, and what lies beyond is full.
    const most = largest(ends);
    const own = scaleOver(row, (token) => row.scores[token]);
    const end = own > 0 && own < most ? own : most;
    const names = [...(embed ? ["embed"] : []), ...stream.names];
    const each = state.scale === "layer";
    const chosen = stream.layers.indexOf(layer);
    const view = cellsView(row, {
      rows: names,
      columns: row.labels,
      slanted: true,
      at,
      scale: (line) => (each ? ends[line] : end),
      muted: mutedIn(row),
      row: chosen < 0 ? null : chosen + embed,
      column: state.token,
      strength: (token) => Math.abs(row.scores[token]),
      say: (line, token) => `${names[line]} · ${tokenOf(row, token)}: ${numberOf(row, at(line, token))}`,
      pick: (line, token) => choose({ token, ...(line < embed ? {} : { layer: stream.layers[line - embed] }) }),
      title: `Relevance after each layer for ${row.target} (${stream.name})`,
      file: `row${state.row}-${safe(stream.name)}`,
      legend: each
        ? { low: "lowers −100 %", high: "+100 % raises · of the layer’s strongest" }
        : legendOf(row, end, end < most),
      table: () => [
        ["layer", "token", "text", "relevance"],
        ...names.flatMap((name, line) => row.tokens.map((_, token) => [name, token, row.raw(token), at(line, token)])),
      ],
    });
    const what =
      stream.name === "residual"
        ? "Where each layer’s relevance sits, from the embeddings (bottom) to the last layer (top)."
        : `${capital(stream.meaning || stream.name)}, by layer and token.`;
    panes.layers.say("Layers × tokens", `${what} Choose a cell for its layer and token.`, view, theme);
    views.layers.show(view, theme);
  },

  heads(now, theme) {
    const { row, grid, token, head, gridPlace } = now;
    controls.parts.show([...row.grids.keys()], grid ? grid.name : "");
    byId("heads").firstChild.classList.toggle("two", Boolean(grid));
    headsRight.hidden = !grid;
    if (!grid) {
      const how = 'latents=("residual", "head")';
      const caption = missing("This explanation has no relevance by head.", how, "Where the model has attention heads");
      panes.heads.say("Heads", caption, null, theme);
      return;
    }
    const at = (place, part) => grid.at(place, part, token);
    let end = 0;
    grid.layers.forEach((_, place) => {
      for (let part = 0; part < grid.count; part++) end = Math.max(end, Math.abs(at(place, part)) || 0);
    });
    const plural = `${grid.parts}s`;
    const view = cellsView(row, {
      rows: grid.layers.map((number) => `L${number}`),
      columns: Array.from({ length: grid.count }, (_, part) => String(part)),
      at,
      scale: () => end,
      row: gridPlace < 0 ? null : gridPlace,
      column: head,
      widest: 24,
      say: (place, part) => {
        const known = labelOf(grid, grid.layers[place], part)?.label;
        return `${grid.label(place, part)}: ${numberOf(row, at(place, part))} · ${where(now)}${known ? ` · ${known}` : ""}`;
      },
      pick: (place, part) => choose({ layer: grid.layers[place], head: part }),
      title: `Relevance of ${plural} for ${row.target}, ${where(now)}`,
      file: `row${state.row}-${safe(grid.name)}`,
      legend: legendOf(row, end),
      table: () => [
        ["layer", grid.parts, "token", "text", "relevance"],
        ...grid.layers.flatMap((number, place) =>
          view.columns.map((_, part) => [number, part, ...cellsOf(now), at(place, part)]),
        ),
      ],
    });
    const some = grid.series && token !== null ? " Grey: not on this page." : "";
    panes.heads.say(
      `${capital(plural)} of all layers`,
      `${capital(grid.meaning || grid.name)}: ${token === null ? "sum over all tokens" : `at ${where(now)}`}.${some}`,
      view,
      theme,
    );
    views.heads.show(view, theme);
    showContexts(contexts.head, grid, now.layer, head, head === null ? "" : grid.label(gridPlace, head));
    if (head === null) {
      panes.head.say(`L${now.layer}`, `${capital(plural)} of this layer were not kept.`, null, theme);
      return;
    }
    const label = grid.label(gridPlace, head);
    const total = `${label}: ${numberOf(row, grid.at(gridPlace, head))} over all tokens`;
    const own = textView(
      row,
      (one) => grid.at(gridPlace, head, one),
      `Relevance of ${label} at each token for ${row.target}`,
      `row${state.row}-${label}`,
    );
    const known = !Number.isNaN(own.at(0));
    panes.head.say(
      total,
      known
        ? `At which tokens ${label} has its relevance.`
        : "Its numbers at each token are not on this page, which would be too large with those of all.",
      known ? own : null,
      theme,
    );
    if (known) views.head.show(own, theme);
  },

  maps(now, theme) {
    const { row, maps } = now;
    controls.map.show([...row.maps.keys()], maps ? maps.name : "");
    byId("maps").hidden = !maps && !row.grids.size;
    if (!maps) {
      panes.maps.say(
        "From token to token",
        missing(
          "This explanation does not say what a head carries from which token.",
          'latents=("head", "flow")',
          "Where the model has attention heads",
        ),
        null,
        theme,
      );
      return;
    }
    // Parts of other kinds are no heads: then the map's own choice counts.
    const named = now.grid && ["head", "query"].includes(now.grid.name) && now.head !== null;
    const chosen = state.head !== null && !now.grid ? state : (headsOf(maps)[0] ?? { layer: 0, head: 0 });
    const { layer, head } = named ? now : chosen;
    const label = `L${layer}H${head}`;
    const series = maps.series(layer, head);
    if (series < 0) {
      const reason = maps.kept.length ? "The page has room for the strongest:" : "The page has no room for any.";
      const lines = [`The ${maps.name} of ${label} is not on this page. ${reason}`, ...buttonsOf(maps)];
      panes.maps.say("From token to token", lines, null, theme);
      return;
    }
    const at = (query, key) => maps.at(series, query, key, row.length);
    let end = 0;
    const muted = mutedIn(row);
    for (let query = 0; query < row.length; query++)
      for (let key = 0; key < row.length; key++) if (!muted(key)) end = Math.max(end, Math.abs(at(query, key)) || 0);
    const view = cellsView(row, {
      rows: row.labels,
      columns: row.labels,
      slanted: true,
      square: true,
      up: false,
      widest: 20,
      at,
      scale: () => end,
      muted,
      row: state.token, // a head has its relevance where it looks from
      column: state.key,
      strength: (key) => Math.abs(row.scores[key]),
      blank: true,
      say: (query, key) =>
        `${nameOf(row, key)} → ${nameOf(row, query)}: ${numberOf(row, at(query, key))} · token ${key} to ${query}`,
      pick: (query, key) => choose({ token: query, key }),
      title: `${capital(maps.name)} of ${label} for ${row.target}`,
      file: `row${state.row}-${safe(maps.name)}-${label}`,
      legend: legendOf(row, end),
      table: () => [
        ["query", "query_text", "key", "key_text", "relevance"],
        ...row.tokens.flatMap((_, query) =>
          row.tokens.map((_, key) => [query, row.raw(query), key, row.raw(key), at(query, key)]),
        ),
      ],
    });
    const some = maps.largest ? ` Of each only the ${maps.largest} largest were kept.` : "";
    const axes = `Down: the token that looks. Across: the token that it looks at.${some}`;
    const others = named ? [] : [" Heads: ", ...buttonsOf(maps)];
    const caption = [`${capital(maps.meaning || maps.name)}. ${axes}`, ...others];
    panes.maps.say(`From token to token: ${label}`, caption, view, theme);
    views.maps.show(view, theme);
  },

  neurons(now, theme) {
    const { row, list, listPlace, token, neuron, top } = now;
    const layer = listPlace < 0 ? now.layer : list.layers[listPlace];
    controls.list.show([...row.lists.keys()], list ? list.name : "");
    byId("neurons").firstChild.classList.toggle("even", Boolean(top));
    neuronsRight.hidden = neuron === null;
    if (!list || !top) {
      const there = list ? list.layers.map((number) => `L${number}`).join(", ") : "";
      const what = list
        ? `${capital(list.parts)}s of layer ${layer} were not kept; those of ${there} were.`
        : missing(
            "This explanation has no relevance by neuron.",
            'latents=("residual", "head", lxt.Keep("neuron", top=20))',
            "Where each layer has one MLP (a mixture of experts has \"expert\" instead)",
          );
      panes.neurons.say("Neurons", what, null, theme);
      return;
    }
    const items = top.found.map(({ part, score }) => ({
      part,
      score,
      name: list.label(listPlace, part),
      text: labelOf(list, layer, part)?.label || "",
    }));
    const end = largest(items.map(({ score }) => score));
    const plural = `${list.parts}s`;
    const view = {
      items,
      scale: end,
      chosen: items.findIndex((item) => item.part === neuron),
      legend: legendOf(row, end),
      say: (place) =>
        `${items[place].name}: ${numberOf(row, items[place].score)}${items[place].text && ` · ${items[place].text}`}`,
      pick: (place) => choose({ neuron: items[place].part, ...(list.layers.length > 1 ? { layer } : {}) }),
      title: `${capital(plural)} of layer ${layer} with the most relevance for ${row.target}, ${where(now)}`,
      file: `row${state.row}-${safe(list.name)}-L${layer}`,
      table: () => [
        ["layer", list.parts, "label", "token", "text", "relevance"],
        ...items.map((item) => [layer, item.part, item.text, ...cellsOf(now), item.score]),
      ],
    };
    view.scene = (colours) => listScene(view, colours);
    const over = list.complete ? "all tokens together" : "summed over the tokens where it is among the largest";
    const at = token === null ? over : `at ${where(now)}`;
    const caption = items.length
      ? `The ${items.length} with the most relevance, ${at}. All others together: ${numberOf(row, top.others)}.`
      : `None has any relevance, ${at}.`;
    panes.neurons.say(`${capital(plural)} of layer ${layer}`, caption, view, theme);
    neuronList.show(view, theme);
    showContexts(contexts.neuron, list, layer, neuron, neuron === null ? "" : list.label(listPlace, neuron));
    if (neuron === null) return;
    const label = list.label(listPlace, neuron);
    const own = textView(
      row,
      (one) => list.at(listPlace, neuron, one),
      `Relevance of ${label} at each token for ${row.target}`,
      `row${state.row}-${label}`,
    );
    panes.neuron.say(label, `At the tokens where it is among the ${list.largest} with the most relevance.`, own, theme);
    views.neuron.show(own, theme);
  },
};
