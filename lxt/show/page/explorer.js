// The page around the panes, and what it reacts to.

function render() {
  const now = shown();
  const theme = themeOf(data.palette);
  for (const one of Object.values(show)) one(now, theme);
  byId("specials").hidden = !data.texts.some(({ special, tokens }) => special.length && special.length < tokens.length);
  byId("specials").firstChild.checked = Boolean(state.special);
  byId("theme").textContent = isDark() ? "light" : "dark";
}

function frame() {
  byId("about").textContent = `lxt explorer · model ${data.model} · rules ${data.rules}`;
  const versions = Object.entries(data.versions).map(([name, version]) => `${name} ${version}`);
  const precision =
    "Numbers are right to 1/65534 of the largest of their layer or head; sums over tokens are held in full.";
  const colours = "Red raises the explained value, blue lowers it; a full colour is the end of the legend.";
  const keys = "Tab goes from view to view, arrows move inside one, Enter chooses, Escape goes a step back.";
  const notes = [
    `Relevance is in units of the explained value. ${colours} ${precision}`,
    ...(data.left.length
      ? [`To stay below 2 MB this page holds ${data.left.join("; ")}. The Attribution has all.`]
      : []),
    `${keys} The address after # leads to what is chosen.`,
    versions.join(", "),
  ];
  byId("footer").replaceChildren(...notes.map((note) => make("p", {}, note)));
}

byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  render();
});
byId("specials").addEventListener("change", (event) => choose({ special: Number(event.target.checked) }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.target.matches("select")) return;
  const last = ["neuron", "head", "layer", "key", "token"].find((key) => state[key] !== null);
  if (last) choose({ [last]: null });
});
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(render);
});
for (const event of ["hashchange", "popstate"]) {
  addEventListener(event, () => {
    state = readAddress();
    render();
  });
}
addEventListener("scroll", hideTip, { passive: true });

frame();
state = readAddress();
render();
