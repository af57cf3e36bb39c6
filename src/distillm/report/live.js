(() => {
  "use strict";
  const note = document.getElementById("live");
  const said = note.textContent;

  async function ask() {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const version = (await answer.text()).trim();
      note.textContent = said;
      // Whoever is selecting text does not want it to go away. The page itself remembers its place.
      if (version !== note.dataset.version && getSelection().isCollapsed) return location.reload();
    } catch (error) {
      note.textContent = "distillm watch does not answer: it was stopped, or is out of reach. This is what was known last.";
    }
    setTimeout(ask, 3000);
  }
  setTimeout(ask, 3000);
})();
