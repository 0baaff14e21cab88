"use strict";
// The viewer of a registration report: three planes of the fixed scan's grid.
//
// Lengths are mm from the low face of the fixed scan along its upright axes (right,
// anterior, superior). Pictures have the patient's right or front on the left, so that
// columns and rows run against the axes.
(() => {
  const root = document.getElementById("viewer");
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const byId = (id) => document.getElementById(id);

  const SHAPE = data.shape;
  const VOXEL = data.spacing.map((s, i) => s * data.factors[i]);
  const EXTENT = data.scanShape.map((n, i) => n * data.spacing[i]);
  const STRIDE = [1, SHAPE[0], SHAPE[0] * SHAPE[1]];
  const FIELD = data.field;
  const FIELD_STEP = FIELD.shape.map((m, i) =>
    m > 1 ? ((data.scanShape[i] - 1) * data.spacing[i]) / (m - 1) : EXTENT[i]);
  const GRID_MM = niceLength(Math.max(...EXTENT) / 18);
  const VIEWS = ["fixed", "before", "after", "blend", "colour", "checker", "difference"];
  const COMPARING = ["blend", "colour", "checker", "difference"];
  const OVERLAYS = ["none", "jacobian", "displacement"];
  const FEW_LABELS = 4;
  const YELLOW = "#ffd23f", CYAN = "#35e0ff";

  const state = {
    view: "after", moving: "after", overlay: "none", grid: false, cross: true,
    labels: false, share: 0.5, square: niceLength(Math.max(...EXTENT) / 10),
    at: data.start.map((i, k) => (i + 0.5) * data.spacing[k]),
  };
  const volumes = {};
  let field = null;

  function niceLength(mm) {
    const power = 10 ** Math.floor(Math.log10(mm)), part = mm / power;
    return power * (part < 1.5 ? 1 : part < 3.5 ? 2 : part < 7.5 ? 5 : 10);
  }

  // --- unpacking -------------------------------------------------------------------

  async function inflate(text) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream()
      .pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  async function volumeOf(text) {
    const found = new Uint8Array(await inflate(text));
    for (let row = 0; row < found.length; row += SHAPE[0])
      for (let i = row + 1; i < row + SHAPE[0]; i++) found[i] += found[i - 1];
    return found;
  }

  async function fieldOf(text) {
    const view = new DataView(await inflate(text));
    const found = new Float32Array(view.byteLength / 2);
    for (let i = 0; i < found.length; i++)
      found[i] = view.getInt16(2 * i, true) * FIELD.unit;
    return found;
  }

  // --- slices ----------------------------------------------------------------------

  const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
  const voxelAt = (axis) => clamp(Math.floor(state.at[axis] / VOXEL[axis]), 0, SHAPE[axis] - 1);
  const scanVoxel = (axis) =>
    clamp(Math.floor(state.at[axis] / data.spacing[axis]), 0, data.scanShape[axis] - 1);

  // Calls f(index of the voxel, pixel, column's voxel, row's voxel), right to left and
  // top to bottom.
  function eachPixel(plane, f) {
    const { across, horizontal, vertical } = plane;
    const w = SHAPE[horizontal], h = SHAPE[vertical];
    const base = voxelAt(across) * STRIDE[across];
    for (let r = 0, pixel = 0; r < h; r++) {
      const row = base + (h - 1 - r) * STRIDE[vertical];
      for (let c = 0; c < w; c++, pixel++)
        f(row + (w - 1 - c) * STRIDE[horizontal], pixel, w - 1 - c, h - 1 - r);
    }
  }

  function pictureOf(plane) {
    const image = new ImageData(SHAPE[plane.horizontal], SHAPE[plane.vertical]);
    const out = image.data, fixed = volumes.fixed;
    const comparing = COMPARING.includes(state.view);
    const other = volumes[comparing ? state.moving : state.view];
    const share = state.share, square = state.square;
    const vh = VOXEL[plane.horizontal], vv = VOXEL[plane.vertical];
    eachPixel(plane, (i, pixel, col, row) => {
      const a = fixed[i], b = other[i];
      let red = b, green = b, blue = b;
      if (state.view === "blend") red = green = blue = a + share * (b - a);
      else if (state.view === "colour") { red = blue = a; green = b; }
      else if (state.view === "difference") red = green = blue = 127.5 + (b - a) / 2;
      else if (state.view === "checker") {
        const odd = (Math.floor(((col + 0.5) * vh) / square)
          + Math.floor(((row + 0.5) * vv) / square)) & 1;
        red = green = blue = odd ? b : a;
      }
      const p = 4 * pixel;
      out[p] = red; out[p + 1] = green; out[p + 2] = blue; out[p + 3] = 255;
    });
    if (state.overlay === "jacobian") tint(plane, out);
    return image;
  }

  // Blue shrinks, red grows; a voxel that folds is yellow.
  function tint(plane, out) {
    eachPixel(plane, (i, pixel) => {
      const byte = volumes.jacobian[i], p = 4 * pixel;
      if (byte === 0) { out[p] = 255; out[p + 1] = 225; out[p + 2] = 0; return; }
      const level = (byte - 128) / 127;
      const alpha = Math.min(0.85, 1.6 * Math.abs(level));
      const colour = level > 0 ? [214, 47, 39] : [44, 123, 217];
      for (let k = 0; k < 3; k++) out[p + k] += alpha * (colour[k] - out[p + k]);
    });
  }

  // The displacement's three components at the field's points of a slice.
  function fieldSlice(plane) {
    const { across, horizontal, vertical } = plane;
    const [mx, my] = FIELD.shape, size = mx * my * FIELD.shape[2];
    const stride = [1, mx, mx * my];
    const w = FIELD.shape[horizontal], h = FIELD.shape[vertical];
    const place = clamp(
      (state.at[across] - data.spacing[across] / 2) / FIELD_STEP[across],
      0, FIELD.shape[across] - 1);
    const low = Math.floor(place), high = Math.min(low + 1, FIELD.shape[across] - 1);
    const part = place - low;
    const found = [0, 1, 2].map(() => new Float32Array(w * h));
    for (let k = 0; k < 3; k++)
      for (let j = 0; j < h; j++)
        for (let i = 0; i < w; i++) {
          const at = k * size + i * stride[horizontal] + j * stride[vertical];
          const one = field[at + low * stride[across]];
          found[k][j * w + i] = one + part * (field[at + high * stride[across]] - one);
        }
    return { w, h, found };
  }

  const RAMP = [[20, 10, 60], [120, 28, 109], [213, 72, 66], [251, 155, 6], [252, 255, 164]];

  function displacementPicture(plane) {
    const { w, h, found } = fieldSlice(plane);
    const image = new ImageData(w, h), most = FIELD.most || 1;
    for (let j = 0; j < h; j++)
      for (let i = 0; i < w; i++) {
        const n = j * w + i;
        const length = Math.hypot(found[0][n], found[1][n], found[2][n]);
        const level = clamp(length / most, 0, 1) * (RAMP.length - 1);
        const low = Math.min(Math.floor(level), RAMP.length - 2);
        const p = 4 * ((h - 1 - j) * w + (w - 1 - i));
        for (let k = 0; k < 3; k++)
          image.data[p + k] = RAMP[low][k] + (level - low) * (RAMP[low + 1][k] - RAMP[low][k]);
        image.data[p + 3] = 150;
      }
    return image;
  }

  // --- drawing ---------------------------------------------------------------------

  function scratch(image) {
    const canvas = document.createElement("canvas");
    canvas.width = image.width; canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  // All planes have one scale and one box, so that lengths can be compared by eye.
  const BOX = [0, 1].map((side) => Math.max(...data.planes.map(
    (p) => EXTENT[side === 0 ? p.horizontal : p.vertical])));

  function layoutOf(plane, canvas) {
    const scale = Math.min(canvas.width / BOX[0], canvas.height / BOX[1]);
    const ew = EXTENT[plane.horizontal], eh = EXTENT[plane.vertical];
    const left = (canvas.width - ew * scale) / 2, top = (canvas.height - eh * scale) / 2;
    return {
      scale, left, top, width: ew * scale, height: eh * scale,
      x: (mm) => left + (ew - mm) * scale, y: (mm) => top + (eh - mm) * scale,
      h: (px) => ew - (px - left) / scale, v: (px) => eh - (px - top) / scale,
    };
  }

  function draw(view) {
    const { plane, canvas } = view;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio);
    const height = Math.round(canvas.clientHeight * ratio);
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width; canvas.height = height;
    }
    const pen = canvas.getContext("2d"), at = layoutOf(plane, canvas);
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, width, height);
    pen.save();
    pen.beginPath();
    pen.rect(at.left, at.top, at.width, at.height);
    pen.clip();
    const { horizontal, vertical } = plane;
    const full = [SHAPE[horizontal] * VOXEL[horizontal], SHAPE[vertical] * VOXEL[vertical]];
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(scratch(pictureOf(plane)), at.x(full[0]), at.y(full[1]),
      full[0] * at.scale, full[1] * at.scale);
    if (state.overlay === "displacement") {
      const step = [FIELD_STEP[horizontal], FIELD_STEP[vertical]];
      const half = [data.spacing[horizontal] / 2, data.spacing[vertical] / 2];
      const size = [FIELD.shape[horizontal] * step[0], FIELD.shape[vertical] * step[1]];
      pen.drawImage(scratch(displacementPicture(plane)),
        at.x(half[0] - step[0] / 2 + size[0]), at.y(half[1] - step[1] / 2 + size[1]),
        size[0] * at.scale, size[1] * at.scale);
    }
    if (state.grid) drawGrid(plane, pen, at, ratio);
    if (state.labels && volumes.labels_fixed) drawLabels(plane, pen, at, ratio);
    pen.restore();
    if (state.cross) drawCross(plane, pen, at, ratio);
    drawLetters(plane, pen, width, height, ratio);
  }

  // Lines on which a coordinate of the moving scan is constant: marching squares.
  function drawGrid(plane, pen, at, ratio) {
    const { horizontal, vertical } = plane;
    const { w, h, found } = fieldSlice(plane);
    const place = (axis, i) => data.spacing[axis] / 2 + i * FIELD_STEP[axis];
    pen.beginPath();
    for (const axis of [horizontal, vertical]) {
      const value = (i, j) => found[axis][j * w + i]
        + place(axis, axis === horizontal ? i : j);
      for (let j = 0; j + 1 < h; j++)
        for (let i = 0; i + 1 < w; i++) {
          const corners = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]];
          const values = corners.map(([a, b]) => value(a, b));
          const first = Math.ceil(Math.min(...values) / GRID_MM);
          const last = Math.floor(Math.max(...values) / GRID_MM);
          if (last - first > 40) continue;
          for (let level = first; level <= last; level++)
            crossings(corners, values, level * GRID_MM).forEach(([a, b], n) => {
              const x = at.x(place(horizontal, a)), y = at.y(place(vertical, b));
              if (n % 2) pen.lineTo(x, y); else pen.moveTo(x, y);
            });
        }
    }
    for (const [colour, thick] of [["rgba(0,0,0,0.55)", 2.4], ["#8dfc9a", 1.1]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = thick * ratio;
      pen.stroke();
    }
  }

  function crossings(corners, values, level) {
    const found = [];
    for (let k = 0; k < 4; k++) {
      const n = (k + 1) % 4, a = values[k], b = values[n];
      if ((a < level) === (b < level)) continue;
      const part = (level - a) / (b - a);
      found.push([0, 1].map((c) => corners[k][c] + part * (corners[n][c] - corners[k][c])));
    }
    return found;
  }

  function drawLabels(plane, pen, at, ratio) {
    const moving = state.view === "before"
      || (COMPARING.includes(state.view) && state.moving === "before") ? "before" : "after";
    const outline = [["labels_fixed", YELLOW]];
    if (state.view !== "fixed") outline.push([`labels_${moving}`, CYAN]);
    const { horizontal, vertical } = plane;
    const sh = STRIDE[horizontal], sv = STRIDE[vertical];
    for (const [name, colour] of outline) {
      const labels = volumes[name];
      pen.beginPath();
      eachPixel(plane, (i, _, col, row) => {
        const x = at.x(col * VOXEL[horizontal]), y = at.y(row * VOXEL[vertical]);
        const wide = VOXEL[horizontal] * at.scale, high = VOXEL[vertical] * at.scale;
        if (col > 0 && labels[i] !== labels[i - sh]) {
          pen.moveTo(x, y); pen.lineTo(x, y - high);
        }
        if (row > 0 && labels[i] !== labels[i - sv]) {
          pen.moveTo(x, y); pen.lineTo(x - wide, y);
        }
      });
      pen.strokeStyle = colour;
      pen.lineWidth = 1.4 * ratio;
      pen.stroke();
    }
  }

  function drawCross(plane, pen, at, ratio) {
    const x = at.x(state.at[plane.horizontal]), y = at.y(state.at[plane.vertical]);
    const gap = 8 * ratio;
    pen.strokeStyle = "rgba(120,190,255,0.8)";
    pen.lineWidth = ratio;
    pen.beginPath();
    pen.moveTo(at.left, y); pen.lineTo(x - gap, y);
    pen.moveTo(x + gap, y); pen.lineTo(at.left + at.width, y);
    pen.moveTo(x, at.top); pen.lineTo(x, y - gap);
    pen.moveTo(x, y + gap); pen.lineTo(x, at.top + at.height);
    pen.stroke();
  }

  function drawLetters(plane, pen, width, height, ratio) {
    const [left, right, top, bottom] = plane.edges, edge = 9 * ratio;
    pen.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineWidth = 3 * ratio;
    pen.strokeStyle = "#000";
    pen.fillStyle = YELLOW;
    for (const [letter, x, y] of [
      [left, edge, height / 2], [right, width - edge, height / 2],
      [top, width / 2, edge], [bottom, width / 2, height - edge],
    ]) {
      pen.strokeText(letter, x, y);
      pen.fillText(letter, x, y);
    }
  }

  // --- what the reader does ----------------------------------------------------------

  const views = data.planes.map((plane) => ({
    plane,
    canvas: byId(`canvas-${plane.name}`),
    slider: byId(`slice-${plane.name}`),
    label: byId(`where-${plane.name}`),
  }));
  let waiting = false;

  function refresh() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      views.forEach(draw);
      tell();
    });
  }

  function tell() {
    for (const { plane, slider, label } of views) {
      const index = scanVoxel(plane.across), count = data.scanShape[plane.across];
      slider.value = String(index);
      slider.setAttribute("aria-valuetext", `slice ${index + 1} of ${count}`);
      label.textContent = `${index + 1} / ${count}`;
    }
    const index = [0, 1, 2].map((axis) => state.at[axis] / data.spacing[axis] - 0.5);
    const mm = [0, 1, 2].map((row) => data.affine[row][3]
      + index.reduce((sum, i, k) => sum + data.affine[row][k] * i, 0));
    const voxel = [0, 1, 2].reduce((sum, axis) => sum + voxelAt(axis) * STRIDE[axis], 0);
    const byte = volumes.jacobian[voxel];
    const determinant = 2 ** (data.log2Range * (byte - 128) / 127);
    const bound = byte === 1 ? "≤ " : byte === 255 ? "≥ " : "";
    byId("readout").textContent = `x ${mm[0].toFixed(1)}, y ${mm[1].toFixed(1)}, `
      + `z ${mm[2].toFixed(1)} mm (RAS) · Jacobian `
      + (byte === 0 ? "folds" : bound + determinant.toFixed(2))
      + ` · displacement ${displacementHere().toFixed(1)} mm`;
  }

  function displacementHere() {
    const { horizontal, vertical } = data.planes[0];
    const { w, found } = fieldSlice(data.planes[0]);
    const near = (axis) => clamp(Math.round(
      (state.at[axis] - data.spacing[axis] / 2) / FIELD_STEP[axis]), 0, FIELD.shape[axis] - 1);
    const n = near(vertical) * w + near(horizontal);
    return Math.hypot(found[0][n], found[1][n], found[2][n]);
  }

  function press() {
    const comparing = COMPARING.includes(state.view);
    for (const button of root.querySelectorAll("button[data-set]")) {
      const [name, value] = button.dataset.set.split("=");
      const on = value === "toggle" ? state[name] : state[name] === value;
      button.setAttribute("aria-pressed", String(Boolean(on)));
    }
    byId("moving-choice").hidden = !comparing;
    byId("share-choice").hidden = state.view !== "blend";
    byId("square-choice").hidden = state.view !== "checker";
    byId("share-value").textContent = `${Math.round(100 * state.share)} % moving`;
    byId("square-value").textContent = `${Number(state.square.toPrecision(3))} mm`;
    byId("legend").textContent = "";
    legend().forEach((part) => byId("legend").append(part));
    refresh();
  }

  function item(className, text) {
    const found = document.createElement("span");
    found.className = className;
    found.textContent = text;
    return found;
  }

  function legend() {
    const parts = [];
    const names = { before: "before", after: "after" };
    if (state.view === "colour")
      parts.push(item("key", `green: moving ${names[state.moving]}, magenta: fixed, grey: alike`));
    if (state.view === "difference")
      parts.push(item("key", `moving ${names[state.moving]} − fixed: grey where alike`));
    if (state.overlay === "jacobian")
      parts.push(item("key", "Jacobian ¼"), item("bar jacobian", ""),
        item("key", "4 (blue shrinks, red grows, yellow folds)"));
    if (state.overlay === "displacement")
      parts.push(item("key", "displacement 0"), item("bar displacement", ""),
        item("key", `${FIELD.most.toFixed(1)} mm`));
    if (state.grid) parts.push(item("key", `grid of ${GRID_MM} mm in the moving scan`));
    if (state.labels && volumes.labels_fixed)
      parts.push(item("key", state.view === "fixed" ? "labels: fixed yellow"
        : "labels: fixed yellow, moving cyan"));
    return parts;
  }

  function set(name, value) {
    if (value === "toggle") state[name] = !state[name];
    else if (name === "overlay" && state.overlay === value) state.overlay = "none";
    else state[name] = value;
    press();
  }

  function step(plane, slices) {
    const axis = plane.across;
    const index = clamp(scanVoxel(axis) + slices, 0, data.scanShape[axis] - 1);
    state.at[axis] = (index + 0.5) * data.spacing[axis];
    refresh();
  }

  function point(view, event) {
    const box = view.canvas.getBoundingClientRect();
    const ratio = view.canvas.width / box.width;
    const at = layoutOf(view.plane, view.canvas);
    const { horizontal, vertical } = view.plane;
    const places = [[horizontal, at.h((event.clientX - box.left) * ratio)],
      [vertical, at.v((event.clientY - box.top) * ratio)]];
    for (const [axis, mm] of places)
      state.at[axis] = clamp(mm, data.spacing[axis] / 2, EXTENT[axis] - data.spacing[axis] / 2);
    refresh();
  }

  const STEPS = {
    ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10,
    Home: -1e6, End: 1e6,
  };

  function listen(view) {
    const { canvas, slider, plane } = view;
    slider.max = String(data.scanShape[plane.across] - 1);
    slider.addEventListener("input", () => step(plane, Number(slider.value) - scanVoxel(plane.across)));
    canvas.style.aspectRatio = `${BOX[0]} / ${BOX[1]}`;
    canvas.addEventListener("keydown", (event) => {
      if (!(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      step(plane, STEPS[event.key]);
    });
    let turned = 0;
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey) return;
      event.preventDefault();
      turned += event.deltaMode ? 40 * event.deltaY : event.deltaY;
      const slices = Math.trunc(turned / 40);
      turned -= 40 * slices;
      if (slices) step(plane, -clamp(slices, -5, 5));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      canvas.focus({ preventScroll: true });
      point(view, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) point(view, event);
    });
  }

  const KEYS = {
    j: ["overlay", "jacobian"], d: ["overlay", "displacement"], 0: ["overlay", "none"],
    g: ["grid", "toggle"], l: ["labels", "toggle"], x: ["cross", "toggle"],
  };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (key >= "1" && key <= "7") set("view", VIEWS[Number(key) - 1]);
    else if (key in KEYS) set(...KEYS[key]);
    else if (key === "b") set("moving", state.moving === "after" ? "before" : "after");
    else if (key === "f") set("view", state.view === "fixed" ? "after" : "fixed");
  }

  async function start() {
    const names = Object.keys(data.volumes);
    const found = await Promise.all(names.map((name) => volumeOf(data.volumes[name])));
    names.forEach((name, n) => { volumes[name] = found[n]; });
    field = await fieldOf(FIELD.data);
    // Outlines of many structures would hide the scans at first sight.
    state.labels = new Set(volumes.labels_fixed || []).size <= 1 + FEW_LABELS;
    views.forEach(listen);
    for (const button of root.querySelectorAll("button[data-set]"))
      button.addEventListener("click", () => set(...button.dataset.set.split("=")));
    byId("share").addEventListener("input", (event) => {
      state.share = Number(event.target.value) / 100;
      press();
    });
    const squares = byId("square"), usual = state.square;
    squares.min = String(usual / 5);
    squares.max = String(usual * 4);
    squares.step = String(usual / 10);
    squares.value = String(usual);
    squares.addEventListener("input", (event) => {
      state.square = Number(event.target.value);
      press();
    });
    document.addEventListener("keydown", onKey);
    byId("viewer-tools").hidden = false;
    new ResizeObserver(refresh).observe(root);
    press();
    root.dataset.ready = "yes";
  }

  start().catch((error) => {
    byId("viewer-note").textContent = "This browser cannot unpack the viewer's volumes ("
      + error.message + "). The pictures below show the same registration.";
    byId("viewer-note").hidden = false;
  });
})();
