// What several panes have in common: words, and views of a row's numbers.

const nameOf = (row, token) => `‘${row.names[token]}’`;
const tokenOf = (row, token) => `token ${token} ${nameOf(row, token)}`;
const where = ({ row, token }) => (token === null ? "all tokens" : tokenOf(row, token));
/** Where a saved number is: the token's place and text. */
const cellsOf = ({ row, token }) => (token === null ? ["", "all tokens"] : [token, row.raw(token)]);
const numberOf = (row, value) => (Number.isNaN(value) ? "not on this page" : `${signed(value)} ${row.unit}`);
const mutedIn = (row) => (token) => !state.special && row.special.has(token) && row.special.size < row.length;
const legendOf = (row, end, beyond = false) => {
  if (!end) return { low: "", high: `all 0 ${row.unit}` };
  const most = `${amount(end)}${beyond ? " or more" : ""}`;
  return { low: `lowers −${most}`, high: `+${most} raises · ${row.unit}` };
};
/** `who` has it: other models refuse what is asked for here. */
function missing(what, how, who = "") {
  return [`${what} ${who ? `${who}, ask` : "Ask"} for it: `, make("code", {}, how)];
}

function scaleOver(row, at) {
  const muted = mutedIn(row);
  let most = 0;
  for (let token = 0; token < row.length; token++) if (!muted(token)) most = Math.max(most, Math.abs(at(token)) || 0);
  return most;
}

/** A view of running text: any number for each token. */
function textView(row, at, title, file) {
  const end = scaleOver(row, at);
  const muted = mutedIn(row);
  const view = {
    tokens: row.tokens,
    direction: row.direction,
    at,
    muted,
    scale: end,
    chosen: state.token,
    title,
    file,
    legend: legendOf(row, end),
    say: (token) => {
      const marks = [row.special.has(token) && "special", row.asked.has(token) && "explained here"].filter(Boolean);
      return [`${nameOf(row, token)}: ${numberOf(row, at(token))}`, `token ${token}`, ...marks].join(" · ");
    },
    asked: row.asked,
    pick: (token) => choose({ token: token === state.token ? null : token }),
    table: () => [
      ["token", "text", "relevance"],
      ...row.tokens.map((_, token) => [token, row.raw(token), at(token)]),
    ],
  };
  view.scene = (theme) => textScene(view, theme);
  return view;
}

/** A view of cells; `more` overrides. */
function cellsView(row, more) {
  const view = {
    row: null,
    column: null,
    up: true,
    widest: 30,
    muted: () => false,
    strength: () => 0,
    slanted: false,
    ...more,
  };
  const room = Math.max(640, Math.min(1800, 130 + 12 * view.columns.length));
  view.scene = (theme) => gridScene(view, room, theme);
  return view;
}

const isLabelled = (list) => data.labelled !== null && data.labelled.latent === list.name;
const labelOf = (list, layer, part) => (isLabelled(list) ? data.labels[`${layer}:${part}`] : undefined);
const safe = (name) => name.replace(/[^\w.-]+/g, "-");
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
