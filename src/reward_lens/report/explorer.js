(() => {
  const { latents } = JSON.parse(document.getElementById("data").textContent);
  const byLabel = new Map(latents.map((latent) => [latent.label, latent]));
  const body = document.querySelector(".latents tbody");
  const [query, order, found, detail] = ["query", "order", "found", "detail"].map((id) => document.getElementById(id));
  const rows = [...body.rows];
  const rowOf = new Map(rows.map((row) => [row.dataset.label, row]));
  const texts = new Map(latents.map((latent) => [latent.label, searched(latent)]));
  let chosen = null;

  // --- the list: searched, sorted

  function searched(latent) {
    return latent.contexts.map(({ tokens }) => tokens.map(([text]) => text).join("")).join("\n").toLowerCase();
  }

  function matches(label, wanted) {
    const name = label.toLowerCase();
    return name === wanted || name === `f${wanted}` || texts.get(label).includes(wanted);
  }

  function search() {
    const wanted = query.value.trim().toLowerCase();
    for (const row of rows) row.hidden = wanted !== "" && !matches(row.dataset.label, wanted);
    const left = seen().length;
    found.textContent = wanted ? `${left} of ${rows.length} latents` : `${rows.length} latents`;
    reachable();
  }

  function seen() {
    return [...body.rows].filter((row) => !row.hidden);
  }

  function sort() {
    const [key, way] = order.value.split(" ");
    const sign = way === "up" ? 1 : -1;
    const value = (row) => {
      const number = parseFloat(row.dataset[key]);
      return way === "size" ? Math.abs(number) : number;
    };
    // What was not measured comes last either way; equal ones stay in the order of the page.
    const sorted = rows.map((row) => [row, value(row)]).sort(([, a], [, b]) =>
      Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : sign * (a - b));
    body.append(...sorted.map(([row]) => row));
  }

  // --- choosing: by pointing, by the address, or with the arrow keys; Tab goes to the chosen one alone

  function reachable() {
    const visible = seen();
    const first = visible.find((row) => row.dataset.label === chosen) ?? visible[0];
    for (const row of rows) linkOf(row).tabIndex = row === first ? 0 : -1;
  }

  function linkOf(row) {
    return row.querySelector("a");
  }

  function choose(label) {
    if (label === chosen) return;
    rowOf.get(chosen)?.removeAttribute("aria-current");
    chosen = label;
    rowOf.get(label).setAttribute("aria-current", "true");
    detail.replaceChildren(...described(byLabel.get(label)));
    detail.hidden = false;
    reachable();
  }

  function go(label) {
    history.replaceState(null, "", `#${label}`);
    choose(label);
  }

  function fromAddress() {
    const label = decodeURIComponent(location.hash.slice(1));
    if (byLabel.has(label)) choose(label);
    return byLabel.has(label);
  }

  document.addEventListener("click", (event) => {
    const row = event.target.closest(".latents tbody tr");
    const link = event.target.closest("a");
    const label = row?.dataset.label ?? (detail.contains(link) ? link.hash.slice(1) : null);
    if (!byLabel.has(label)) return;
    event.preventDefault();
    go(label);
    rowOf.get(label).scrollIntoView({ block: "nearest" });
    if (stacked()) detail.scrollIntoView({ block: "start" });
  });

  function stacked() {
    return detail.getBoundingClientRect().left === body.closest("section").getBoundingClientRect().left;
  }

  body.addEventListener("keydown", (event) => {
    const visible = seen();
    const now = visible.findIndex((row) => row.contains(event.target));
    const next = { ArrowDown: now + 1, ArrowUp: now - 1, Home: 0, End: visible.length - 1 }[event.key];
    if (event.key === "Enter") {
      go(visible[now].dataset.label);
      detail.focus();
      event.preventDefault();
    }
    if (next === undefined) return;
    event.preventDefault();
    const row = visible[Math.min(Math.max(next, 0), visible.length - 1)];
    go(row.dataset.label);
    linkOf(row).focus();
  });

  // --- the detail of one latent

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function drawn(name, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function described(latent) {
    return [
      make("h2", { id: "detail-name" }, latent.label),
      make("dl", { class: "facts small" }, ...latent.facts.map(([name, value, remark]) => make("div", {},
        make("dt", {}, name), make("dd", {}, make("b", {}, value), ...(remark ? [" ", make("small", {}, remark)] : []))))),
      make("h3", {}, "Activations"), histogram(latent),
      make("h3", {}, "Nearest decoder rows"), neighbours(latent),
      make("h3", {}, `Contexts, the largest activations of ${latent.contexts.length} texts`),
      ...latent.contexts.flatMap(context),
      make("p", { class: "back" }, make("a", { href: "#list" }, "Back to the list")),
    ];
  }

  function histogram({ histogram: bins, largest }) {
    if (!bins) return make("p", { class: "note" }, "Active at no position of these texts.");
    const most = Math.max(...bins.counts);
    const short = (x) => String(Number(x.toPrecision(3)));
    const bars = bins.counts.map((count, i) => {
      const height = count ? Math.max(1, 60 * count / most) : 0;
      const [low, high] = [i * bins.width, (i + 1) * bins.width].map(short);
      return drawn("rect", { x: 10 * i + 1, y: 60 - height, width: 8, height },
        drawn("title", {}, `over ${low}, up to ${high}: ${count} positions`));
    });
    const total = bins.counts.reduce((sum, count) => sum + count, 0);
    const label = `Histogram of the activations at ${total} positions, the largest ${largest}`;
    const width = 10 * bins.counts.length;
    return make("figure", { class: "activations" },
      drawn("svg", { viewBox: `0 0 ${width} 61`, preserveAspectRatio: "none", role: "img", "aria-label": label }, ...bars,
        drawn("path", { class: "zero", d: `M0 60.5H${width}` })),
      make("div", { class: "ends", "aria-hidden": "true" }, make("span", {}, "0"),
        make("span", {}, short(bins.counts.length * bins.width))),
      make("figcaption", { class: "note" }, `Active at ${total.toLocaleString("en")} positions, the largest ${largest}; ` +
        `the highest bar stands for ${most.toLocaleString("en")}. Positions at 0 are in no bar.`));
  }

  function neighbours({ neighbours: near }) {
    if (!near.length) return make("p", { class: "note" }, "Not measured.");
    return make("ul", { class: "near" }, ...near.map(([label, cosine, listed]) =>
      make("li", {}, listed ? make("a", { href: `#${label}` }, label) : label, " ", make("small", {}, cosine))));
  }

  function context({ where, peak, tokens }, i) {
    const id = `context-${i}`;
    const strip = make("div", {
      class: "strip", id, "data-out": `${id}-out`, dir: "auto", tabindex: 0, role: "group",
      "aria-label": `${where}, ${tokens.length} tokens. Left and right arrow keys read the values.`,
    }, ...tokens.map(([text, shade, value, largest]) => {
      const kinds = [shade, largest ? "peak" : ""].filter(Boolean).join(" ");
      return make("span", kinds ? { class: kinds, title: value } : { title: value }, text);
    }));
    return [
      make("p", { class: "where" }, make("b", {}, peak), " ", make("small", {}, where)),
      strip, make("output", { class: "readout", id: `${id}-out` }),
    ];
  }

  query.addEventListener("input", search);
  order.addEventListener("change", sort);
  window.addEventListener("hashchange", fromAddress);
  if (!fromAddress() && rows.length) choose(rows[0].dataset.label);
  sort();
  search();
})();
