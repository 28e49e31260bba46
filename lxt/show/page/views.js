// Views: a map of cells, running text, a list. Each is built once, shows what it is given, and says what is picked.
// All words are set as text; nothing is ever parsed as markup.

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value;
    else if (value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const tip = document.getElementById("tip");

/** Says `text` beside a box of the window, without ever covering it. */
function showTip(text, box) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const above = box.top - height - 8;
  tip.style.left = `${Math.max(6, Math.min(innerWidth - width - 6, box.left + box.width / 2 - width / 2))}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}

const hideTip = () => {
  tip.hidden = true;
};

/** Arrow keys, Home and End in a table of cells; null where a key means nothing. `up`: row 0 is the lowest. */
function moved(key, at, rows, columns, up) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [up ? 1 : -1, 0], ArrowDown: [up ? -1 : 1, 0] }[key];
  const inside = (value, count) => Math.max(0, Math.min(count - 1, value));
  if (step) return { row: inside(at.row + step[0], rows), column: inside(at.column + step[1], columns) };
  if (key === "Home") return { ...at, column: 0 };
  if (key === "End") return { ...at, column: columns - 1 };
  if (key === "PageUp") return { ...at, row: up ? rows - 1 : 0 };
  if (key === "PageDown") return { ...at, row: up ? 0 : rows - 1 };
  return null;
}

let cellsMade = 0;

/** Rows × columns, painted. Assistive technology gets the one cell that the keyboard is at. */
class GridView {
  constructor(host, label) {
    this.cell = make("div", { role: "gridcell", id: `cell${cellsMade++}`, "aria-selected": "false" });
    this.line = make("div", { role: "row", class: "spoken" }, this.cell);
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.ring = make("div", { class: "ring", hidden: "" });
    this.box = make("div", { class: "grid holder", role: "grid", tabindex: "0", "aria-label": label });
    this.box.setAttribute("aria-activedescendant", this.cell.id);
    this.box.append(this.canvas, this.ring, this.line);
    host.append(this.box);
    this.at = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(this.under(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("click", (event) => {
      const at = this.under(event);
      if (!at) return;
      this.at = at;
      this.box.focus({ preventScroll: true });
      this.view.pick(at.row, at.column);
    });
    this.box.addEventListener("focus", () => {
      // A click brings its own place.
      if (this.box.matches(":focus-visible")) this.move(this.at || this.start());
    });
    this.box.addEventListener("blur", () => this.point(null));
    this.box.addEventListener("scroll", hideTip);
    this.box.addEventListener("keydown", (event) => this.key(event));
  }

  show(view, theme) {
    this.view = view;
    const style = getComputedStyle(this.box.parentElement);
    const room = this.box.parentElement.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const scene = gridScene(view, Math.max(220, room), theme);
    this.cells = scene.cells;
    this.canvas.style.width = `${scene.width}px`;
    this.canvas.style.height = `${scene.height}px`;
    paint(this.canvas, scene, theme, Math.min(devicePixelRatio || 1, 16_000 / scene.width));
    this.box.setAttribute("aria-rowcount", view.rows.length);
    this.box.setAttribute("aria-colcount", view.columns.length);
    if (this.at && (this.at.row >= view.rows.length || this.at.column >= view.columns.length)) this.at = null;
    this.speak(this.at || this.start());
  }

  start() {
    return { row: this.view.row ?? this.view.rows.length - 1, column: this.view.column ?? 0 };
  }

  under(event) {
    const { left, top, wide, high, rows, columns, up } = this.cells;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - left) / wide);
    const line = Math.floor((event.clientY - box.top - top) / high);
    if (column < 0 || column >= columns || line < 0 || line >= rows) return null;
    return { row: up ? rows - 1 - line : line, column };
  }

  /** The ring and the read-out at a cell; at none. */
  point(at) {
    this.ring.hidden = !at;
    if (!at) {
      hideTip();
      return;
    }
    const { left, top, wide, high, rows, up } = this.cells;
    const x = left + at.column * wide;
    const y = top + (up ? rows - 1 - at.row : at.row) * high;
    const sizes = { left: x - 2, top: y - 2, width: wide + 4, height: high + 4 };
    for (const [side, size] of Object.entries(sizes)) this.ring.style[side] = `${size}px`;
    const box = this.canvas.getBoundingClientRect();
    showTip(this.view.say(at.row, at.column), {
      left: box.left + x,
      top: box.top + y,
      width: wide,
      bottom: box.top + y + high,
    });
  }

  speak(at) {
    this.cell.textContent = this.view.say(at.row, at.column);
    this.cell.setAttribute("aria-colindex", at.column + 1);
    this.line.setAttribute("aria-rowindex", at.row + 1);
    this.cell.setAttribute(
      "aria-selected",
      String(at.row === this.view.row && (this.view.column ?? at.column) === at.column),
    );
  }

  move(at) {
    this.at = at;
    const x = this.cells.left + at.column * this.cells.wide;
    if (x < this.box.scrollLeft + this.cells.left || x > this.box.scrollLeft + this.box.clientWidth - 40) {
      this.box.scrollLeft = x - this.box.clientWidth / 2;
    }
    this.speak(at);
    this.point(at);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.at || this.start();
    const to = moved(event.key, at, this.view.rows.length, this.view.columns.length, this.view.up);
    if (to) this.move(to);
    else if (event.key === "Enter" || event.key === " ") {
      this.view.pick(at.row, at.column);
      this.point(at);
    } else return;
    event.preventDefault();
  }
}

/** What text and lists have in common: options of which one is reached by Tab, the others by arrows. */
class Options {
  constructor(host, label, kind) {
    this.box = make("div", { class: kind, role: "listbox", "aria-label": label });
    host.append(this.box);
    this.options = [];
    this.box.addEventListener("click", (event) => this.act(event.target));
    this.box.addEventListener("pointerover", (event) => this.hint(event.target));
    this.box.addEventListener("pointerleave", hideTip);
    this.box.addEventListener("focusin", (event) => {
      if (event.target.matches(":focus-visible")) this.hint(event.target);
    });
    this.box.addEventListener("focusout", hideTip);
    this.box.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const place = this.options.indexOf(document.activeElement);
      if (event.key === "Enter" || event.key === " ") this.act(document.activeElement);
      else {
        const to = this.next(event.key, place);
        if (to === null) return;
        this.reach(Math.max(0, Math.min(this.options.length - 1, to)), true);
      }
      event.preventDefault();
    });
  }

  placeOf(target) {
    return this.options.indexOf(target.closest ? target.closest('[role="option"]') : null);
  }

  act(target) {
    const place = this.placeOf(target);
    if (place < 0) return;
    this.reach(place, true);
    this.view.pick(place);
  }

  hint(target) {
    const place = this.placeOf(target);
    if (place < 0 || !this.view.say) return;
    showTip(
      this.view.say(place),
      this.options[place].getClientRects()[0] || this.options[place].getBoundingClientRect(),
    );
  }

  reach(place, focus = false) {
    for (const option of this.box.querySelectorAll('[tabindex="0"]')) option.tabIndex = -1;
    const option = this.options[place];
    if (!option) return;
    option.tabIndex = 0;
    if (focus) option.focus();
  }

  next(key, place) {
    if (key === "ArrowDown" || key === "ArrowRight") return place + 1;
    if (key === "ArrowUp" || key === "ArrowLeft") return place - 1;
    if (key === "Home") return 0;
    if (key === "End") return this.options.length - 1;
    return null;
  }
}

/** Tokens as running text in colours. */
class TextView extends Options {
  constructor(host, label, small = false) {
    super(host, label, small ? "text small" : "text");
  }

  show(view, theme) {
    if (this.tokens !== view.tokens) this.build(view);
    this.view = view;
    this.options.forEach((option, token) => {
      const value = view.at(token);
      const plainly = view.muted(token);
      const unknown = Number.isNaN(value);
      const fraction = view.scale && !plainly && !unknown ? value / view.scale : 0;
      const color = Math.abs(fraction) < 0.012 ? "" : colorOf(theme, fraction);
      option.style.background = color;
      option.style.color = color && inkOn(color);
      option.className = `token${plainly ? " plain" : unknown ? " unknown" : ""}${view.asked.has(token) ? " asked" : ""}`;
      option.setAttribute("aria-label", view.say(token));
      option.setAttribute("aria-selected", String(token === view.chosen));
    });
    const focused = this.options.indexOf(document.activeElement);
    this.reach(focused >= 0 ? focused : (view.chosen ?? 0));
  }

  build(view) {
    this.tokens = view.tokens;
    this.box.dir = view.direction;
    this.box.replaceChildren();
    this.options = view.tokens.map((token) => {
      const word = token.trimStart() ? token.replace(/^ +/, "") : token; // the space before a word stays outside its box
      const option = make("span", { class: "token", role: "option", tabindex: "-1" }, word);
      this.box.append(token.slice(0, token.length - word.length), option);
      if (token.includes("⏎")) this.box.append("\n");
      return option;
    });
  }

  next(key, place) {
    const back = this.box.dir === "rtl" ? "ArrowRight" : "ArrowLeft";
    if (key === back) return place - 1;
    if (key === "ArrowLeft" || key === "ArrowRight") return place + 1;
    if (key === "ArrowUp" || key === "ArrowDown") return this.otherLine(place, key === "ArrowDown" ? 1 : -1);
    return super.next(key, place);
  }

  /** The nearest token on the next line of that direction. */
  otherLine(place, step) {
    const from = this.options[place].getBoundingClientRect();
    let line = null;
    let best = place;
    let least = Infinity;
    for (let i = place + step; i >= 0 && i < this.options.length; i += step) {
      const box = this.options[i].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < 4) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > 4) break;
      const apart = Math.abs(box.left + box.width / 2 - from.left - from.width / 2);
      if (apart < least) [best, least] = [i, apart];
    }
    return best;
  }
}

/** Options below each other; `cells(item)` gives what stands in the columns. */
class ListView extends Options {
  constructor(host, label, cells) {
    super(host, label, "list");
    this.cells = cells;
  }

  show(view, theme) {
    const focused = this.options.indexOf(document.activeElement);
    this.view = view;
    this.options = view.items.map((item, place) => {
      const chosen = String(place === view.chosen);
      const option = make("div", { class: "option", role: "option", tabindex: "-1", "aria-selected": chosen });
      option.append(...this.cells(item, view, theme));
      return option;
    });
    this.box.replaceChildren(...this.options);
    const chosen = Math.max(0, view.chosen ?? 0);
    this.reach(focused >= 0 ? Math.min(focused, this.options.length - 1) : chosen, focused >= 0);
  }
}

/** A part of the page: its title, what can be switched, how it is saved, what it says of itself, and its views. */
class Pane {
  constructor(host, heading = "h2") {
    this.title = make(heading);
    this.controls = make("span", { class: "controls" });
    this.saving = make("span", { class: "save", role: "group", "aria-label": "save this view" }, "save");
    for (const form of ["png", "svg", "csv"]) {
      const button = make("button", { type: "button", "data-form": form }, form.toUpperCase());
      button.addEventListener("click", () => save(this.view, form, this.theme));
      this.saving.append(button);
    }
    this.caption = make("p", { class: "caption" });
    this.body = make("div", { class: "body" });
    this.legend = make("div", { class: "legend" });
    host.append(
      make("div", { class: "head" }, this.title, this.controls, this.saving),
      this.caption,
      this.body,
      this.legend,
    );
  }

  /** Everything but the body. `view` is what is saved; null where there is nothing to save. */
  say(title, caption, view, theme) {
    Object.assign(this, { view, theme });
    this.title.textContent = title;
    this.caption.replaceChildren(...[caption].flat());
    this.saving.hidden = !view;
    this.body.hidden = this.legend.hidden = !view;
    if (!view) return;
    const bar = make("span", {
      class: "bar",
      role: "img",
      "aria-label": `colours from ${view.legend.low} to ${view.legend.high}`,
    });
    for (let step = -16; step <= 16; step++) {
      const piece = make("i");
      piece.style.background = colorOf(theme, step / 16);
      bar.append(piece);
    }
    this.legend.replaceChildren(make("span", {}, view.legend.low), bar, make("span", {}, view.legend.high));
  }
}

/** Buttons of which one is pressed. */
class Switch {
  constructor(host, label, pick) {
    this.box = make("span", { class: "switch", role: "group", "aria-label": label });
    this.pick = pick;
    host.append(this.box);
  }

  show(all, chosen) {
    if (this.box.children.length !== all.length) {
      this.box.replaceChildren(...all.map(() => make("button", { type: "button" })));
      [...this.box.children].forEach((button, place) =>
        button.addEventListener("click", () => this.pick(this.values[place])),
      );
    }
    this.values = all.map(([value]) => value);
    all.forEach(([value, text], place) => {
      this.box.children[place].textContent = text;
      this.box.children[place].setAttribute("aria-pressed", String(value === chosen));
    });
  }
}

/** A menu of names; hidden where there is nothing to choose. */
class Menu {
  constructor(host, label, pick) {
    this.box = make("select", { "aria-label": label });
    this.box.addEventListener("change", () => pick(this.box.value));
    host.append(this.box);
  }

  show(names, chosen) {
    this.box.hidden = names.length < 2;
    if (
      this.box.options.length !== names.length ||
      names.some((name, place) => this.box.options[place].value !== name)
    ) {
      this.box.replaceChildren(...names.map((name) => make("option", { value: name }, name.replace(/_/g, " "))));
    }
    this.box.value = chosen;
  }
}
