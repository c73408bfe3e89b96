// A map: a canvas with a point for each document, which can be zoomed, moved and pointed at.

const ZOOM = {least: 0.8, most: 60};
const NEAR = 12;  // pixels within which a point is pointed at
const MARGIN = 20, CAPTION = 22;  // pixels around the whole map, and more of them above it

class DocumentMap {
  /** `handlers`: point(document or null, event), open(document), moved(view). */
  constructor(data, model, handlers) {
    Object.assign(this, {data, model, handlers});
    this.view = {scale: 1, x: 0.5, y: 0.5};  // what the middle shows, in [0, 1] of the map
    this.canvas = element("canvas", {tabIndex: 0});
    this.canvas.setAttribute("role", "img");
    this.note = element("span", {className: "note"});
    const button = (text, label, act) => element("button", {type: "button", textContent: text, title: label,
      ariaLabel: label, onclick: act});
    this.figure = element("figure", {},
      element("figcaption", {}, element("b", {textContent: data.models[model].name}), this.note),
      this.canvas,
      element("div", {className: "zoom"},
        button("+", "Zoom in (+)", () => this.zoom(1.6)),
        button("−", "Zoom out (−)", () => this.zoom(1 / 1.6)),
        button("⌂", "Show all (0)", () => this.reset())));
    this.listen();
    new ResizeObserver(() => this.redraw()).observe(this.canvas);
  }

  /** Show a state. `ranks` gives each document its mark, `passes` says which are not faded. */
  show({map, doc, fails, ranks}) {
    const {columns} = this.data;
    Object.assign(this, {x: columns[`${map}_x${this.model}`], y: columns[`${map}_y${this.model}`], map,
      chosen: doc, fails, ranks});
    this.redraw();
  }

  redraw() {
    if (this.waiting || !this.ranks) return;
    // In a task of its own, so that two maps do not keep the page busy together.
    this.waiting = requestAnimationFrame(() => setTimeout(() => {
      this.waiting = 0;
      this.draw();
    }));
  }

  /** Marks and colours of the theme of the moment. */
  restyle() {
    const [ink, halo, faint] = ["var(--ink)", "var(--panel)", "var(--faint)"].map(resolved);
    this.style = {ink, halo, faint, font: getComputedStyle(document.body).fontFamily, pictures: {}};
    this.redraw();
  }

  /** The pictures of all marks, drawn once for a size and theme. */
  pictures(radius, ratio) {
    const key = `${radius} ${ratio}`;
    this.style.pictures[key] ??= Array.from({length: NUM_COLORS * SHAPES.length}, (_, rank) =>
      markPicture(rank, radius * ratio));
    return this.style.pictures[key];
  }

  /** Pixels of the canvas: the size of the map's square, and where its corner lies. */
  frame() {
    const {clientWidth: width, clientHeight: height} = this.canvas, {scale, x, y} = this.view;
    const across = (width - 2 * MARGIN) * scale, down = (height - CAPTION - 2 * MARGIN) * scale;
    return {width, height, across, down, left: width / 2 - x * across, top: (height + CAPTION) / 2 - y * down};
  }

  draw() {
    const {canvas, data, style} = this, ratio = devicePixelRatio || 1;
    const {width, height, across, down, left, top} = this.frame();
    if (!width || !style) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const radius = Math.round(2 * Math.min(6, 2.4 + Math.log2(this.view.scale + 0.2) + (data.count < 2000))) / 2;
    const {fails, ranks, x: xs, y: ys} = this, kx = across / 65535, ky = down / 65535;
    const pictures = this.pictures(radius, ratio), size = pictures[0].width / ratio;
    context.fillStyle = style.faint;
    let shown = 0;
    // The faded first, under the others. A loop over 12,000 points: it makes no object.
    for (const faded of [true, false]) {
      for (let doc = 0; doc < data.count; doc++) {
        if (Boolean(fails[doc]) !== faded) continue;
        if (!faded) shown++;
        const x = left + xs[doc] * kx, y = top + ys[doc] * ky;
        if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
        if (faded) context.fillRect(x - 1, y - 1, 2, 2);
        else context.drawImage(pictures[ranks[doc] % pictures.length], x - size / 2, y - size / 2, size, size);
      }
    }
    const at = (doc) => [left + xs[doc] * kx, top + ys[doc] * ky];
    this.drawLabels(context, {width, height, across, down, left, top});
    this.ring(context, this.pointed, at, radius + 3, 1.5);
    this.ring(context, this.chosen, at, radius + 5, 2.5);
    this.canvas.ariaLabel = `Map of ${data.models[this.model].name}: ${shown} of ${data.count} documents. ` +
      "The list of documents holds the same.";
    this.note.textContent = `${data.map_notes[this.map]} · ${shown.toLocaleString("en")} documents`;
  }

  ring(context, doc, at, radius, width) {
    if (doc === null || doc === undefined) return;
    context.beginPath();
    context.arc(...at(doc), radius, 0, 7);
    context.lineWidth = width;
    context.strokeStyle = this.style.ink;
    context.stroke();
  }

  /** Labels of the regions: coarse from afar, finer when near; the larger first, none over another. */
  drawLabels(context, {width, height, across, down, left, top}) {
    const levels = this.data.models[this.model].labels[this.map], {scale} = this.view;
    const level = levels[Math.min(levels.length - 1, scale < 2.2 ? 0 : scale < 5.5 ? 1 : 2)] ?? [];
    const taken = [];
    context.font = `600 12px ${this.style.font}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.lineWidth = 4;
    for (const [u, v, text] of level) {
      const half = context.measureText(text).width / 2 + 4, y = top + v * down;
      let x = left + u * across;
      if (x < -half || y < 0 || x > width + half || y > height) continue;
      x = Math.min(Math.max(x, half), width - half);
      if (taken.some((box) => Math.abs(box.x - x) < box.half + half && Math.abs(box.y - y) < 17)) continue;
      taken.push({x, y, half});
      context.strokeStyle = this.style.halo;
      context.strokeText(text, x, y);
      context.fillStyle = this.style.ink;
      context.fillText(text, x, y);
    }
  }

  /** The nearest document that is not faded; null where none is near. */
  nearest(px, py) {
    const {across, down, left, top} = this.frame();
    let best = null, least = NEAR * NEAR;
    for (let doc = 0; doc < this.data.count; doc++) {
      if (this.fails[doc]) continue;
      const dx = left + (this.x[doc] / 65535) * across - px;
      const dy = top + (this.y[doc] / 65535) * down - py;
      if (dx * dx + dy * dy < least) [best, least] = [doc, dx * dx + dy * dy];
    }
    return best;
  }

  listen() {
    const {canvas} = this;
    let drag = null;
    canvas.onpointerdown = (event) => {
      drag = {x: event.clientX, y: event.clientY, moved: false};
      canvas.setPointerCapture(event.pointerId);
    };
    canvas.onpointermove = (event) => {
      if (!drag) {
        this.handlers.point(this.nearest(event.offsetX, event.offsetY), event);
        return;
      }
      const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
      if (!drag.moved && Math.hypot(dx, dy) < 4) return;
      this.handlers.point(null, event);
      this.move(-dx, -dy);
      drag = {x: event.clientX, y: event.clientY, moved: true};
    };
    canvas.onpointerup = (event) => {
      const found = drag && !drag.moved ? this.nearest(event.offsetX, event.offsetY) : null;
      drag = null;
      if (found !== null) this.handlers.open(found);
    };
    canvas.onpointercancel = () => { drag = null; };
    canvas.onpointerleave = (event) => this.handlers.point(null, event);
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
    }, {passive: false});
  }

  /** Move what is shown by so many pixels. */
  move(dx, dy) {
    const {across, down} = this.frame(), clamp = (value) => Math.min(1.1, Math.max(-0.1, value));
    this.view.x = clamp(this.view.x + dx / across);
    this.view.y = clamp(this.view.y + dy / down);
    this.redraw();
  }

  /** Zoom by a factor, so that the place under a pixel (the middle, if none is given) stays. */
  zoom(factor, px = this.canvas.clientWidth / 2, py = (this.canvas.clientHeight + CAPTION) / 2) {
    const scale = Math.min(ZOOM.most, Math.max(ZOOM.least, this.view.scale * factor));
    const before = this.frame();
    const u = (px - before.left) / before.across, v = (py - before.top) / before.down;
    this.view.scale = scale;
    const {across, down, left, top} = this.frame();
    this.move(left + u * across - px, top + v * down - py);
  }

  reset() {
    this.view = {scale: 1, x: 0.5, y: 0.5};
    this.redraw();
  }
}
