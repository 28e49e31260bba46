"use strict";
// What the pages can do beyond showing: sort a table by a column, filter by a word, open the neuron that a link names,
// and go through rows with the arrow keys. Without scripts everything is there all the same, in its first order.

const rows = () => [...document.querySelectorAll("tbody.sorted tr, body > details")];

function sort(header, column) {
  const body = header.closest("table").tBodies[0];
  const falling = header.getAttribute("aria-sort") !== "descending";
  const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.toLowerCase();
  const compare = (a, b) => {
    if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1; // what is missing stays at the end
    const order = isNaN(a) || isNaN(b) ? String(a).localeCompare(b) : a - b;
    return falling ? -order : order;
  };
  const sorted = [...body.rows].sort((one, other) => compare(value(one), value(other)));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  body.append(...sorted);
}

function filter(text, count) {
  const wanted = text.trim().toLowerCase();
  let shown = 0;
  for (const row of rows()) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    shown += !row.hidden;
  }
  count.textContent = `${shown} shown`;
}

function reveal() {
  const found = document.getElementById(location.hash.slice(1)); // a summary, which the browser goes to by itself
  if (found) found.parentElement.open = true;
}

for (const table of document.querySelectorAll("table")) {
  if (!table.tBodies[0].classList.contains("sorted")) continue;
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    if (header.className === "where") return;
    const button = document.createElement("button");
    button.append(...header.childNodes);
    button.type = "button";
    button.addEventListener("click", () => sort(header, column));
    header.append(button);
  });
}

const label = document.createElement("label");
const input = document.createElement("input");
const count = document.createElement("span");
input.type = "search";
count.className = "quiet";
count.setAttribute("role", "status");
label.append("Filter ", input, " ", count);
input.addEventListener("input", () => filter(input.value, count));
document.querySelector("[data-filter]").append(label);

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "/" && document.activeElement !== input) {
    event.preventDefault();
    input.focus();
  } else if (event.key === "Escape" && document.activeElement === input) {
    input.value = "";
    filter("", count);
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const ends = rows().filter((row) => !row.hidden).map((row) => row.querySelector("summary, a"));
    const at = ends.indexOf(document.activeElement);
    const next = at < 0 ? (document.activeElement === input ? ends[0] : undefined)
      : ends[at + (event.key === "ArrowDown" ? 1 : -1)];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  }
});
window.addEventListener("hashchange", reveal);
reveal();
