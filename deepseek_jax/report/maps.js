// The maps of expert load: layers over time, and the experts of one layer over time. report.js calls addMaps.
"use strict";

function addMaps({ runs, box, live, state, element, css, indexAt }) {
  // cividis (Nunez, Anderton, Renslow 2018), for readers with any vision; blue to orange around a middle.
  const RISING = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  const AROUND = { light: ["#08519c", "#6baed6", "#f4f4f2", "#f4a45c", "#a63603"], dark: ["#6db8ff", "#2b6ca3", "#23272d", "#b4601b", "#ffb066"] };
  const LEFT = 74; // of the cells, in pixels: room for names
  const BELOW = 20;
  const loads = runs.filter((run) => run.load).map((run) => ({ name: run.name, ...decoded(run.load) }));
  let load = loads[0];
  let layer = 0; // whose experts are shown

  function bytes(text) {
    const raw = atob(text);
    return Uint8Array.from(raw, (c) => c.charCodeAt(0));
  }

  function decoded(packed) {
    return { ...packed, fullest: new Uint16Array(bytes(packed.fullest).buffer), load: bytes(packed.load) };
  }

  function mixed(stops, share) {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const part = (stop, i) => parseInt(stop.slice(1 + 2 * i, 3 + 2 * i), 16);
    return [0, 1, 2].map((i) => part(stops[low], i) + (at - low) * (part(stops[low + 1], i) - part(stops[low], i)));
  }

  // ---- One map --------------------------------------------------------------------------------------------
  // of(): { rows, steps, value(row, column), shade(value) -> rgb, name(row), said(row, column), scale: [low, high] }
  function addMap({ title, help, of, pick, extra = [] }) {
    const canvas = element("canvas", {});
    const place = element("div", { class: "plot map", tabindex: 0, role: "application", "aria-roledescription": "map",
      "aria-label": `${title}. Arrow keys move from cell to cell.` }, canvas);
    const readout = element("p", { class: "readout" });
    const bar = element("canvas", { width: 180, height: 12, "aria-hidden": "true" });
    const ends = [element("span"), element("span")];
    box.append(element("figure", {},
      element("div", { class: "head" }, element("h3", {}, title), ...extra), element("figcaption", {}, help),
      element("div", { class: "scale" }, ends[0], bar, ends[1]), place, readout));
    let cell = null; // [row, column] under the cursor

    function range(steps) {
      const low = Math.min(Math.max(indexAt(steps, state.view[0] - 1e-9) + 1, 0), steps.length - 1);
      const high = steps.findIndex((step) => step >= state.view[1]);
      return [low, high < 0 ? steps.length - 1 : Math.max(high, low)];
    }

    function shape(map) {
      const width = Math.max(place.clientWidth, 160);
      const height = Math.min(Math.max(280 / map.rows, 2), 22);
      const [low, high] = range(map.steps);
      return { width, height, low, high, wide: (width - LEFT - 2) / (high - low + 1) };
    }

    function draw() {
      const map = of();
      const { width, height, low, high, wide } = shape(map);
      const ratio = devicePixelRatio || 1;
      const tall = Math.ceil(map.rows * height) + BELOW;
      canvas.width = width * ratio;
      canvas.height = tall * ratio;
      canvas.style.width = `${width}px`;
      canvas.style.height = `${tall}px`;
      const image = new ImageData(high - low + 1, map.rows);
      for (let row = 0; row < map.rows; row++) {
        for (let column = low; column <= high; column++) {
          image.data.set([...map.shade(map.value(row, column)), 255], 4 * (row * image.width + column - low));
        }
      }
      const small = element("canvas", { width: image.width, height: image.height });
      small.getContext("2d").putImageData(image, 0, 0);
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      pen.imageSmoothingEnabled = false;
      pen.drawImage(small, LEFT, 0, width - LEFT - 2, map.rows * height);
      pen.font = "11px system-ui, sans-serif";
      pen.fillStyle = css("--soft");
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      const every = Math.ceil(13 / height);
      for (let row = 0; row < map.rows; row += every) pen.fillText(map.name(row), LEFT - 6, (row + 0.5) * height, LEFT - 8);
      const labels = Math.max(Math.min(Math.floor((width - LEFT) / 90), high - low), 1);
      for (let i = 0; i <= labels; i++) {
        const column = Math.round(low + (i * (high - low)) / labels);
        pen.textAlign = i === 0 ? "left" : i === labels ? "right" : "center";
        const x = i === 0 ? LEFT : i === labels ? width - 2 : LEFT + (column - low + 0.5) * wide;
        pen.fillText(map.steps[column].toLocaleString("en"), x, tall - BELOW / 2 + 2);
      }
      if (cell && cell[0] < map.rows && cell[1] >= low && cell[1] <= high) {
        pen.lineWidth = 2;
        for (const [style, grow] of [[css("--paper"), 2.5], [css("--ink"), 1]]) {
          pen.strokeStyle = style;
          pen.strokeRect(LEFT + (cell[1] - low) * wide - grow, cell[0] * height - grow, wide + 2 * grow, height + 2 * grow);
        }
      }
      const strip = bar.getContext("2d");
      for (let x = 0; x < bar.width; x++) {
        strip.fillStyle = `rgb(${map.shade(map.at(x / (bar.width - 1))).join(" ")})`;
        strip.fillRect(x, 0, 1, bar.height);
      }
      ends.forEach((end, i) => { end.textContent = map.scale[i]; });
      readout.textContent = cell && cell[0] < map.rows && cell[1] < map.steps.length ? map.said(...cell) : map.hint;
    }

    function move(row, column, aloud) {
      const map = of();
      const { low, high } = shape(map);
      cell = [Math.min(Math.max(row, 0), map.rows - 1), Math.min(Math.max(column, low), high)];
      draw();
      if (aloud) live.textContent = `${title}: ${readout.textContent}`;
    }

    function under(event) {
      const map = of();
      const { height, low, wide } = shape(map);
      const at = canvas.getBoundingClientRect();
      return [Math.floor((event.clientY - at.top) / height), low + Math.floor((event.clientX - at.left - LEFT) / wide)];
    }

    place.addEventListener("pointermove", (event) => move(...under(event), false));
    place.addEventListener("pointerleave", () => { cell = null; draw(); });
    place.addEventListener("click", (event) => { if (pick) pick(Math.min(Math.max(under(event)[0], 0), of().rows - 1)); });
    place.addEventListener("keydown", (event) => {
      const map = of();
      const [row, column] = cell ?? [0, map.steps.length];
      const to = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        Home: [row, 0], End: [row, map.steps.length] }[event.key];
      if (event.key === "Enter" && pick && cell) pick(row);
      if (!to) return;
      event.preventDefault();
      move(...to, true);
    });
    return { title, place, canvas, draw };
  }

  // ---- Layers, and the experts of one ---------------------------------------------------------------------
  const select = element("select", { id: "layer" });
  const which = element("select", { id: "load-run" }, ...loads.map((one, i) => element("option", { value: i }, one.name)));
  const times = (value) => `${value.toFixed(2)} times the mean`;

  const layersMap = addMap({
    title: "The fullest expert of each layer",
    help: "Layers from top to bottom, the run from left to right: the tokens of the fullest expert / the mean of the layer, at its highest in each column. Balanced is 1.",
    extra: loads.length > 1 ? [element("label", {}, "run ", which)] : [],
    pick: (row) => { layer = row; select.value = row; experts.draw(); },
    of() {
      const { layers, steps, fullest, layer_scale: scale } = load;
      const top = load.top ??= Math.max(2, [...fullest].sort((a, b) => a - b)[Math.floor(fullest.length * 0.98)] / scale);
      return {
        rows: layers.length, steps, hint: "Point at a cell, or move with the arrow keys. A click or Enter shows the layer's experts below.",
        value: (row, column) => fullest[row * steps.length + column] / scale,
        shade: (value) => mixed(RISING, Math.log(Math.max(value, 1)) / Math.log(top)),
        at: (share) => top ** share,
        scale: ["1", `${top.toFixed(2)} or more`],
        name: (row) => layers[row],
        said(row, column) { return `${layers[row]}, step ${steps[column].toLocaleString("en")} · fullest expert ${times(this.value(row, column))}`; },
      };
    },
  });

  const experts = addMap({
    title: "The experts of a layer",
    help: "Experts from top to bottom: the tokens of each / the mean of the layer, over the steps of a column.",
    extra: [element("label", {}, "layer ", select)],
    of() {
      const { experts: rows, expert_steps: steps, load: values, expert_scale: scale, layers } = load;
      const stops = AROUND[document.documentElement.dataset.theme];
      return {
        rows, steps, hint: `${layers[layer]}: ${rows} experts. Blue: less than the mean, orange: more.`,
        value: (row, column) => values[(layer * steps.length + column) * rows + row] / scale,
        shade: (value) => mixed(stops, 0.5 + Math.log2(Math.max(value, 0.01)) / 4),
        at: (share) => 2 ** (4 * (share - 0.5)),
        scale: ["1/4 of the mean", "4 times"],
        name: (row) => `expert ${row}`,
        said(row, column) { return `${layers[layer]}, expert ${row}, step ${steps[column].toLocaleString("en")} · ${times(this.value(row, column))}`; },
      };
    },
  });

  function fill() {
    const count = load.steps.length;
    const last = load.layers.map((_, row) => load.fullest[(row + 1) * count - 1]);
    layer = last.indexOf(Math.max(...last));
    select.replaceChildren(...load.layers.map((name, i) => element("option", { value: i }, name)));
    select.value = layer;
    layersMap.draw();
    experts.draw();
  }
  select.addEventListener("change", () => { layer = Number(select.value); experts.draw(); });
  which.addEventListener("change", () => { load = loads[Number(which.value)]; fill(); });
  fill();
  return [layersMap, experts];
}
