// Pictures: scenes of rectangles and words, painted on a canvas or written as SVG, and what is saved of a view.

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif';
const measuring = document.createElement("canvas").getContext("2d");

function widthOf(text, size, weight = 400) {
  measuring.font = `${weight} ${size}px ${FONT}`;
  return measuring.measureText(text).width;
}

function shortened(text, most, size) {
  if (widthOf(text, size) <= most) return text;
  const letters = Array.from(text);
  while (letters.length > 1 && widthOf(`${letters.join("")}…`, size) > most) letters.pop();
  return `${letters.join("")}…`;
}

// ---- colours

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The page's colours as they are now. */
function themeOf(palette) {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    steps: palette[isDark() ? "dark" : "light"],
    page: named("page"),
    text: named("text"),
    muted: named("muted"),
    line: named("line"),
    soft: named("soft"),
  };
}

/** The colour of a number that is this share of the scale's end. */
function colorOf(theme, fraction) {
  const half = (theme.steps.length - 1) / 2;
  return theme.steps[half + Math.round(half * Math.max(-1, Math.min(1, fraction || 0)))];
}

/** The ink that reads best on a colour: the better WCAG contrast. */
function inkOn(color) {
  const part = (start) => {
    const share = parseInt(color.slice(start, start + 2), 16) / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  };
  const light = 0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5);
  return 1.05 / (light + 0.05) >= (light + 0.05) / 0.0513 ? "#ffffff" : "#040406";
}

// ---- scenes: {width, height, marks}

const rect = (x, y, w, h, fill, stroke = null) => ({ x, y, w, h, fill, stroke });
const words = (x, y, text, fill, size = 11, more = {}) => ({ x, y, text, fill, size, ...more });

const LABEL = 11; // px

/** Rows × columns of coloured cells with their names. `cells` says where they are. */
function gridScene(view, room, theme) {
  const rows = view.rows.length;
  const columns = view.columns.length;
  const left = Math.ceil(Math.max(18, ...view.rows.map((name) => Math.min(110, widthOf(name, LABEL, 600))))) + 10;
  const least = Math.max(1, Math.min(3, 6000 / columns)); // wider canvases than browsers paint must not come about
  const wide = Math.max(least, Math.min(view.widest, Math.floor((room - left - 14) / columns)));
  const high = view.square ? wide : Math.max(6, Math.min(20, Math.floor(460 / rows)));
  const names = view.slanted ? view.columns.map((name) => shortened(name, 84, LABEL)) : view.columns;
  const down = view.slanted ? 16 + Math.ceil(0.82 * Math.max(10, ...names.map((name) => widthOf(name, LABEL)))) : 32;
  const marks = [];
  const top = 4;
  const yOf = (row) => top + (view.up ? rows - 1 - row : row) * high;
  for (let row = 0; row < rows; row++) {
    const end = view.scale(row);
    for (let column = 0; column < columns; column++) {
      const value = view.at(row, column);
      const fraction = end ? value / end : 0;
      if (view.muted(column) || (Number.isNaN(value) && !view.blank))
        marks.push(rect(left + column * wide, yOf(row), wide, high, theme.soft));
      else if (fraction) marks.push(rect(left + column * wide, yOf(row), wide, high, colorOf(theme, fraction)));
    }
  }
  for (const row of view.square ? strongestNamed(view, high, view.row) : everyNamed(rows, 12 / high, view.row)) {
    const [fill, weight] = row === view.row ? [theme.text, 600] : [theme.muted, 400];
    const name = shortened(view.rows[row], 110, LABEL);
    marks.push(words(left - 7, yOf(row) + high / 2 + 4, name, fill, LABEL, { anchor: "end", weight }));
  }
  marks.push(rect(left, top, columns * wide, rows * high, null, theme.line));
  const below = top + rows * high;
  const most = 9 + widthOf(String(columns), LABEL);
  const named = view.slanted ? strongestNamed(view, wide, view.column) : everyNamed(columns, most / wide, view.column);
  for (const column of named) {
    const chosen = column === view.column;
    const more = { weight: chosen ? 600 : 400, fill: chosen ? theme.text : theme.muted };
    const middle = left + (column + 0.5) * wide;
    if (view.slanted)
      marks.push({ ...words(middle + 3, below + 11, names[column], "", LABEL, { anchor: "end", turn: -55 }), ...more });
    else marks.push({ ...words(middle, below + 14, names[column], "", LABEL, { anchor: "middle" }), ...more });
  }
  if (view.row !== null)
    marks.push(rect(left - 1, yOf(view.row) - 0.5, columns * wide + 2, high + 1, null, theme.text));
  if (view.column !== null)
    marks.push(rect(left + view.column * wide - 0.5, top - 1, wide + 1, rows * high + 2, null, theme.text));
  const width = left + columns * wide + 14;
  return { width, height: below + down, marks, cells: { left, top, wide, high, rows, columns, up: view.up } };
}

/** Which of `count` cells have room for their names: each so many, and the chosen one, none over another. */
function everyNamed(count, room, chosen) {
  const apart = Math.max(1, Math.ceil(room));
  const regular = Array.from({ length: count }, (_, place) => place).filter((place) => place % apart === 0);
  return withChosen(regular, chosen, apart);
}

/** The same of tokens: the strongest have names. Both sides of a map of tokens thus name the same ones. */
function strongestNamed(view, size, chosen) {
  const apart = Math.ceil(14 / size);
  const taken = [];
  const order = view.columns.map((_, column) => column);
  for (const place of order.sort((one, other) => view.strength(other) - view.strength(one))) {
    if (apart > 1 && taken.length > 60) break;
    if (taken.every((other) => Math.abs(other - place) >= apart)) taken.push(place);
  }
  return withChosen(taken, chosen, apart);
}

function withChosen(taken, chosen, apart) {
  return chosen === null ? taken : [chosen, ...taken.filter((place) => Math.abs(place - chosen) >= apart)];
}

/** Tokens as running text. */
function textScene(view, theme, room = 900) {
  const marks = [];
  const size = 16;
  let x = 8;
  let y = 24;
  for (let token = 0; token < view.tokens.length; token++) {
    const whole = view.tokens[token];
    const shown = shortened(whole.trimStart() || whole, room - 40, size);
    const gap = whole.length > shown.length && whole.startsWith(" ") ? widthOf(" ", size) : 0;
    const width = widthOf(shown, size) + 4;
    if (x > 8 && x + gap + width > room - 8) [x, y] = [8, y + 30];
    else x += x > 8 ? gap : 0;
    const fill = view.muted(token) ? null : colorOf(theme, view.scale ? view.at(token) / view.scale : 0);
    if (fill) marks.push(rect(x, y - 18, width, 25, fill));
    marks.push(words(x + 2, y, shown, fill ? inkOn(fill) : theme.muted, size));
    x += width;
    if (whole.includes("⏎")) [x, y] = [8, y + 30];
  }
  if (view.direction === "rtl")
    for (const mark of marks)
      Object.assign(mark, mark.text === undefined ? { x: room - mark.x - mark.w } : { x: room - mark.x, anchor: "end" });
  return { width: room, height: y + 16, marks };
}

/** Bars with names. */
function listScene(view, theme) {
  const marks = [];
  view.items.forEach((item, place) => {
    const y = 20 + place * 22;
    const share = view.scale ? item.score / view.scale : 0;
    marks.push(words(64, y, signed(item.score), theme.text, 12, { anchor: "end" }));
    marks.push(rect(76, y - 10, Math.max(1, 120 * Math.abs(share)), 12, colorOf(theme, Math.sign(share))));
    marks.push(words(208, y, item.name, theme.text, 12, { weight: 600 }));
    marks.push(words(300, y, shortened(item.text, 390, 12), theme.muted, 12));
  });
  return { width: 700, height: 24 + view.items.length * 22, marks };
}

/** A scene with its title above and its legend below, as it is saved. */
function framed(scene, title, legend, theme) {
  const width = Math.max(scene.width, 460);
  const lines = [];
  let line = "";
  for (const word of title.split(/(?<= )/)) {
    if (line && widthOf(line + word, 14, 600) > width - 16) [line, lines[lines.length]] = ["", line];
    line += word;
  }
  lines.push(line);
  const top = 14 + lines.length * 20;
  const marks = lines.map((text, place) => words(8, 22 + 20 * place, text, theme.text, 14, { weight: 600 }));
  for (const mark of scene.marks) marks.push({ ...mark, y: mark.y + top });
  const y = top + scene.height + 12;
  let x = 8;
  marks.push(words(x, y + 10, legend.low, theme.muted));
  x += widthOf(legend.low, LABEL) + 8;
  for (let step = -20; step <= 20; step++) marks.push(rect(x + (step + 20) * 4, y, 4, 12, colorOf(theme, step / 20)));
  marks.push(rect(x, y, 164, 12, null, theme.line));
  marks.push(words(x + 172, y + 10, legend.high, theme.muted));
  return { width, height: y + 26, marks };
}

// ---- painting

function paint(canvas, scene, theme, ratio) {
  canvas.width = Math.max(1, Math.round(scene.width * ratio));
  canvas.height = Math.max(1, Math.round(scene.height * ratio));
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = theme.page;
  context.fillRect(0, 0, scene.width, scene.height);
  for (const mark of scene.marks) {
    if (mark.text === undefined) {
      if (mark.fill) {
        context.fillStyle = mark.fill;
        context.fillRect(mark.x, mark.y, mark.w, mark.h);
      }
      if (mark.stroke) {
        context.strokeStyle = mark.stroke;
        context.strokeRect(mark.x, mark.y, mark.w, mark.h);
      }
      continue;
    }
    context.save();
    context.font = `${mark.weight || 400} ${mark.size}px ${FONT}`;
    context.fillStyle = mark.fill;
    context.textAlign = { end: "right", middle: "center" }[mark.anchor] || "left";
    context.translate(mark.x, mark.y);
    if (mark.turn) context.rotate((mark.turn * Math.PI) / 180);
    context.fillText(mark.text, 0, 0);
    context.restore();
  }
}

function svgOf(scene, theme) {
  const space = "http://www.w3.org/2000/svg";
  const make = (name, attributes, text = null) => {
    const element = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return element;
  };
  const near = (number) => Math.round(number * 100) / 100;
  const { width, height } = { width: near(scene.width), height: near(scene.height) };
  const root = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": FONT });
  root.append(make("rect", { width, height, fill: theme.page }));
  for (const mark of scene.marks) {
    const place = { x: near(mark.x), y: near(mark.y) };
    if (mark.text === undefined) {
      const paints = { fill: mark.fill || "none", ...(mark.stroke ? { stroke: mark.stroke } : {}) };
      root.append(make("rect", { ...place, width: near(mark.w), height: near(mark.h), ...paints }));
      continue;
    }
    const look = { fill: mark.fill, "font-size": mark.size, "text-anchor": mark.anchor || "start" };
    if (mark.weight) look["font-weight"] = mark.weight;
    if (mark.turn) look.transform = `rotate(${mark.turn} ${place.x} ${place.y})`;
    root.append(make("text", { ...place, ...look, "xml:space": "preserve" }, mark.text));
  }
  return new XMLSerializer().serializeToString(root);
}

/** A text as a field: one that a spreadsheet would compute gets the apostrophe by which it is text there. */
function fieldOf(text) {
  const safely = /^[\t\r\n]*[=+\-@][^]/.test(text) ? `'${text}` : text;
  return `"${safely.replace(/"/g, '""')}"`;
}

function csvOf([header, ...lines]) {
  const field = (value) => (typeof value === "string" ? fieldOf(value) : plain(value));
  return `${[header.join(","), ...lines.map((line) => line.map(field).join(","))].join("\r\n")}\r\n`;
}

function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Save a view: {file, title, legend, scene(theme), table()}. */
function save(view, form, theme) {
  const name = `lxt-${view.file}.${form}`;
  if (form === "csv") {
    download(name, new Blob([csvOf(view.table())], { type: "text/csv" }));
    return;
  }
  const scene = framed(view.scene(theme), view.title, view.legend, theme);
  if (form === "svg") {
    download(name, new Blob([svgOf(scene, theme)], { type: "image/svg+xml" }));
    return;
  }
  const canvas = document.createElement("canvas");
  paint(canvas, scene, theme, Math.min(2, 16_000 / Math.max(scene.width, scene.height)));
  // At once: what toBlob gives later, browsers may take for a download that nobody asked for.
  download(name, new Blob([bytesOf(canvas.toDataURL("image/png").split(",")[1])], { type: "image/png" }));
}
