(() => {
  "use strict";
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  root.classList.add("js");

  const charts = new Map(JSON.parse(byId("charts").textContent).map((chart) => [chart.id, chart]));
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

  function traces(chart) {
    const few = Math.max(...chart.series.map((series) => series.x.length)) <= 30;
    return chart.series.map((series) => {
      const { color: tint, line } = paint(series.look);
      const shared = { name: plain(series.name), x: series.x, y: series.y };
      if (chart.kind === "bar") {
        return {
          ...shared, type: "bar", width: series.width, marker: { color: tint, line: { width: 0 } },
          hovertemplate: "%{y:.0%}",
        };
      }
      return {
        ...shared, type: "scatter", mode: few ? "lines+markers" : "lines",
        line: { ...line, color: tint }, marker: { size: 5, color: tint }, hovertemplate: "%{y:.4g}",
        cliponaxis: false,
      };
    });
  }

  function layout(chart, width) {
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("muted") };
    const axis = {
      gridcolor: color("grid"), zeroline: false, linecolor: color("line"), tickcolor: color("line"),
      fixedrange: true,
    };
    const bars = chart.kind === "bar";
    const half = (series, index) => (bars ? series.width.at(index) / 2 : 0);
    const first = Math.min(...chart.series.map((series) => series.x[0] - half(series, 0)));
    const last = Math.max(...chart.series.map((series) => series.x.at(-1) + half(series, -1)));
    return {
      font, width, height: 280, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 44, r: 12, t: 8, b: 44 }, barmode: "stack", bargap: 0, dragmode: false,
      showlegend: chart.series.length > 1, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hovermode: "x unified",
      hoverlabel: { bgcolor: color("raised"), bordercolor: color("line"), font: { ...font, color: color("ink") } },
      xaxis: { ...axis, showgrid: false, title: { text: "step", standoff: 6 }, hoverformat: ",d", range: first < last ? [first, last] : undefined },
      yaxis: {
        ...axis, automargin: true, title: { text: chart.y_title, standoff: 8 },
        range: chart.y_range || undefined, rangemode: "tozero", tickformat: bars ? ".0%" : undefined, nticks: 6,
      },
      shapes: chart.marks.map(([x]) => ({
        type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: color("muted"), width: 1, dash: "dot" },
      })),
      annotations: chart.marks.map(([x, text]) => ({
        x, y: 1, yref: "paper", text: plain(text), showarrow: false, xanchor: "right", yanchor: "top", xshift: -4,
        font: { ...font, size: 11 },
      })),
    };
  }

  function draw(place, width) {
    const chart = charts.get(place.dataset.chart);
    window.Plotly.react(place, traces(chart), layout(chart, width), { responsive: true, displayModeBar: false });
    drawn.add(place);
  }

  function drawVisible() {
    if (!window.Plotly) return;
    for (const place of document.querySelectorAll(".chart")) {
      if (!drawn.has(place) && !place.closest("details:not([open])")) draw(place);
    }
  }

  function redraw(width) {
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
      for (const place of document.querySelectorAll(".chart")) {
        place.style.height = "auto";
        place.textContent = "This browser cannot draw the chart. The tables below hold the same numbers.";
      }
    }
  }

  const preferred = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : preferred.matches);
  function show() {
    button.setAttribute("aria-pressed", String(isDark()));
    redraw();
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  preferred.addEventListener("change", show);
  show();

  for (const copy of document.querySelectorAll(".copy")) {
    if (!navigator.clipboard) continue;
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(byId(copy.dataset.copy).textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }

  document.addEventListener("toggle", drawVisible, true);
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
  load();
})();
