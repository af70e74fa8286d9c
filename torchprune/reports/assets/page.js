(() => {
  "use strict";
  const root = document.documentElement;
  const one = (selector, inside = document) => inside.querySelector(selector);
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const say = (text) => { one("#said").textContent = text; };
  const collator = new Intl.Collator("en", { numeric: true });
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, Arial, "Liberation Sans", sans-serif';
  const INK = "var(--ink)", QUIET = "var(--quiet)", LINE = "var(--line)";

  // -- theme, copies, download ---------------------------------------------------------------------

  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const themeButton = one("#theme");
  const showTheme = () => themeButton.setAttribute("aria-pressed", String(isDark()));
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("torchprune-theme", root.dataset.theme);
    } catch { /* nowhere to keep it */ }
    showTheme();
  });
  systemDark.addEventListener("change", showTheme);
  showTheme();

  async function copy(text, code) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      getSelection().selectAllChildren(code);
      return document.execCommand("copy");
    }
  }
  for (const button of all(".copy")) {
    const code = one("code", button.parentElement);
    button.addEventListener("click", async () => {
      const done = await copy(code.textContent, code);
      button.textContent = done ? "Copied" : "Selected";
      say(done ? "Copied." : "Selected: copy it with your keyboard.");
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  one("#download").addEventListener("click", () => {
    const text = JSON.stringify(JSON.parse(one("#data").textContent), null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `${document.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "report"}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say("The JSON is downloaded.");
  });

  // -- tables --------------------------------------------------------------------------------------

  const asNumber = (key) => {
    if (key === "nan") return NaN;
    if (/^-?inf$/.test(key)) return key[0] === "-" ? -Infinity : Infinity;
    const plain = key.replace(/,/g, "").match(/^\s*([-+]?[\d.]+(?:e[-+]?\d+)?)/i);
    return plain ? Number(plain[1]) : NaN;
  };
  function sortRows(table, column, down) {
    const rows = all("tbody tr", table);
    const keys = new Map(rows.map((row) => [row, row.cells[column].dataset.key]));
    const filled = [...keys.values()].filter((key) => key !== "");
    const numbers = filled.every((key) => key === "nan" || !Number.isNaN(asNumber(key)));
    const last = (key) => key === "" || (numbers && key === "nan");
    const sign = down ? -1 : 1;
    const less = (a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (last(x) || last(y)) return Number(last(x)) - Number(last(y));
      if (!numbers) return sign * collator.compare(x, y);
      const [p, q] = [asNumber(x), asNumber(y)];
      return p === q ? 0 : sign * (p < q ? -1 : 1);
    };
    one("tbody", table).append(...rows.sort(less));
  }
  for (const table of all("table")) {
    if (one("tbody", table).rows.length < 2) continue;
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      const name = head.textContent.trim();
      button.textContent = name;
      if (!name) button.setAttribute("aria-label", "first column");
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sortRows(table, column, down);
        say(`Sorted by ${name || "the first column"}, ${down ? "greatest" : "least"} first.`);
      });
    });
  }
  for (const piece of all(".sortable")) {
    const field = one(".filter", piece);
    field?.addEventListener("input", () => {
      const wanted = field.value.trim().toLowerCase();
      const rows = all("tbody tr", piece);
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      say(`${rows.filter((row) => !row.hidden).length} of ${rows.length} rows.`);
    });
  }

  // -- what all charts share -----------------------------------------------------------------------

  const CHUNK = 20, ROW = 22;
  const chunksOf = (list) => Array.from(
    { length: Math.max(1, Math.ceil(list.length / CHUNK)) },
    (_, i) => list.slice(i * CHUNK, (i + 1) * CHUNK),
  );
  const drawn = new Map();
  const pen = document.createElement("canvas").getContext("2d");
  const widthOf = (texts) => {
    pen.font = `12px ${FONT}`;
    return texts.reduce((most, text) => Math.max(most, pen.measureText(text).width), 0);
  };
  const escaped = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const short = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace(/\.0e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  };
  const tooltip = {
    confine: true, className: "tip", transitionDuration: 0, backgroundColor: "var(--paper)",
    borderColor: "var(--line)", textStyle: { color: INK, fontSize: 13, fontFamily: FONT },
  };
  const textStyle = { fontFamily: FONT, fontSize: 12, color: INK };
  const quietLabel = { color: QUIET, fontSize: 12, fontFamily: FONT };

  /** Draw options one below the other; each is {height, option}. */
  function draw(place, options, width) {
    for (const chart of drawn.get(place) ?? []) chart.dispose();
    place.replaceChildren();
    drawn.set(place, options.map(({ height, option }) => {
      const box = document.createElement("div");
      box.className = "chunk";
      box.setAttribute("aria-hidden", "true");
      place.append(box);
      const chart = echarts.init(box, null, { renderer: "svg", width, height });
      chart.setOption({ animation: false, textStyle, tooltip, ...option });
      chart.getZr().flush();
      const svg = one("svg", box);
      svg?.setAttribute("viewBox", `0 0 ${width} ${height}`);
      return chart;
    }));
  }
  const roomIn = (place) => Math.max(240, place.clientWidth - 10);

  // -- bars ----------------------------------------------------------------------------------------

  function scaleOf(bars) {
    const ends = bars.flatMap((bar) => [bar.value, bar.low, bar.high]).filter((v) => v !== null);
    let low = Math.min(0, ...ends), high = Math.max(0, ...ends);
    if (low === high) high = 1;
    const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    return { min: Math.floor(low / step) * step, max: Math.ceil(high / step - 1e-9) * step, interval: step };
  }

  function whisker(params, api) {
    const [low, high, at] = [0, 1, 2].map((i) => api.value(i));
    const [left, right] = [api.coord([low, at]), api.coord([high, at])];
    const half = 4, style = { stroke: INK, lineWidth: 1.3, fill: "none" };
    const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style });
    return {
      type: "group",
      children: [
        line(left[0], left[1], right[0], right[1]),
        line(left[0], left[1] - half, left[0], left[1] + half),
        line(right[0], right[1] - half, right[0], right[1] + half),
      ],
    };
  }

  function barsOption(bars, first, scale, names, values) {
    const whiskers = bars
      .map((bar, i) => [bar.low ?? bar.value, bar.high ?? bar.value, i])
      .filter(([low, high]) => low !== null && low !== high);
    const category = {
      type: "category", inverse: true, axisLine: { show: false }, axisTick: { show: false },
    };
    return {
      grid: { left: names + 14, right: values + 14, top: first ? 26 : 0, bottom: 2 },
      tooltip: {
        ...tooltip, trigger: "axis", axisPointer: { type: "none" },
        formatter: (found) => {
          const bar = bars[found[0].dataIndex];
          const range = bar.range ? `<br>${escaped(bar.range)}` : "";
          return `${escaped(bar.full)}<br><b>${escaped(bar.text)}</b>${range}`;
        },
      },
      xAxis: {
        type: "value", position: "top", ...scale, axisLabel: { ...quietLabel, show: first, formatter: short, hideOverlap: true },
        splitLine: { lineStyle: { color: LINE } },
      },
      yAxis: [
        {
          ...category, data: bars.map((bar) => bar.name),
          axisLabel: { interval: 0, color: INK, fontSize: 12, width: names, overflow: "truncate", margin: 8 },
        },
        {
          ...category, position: "right", data: bars.map((bar) => bar.text),
          axisLabel: { interval: 0, color: INK, fontSize: 12, align: "right", margin: values + 8 },
        },
      ],
      series: [
        {
          type: "bar", barWidth: "58%", silent: true, itemStyle: { color: "var(--bar)" },
          data: bars.map((bar) => bar.value ?? "-"),
        },
        ...(whiskers.length ? [{ type: "custom", silent: true, renderItem: whisker, data: whiskers, encode: { x: [0, 1], y: 2 }, z: 5 }] : []),
      ],
    };
  }

  function barsOf(figure, data) {
    const place = one(".drawing", figure);
    const [sort, kind, filter, count] = [".sort", ".kind", ".filter", ".count"].map((s) => one(s, figure));
    const body = one("tbody", figure), rows = all("tr", body);
    const value = (bar, empty) => bar.value ?? empty;
    const orders = {
      order: () => 0,
      most: (a, b) => value(b, -Infinity) - value(a, -Infinity) || 0,
      least: (a, b) => value(a, Infinity) - value(b, Infinity) || 0,
      name: (a, b) => collator.compare(a.full, b.full),
    };
    const wanted = () => {
      const text = (filter?.value ?? "").trim().toLowerCase();
      return data.bars
        .map((bar, at) => ({ ...bar, at }))
        .filter((bar) => (!kind?.value || bar.kind === kind.value) && bar.full.toLowerCase().includes(text))
        .sort(orders[sort?.value ?? "order"]);
    };
    const render = (width = roomIn(place)) => {
      const shown = wanted();
      if (count) count.textContent = `${shown.length} of ${data.bars.length}`;
      const scale = scaleOf(shown);
      const names = Math.min(widthOf(shown.map((bar) => bar.name)) + 2, width * 0.42);
      const values = Math.min(widthOf(shown.map((bar) => bar.text)), width * 0.3);
      draw(place, chunksOf(shown).map((bars, i) => ({
        height: bars.length * ROW + (i ? 2 : 28),
        option: barsOption(bars, i === 0, scale, names, values),
      })), width);
      return shown;
    };
    const change = () => {
      const shown = render(), seen = new Set(shown.map((bar) => bar.at));
      rows.forEach((row, at) => { row.hidden = !seen.has(at); });
      body.append(...shown.map((bar) => rows[bar.at]), ...rows.filter((row) => row.hidden));
      all("thead th", figure).forEach((head) => head.removeAttribute("aria-sort"));
      place.parentElement.scrollTop = 0;
      const how = sort?.selectedOptions[0].textContent ?? "";
      say(`${shown.length} of ${data.bars.length} bars, ${how}.`);
    };
    for (const control of [sort, kind]) control?.addEventListener("change", change);
    filter?.addEventListener("input", change);
    return render;
  }

  // -- heat map ------------------------------------------------------------------------------------

  const HEAT = ["#f3f0dc", "#b9dcbf", "#6fbcc0", "#3a8fb7", "#2c5f9e", "#28336b"];
  const inkOn = (share) => (share > 0.5 ? "#ffffff" : "#1a1d21");

  function heatOf(figure, data) {
    const place = one(".drawing", figure);
    const heightOf = (v) => (data.logarithmic ? Math.log10(Math.max(v, data.least)) : v);
    const known = data.values.flat().filter((v) => v !== null).map(heightOf);
    let [low, high] = [Math.min(...known), Math.max(...known)];
    if (!known.length) [low, high] = [0, 1];
    if (low === high) high = low + (Math.abs(low) || 1) * 1e-6;
    return (room = roomIn(place)) => {
      const names = Math.min(widthOf(data.rows) + 2, room * 0.42);
      const heads = widthOf(data.columns);
      const widest = Math.max(34, heads * 0.72);
      const width = Math.max(room, names + 24 + widest * data.columns.length);
      const cell = (width - names - 24) / data.columns.length;
      const numbers = cell > widthOf(data.texts.flat()) + 8;
      const tilted = heads > cell - 8;
      const top = tilted ? Math.min(heads * 0.75 + 16, 130) : 28;
      const rows = chunksOf(data.rows.map((_, i) => i));
      draw(place, rows.map((at, i) => ({
        height: at.length * ROW + (i ? 2 : top) + (i === rows.length - 1 ? 62 : 0),
        option: heatOption(at, i === 0, i === rows.length - 1),
      })), width);

      function heatOption(at, first, last) {
        const cells = at.flatMap((row, y) => data.values[row].flatMap((value, x) => {
          if (value === null) return [];
          const share = (heightOf(value) - low) / (high - low);
          const label = { color: inkOn(share) };
          return [{ value: [x, y, heightOf(value)], row, label }];
        }));
        return {
          grid: { left: names + 14, right: 10, top: first ? top : 0, bottom: last ? 62 : 2 },
          tooltip: {
            ...tooltip, trigger: "item",
            formatter: ({ data: { row, value } }) =>
              `${escaped(data.rows[row])}, ${escaped(data.columns[value[0]])}<br><b>${escaped(data.texts[row][value[0]])}</b>`,
          },
          xAxis: {
            type: "category", position: "top", data: data.columns, axisLine: { show: false }, axisTick: { show: false },
            axisLabel: { ...quietLabel, show: first, interval: 0, rotate: tilted ? 45 : 0, width: 170, overflow: "truncate" },
          },
          yAxis: {
            type: "category", inverse: true, data: at.map((row) => data.rows[row]), axisLine: { show: false }, axisTick: { show: false },
            axisLabel: { interval: 0, color: INK, fontSize: 12, width: names, overflow: "truncate" },
          },
          visualMap: {
            show: last, min: low, max: high, calculable: false, orient: "horizontal", left: names + 14, bottom: 8,
            itemWidth: 12, itemHeight: Math.min(220, width - names - 40), hoverLink: false,
            precision: 12, text: [ends(high), ends(low)], textStyle: { color: QUIET, fontSize: 12 },
            inRange: { color: HEAT },
          },
          series: [{
            type: "heatmap", data: cells, emphasis: { disabled: true }, itemStyle: { borderColor: "var(--paper)", borderWidth: 1 },
            label: { show: numbers, fontSize: 11, formatter: ({ data: { row, value } }) => data.texts[row][value[0]] },
          }],
        };
      }
      function ends(height) {
        return `${short(data.logarithmic ? 10 ** height : height)}`;
      }
    };
  }

  // -- lines ---------------------------------------------------------------------------------------

  const SYMBOLS = ["circle", "rect", "triangle", "diamond", "pin", "arrow"];
  const DASHES = ["solid", [7, 3], [2, 3], [10, 3, 2, 3]];

  /** Round places on a logarithmic axis: 1, 2, 5 of each power of ten, or the powers alone. */
  function decades(low, high) {
    const found = [], wide = Math.log10(high / low) > 3;
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      for (const digit of wide ? [1] : [1, 2, 5]) found.push(Number(`${digit}e${power}`));
    }
    const inside = found.filter((value) => value >= low && value <= high);
    return inside.length > 1 ? inside : [low, Math.sqrt(low * high), high].map((v) => Number(v.toPrecision(3)));
  }

  function linesOf(figure, data) {
    const place = one(".drawing", figure);
    const percents = (value) => `${Number((100 * value).toPrecision(4))} %`;
    const rising = (params, api) => {
      const [x, low, high, colour] = [0, 1, 2, 3].map((i) => api.value(i));
      const [top, foot] = [api.coord([x, high]), api.coord([x, low])];
      const style = { stroke: `var(--c${colour})`, lineWidth: 1.4, fill: "none" };
      const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style });
      return {
        type: "group",
        children: [
          line(top[0], top[1], foot[0], foot[1]),
          line(top[0] - 4, top[1], top[0] + 4, top[1]),
          line(foot[0] - 4, foot[1], foot[0] + 4, foot[1]),
        ],
      };
    };
    return (width = roomIn(place)) => {
      const ranges = [];
      const series = data.lines.map((line, i) => {
        const colour = i % 6;
        for (const [x, y, low, high] of line.spots) {
          const ends = [low ?? y, high ?? y];
          if (ends[0] !== ends[1] && !(data.logarithmic && ends[0] <= 0)) ranges.push([x, ...ends, colour]);
        }
        return {
          type: "line", name: line.name, data: line.spots.map(([x, y, , , xs, ys], at) => ({ value: [x, y], xs, ys, at })),
          symbol: SYMBOLS[i % SYMBOLS.length], symbolSize: 9, showSymbol: true, showAllSymbol: true,
          lineStyle: line.joined ? { width: 2, color: `var(--c${colour})`, type: DASHES[Math.floor(i / 6) % DASHES.length] } : { width: 0, opacity: 0 },
          itemStyle: { color: `var(--c${colour})` }, emphasis: { disabled: true }, z: 3,
        };
      });
      if (data.level !== null) {
        series.push({
          type: "line", name: data.level_name, data: [], symbol: "none", lineStyle: { type: "dashed", color: QUIET }, itemStyle: { color: QUIET },
          markLine: {
            silent: true, symbol: "none", lineStyle: { type: "dashed", color: QUIET, width: 1.5 }, data: [{ yAxis: data.level }],
            label: { formatter: `${data.level_name} ${data.level_text}`, position: "insideEndTop", color: QUIET, fontSize: 12 },
          },
        });
      }
      if (ranges.length) {
        series.push({ type: "custom", renderItem: rising, data: ranges, silent: true, encode: { x: 0, y: [1, 2] }, z: 2 });
      }
      const legendRows = Math.ceil(data.lines.reduce((sum, line) => sum + widthOf([line.name]) + 46, 0) / (width - 20));
      const top = 34 + 22 * legendRows;
      const heights = [...data.lines.flatMap((line) => line.spots.flatMap(([, y, low, high]) => [y, low ?? y, high ?? y])), ...(data.level === null ? [] : [data.level])];
      const [least, most] = [Math.min(...heights), Math.max(...heights)];
      const margin = (most - least || Math.abs(most) || 1) * 0.06;
      const ticks = data.logarithmic ? decades(least / 1.15, most * 1.15) : null;
      const vertical = ticks
        ? { type: "log", min: least / 1.15, max: most * 1.15, axisTick: { show: true, customValues: ticks } }
        : { type: "value", scale: true, ...(heights.length ? { min: least - margin, max: most + margin } : {}) };
      draw(place, [{
        height: 300 + top,
        option: {
          grid: { left: 10, right: 20, top, bottom: 32, containLabel: true },
          legend: { top: 0, left: 0, selectedMode: false, data: data.lines.map((line) => line.name), textStyle: { color: INK, fontSize: 12 }, itemWidth: 24, itemGap: 14 },
          tooltip: {
            ...tooltip, trigger: "item",
            formatter: ({ seriesIndex, dataIndex }) => {
              const line = data.lines[seriesIndex], [, y, low, high, xs, ys] = line.spots[dataIndex];
              const range = (low ?? y) !== (high ?? y) ? ` (${short(low ?? y)} to ${short(high ?? y)})` : "";
              return `${escaped(line.name)}<br>${escaped(data.x)}: ${escaped(xs)}<br>${escaped(data.y)}: <b>${escaped(ys)}</b>${escaped(range)}`;
            },
          },
          xAxis: {
            type: "value", scale: true, name: data.x, nameLocation: "middle", nameGap: 30, nameTextStyle: { color: QUIET, fontSize: 12 },
            axisLabel: { ...quietLabel, hideOverlap: true, formatter: data.percent ? percents : short },
            axisLine: { lineStyle: { color: LINE } }, splitLine: { show: false },
          },
          yAxis: {
            ...vertical, name: data.y, nameLocation: "end", nameTextStyle: { color: QUIET, fontSize: 12, align: "left" },
            axisLabel: { ...quietLabel, formatter: short, ...(ticks ? { customValues: ticks } : { showMinLabel: false, showMaxLabel: false }) },
            splitLine: { show: !ticks, lineStyle: { color: LINE } },
          },
          series,
        },
      }], width);
    };
  }

  // -- all of them ---------------------------------------------------------------------------------

  const makers = { bars: barsOf, heat: heatOf, lines: linesOf };
  const renders = new Map();
  const widths = new Map();
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.clientWidth && widths.get(target) !== target.clientWidth) {
        widths.set(target, target.clientWidth);
        renders.get(target)();
      }
    }
  });
  for (const details of all("details.values")) details.open = false;
  for (const figure of all("figure.chart")) {
    const place = one(".drawing", figure);
    const render = makers[figure.dataset.kind](figure, JSON.parse(one(".drawn", figure).textContent));
    render();
    renders.set(place, render);
    widths.set(place, place.clientWidth);
    watch.observe(place);
  }
  addEventListener("beforeprint", () => { for (const render of renders.values()) render(680); });
  addEventListener("afterprint", () => { for (const render of renders.values()) render(); });
  root.dataset.drawn = "true";
})();
