(() => {
  "use strict";
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Storage may be forbidden, or full: then nothing is remembered.
  const kept = (store, name) => { try { return window[store].getItem(name); } catch { return null; } };
  const keep = (store, name, value) => { try { window[store].setItem(name, value); } catch { /* as said */ } };
  const THEME = "distillm-theme";
  const PLACE = `distillm-report:${location.pathname}`;

  // This stands in the head, so that no page is drawn in the wrong theme first.
  root.classList.add("js");
  const chosen = kept("localStorage", THEME);
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;

  // Of a panel's height, which the style sets: the plot, and the gap below it; what is left is for title and legend.
  const PLOT = 140;
  const GAP = 14;
  const FOOT = 48;
  let charts = new Map();
  const drawn = new Set();
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  // Plotly reads a little HTML in names; those come from the data.
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function paint(look) {
    const line = { width: 2 };
    if (look === "faint") return { color: color("faint"), line: { width: 1.25 } };
    if (look === "dashed") return { color: color("muted"), line: { ...line, dash: "dash" } };
    if (look === "dotted") return { color: color("soft"), line: { ...line, dash: "dot" } };
    if (look === "origin-dataset") return { color: color("grey"), line };
    if (look === "origin-generated") return { color: color("accent"), line };
    if (look === "origin-replayed") return { color: color("faint"), line };
    if (look === "origin-other") return { color: color("muted"), line };
    if (look.startsWith("run-")) {
      const index = Number(look.slice(4));
      const dash = ["solid", "dash", "dot", "dashdot"][Math.floor(index / 6) % 4];
      return { color: color(`run-${index % 6}`), line: { ...line, dash } };
    }
    return { color: color(look), line };
  }

  // The panels of a figure share one x axis, so that a pointer on one shows the values of all.
  const suffix = (index) => (index ? String(index + 1) : "");

  function traces(panels, beside) {
    return panels.flatMap((chart, index) => {
      const few = Math.max(...chart.series.map((series) => series.x.length)) <= 30;
      return chart.series.map((series) => {
        const { color: tint, line } = paint(series.look);
        const shared = {
          name: plain(series.name), x: series.x, y: series.y, xaxis: "x", yaxis: `y${suffix(index)}`,
          legend: `legend${suffix(index)}`, showlegend: !beside && chart.series.length > 1,
        };
        if (chart.kind === "bar") {
          return {
            ...shared, type: "bar", width: series.width, marker: { color: tint, line: { width: 0 } },
            hovertemplate: "%{y:.0%}",
          };
        }
        if (chart.kind === "scatter") {
          return {
            ...shared, type: "scatter", mode: "markers+text", marker: { size: 10, color: tint },
            text: [String(Number(series.look.slice(4)) + 1)], textposition: "top center", textfont: { color: color("ink") },
            hovertemplate: "%{x:.4g}, %{y:.4g}",
          };
        }
        return {
          ...shared, type: "scatter", mode: few ? "lines+markers" : "lines",
          line: { ...line, color: tint }, marker: { size: 5, color: tint }, hovertemplate: "%{y:.4g}",
          cliponaxis: false,
        };
      });
    });
  }

  function reach(panels) {
    const ends = panels.flatMap((chart) => chart.series.flatMap((series) => {
      const half = (index) => (chart.kind === "bar" ? series.width.at(index) / 2 : 0);
      return chart.kind === "scatter" ? series.x : [series.x[0] - half(0), series.x.at(-1) + half(-1)];
    }));
    const [first, last] = [Math.min(...ends), Math.max(...ends)];
    if (panels[0].kind !== "scatter") return first < last ? [first, last] : undefined;
    const margin = (last - first) * 0.08 || Math.abs(last) * 0.2 || 1;
    return [first - margin, last + margin];
  }

  function heights(chart) {
    if (chart.kind !== "scatter") return chart.y_range || undefined;
    const values = chart.series.flatMap((series) => series.y);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const margin = (high - low) * 0.25 || Math.abs(high) * 0.2 || 1;
    return [low - margin, high + margin];
  }

  function layout(panels, beside, width, height) {
    const inner = height - FOOT;
    const head = inner / panels.length - PLOT - GAP;
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("muted") };
    const axis = { gridcolor: color("grid"), zeroline: false, linecolor: color("line"), tickcolor: color("line"), fixedrange: true };
    const scatter = panels[0].kind === "scatter";
    const made = {
      font, width, height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 52, r: 12, t: 0, b: FOOT }, barmode: "stack", bargap: 0, dragmode: false, showlegend: true,
      hovermode: scatter ? "closest" : "x unified", hoversubplots: "axis",
      hoverlabel: { bgcolor: color("raised"), bordercolor: color("line"), font: { ...font, color: color("ink") } },
      xaxis: {
        ...axis, showgrid: false, title: { text: plain(panels[0].x_title), standoff: 6 }, range: reach(panels),
        hoverformat: scatter ? ".4~s" : ",d", tickformat: scatter ? "~s" : undefined,
        anchor: `y${suffix(panels.length - 1)}`, nticks: 8, spikethickness: 1, spikecolor: color("muted"), spikedash: "dot",
      },
      shapes: [], annotations: [],
    };
    panels.forEach((chart, index) => {
      const top = 1 - (index * (head + PLOT + GAP) + head) / inner;
      const bars = chart.kind === "bar";
      made[`yaxis${suffix(index)}`] = {
        ...axis, automargin: true, title: { text: plain(chart.y_title), standoff: 6, font: { ...font, size: 11 } },
        domain: [top - PLOT / inner, top], range: heights(chart), anchor: "x",
        rangemode: scatter ? "normal" : "tozero", tickformat: bars ? ".0%" : undefined, nticks: 5,
      };
      made[`legend${suffix(index)}`] = {
        orientation: "h", x: 0, xanchor: "left", y: top, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)",
        font: { ...font, size: 11 },
      };
      made.annotations.push({
        text: `<b>${plain(chart.title)}</b>`, x: 0, xref: "paper", xanchor: "left", y: top, yref: "paper",
        yanchor: "bottom", yshift: beside || chart.series.length < 2 ? 6 : head - 24, showarrow: false, font: { ...font, color: color("ink") },
      });
      for (const [x, text] of chart.marks) {
        made.shapes.push({
          type: "line", x0: x, x1: x, xref: "x", y0: 0, y1: 1, yref: `y${suffix(index)} domain`,
          line: { color: color("muted"), width: 1, dash: "dot" },
        });
        made.annotations.push({
          x, y: 1, xref: "x", yref: `y${suffix(index)} domain`, text: plain(text), showarrow: false, xanchor: "right",
          yanchor: "top", xshift: -4, font: { ...font, size: 11 },
        });
      }
    });
    return made;
  }

  function draw(place, width) {
    const panels = place.dataset.charts.split(" ").map((id) => charts.get(id));
    const settings = { responsive: true, displayModeBar: false };
    window.Plotly.react(place, traces(panels, place.dataset.legend), layout(panels, place.dataset.legend, width, place.clientHeight), settings);
    drawn.add(place);
  }

  function drawVisible() {
    if (!window.Plotly) return;
    for (const place of all(".chart")) if (!drawn.has(place) && !place.closest("details:not([open])")) draw(place);
  }

  function redraw(width) {
    for (const swatch of all(".swatch")) {
      const { color: tint, line } = paint(swatch.dataset.look);
      swatch.style.borderTop = `3px ${{ dash: "dashed", dot: "dotted", dashdot: "double" }[line.dash] || "solid"} ${tint}`;
    }
    if (window.Plotly) for (const place of drawn) draw(place, width);
  }

  async function load() {
    const holder = byId("plotly");
    if (!holder) return;
    try {
      const packed = Uint8Array.from(atob(holder.textContent.trim()), (char) => char.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script);
      drawVisible();
    } catch (error) {
      console.error(error);
      for (const place of all(".chart")) {
        place.style.height = "auto";
        place.textContent = "This browser cannot draw the chart. The tables below hold the same numbers.";
      }
    }
  }

  function themes() {
    const select = byId("theme");
    select.value = root.dataset.theme || "auto";
    select.addEventListener("change", () => {
      if (select.value === "auto") delete root.dataset.theme;
      else root.dataset.theme = select.value;
      keep("localStorage", THEME, select.value);
      redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
    let before;
    addEventListener("beforeprint", () => {
      before = root.dataset.theme;
      root.dataset.theme = "light";
      redraw(640);
    });
    addEventListener("afterprint", () => {
      if (before) root.dataset.theme = before;
      else delete root.dataset.theme;
      redraw();
    });
  }

  // Which answers are shown: those that hold the words looked for, of all; without any, those of the group chosen.
  const texts = new Map();
  const groupOf = (item) => item.closest(".heat")?.querySelector(".shown input:checked")?.value;

  function show() {
    const wanted = (byId("search")?.value || "").trim().toLowerCase();
    let count = 0;
    for (const [item, text] of texts) {
      const group = groupOf(item);
      const fits = wanted ? text.includes(wanted) : !group || item.dataset.groups.split(" ").includes(group);
      item.hidden = !fits;
      if (wanted && fits) count += 1;
    }
    for (const more of all("details.more")) {
      if (wanted && !more.open) more.dataset.opened = "";
      if (wanted) more.open = true;
      else if ("opened" in more.dataset) {
        more.open = false;
        delete more.dataset.opened;
      }
    }
    for (const run of all("details.run")) {
      const hits = all(".item:not([hidden])", run).length;
      run.querySelector(".hits").textContent = wanted ? `· ${hits} found` : "";
    }
    byId("found").textContent = wanted ? `${count} of ${texts.size} answers hold these words` : "";
  }

  function answers() {
    for (const item of all(".item")) texts.set(item, item.textContent.toLowerCase());
    for (const field of all(".shown")) {
      field.hidden = false;
      field.addEventListener("change", show);
    }
    byId("search")?.addEventListener("input", show);
    for (const tokens of all(".tokens")) {
      const spans = [...tokens.children];
      let at = -1;
      const go = (place) => {
        if (!spans[place]) return;
        spans[at]?.classList.remove("at");
        at = place;
        spans[at].classList.add("at");
        tokens.closest(".answer").querySelector(".said").textContent = spans[at].title;
      };
      tokens.addEventListener("click", (event) => go(spans.indexOf(event.target)));
      tokens.addEventListener("keydown", (event) => {
        const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
        if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        go(to);
      });
    }
    show();
  }

  function copying() {
    for (const copy of all(".copy")) {
      if (!navigator.clipboard) continue;
      copy.hidden = false;
      copy.addEventListener("click", async () => {
        await navigator.clipboard.writeText(byId(copy.dataset.copy).textContent);
        copy.textContent = "Copied";
        setTimeout(() => { copy.textContent = "Copy"; }, 1500);
      });
    }
  }

  // A page that is loaded again, as of a run that goes on, looks as it did: what was open, chosen, sought, and where.
  const details = () => all("details");
  const radios = () => all(".shown input");

  function remember() {
    const state = {
      y: scrollY, sought: byId("search")?.value || "", open: details().map((each) => each.open && !("opened" in each.dataset)),
      picked: radios().filter((each) => each.checked).map((each) => [each.name, each.value]),
    };
    keep("sessionStorage", PLACE, JSON.stringify(state));
  }

  function restore() {
    const how = performance.getEntriesByType("navigation")[0]?.type;
    if (how !== "reload" && how !== "back_forward") return;
    let state;
    try { state = JSON.parse(kept("sessionStorage", PLACE)); } catch { /* not ours */ }
    if (!state) return;
    const found = details();
    // With another number of them it is not known which is which.
    if (state.open.length === found.length) found.forEach((each, index) => { each.open = state.open[index]; });
    for (const each of radios()) each.checked = state.picked.some(([name, value]) => each.name === name && each.value === value) || each.checked;
    if (byId("search")) byId("search").value = state.sought;
    show();
    scrollTo(0, state.y);
  }

  addEventListener("DOMContentLoaded", () => {
    charts = new Map(JSON.parse(byId("charts").textContent).map((chart) => [chart.id, chart]));
    all(".tools").forEach((each) => { each.hidden = false; });
    themes();
    redraw();
    answers();
    copying();
    history.scrollRestoration = "manual";
    restore();
    addEventListener("pagehide", remember);
    document.addEventListener("toggle", drawVisible, true);
    load();
  });
})();
