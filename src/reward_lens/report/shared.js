"use strict";
// What every page has: the appearance, folded texts, and tokens that are read one by one.

// --- appearance: the system's until the reader chooses

const appearance = (() => {
  const root = document.documentElement;
  const darkSystem = window.matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const followers = [];
  root.classList.add("js");

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : darkSystem.matches;
  }

  function changed() {
    toggle.textContent = isDark() ? "Light colours" : "Dark colours";
    for (const follower of followers) follower();
  }

  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    changed();
  });
  darkSystem.addEventListener("change", () => { if (!root.dataset.theme) changed(); });
  changed();

  return { isDark, follow: (follower) => { followers.push(follower); follower(); } };
})();

(() => {
  // --- long texts

  document.addEventListener("click", (event) => {
    const { expand } = event.target.dataset ?? {};
    if (expand) unfold(document.getElementById(expand), event.target);
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
      `${text}  ${token.title}  (${place} of ${strip.childElementCount})`;
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
