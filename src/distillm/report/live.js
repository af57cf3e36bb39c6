(() => {
  "use strict";
  const note = document.getElementById("live");
  const said = note.textContent;
  const root = document.documentElement;
  const name = "distillm-live";
  // Numbers in a heading change from one rendering to the next.
  const label = (part) => (part.querySelector("summary")?.textContent || "").replace(/\d+/g, "");

  const kept = JSON.parse(sessionStorage.getItem(name) || "null");
  if (kept) {
    sessionStorage.removeItem(name);
    history.scrollRestoration = "manual";
    if (kept.theme) root.dataset.theme = kept.theme;
    for (const part of document.querySelectorAll("details")) if (kept.open.includes(label(part))) part.open = true;
    addEventListener("DOMContentLoaded", () => scrollTo(0, kept.top));
    addEventListener("load", () => scrollTo(0, kept.top));
  }

  function reload() {
    const open = [...document.querySelectorAll("details[open]")].map(label);
    sessionStorage.setItem(name, JSON.stringify({ top: scrollY, theme: root.dataset.theme, open }));
    location.reload();
  }

  async function ask() {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const version = (await answer.text()).trim();
      note.textContent = said;
      // Whoever is selecting text does not want it to go away.
      if (version !== note.dataset.version && getSelection().isCollapsed) return reload();
    } catch (error) {
      note.textContent = "distillm watch does not answer: it was stopped, or is out of reach. This is what was known last.";
    }
    setTimeout(ask, 3000);
  }
  setTimeout(ask, 3000);
})();
