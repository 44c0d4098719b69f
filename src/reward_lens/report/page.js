"use strict";
(() => {
  const root = document.documentElement;
  const { specs, themes } = JSON.parse(document.getElementById("charts").textContent);
  const darkSystem = window.matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const views = new Map();
  root.classList.add("js");

  // --- appearance: the system's until the reader chooses

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : darkSystem.matches;
  }

  async function draw(dark) {
    const options = {
      mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false,
      config: themes[dark ? "dark" : "light"], tooltip: { disableDefaultStyle: true },
    };
    await Promise.all(Object.entries(specs).map(async ([id, spec]) => {
      views.get(id)?.finalize();
      views.set(id, await window.vegaEmbed(document.getElementById(id), spec, options));
    }));
  }

  // One drawing at a time: the last wish wins however fast they come.
  let drawing = Promise.resolve();

  function show(dark = isDark()) {
    toggle.textContent = isDark() ? "Light colours" : "Dark colours";
    drawing = drawing.then(() => draw(dark)).then(() => { root.dataset.drawn = dark ? "dark" : "light"; });
  }

  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  darkSystem.addEventListener("change", () => { if (!root.dataset.theme) show(); });
  window.addEventListener("beforeprint", () => { if (isDark()) show(false); });
  window.addEventListener("afterprint", () => { if (isDark()) show(true); });
  show();

  // --- charts as files

  document.addEventListener("click", async (event) => {
    const id = event.target.dataset?.save;
    if (!id) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([await views.get(id).view.toSVG()], { type: "image/svg+xml" }));
    link.download = `${id}.svg`;
    link.click();
    URL.revokeObjectURL(link.href);
  });

  // --- long texts and groups of pairs

  document.addEventListener("click", (event) => {
    const { expand, all } = event.target.dataset ?? {};
    if (expand) unfold(document.getElementById(expand), event.target);
    if (all) {
      const pairs = [...document.getElementById(all).querySelectorAll("details.pair")];
      const open = pairs.some((pair) => !pair.open);
      for (const pair of pairs) pair.open = open;
    }
  });

  function unfold(text, button) {
    const folded = text.classList.toggle("clamp");
    button.textContent = folded ? "Show all" : "Show less";
    button.setAttribute("aria-expanded", String(!folded));
  }

  // --- tokens: pointing, touching or the arrow keys name a token and its value

  function read(token) {
    const strip = token.parentElement;
    strip.querySelector("[data-now]")?.removeAttribute("data-now");
    token.dataset.now = "";
    const place = [...strip.children].indexOf(token) + 1;
    const text = JSON.stringify(token.textContent);
    document.getElementById(strip.dataset.out).textContent =
      `${text}  ${token.title}  (token ${place} of ${strip.childElementCount})`;
  }

  function tokenOf(event) {
    return event.target.parentElement?.classList.contains("strip") ? event.target : null;
  }

  for (const kind of ["pointerover", "click"]) {
    document.addEventListener(kind, (event) => { const token = tokenOf(event); if (token) read(token); });
  }

  document.addEventListener("keydown", (event) => {
    const strip = event.target;
    if (!strip.classList?.contains("strip")) return;
    const tokens = [...strip.children];
    const now = tokens.findIndex((token) => token.dataset.now !== undefined);
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (strip.classList.contains("clamp")) unfold(strip, document.querySelector(`[data-expand="${strip.id}"]`));
    const token = tokens[Math.min(Math.max(next, 0), tokens.length - 1)];
    read(token);
    token.scrollIntoView({ block: "nearest" });
  });
})();
