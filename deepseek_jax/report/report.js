// Draws the charts and maps of a report from the JSON in the element "data". Text of a run enters the page
// by text nodes and attributes alone, never as markup.
"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);
  const root = document.documentElement;
  const live = find("live");
  const reset = find("reset");
  const GLYPHS = { start: "●", spike: "▲", skipped: "✕", rollback: "◀", stage: "■", checkpoint: "◆" };
  const MARK_COLORS = { start: 2, spike: 1, skipped: 7, rollback: 3, stage: 4, checkpoint: 6 };
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 5], [12, 6], [8, 2, 2, 2, 2, 2]];
  const ROWS = 50; // of a curve in its chart's table
  const HEIGHT = 230; // of a chart, in pixels

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const color = (i) => css(`--c${i % 8}`);
  const dashes = (i) => DASHES[(i + (i >> 3)) % 8]; // with the next colours other ones
  const figure = (v) => (v == null ? "–" : Number.isInteger(v) ? v.toLocaleString("en") : String(+v.toPrecision(6)));
  const exact = (v) => (v == null ? "–" : Number.isInteger(v) ? v.toLocaleString("en") : String(v));
  const short = (v) => {
    const a = Math.abs(v);
    if (a >= 1e4 || (a >= 1e3 && a % 1e3 === 0)) {
      const power = Math.min(Math.floor(Math.log10(a) / 3), 4);
      return `${+(v / 1000 ** power).toPrecision(4)}${["", "k", "M", "B", "T"][power]}`;
    }
    return a && a < 1e-3 ? v.toExponential(1).replace(".0e", "e") : String(+v.toPrecision(6));
  };

  function element(name, attributes = {}, ...children) {
    const svg = ["svg", "path", "circle"].includes(name);
    const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
    e.append(...children);
    return e;
  }

  // ---- What all charts share ----------------------------------------------------------------------------
  for (const run of data.runs) {
    run.xs = run.steps.map((differences) => {
      let step = 0;
      return differences.map((d) => (step += d));
    });
  }
  const ends = data.runs.flatMap((run) => run.xs.flatMap((x) => [x[0], x[x.length - 1]]));
  const first = Math.min(...ends);
  const whole = [first, Math.max(...ends, first + 1)];
  const state = { view: whole, smooth: false, log: false, marks: true };
  const charts = [];
  const maps = [];

  function setView(view) {
    state.view = view;
    reset.disabled = view[0] === whole[0] && view[1] === whole[1];
    for (const chart of charts) chart.plot.setScale("x", { min: view[0], max: view[1] });
    for (const map of maps) map.draw();
  }

  function zoom(step, factor) {
    const half = Math.max(((state.view[1] - state.view[0]) / 2) * factor, 1);
    const low = Math.max(Math.min(step - half, whole[1] - 2 * half), whole[0]);
    setView([low, Math.min(low + 2 * half, whole[1])]);
  }

  // The last point at or before a step; -1 before the first.
  function indexAt(xs, step) {
    let low = 0;
    let high = xs.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  // A moving average that reaches back over a fiftieth of the points, and begins without a bias.
  function smoothed(ys) {
    const keep = 1 - 2 / (Math.max(ys.length / 50, 4) + 1);
    let sum = 0;
    let weight = 0;
    return ys.map((y) => {
      if (y == null) return y;
      sum = keep * sum + (1 - keep) * y;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  const marksOf = (lines) =>
    [...new Set(lines.map((line) => line.run))].flatMap((run) => run.marks.map(([kind, step, text]) => ({ kind, step, text: data.runs.length > 1 ? `${run.name}, ${text}` : text })));

  function drawMarks(u, marks) {
    if (!state.marks) return;
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio || 1;
    const drawn = {};
    ctx.save();
    ctx.font = `${10 * ratio}px sans-serif`;
    ctx.textAlign = "center";
    for (const { kind, step } of marks) {
      if (step < state.view[0] || step > state.view[1]) continue;
      const x = Math.round(u.valToPos(step, "x", true));
      if (Math.abs((drawn[kind] ?? -99) - x) < 3 * ratio) continue;
      drawn[kind] = x;
      ctx.fillStyle = ctx.strokeStyle = color(MARK_COLORS[kind]);
      const low = kind === "checkpoint";
      ctx.fillText(GLYPHS[kind], x, low ? bbox.top + bbox.height - 3 * ratio : bbox.top + 9 * ratio);
      if (low) continue;
      ctx.globalAlpha = 0.55;
      ctx.setLineDash([4 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top + 12 * ratio);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.globalAlpha = 1;
    }
    ctx.restore();
  }

  // ---- A chart ------------------------------------------------------------------------------------------
  function addChart(spec) {
    const many = data.runs.length > 1;
    const lines = data.runs.flatMap((run, r) =>
      spec.series.flatMap(({ name, label }, s) => {
        if (!run.series[name]) return [];
        const [at, ys] = run.series[name];
        const style = many ? r : s;
        const full = many ? (spec.series.length > 1 ? `${run.name}: ${label}` : run.name) : label;
        return [{ run, name, label: full, xs: run.xs[at], ys, style, dots: name.startsWith("eval_") || run.xs[at].length < 2 }];
      }),
    );
    const marks = marksOf(lines);
    const place = element("div", {
      class: "plot", tabindex: 0, role: "application", "aria-roledescription": "chart",
      "aria-label": `${spec.title}, ${spec.unit || "no unit"}. Arrow keys move from point to point, Home and End to the ends, plus and minus zoom, Escape shows the whole run.`,
    });
    const readout = element("p", { class: "readout" });
    const legend = element("ul", { class: "legend" });
    const table = element("details", {}, element("summary", {}, `${spec.title} as a table`));
    find(`charts-${spec.section}`).append(
      element("figure", { id: spec.id, class: spec.series[0].name === "loss" ? "wide" : "" },
        element("div", { class: "head" }, element("h3", {}, spec.title), element("span", { class: "unit" }, spec.unit)),
        element("figcaption", {}, spec.help), place, readout, legend, table),
    );
    const chart = { spec, lines, place, plot: null, draw };

    function draw() {
      if (chart.plot) chart.plot.destroy();
      const log = state.log && spec.log;
      const tables = [];
      const series = [{}];
      for (const line of lines) {
        const ys = log ? line.ys.map((y) => (y > 0 ? y : null)) : line.ys;
        const stroke = color(line.style);
        const soft = state.smooth && spec.smooth && !line.dots;
        if (soft) {
          tables.push([line.xs, ys]);
          series.push({ stroke, alpha: 0.3, width: 1, points: { show: false } });
        }
        tables.push([line.xs, soft ? smoothed(ys) : ys]);
        series.push({ stroke, width: 1.8, dash: dashes(line.style), points: { show: line.dots, size: 6, fill: stroke } });
      }
      const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
      const values = (_, splits) => splits.map((v) => (v == null ? "" : short(v)));
      const plot = new uPlot({
        width: Math.max(place.clientWidth, 120),
        height: HEIGHT,
        legend: { show: false },
        cursor: { sync: { key: "report" }, drag: { x: true, y: false, dist: 6 }, points: { size: 7 },
          bind: { dblclick: () => () => { setView(whole); return null; } } },
        scales: { x: { time: false }, y: log ? { distr: 3 } : { range: (_, low, high) => padded(low, high) } },
        axes: [{ ...axis, values, size: 34 }, { ...axis, values: log ? (_, s) => s.map((v) => (v == null ? "" : short(v))) : values, size: 56 }],
        series,
        hooks: {
          draw: [(u) => drawMarks(u, marks)],
          setCursor: [(u) => { readout.textContent = text(u.cursor.left >= 0 ? Math.round(u.posToVal(u.cursor.left, "x")) : null); }],
          setScale: [(u, key) => {
            const { min, max } = u.scales.x;
            if (key === "x" && min != null && (min !== state.view[0] || max !== state.view[1])) setView([min, max]);
          }],
        },
      }, uPlot.join(tables), place);
      plot.setScale("x", { min: state.view[0], max: state.view[1] });
      chart.plot = plot;
      readout.textContent = text(null);
      const keys = lines.length > 1 || many ? lines.map(key) : [];
      legend.replaceChildren(...keys, ...(chart === charts[0] ? markKeys() : []));
    }

    function padded(low, high) {
      if (low == null) return [0, 1];
      const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
      return [low >= 0 ? Math.max(low - room, 0) : low - room, high + room];
    }

    function key(line) {
      const sample = element("svg", { width: 34, height: 12, "aria-hidden": "true" },
        element("path", { d: "M1 6H33", stroke: color(line.style), "stroke-width": 2.2, "stroke-dasharray": dashes(line.style).join(" ") }));
      if (line.dots) sample.append(element("circle", { cx: 17, cy: 6, r: 3.4, fill: color(line.style) }));
      return element("li", {}, sample, ` ${line.label}`);
    }

    function markKeys() {
      const kinds = [...new Set(data.runs.flatMap((run) => run.marks.map((m) => m[0])))];
      return kinds.map((kind) => element("li", { class: "muted", title: data.kinds[kind][1] }, `${GLYPHS[kind]} ${data.kinds[kind][0]}`));
    }

    // What the chart shows at a step; without one at its end.
    function text(step) {
      const at = step ?? state.view[1];
      const values = lines.map((line) => {
        const i = indexAt(line.xs, at);
        if (i < 0) return `${line.label} –`;
        return `${line.label} ${figure(line.ys[i])}${line.xs[i] === step ? "" : ` at step ${exact(line.xs[i])}`}`;
      });
      const near = step == null ? [] : marks.filter((m) => Math.abs(m.step - step) <= (state.view[1] - state.view[0]) / 200);
      const events = near.slice(0, 3).map((m) => `${GLYPHS[m.kind]} ${data.kinds[m.kind][0]} at step ${exact(m.step)}: ${m.text}`);
      return [step == null ? "last" : `step ${exact(step)}`, ...values, ...events].join(" · ");
    }

    place.addEventListener("keydown", (event) => {
      const xs = chart.plot.data[0];
      const low = Math.max(indexAt(xs, state.view[0] - 1e-9) + 1, 0);
      const high = indexAt(xs, state.view[1]);
      const now = chart.at == null ? high + 1 : indexAt(xs, chart.at);
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 10, PageDown: now + 10, Home: low, End: high }[event.key];
      if (event.key === "Escape") setView(whole);
      if (event.key === "+" || event.key === "-") zoom(chart.at ?? xs[high], event.key === "+" ? 0.5 : 2);
      if (to === undefined) return;
      event.preventDefault();
      chart.at = xs[Math.min(Math.max(to, low), high)];
      for (const { plot } of charts) plot.setCursor({ left: plot.valToPos(chart.at, "x"), top: HEIGHT / 2 });
      readout.textContent = text(chart.at);
      live.textContent = `${spec.title}: ${readout.textContent}`;
    });

    table.addEventListener("toggle", () => {
      if (!table.open || table.children.length > 1) return;
      const every = uPlot.join(lines.map((line) => [line.xs, line.ys]));
      const count = every[0].length;
      const kept = lines.flatMap(({ xs }) => {
        const most = Math.min(xs.length, ROWS);
        return Array.from({ length: most }, (_, i) => indexAt(every[0], xs[Math.round((i * (xs.length - 1)) / Math.max(most - 1, 1))]));
      });
      const rows = [...new Set(kept)].sort((a, b) => a - b);
      const head = element("tr", {}, ...["step", ...lines.map((line) => line.label)].map((t) => element("th", { scope: "col" }, t)));
      const body = rows.map((i) => element("tr", {}, element("th", { scope: "row" }, exact(every[0][i])),
        ...lines.map((_, s) => element("td", { class: "n" }, every[s + 1][i] === undefined ? "" : exact(every[s + 1][i])))));
      const caption = element("caption", {}, `${rows.length} of ${exact(count)} points of this page`);
      table.append(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${spec.title} as a table` },
        element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...body))));
    });
    charts.push(chart);
  }

  // ---- Maps, controls ------------------------------------------------------------------------------------
  function redraw() {
    for (const chart of charts) chart.draw();
    for (const map of maps) map.draw();
  }

  function setTheme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    find("theme").setAttribute("aria-pressed", String(dark));
  }

  const darkness = matchMedia("(prefers-color-scheme: dark)");
  setTheme(darkness.matches);
  darkness.addEventListener("change", () => { setTheme(darkness.matches); redraw(); });
  find("theme").addEventListener("click", () => { setTheme(root.dataset.theme !== "dark"); redraw(); });
  for (const name of ["smooth", "log", "marks"]) {
    find(name).checked = state[name]; // a browser may have kept what it was before the page was read again
    find(name).addEventListener("change", (event) => { state[name] = event.target.checked; redraw(); });
  }
  reset.addEventListener("click", () => setView(whole));
  for (const spec of data.charts) addChart(spec);
  for (const chart of charts) chart.draw(); // when all figures are there: they share the width
  if (find("heat")) maps.push(...addMaps({ runs: data.runs, box: find("heat"), live, state, element, css, indexAt }));
  let width = root.clientWidth;
  addEventListener("resize", () => {
    if (width === root.clientWidth) return; // a phone's address bar moves
    width = root.clientWidth;
    redraw();
  });
  window.report = { charts, maps, state }; // for tests and the console
})();
