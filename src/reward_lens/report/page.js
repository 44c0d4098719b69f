(() => {
  const root = document.documentElement;
  const { specs, themes } = JSON.parse(document.getElementById("charts").textContent);
  const views = new Map();

  // --- charts, drawn in the colours of the page

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

  function show() {
    const dark = appearance.isDark();
    drawing = drawing.then(() => draw(dark)).then(() => { root.dataset.drawn = dark ? "dark" : "light"; });
  }

  appearance.follow(show);

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

  // --- groups of pairs

  document.addEventListener("click", (event) => {
    const { all } = event.target.dataset ?? {};
    if (!all) return;
    const pairs = [...document.getElementById(all).querySelectorAll("details.pair")];
    const open = pairs.some((pair) => !pair.open);
    for (const pair of pairs) pair.open = open;
  });
})();
