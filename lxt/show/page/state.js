// What is chosen, kept in the address after #, and what is shown of it.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const rowsMade = new Map();

function rowAt(number) {
  if (!rowsMade.has(number)) rowsMade.set(number, new Row(data.rows[number], data.texts));
  return rowsMade.get(number);
}

// ---- what is chosen. null: nothing, and the strongest is shown

const NOTHING = {
  row: 0,
  token: null,
  layer: null,
  head: null,
  neuron: null,
  key: null,
  scale: "map",
  stream: "residual",
  parts: "head",
  list: "neuron",
  map: "flow",
  special: 0,
};
let state = { ...NOTHING };

function readAddress() {
  const found = { ...NOTHING };
  for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
    if (!Object.hasOwn(NOTHING, key)) continue;
    const named = typeof NOTHING[key] === "string";
    if (named) found[key] = text;
    else if (/^\d{1,9}$/.test(text)) found[key] = Number(text);
  }
  if (found.row >= data.rows.length) found.row = 0;
  if (found.token !== null && found.token >= rowAt(found.row).length) found.token = null;
  if (found.key !== null && found.key >= rowAt(found.row).length) found.key = null;
  return found;
}

function choose(change) {
  const next = { ...state, ...change };
  if (next.row !== state.row) {
    const same = data.rows[next.row].text === data.rows[state.row].text;
    Object.assign(next, { key: null }, same ? {} : { token: null });
  }
  if (next.layer !== state.layer && !("head" in change)) next.head = null;
  if ((next.layer !== state.layer || next.list !== state.list) && !("neuron" in change)) next.neuron = null;
  state = next;
  const parts = Object.entries(state).filter(([key, value]) => value !== NOTHING[key]);
  const address = new URLSearchParams(parts.map(([key, value]) => [key, String(value)])).toString();
  if (address !== location.hash.slice(1)) history.pushState(null, "", `#${address}`);
  render();
}

/** What is shown: what is chosen, and where nothing is, the strongest. Layers are numbers, places are indices. */
function shown() {
  const row = rowAt(state.row);
  const pickOf = (all, name) => all.get(name) || [...all.values()][0] || null;
  const stream = pickOf(row.streams, state.stream);
  const grid = pickOf(row.grids, state.parts);
  const list = pickOf(row.lists, state.list);
  const maps = pickOf(row.maps, state.map);
  const token = state.token;
  let layer = state.layer;
  if (layer === null && grid) layer = grid.layers[strongest(grid, token).place];
  if (layer === null && list) layer = strongestLayer(list, token);
  if (layer === null && stream) layer = stream.layers[stream.layers.length - 1];
  const gridPlace = grid ? grid.layers.indexOf(layer) : -1;
  let head = null;
  if (gridPlace >= 0)
    head = state.head !== null && state.head < grid.count ? state.head : strongest(grid, token, gridPlace).part;
  // Features are often of one layer: they are shown whichever layer is chosen.
  const listPlace = !list ? -1 : list.layers.length === 1 ? 0 : list.layers.indexOf(layer);
  const top = listPlace >= 0 ? list.top(listPlace, token) : null;
  const neuron = top ? (state.neuron ?? top.found[0]?.part ?? null) : null;
  return { row, token, stream, grid, list, maps, layer, head, gridPlace, listPlace, top, neuron };
}

function strongest(grid, token, only = null) {
  let best = { place: only ?? 0, part: 0 };
  let most = -1;
  for (let place = only ?? 0; place < (only === null ? grid.layers.length : only + 1); place++) {
    for (let part = 0; part < grid.count; part++) {
      const size = Math.abs(grid.at(place, part, token));
      if (size > most) [most, best] = [size, { place, part }];
    }
  }
  return best;
}

function strongestLayer(list, token) {
  const sizes = list.layers.map((_, place) => Math.abs(list.top(place, token).found[0]?.score ?? 0));
  return list.layers[sizes.indexOf(Math.max(...sizes))];
}
