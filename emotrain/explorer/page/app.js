// The page: one state (state.js) in the address, and the parts that show it.

class App {
  constructor(data) {
    this.data = data;
    this.filters = new Filters(data);
    this.maps = data.models.map((_, m) => new DocumentMap(data, m, {
      point: (doc, event) => this.point(doc, event),
      open: (doc) => this.open(doc),
    }));
    document.getElementById("maps").replaceChildren(...this.maps.map((map) => map.figure));
    document.body.classList.toggle("two", data.models.length > 1);
    this.panel = new Panel(document.getElementById("panel"), this);
    this.histograms = new FilterPanel(document.getElementById("filters"), this);
    this.search = new SearchBox(this);
    this.fillControls();
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.onchange = () => this.show();
    addEventListener("hashchange", () => this.show());
    addEventListener("keydown", (event) => this.key(event));
    this.show();
    data.readTexts().then(() => {
      this.show();
      performance.mark("searchable");
    }).catch(fail);
  }

  fillControls() {
    const {data} = this, names = data.models.map((model) => model.name);
    document.title = `${names.join(" and ")} · emotrain explorer`;
    document.getElementById("what").textContent = names.join(" · ");
    document.getElementById("about").textContent = data.about;
    const fill = (id, options, change) => {
      const select = document.getElementById(id);
      select.replaceChildren(...options.map(([value, text]) => element("option", {value, textContent: text})));
      select.onchange = () => change(select.value);
      select.parentElement.hidden = options.length < 2;
    };
    fill("model", names.map((name, m) => [m, name]), (m) => this.go({model: Number(m), expert: null}));
    fill("map", data.maps.map((name) => [name, name.toUpperCase()]), (map) => this.go({map}));
    const color = document.getElementById("color");
    color.onchange = () => this.go({color: color.value});
    const layer = document.getElementById("layer");
    layer.onchange = () => this.go({layer: Number(layer.value), expert: null});
    document.getElementById("theme").onclick = () => this.switchTheme();
    document.querySelector(".skip").onclick = (event) => {
      event.preventDefault();  // the address holds the state
      document.getElementById("panel").focus();
    };
    const guide = document.getElementById("guide");
    document.getElementById("help").onclick = () => guide.showModal();
  }

  // ---- from one state to another

  /** Ask for another state: the address changes, and what it says is shown. */
  go(changes) {
    const asked = writeState(this.data, {...this.state, ...changes});
    if (asked === "#" && !location.hash) return;
    location.hash = asked;
  }

  filter(kind, value) {
    this.go({filters: {...this.state.filters, [kind]: value}, doc: null, expert: null});
  }

  toggle(kind, value) {
    const values = new Set(this.state.filters[kind]);
    if (!values.delete(value)) values.add(value);
    this.go({filters: {...this.state.filters, [kind]: values}});
  }

  clear() {
    this.go({filters: readState(this.data, "").filters});
  }

  open(doc) { this.go({doc, expert: null}); }

  /** Open the document before or after, among those that the filters leave. */
  step(by) {
    const {passing} = this.filters, {doc} = this.state;
    if (!passing.length) return;
    let place = passing.findIndex((other) => other >= (doc ?? 0));
    if (doc === null) place = by > 0 ? 0 : passing.length - 1;
    else if (place < 0) place = by > 0 ? 0 : passing.length - 1;
    else if (passing[place] === doc || by < 0) place += by;
    this.open(passing[(place + passing.length) % passing.length]);
  }

  /** Every filter that is set -> [{text, remove}, …]. */
  activeFilters() {
    const {data, state} = this, found = [];
    for (const [kind, values] of Object.entries(state.filters)) {
      if (kind === "text") {
        if (values) found.push({text: `“${values}”`, remove: () => this.filter("text", "")});
        continue;
      }
      const model = data.models[kind.slice(-1)], of = data.models.length > 1 && model ? ` of ${model.name}` : "";
      for (const value of values) {
        const [layer, expert] = String(value).split(".");
        const text = kind === "domain" ? data.domains[value]
          : kind.startsWith("cluster") ? `cluster ${value} ${model.clusters[value]}${of}`
            : `expert ${expert} of layer ${model.layers[layer]}${of}`;
        found.push({text, remove: () => this.toggle(kind, value)});
      }
    }
    return found;
  }

  switchTheme() {
    this.go({theme: this.theme === "dark" ? "light" : "dark"});
  }

  // ---- showing it

  show() {
    const {data} = this, state = readState(data, location.hash), before = this.theme;
    this.state = state;
    this.theme = state.theme || (this.dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = this.theme;
    this.filters.take(state.filters);
    this.ranks = data.models.map((_, m) => this.ranksOf(m));
    for (const map of this.maps) {
      if (before !== this.theme) map.restyle();
      map.show({...state, fails: this.filters.fails, ranks: this.ranks[map.model]});
    }
    const model = data.models[state.model], layer = document.getElementById("layer");
    layer.replaceChildren(...model.layers.map((name, l) => element("option", {value: l, textContent: name})));
    for (const id of ["model", "layer", "color", "map"]) document.getElementById(id).value = state[id];
    this.histograms.show();
    this.panel.show();
    this.search.show();
  }

  /** The mark of each document on the map of a model. */
  ranksOf(m) {
    const {data, state} = this;
    if (state.color === "domain") return data.columns.domain;
    if (state.color === "cluster") return data.columns[`cluster${m}`];
    const layer = Math.min(state.layer, data.models[m].layers.length - 1);
    return Uint16Array.from({length: data.count}, (_, doc) =>
      this.rankOf("expert", m, data.poolOf(m, layer, doc).experts[0]));
  }

  /** The mark of a domain, of a cluster, or of an expert: the most used one comes first. */
  rankOf(color, m, index) {
    if (color !== "expert") return index;
    const {layers, pages} = this.data.models[m], layer = Math.min(this.state.layer, layers.length - 1);
    this.expertRanks ??= new Map();
    if (!this.expertRanks.has(`${m}.${layer}`)) {
      const order = [...pages[layer].keys()].sort((a, b) => pages[layer][b].load - pages[layer][a].load);
      const ranks = [];
      order.forEach((expert, rank) => { ranks[expert] = rank; });
      this.expertRanks.set(`${m}.${layer}`, ranks);
    }
    return this.expertRanks.get(`${m}.${layer}`)[index] ?? 0;
  }

  /** Point at a document on all maps; `event` says where its name is shown. */
  point(doc, event) {
    if (doc !== this.pointed) {
      this.pointed = doc;
      for (const map of this.maps) {
        map.pointed = doc;
        map.canvas.style.cursor = doc === null ? "" : "pointer";
        map.redraw();
      }
    }
    if (!event || doc === null) {
      this.say();
      return;
    }
    const {data} = this, cluster = (m) => data.models[m].clusters[data.clusterOf(m, doc)];
    const say = (text) => this.say([data.domainOf(doc), ...data.models.map((_, m) => cluster(m)), text]
      .filter(Boolean).join(" · "), event.clientX, event.clientY);
    say("");
    data.snippet(doc, 24).then((text) => this.pointed === doc && say(text));
  }

  /** Show a line beside the pointer; without a text, none. */
  say(text, x, y) {
    const tip = document.getElementById("tip");
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    tip.style.left = `${Math.min(x + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
  }

  key(event) {
    const guide = document.getElementById("guide");
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || guide.open) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const onMaps = (act) => () => this.maps.forEach(act);
    const moves = {ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60]};
    const act = event.shiftKey && moves[event.key]
      ? onMaps((map) => map.move(...moves[event.key]))
      : {
        "/": () => this.search.input.focus(),
        "?": () => guide.showModal(),
        t: () => this.switchTheme(),
        ArrowLeft: () => this.step(-1),
        ArrowRight: () => this.step(1),
        Escape: () => (this.state.doc !== null || this.state.expert ? this.go({doc: null, expert: null}) : this.clear()),
        "+": onMaps((map) => map.zoom(1.6)),
        "-": onMaps((map) => map.zoom(1 / 1.6)),
        0: onMaps((map) => map.reset()),
      }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }
}

Data.open().then((data) => {
  new App(data);
  // After the first picture: the page answers from here on.
  requestAnimationFrame(() => setTimeout(() => performance.mark("interactive")));  // for benchmarks
}).catch(fail);

/** Say why the page does not work, in place of the documents. */
function fail(error) {
  document.getElementById("panel").textContent = `This page cannot be shown: ${error.message}.`;
}
