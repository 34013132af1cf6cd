"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const all = (selector, scope = document) => [...scope.querySelectorAll(selector)];
  const METRIC = { recall: "Recall", hit_rate: "HitRate", ndcg: "NDCG", mrr: "MRR", map: "MAP" };
  const label = (name) => name.includes("@") ? `${METRIC[name.split("@")[0]] ?? name.split("@")[0]}@${name.split("@")[1]}` : name;
  // Plotly reads a little HTML in labels; what comes from the data must stay text.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, n = 26) => plain(text.length > n ? text.slice(0, n - 1) + "…" : text);

  // ---- theme: the system's choice until the reader makes one
  const remembered = () => { try { return localStorage.getItem("vlrank-theme"); } catch { return null; } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => { root.dataset.theme = remembered() ?? (system.matches ? "dark" : "light"); };
  apply();
  system.addEventListener("change", () => { apply(); redraw(); });
  document.getElementById("theme").addEventListener("click", () => {
    const next = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("vlrank-theme", next); } catch { /* private mode: the choice lasts for this page */ }
    root.dataset.theme = next;
    redraw();
  });

  // ---- charts: drawn when they come into view, drawn again when theme or choice change
  const charts = new Map();
  const hueOf = (index) => css(`--p${index % 10}`);
  const colour = (method, index) => method.kind === "model" ? hueOf(index) : css("--grey");
  const DASH = { identity: "solid", random: "dot", popularity: "dash", item_knn: "dashdot", als: "longdash", bm25: "longdashdot", embedding: "5px,2px" };
  const SYMBOL = { identity: "square", random: "x", popularity: "diamond", item_knn: "triangle-up", als: "triangle-down", bm25: "pentagon", embedding: "star" };
  const axis = (title, more = {}) => ({
    title: { text: title, font: { size: 12, color: css("--muted") }, standoff: 8 }, gridcolor: css("--line"), zeroline: false,
    linecolor: css("--line"), tickfont: { size: 11.5, color: css("--muted") }, fixedrange: true, automargin: true, ...more,
  });
  const layout = (more = {}) => ({
    margin: { l: 48, r: 12, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
    font: { family: css("--font"), color: css("--ink"), size: 12.5 },
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--ink"), family: css("--font") } },
    showlegend: false, ...more, // legends are HTML below the chart: they wrap on a phone
  });
  const draw = (element) => {
    const [traces, look] = charts.get(element)();
    const named = look.legend === false ? [] : traces.filter((trace) => trace.name && trace.showlegend !== false);
    delete look.legend;
    legend(element, named.length > 1 ? named : []);
    element.dataset.drawn = "yes";
    Plotly.react(element, traces, look, { displayModeBar: false, responsive: true });
  };
  const DASHES = { dot: "2 3", dash: "6 4", dashdot: "6 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3", "5px,2px": "5 2" };
  const SHAPES = { circle: "M7 5a4 4 0 1 0 8 0a4 4 0 1 0-8 0", square: "M7.5 1.5h7v7h-7z", diamond: "M11 .5l4.5 4.5l-4.5 4.5l-4.5-4.5z", x: "M8 2l6 6m0-6l-6 6", "triangle-up": "M11 1l4.5 8h-9z", "triangle-down": "M11 9l4.5-8h-9z", pentagon: "M11 .8l4.4 3.2l-1.7 5.2h-5.4l-1.7-5.2z", star: "M11 0l1.3 3.6h3.8l-3 2.4l1.1 3.8l-3.2-2.2l-3.2 2.2l1.1-3.8l-3-2.4h3.8z", bar: "M6.5 1h9v8h-9z" };
  const NS = "http://www.w3.org/2000/svg";
  const legend = (element, traces) => {
    let list = element.nextElementSibling;
    if (!list?.classList.contains("legend")) {
      list = document.createElement("ul");
      list.className = "legend";
      element.after(list);
    }
    list.hidden = !traces.length;
    list.replaceChildren(...traces.map((trace) => {
      const entry = document.createElement("li");
      const swatch = document.createElementNS(NS, "svg");
      swatch.setAttribute("viewBox", "0 0 22 10");
      swatch.setAttribute("aria-hidden", "true");
      const tint = trace.line?.color ?? trace.marker?.color;
      const path = document.createElementNS(NS, "path");
      const line = (trace.mode ?? "").includes("lines");
      const symbol = trace.marker?.symbol ?? "circle";
      path.setAttribute("d", trace.type === "bar" ? SHAPES.bar : line ? "M0 5h22" : SHAPES[symbol]);
      const stroked = line || symbol === "x";
      path.setAttribute("fill", stroked ? "none" : tint);
      if (stroked) { path.setAttribute("stroke", tint); path.setAttribute("stroke-width", symbol === "x" && !line ? 2.4 : trace.line?.width ?? 2); }
      if (DASHES[trace.line?.dash]) path.setAttribute("stroke-dasharray", DASHES[trace.line.dash]);
      swatch.append(path);
      entry.append(swatch, trace.label ?? trace.name.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&"));
      return entry;
    }));
  };
  const redraw = () => charts.forEach((_, element) => { if (element.dataset.drawn) draw(element); });
  const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
  }), { rootMargin: "400px" });
  const chart = (element, make) => { charts.set(element, make); watcher.observe(element); };
  addEventListener("beforeprint", () => charts.forEach((_, element) => draw(element)));

  const pressed = (control) => control.querySelector("[aria-pressed=true]").dataset.value;
  const segmented = (control, changed) => all("button", control).forEach((button) => button.addEventListener("click", () => {
    all("button", control).forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    changed(button.dataset.value);
  }));

  const errors = (values, low, high) => ({
    type: "data", symmetric: false, array: values.map((v, i) => high[i] - v), arrayminus: values.map((v, i) => v - low[i]),
    thickness: 1.6, width: 0,
  });

  all("section.group").forEach((section) => {
    const group = DATA.groups[Number(section.dataset.group)];
    const methods = group.methods;
    const models = methods.filter((method) => method.kind === "model");
    const hue = new Map(methods.map((method) => [method.name, colour.bind(null, method, models.indexOf(method))]));

    const scope = section.querySelector("[data-control=scope]");
    segmented(scope, (value) => section.classList.toggle("scope-retrieved", value === "retrieved"));

    const pairs = section.querySelector("[data-control=pairs]");
    if (pairs) {
      const model = section.querySelector("[data-control=pair-model]");
      const show = () => all(".pairs [data-metric]", section).forEach((row) => {
        row.hidden = row.dataset.metric !== pressed(pairs) || row.dataset.of !== (model?.value ?? "0");
      });
      segmented(pairs, show);
      model?.addEventListener("change", show);
      show();
    }

    const forest = section.querySelector("[data-plot=forest]");
    const metric = section.querySelector("[data-control=metric]");
    forest.style.height = `${Math.max(240, 70 + 34 * methods.length)}px`;
    chart(forest, () => {
      const name = pressed(metric);
      const rows = [...methods].reverse();
      return [rows.map((method) => {
        const [low, high] = method.intervals[name];
        return {
          x: [method.means[name]], y: [short(method.label)], mode: "markers", type: "scatter", name: method.label,
          marker: { size: 11, color: hue.get(method.name)(), symbol: SYMBOL[method.name] ?? "circle" },
          error_x: { ...errors([method.means[name]], [low], [high]), color: hue.get(method.name)() },
          hovertemplate: `%{x:.4f}<br>${low.toFixed(4)} to ${high.toFixed(4)}<extra>${short(method.label, 40)}</extra>`,
        };
      }), layout({ legend: false, xaxis: axis(label(name), { rangemode: "tozero" }), yaxis: axis("", { gridcolor: "rgba(0,0,0,0)", tickfont: { size: 12, color: css("--ink") } }) })];
    });
    segmented(metric, () => draw(forest));

    const curve = section.querySelector("[data-plot=curve]");
    curve.style.height = forest.style.height;
    chart(curve, () => [methods.map((method) => ({
      x: method.curve.map((_, i) => i + 1), y: method.curve, type: "scatter", mode: "lines", name: plain(method.label),
      line: { color: hue.get(method.name)(), width: method.kind === "model" ? 2.6 : 1.4, dash: DASH[method.name] ?? "solid" },
      hovertemplate: `first %{x}: %{y:.1%}<extra>${short(method.label, 40)}</extra>`,
    })), layout({ xaxis: axis("K"), yaxis: axis("users", { tickformat: ".0%", rangemode: "tozero" }) })]);

    all("[data-model]", section).filter((element) => element.dataset.plot).forEach((element) => {
      const model = group.models[Number(element.dataset.model)];
      const tint = hue.get(model.name);
      const places = Array.from({ length: group.length }, (_, i) => i + 1);
      const make = {
        heat: () => {
          const flat = Math.max(...model.heat.flat(), 1);
          return [[
            { z: model.heat.map((row) => row.map((v) => v ? Math.log10(1 + v) : null)), customdata: model.heat, x: places, y: places, type: "heatmap", showscale: false,
              colorscale: [[0, css("--soft")], [1, tint()]], zmin: 0, zmax: Math.log10(1 + flat), xgap: 1, ygap: 1,
              hovertemplate: "retriever %{x}, now %{y}: %{customdata} users<extra></extra>" },
            { x: [0.5, group.length + 0.5], y: [0.5, group.length + 0.5], mode: "lines", type: "scatter", line: { color: css("--muted"), width: 1, dash: "dot" }, hoverinfo: "skip" },
          ], layout({ xaxis: axis("rank by the retriever", { range: [0.5, group.length + 0.5], showgrid: false }), yaxis: axis("new rank", { range: [group.length + 0.5, 0.5], showgrid: false }) })];
        },
        position: () => [[
          { x: places, y: model.position.chosen, type: "bar", name: "put first by the model", marker: { color: tint(), opacity: 0.75 }, hovertemplate: "place %{x}: %{y:.1%}<extra></extra>" },
          { x: places, y: model.position.target, type: "scatter", mode: "lines+markers", name: "target is there", line: { color: css("--ink"), width: 1.4 }, marker: { size: 4 }, hovertemplate: "place %{x}: %{y:.1%}<extra></extra>" },
        ], layout({ bargap: 0.25, xaxis: axis("place in the retriever's order", { range: [0.4, group.length + 0.6] }), yaxis: axis("users", { tickformat: ".0%", rangemode: "tozero" }) })],
        ranks: () => {
          const listed = model.ranks.reduce((a, b) => a + b, 0);
          return [[
            { x: places, y: model.ranks, type: "bar", name: "users", marker: { color: tint(), opacity: 0.8 }, hovertemplate: "rank %{x}: %{y} users<extra></extra>" },
            { x: [0.5, group.length + 0.5], y: [listed / group.length, listed / group.length], type: "scatter", mode: "lines", name: "a guess", line: { color: css("--ink"), width: 1.4, dash: "dash" }, hoverinfo: "skip" },
          ], layout({ bargap: 0.2, legend: false, xaxis: axis("rank of the target", { range: [0.4, group.length + 0.6] }), yaxis: axis("users", { rangemode: "tozero" }) })];
        },
        calibration: () => {
          const c = model.calibration;
          const top = Math.min(1, Math.max(...c.predicted, ...c.observed) * 1.12);
          const largest = Math.max(...c.counts);
          return [[
            { x: [0, top], y: [0, top], mode: "lines", type: "scatter", line: { color: css("--muted"), width: 1, dash: "dot" }, hoverinfo: "skip" },
            { x: c.predicted, y: c.observed, customdata: c.counts, mode: "lines+markers", type: "scatter", line: { color: tint(), width: 1.6 },
              marker: { color: tint(), size: c.counts.map((n) => 6 + 14 * Math.sqrt(n / largest)), opacity: 0.85 }, hovertemplate: "says %{x:.1%}, is %{y:.1%}<br>%{customdata} candidates<extra></extra>" },
          ], layout({ xaxis: axis("probability given", { tickformat: ".0%", range: [0, top] }), yaxis: axis("was the target", { tickformat: ".0%", range: [0, top] }) })];
        },
      }[element.dataset.plot];
      chart(element, make);
    });

    section.querySelector("[data-control=model]")?.addEventListener("change", (event) => {
      all("figure[data-of]", section).forEach((figure) => { figure.hidden = figure.dataset.of !== event.target.value; });
    });

    const slices = section.querySelector("[data-plot=slices]");
    if (slices) {
      const by = section.querySelector("[data-control=slice]");
      const which = section.querySelector("[data-control=slice-metric]");
      chart(slices, () => {
        const parts = group.slices.filter((part) => part.by === by.value);
        const name = pressed(which);
        const spread = Math.min(0.7, 0.12 * methods.length);
        return [methods.map((method, i) => {
          const rows = parts.map((part) => part.metrics[name][method.name]);
          const shift = methods.length > 1 ? (i / (methods.length - 1) - 0.5) * spread : 0;
          return {
            x: parts.map((_, j) => j + shift), y: rows.map((row) => row[0]), type: "scatter", mode: "markers", name: plain(method.label),
            marker: { size: method.kind === "model" ? 9 : 7, color: hue.get(method.name)(), symbol: SYMBOL[method.name] ?? "circle" },
            error_y: { ...errors(rows.map((r) => r[0]), rows.map((r) => r[1]), rows.map((r) => r[2])), color: hue.get(method.name)(), thickness: 1.2 },
            hovertemplate: `%{y:.4f}<extra>${short(method.label, 40)}</extra>`,
          };
        }), layout({
          xaxis: axis(plain(by.value), { tickvals: parts.map((_, j) => j), ticktext: parts.map((part) => `${short(part.value, 18)}<br>${part.users.toLocaleString("en")}`), range: [-0.6, parts.length - 0.4], gridcolor: "rgba(0,0,0,0)", tickangle: parts.length > 5 && innerWidth < 900 ? -40 : 0 }),
          yaxis: axis(label(name), { rangemode: "tozero" }), margin: { l: 48, r: 12, t: 8, b: 60 },
        })];
      });
      by.addEventListener("change", () => draw(slices));
      segmented(which, () => draw(slices));
    }
    const box = section.querySelector("[data-browser]");
    if (box) browser(box, group);
  });

  // ---- training and tuning
  const seriesName = (name) => label(name.replace(/^(val|eval)_/, ""));
  const lines = (pick) => DATA.runs.flatMap((run, i) => Object.entries(run.series).filter(([name]) => pick(name)).map(([name, points], j, own) => ({
    x: points.map((p) => p[0]), y: points.map((p) => p[1]), type: "scatter", mode: "lines+markers",
    name: plain(own.length > 1 ? `${run.name}: ${seriesName(name)}` : run.name),
    line: { color: hueOf(i), width: 2, dash: ["solid", "dot", "dash", "dashdot"][j % 4] }, marker: { size: 5 }, hovertemplate: "%{x}: %{y:.4f}<extra></extra>",
  })));
  // Whole epochs, about ten of them.
  const whole = (traces) => ({ dtick: Math.max(1, Math.ceil(Math.max(1, ...traces.flatMap((trace) => trace.x)) / 10)) });
  const xname = DATA.runs[0]?.axis ?? "epoch";
  const place = (name, make) => { const element = document.querySelector(`[data-plot=${name}]`); if (element) chart(element, make); };
  const curve = document.querySelector("[data-control=runs-metric]");
  place("runs-metric", () => {
    const traces = lines((name) => name === pressed(curve));
    return [traces, layout({ xaxis: axis(xname, whole(traces)), yaxis: axis(seriesName(pressed(curve)), { rangemode: "tozero" }) })];
  });
  if (curve) segmented(curve, () => draw(document.querySelector("[data-plot=runs-metric]")));
  place("runs-loss", () => {
    const traces = lines((name) => name.includes("loss"));
    return [traces, layout({ xaxis: axis(xname, whole(traces)), yaxis: axis("loss") })];
  });
  const sweep = DATA.sweep ?? [];
  const modes = [...new Set(sweep.map((trial) => trial.mode))];
  const about = (trial) => plain(Object.entries(trial.config).map(([k, v]) => `${k} ${typeof v === "number" ? Number(v.toPrecision(3)) : v}`).join(", "));
  place("sweep", () => {
    const traces = sweep.map((trial) => ({
      x: trial.points.map((p) => p[0]), y: trial.points.map((p) => p[1]), type: "scatter", mode: "lines+markers", name: plain(trial.mode), legendgroup: trial.mode,
      showlegend: sweep.find((other) => other.mode === trial.mode) === trial, line: { color: hueOf(modes.indexOf(trial.mode)), width: 1.5 }, marker: { size: 5 }, opacity: 0.8,
      hovertemplate: `epoch %{x}: %{y:.4f}<br>${about(trial)}<extra>${plain(trial.name)}</extra>`,
    }));
    return [traces, layout({ xaxis: axis("epoch", whole(traces)), yaxis: axis(label(sweep[0]?.metric ?? "metric")) })];
  });
  const value = (trial) => Math.max(...trial.points.map((p) => p[1]));
  const tried = (mode) => sweep.filter((trial) => trial.mode === mode && trial.points.length);
  const gpus = sweep.some((trial) => trial.gpus);
  place("sweep-best", () => [modes.map((mode, i) => {
    // In the order of the trials, one after the other: the cost does not depend on how many ran at the same time.
    let spent = 0, best = -Infinity;
    const steps = tried(mode).flatMap((trial) => {
      const at = trial.points.map(([, metric, seconds]) => [spent + seconds * (trial.gpus || 1) / 3600, best = Math.max(best, metric)]);
      spent += trial.seconds * (trial.gpus || 1) / 3600;
      return at;
    });
    return { x: steps.map((p) => p[0]), y: steps.map((p) => p[1]), type: "scatter", mode: "lines", name: plain(mode), line: { shape: "hv", color: hueOf(i), width: 2 }, hovertemplate: "%{y:.4f} after %{x:.3f} h<extra></extra>" };
  }), layout({ xaxis: axis(gpus ? "GPU-hours" : "hours of trials"), yaxis: axis(label(sweep[0]?.metric ?? "metric")) })]);
  const choice = document.querySelector("[data-sweep-mode]");
  const shown = () => tried(choice ? pressed(choice) : modes[0]);
  place("sweep-heat", () => {
    const trials = shown().filter((trial) => trial.config.lr && trial.config.batch_size !== undefined);
    const sizes = [...new Set(trials.map((trial) => trial.config.batch_size))].sort((a, b) => a - b);
    const rates = trials.map((trial) => Math.log10(trial.config.lr));
    const low = Math.min(...rates), width = (Math.max(...rates) - low) / 5 || 0.2;
    const cell = (rate) => Math.min(4, Math.floor((rate - low) / width));
    const best = sizes.map((size) => [0, 1, 2, 3, 4].map((column) => {
      const here = trials.filter((trial, i) => trial.config.batch_size === size && cell(rates[i]) === column).map(value);
      return here.length ? Math.max(...here) : null;
    }));
    const centre = (column) => low + (column + 0.5) * width;
    const look = { colorscale: "Viridis", showscale: true, colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11, color: css("--muted") } } };
    return [[
      { type: "heatmap", x: [0, 1, 2, 3, 4].map(centre), y: sizes.map(String), z: best, xgap: 2, ygap: 2, ...look, hovertemplate: "best %{z:.4f}<extra></extra>" },
      { type: "scatter", mode: "markers", x: rates, y: trials.map((trial) => String(trial.config.batch_size)), text: trials.map((trial) => `${value(trial).toFixed(4)}<br>${about(trial)}`), marker: { size: 7, color: css("--panel"), line: { color: css("--ink"), width: 1.2 } }, hovertemplate: "%{text}<extra></extra>", showlegend: false },
    ], layout({
      legend: false, yaxis: axis("batch size", { type: "category" }),
      xaxis: axis("learning rate", { tickvals: [0, 1, 2, 3, 4].map(centre), ticktext: [0, 1, 2, 3, 4].map((column) => Number((10 ** centre(column)).toPrecision(2)).toExponential()), range: [low - 0.05 * width, low + 5.05 * width] }),
    })];
  });
  // Plotly's own parallel coordinates need WebGL, which phones and headless browsers may lack: plain lines do.
  place("sweep-parallel", () => {
    const trials = [...shown()].sort((x, y) => value(x) - value(y)); // the best on top
    const keys = [...new Set(trials.flatMap((trial) => Object.keys(trial.config)))].filter((key) => new Set(trials.map((trial) => trial.config[key])).size > 1);
    const round = (v) => typeof v === "number" ? String(Number(v.toPrecision(2))) : short(String(v), 14);
    const dimension = (name, values) => {
      const distinct = [...new Set(values)].sort((x, y) => (x > y) - (x < y));
      if (distinct.length <= 4 || !values.every((v) => typeof v === "number"))
        return { name, places: values.map((v) => distinct.length > 1 ? distinct.indexOf(v) / (distinct.length - 1) : 0.5), ticks: distinct.map((v, i) => [distinct.length > 1 ? i / (distinct.length - 1) : 0.5, round(v)]) };
      const [low, high] = [distinct[0], distinct.at(-1)];
      const scaled = low > 0 && high / low > 3 ? Math.log : (v) => v;
      return { name, places: values.map((v) => (scaled(v) - scaled(low)) / (scaled(high) - scaled(low))), ticks: [[0, round(low)], [1, round(high)]] };
    };
    const dimensions = [
      ...keys.map((key) => dimension(key, trials.map((trial) => trial.config[key]))),
      dimension("epochs run", trials.map((trial) => Math.max(...trial.points.map((p) => p[0])))),
      dimension(label(trials[0]?.metric ?? "metric"), trials.map(value)),
    ];
    const result = dimensions.at(-1).places;
    const traces = trials.map((trial, i) => ({
      x: dimensions.map((_, j) => j), y: dimensions.map((d) => d.places[i]), type: "scatter", mode: "lines+markers", showlegend: false,
      line: { color: css("--p0"), width: 1 + 1.5 * result[i] }, marker: { size: 4 }, opacity: 0.15 + 0.85 * result[i] ** 2,
      hovertemplate: `${value(trial).toFixed(4)}<br>${about(trial)}<extra>${plain(trial.name)}</extra>`,
    }));
    const note = (x, y, text, more) => ({ x, y, text: plain(text), showarrow: false, bgcolor: css("--panel"), borderpad: 1, font: { size: 11, color: css("--muted") }, ...more });
    return [traces, layout({
      legend: false, hovermode: "closest", margin: { l: 34, r: 34, t: 8, b: 34 },
      xaxis: axis("", { tickvals: dimensions.map((_, j) => j), ticktext: dimensions.map((d) => short(d.name, 14)), range: [-0.15, dimensions.length - 0.6] }),
      yaxis: axis("", { showticklabels: false, showgrid: false, range: [-0.06, 1.06] }),
      annotations: dimensions.flatMap((d, j) => d.ticks.map(([y, text]) => note(j, y, text, { xanchor: "left", xshift: 5 }))),
    })];
  });
  if (choice) segmented(choice, () => all("[data-plot=sweep-heat], [data-plot=sweep-parallel]").forEach(draw));

  // ---- users
  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }
  function card(id, tag = "div") {
    const item = DATA.items[id];
    const element = make(tag, "item");
    if (item.p) {
      const picture = make("img", "pic");
      picture.src = item.p; picture.alt = ""; picture.loading = "lazy"; picture.decoding = "async";
      element.append(picture);
    } else if (DATA.pictures) element.append(make("div", "pic none", "no picture"));
    const text = make("div", "text");
    text.append(make("div", "title", item.t));
    if (item.c) text.append(make("div", "extra", item.c));
    if (item.s) text.append(make("div", "extra", item.s));
    element.append(text);
    element.title = [item.t, item.c, item.s].filter(Boolean).join("\n");
    return element;
  }
  function browser(box, group) {
    const part = (name) => box.querySelector(`[data-b=${name}]`);
    const state = { index: 0, filter: "all" };
    const users = group.browse.users;
    const ranks = (user, model) => {
      const before = user.base.indexOf(user.target) + 1;
      const after = user.orders[model].indexOf(user.target) + 1;
      const middle = Math.floor((user.base.length + 1) / 2);
      const reference = group.ordered ? before : middle;
      const kind = !after ? "miss" : after < reference || !before ? "win" : after > reference ? "loss" : "same";
      return { before, after, kind };
    };
    const chosen = () => {
      const model = Number(part("model").value);
      const words = part("search").value.trim().toLowerCase();
      return users.filter((user) => {
        if (state.filter !== "all" && ranks(user, model).kind !== state.filter) return false;
        return !words || [...user.history, ...user.base].some((id) => DATA.items[id].t.toLowerCase().includes(words));
      });
    };
    const show = () => {
      const model = Number(part("model").value);
      all("[data-b=filter] button", box).forEach((button) => {
        const kind = button.dataset.value;
        const count = kind === "all" ? users.length : users.filter((user) => ranks(user, model).kind === kind).length;
        button.textContent = button.textContent.replace(/ \d+$/, "") + ` ${count}`;
      });
      const rows = chosen();
      state.index = Math.max(0, Math.min(state.index, rows.length - 1));
      part("where").textContent = rows.length ? `${state.index + 1} of ${rows.length} users` : "no such user";
      part("prev").disabled = state.index === 0;
      part("next").disabled = state.index >= rows.length - 1;
      part("user").replaceChildren(...(rows.length ? [view(rows[state.index], model)] : []));
    };
    const view = (user, model) => {
      const { before, after, kind } = ranks(user, model);
      const element = make("article", "usercard");
      element.append(make("h3", "", `User ${user.id}`));
      const verdict = make("p", "verdict");
      verdict.style.margin = "0";
      if (!after) verdict.append(before ? "The target is not in this model's list." : "The retriever missed the target: no order can find it.");
      else {
        verdict.append(group.ordered ? `Target: retriever rank ${before || "–"} → ` : "Target: rank ");
        const rank = make("b", kind, `${after}`);
        verdict.append(rank, ` of ${user.base.length}`);
        if (group.ordered && before) verdict.append(after < before ? ` (▲ ${before - after})` : after > before ? ` (▼ ${after - before})` : " (unchanged)");
      }
      element.append(verdict);
      element.append(make("h4", "", user.earlier ? `History, oldest first (${user.earlier} earlier not shown)` : "History, oldest first"));
      const strip = make("div", "strip");
      strip.tabIndex = 0; strip.setAttribute("role", "region"); strip.setAttribute("aria-label", "History");
      strip.append(...user.history.map((id) => card(id)));
      element.append(strip);
      const byModel = part("sort").value === "model";
      const order = byModel ? user.orders[model] : user.base;
      element.append(make("h4", "", byModel ? "Candidates as the model ranks them" : "Candidates as given"));
      const list = make("ol", "cands");
      const chances = user.probabilities[model];
      order.forEach((id) => {
        const entry = card(id, "li");
        const now = user.orders[model].indexOf(id) + 1;
        const then = user.base.indexOf(id) + 1;
        const placeBox = make("div", "place");
        placeBox.append(make("b", "", now ? String(now) : "–"));
        if (group.ordered && now && then) {
          const move = then - now;
          placeBox.append(make("small", move > 0 ? "win" : move < 0 ? "loss" : "", move > 0 ? `▲ ${move}` : move < 0 ? `▼ ${-move}` : "="));
        }
        if (chances && now) placeBox.append(make("small", "", `${(100 * chances[now - 1]).toFixed(chances[now - 1] < 0.1 ? 1 : 0)}%`));
        entry.prepend(placeBox);
        if (id === user.target) { entry.classList.add("target"); entry.querySelector(".title").prepend(make("span", "tag", "target")); }
        list.append(entry);
      });
      element.append(list);
      element.addEventListener("click", (event) => event.target.closest(".item")?.classList.toggle("open"));
      if (!user.base.includes(user.target)) {
        element.append(make("h4", "", "The target, which is not among the candidates"));
        const missed = make("div", "cands"); const entry = card(user.target); entry.classList.add("target"); missed.append(entry);
        element.append(missed);
      }
      return element;
    };
    const go = (step) => { state.index += step; show(); };
    part("prev").addEventListener("click", () => go(-1));
    part("next").addEventListener("click", () => go(1));
    ["model", "sort"].forEach((name) => part(name).addEventListener("change", show));
    part("search").addEventListener("input", () => { state.index = 0; show(); });
    segmented(part("filter"), (value) => { state.filter = value; state.index = 0; show(); });
    box.tabIndex = -1;
    document.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      const busy = event.target.closest?.("input, select, textarea, .strip, .scroll");
      const near = box.getBoundingClientRect();
      if (busy || near.bottom < 0 || near.top > innerHeight) return;
      if (event.key === "ArrowLeft" && !part("prev").disabled) go(-1);
      else if (event.key === "ArrowRight" && !part("next").disabled) go(1);
      else return;
      event.preventDefault();
    });
    show();
  }
})();
