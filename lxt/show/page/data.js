// The data of the page, unpacked. Numbers are 16-bit integers with a scale for each series (show/packing.py).
"use strict";

const MISSING = -32768;

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

const floatsOf = ({ bytes, data }) => new (bytes === 4 ? Float32Array : Float64Array)(bytesOf(data));
const integersOf = ({ bytes, data }) => new (bytes === 2 ? Uint16Array : Uint32Array)(bytesOf(data));

/** [series, number]; NaN is what the page does not know. */
class Packed {
  constructor({ shape, scale, data }) {
    this.length = shape[1];
    this.scale = floatsOf(scale);
    this.steps = new Int16Array(bytesOf(data));
  }

  at(series, place) {
    const step = this.steps[series * this.length + place];
    return step === MISSING ? NaN : step * this.scale[series];
  }
}

/** A number for each layer and token. */
class Stream {
  constructor(name, { values, ...more }) {
    Object.assign(this, { name, ...more, values: new Packed(values) });
  }

  at(place, token) {
    return this.values.at(place, token);
  }
}

/** A number for each layer and part, and for each token where the page has it. */
class Grid {
  constructor(name, { sums, kept, values, ...more }) {
    Object.assign(this, { name, ...more, sums: floatsOf(sums), values: new Packed(values) });
    this.series = kept && new Map(kept.map((key, series) => [key, series]));
  }

  /** The sum over all tokens, or one token's number; NaN where that one is not on the page. */
  at(place, part, token = null) {
    const key = place * this.count + part;
    if (token === null) return this.sums[key];
    const series = this.series ? this.series.get(key) : key;
    return series === undefined ? NaN : this.values.at(series, token);
  }

  label(place, part) {
    return `L${this.layers[place]}${this.letter}${part}`;
  }
}

/** The largest of many parts, of each token and of all tokens together. */
class List {
  constructor(name, { values, indices, rest, best, sums, others, ...more }) {
    Object.assign(this, { name, ...more });
    Object.assign(this, { values: new Packed(values), rest: new Packed(rest), indices: integersOf(indices) });
    Object.assign(this, { best: integersOf(best), sums: floatsOf(sums), others: floatsOf(others) });
  }

  /** [{part, score}] of those with any relevance, strongest first, and what all others have together. */
  top(place, token = null) {
    const found = [];
    const start = token === null ? place * this.width : place * this.values.length + token * this.largest;
    for (let i = 0; i < (token === null ? this.width : this.largest); i++) {
      const part = (token === null ? this.best : this.indices)[start + i];
      const score = token === null ? this.sums[start + i] : this.values.at(place, token * this.largest + i);
      if (score) found.push({ part, score });
    }
    return { found, others: token === null ? this.others[place] : this.rest.at(place, token) };
  }

  /** A part's number at a token; NaN where it is not among the largest there. */
  at(place, part, token) {
    for (let i = token * this.largest; i < (token + 1) * this.largest; i++) {
      if (this.indices[place * this.values.length + i] === part) return this.values.at(place, i);
    }
    return NaN;
  }

  label(place, part) {
    return `L${this.layers[place]}${this.letter}${part}`;
  }
}

/** Query × key, of the heads that have it. */
class Maps {
  constructor(name, { values, ...more }) {
    Object.assign(this, { name, ...more, values: new Packed(values) });
  }

  series(layer, head) {
    return this.kept.indexOf(this.layers.indexOf(layer) * this.count + head);
  }

  at(series, query, key, length) {
    if (!this.causal) return this.values.at(series, query * length + key);
    return key > query ? 0 : this.values.at(series, (query * (query + 1)) / 2 + key);
  }
}

/** One explained value, unpacked when it is first shown. */
class Row {
  constructor(raw, texts) {
    const make = (Kind, all) => new Map(Object.entries(all).map(([name, one]) => [name, new Kind(name, one)]));
    Object.assign(this, raw, texts[raw.text]);
    const seen = new Map();
    for (const name of this.names) seen.set(name, (seen.get(name) || 0) + 1);
    // What several tokens of the row are called says which of them.
    this.labels = this.names.map((name, token) => (seen.get(name) > 1 ? `${name} (${token})` : name));
    this.special = new Set(this.special);
    this.asked = new Set(this.asked);
    this.scores = floatsOf(raw.relevance);
    this.streams = make(Stream, raw.streams);
    this.grids = make(Grid, raw.grids);
    this.lists = make(List, raw.lists);
    this.maps = make(Maps, raw.maps);
  }

  get length() {
    return this.tokens.length;
  }

  /** A token as it is, for files; one that is far too long as it is shown. */
  raw(token) {
    return this.exact[token] ?? this.tokens[token];
  }
}

// ---- numbers as a reader sees them (the same as show/words.py)

function amount(value, digits = 3) {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return "–";
  const size = Math.floor(Math.log10(Math.abs(value)));
  const text =
    size > -5 && size < 7
      ? value.toFixed(Math.min(20, Math.max(0, digits - 1 - size)))
      : value.toExponential(digits - 1);
  return text.replace(/-/g, "−");
}

const signed = (value, digits = 3) => (value > 0 ? "+" : "") + amount(value, digits);
/** For files: as precise as the page is, with a plain minus. */
const plain = (value) => (Number.isNaN(value) ? "" : String(Number(value.toPrecision(7))));

function largest(values) {
  let most = 0;
  for (const value of values) if (Math.abs(value) > most) most = Math.abs(value);
  return most;
}
