// What is shown, as the fragment of the address: every view is a link, and the browser's back
// button goes back. A click changes the address alone; the page is drawn from the address.

const COLORS = ["domain", "cluster", "expert"];

/** The kinds of filters. Keys of the address; the last two exist once for each model. */
function filterKinds(data) {
  const ofModels = data.models.flatMap((_, m) => [`cluster${m}`, `expert${m}`]);
  return ["domain", "text", ...ofModels];
}

/** The state that an address asks for. What it asks wrongly is passed over: a link comes from
 * anywhere. */
function readState(data, fragment) {
  const asked = new URLSearchParams(fragment.replace(/^#/, ""));
  const number = (key, below, otherwise) => {
    const text = asked.get(key) ?? "";
    return /^\d{1,9}$/.test(text) && Number(text) < below ? Number(text) : otherwise;
  };
  const choice = (key, choices) => (choices.includes(asked.get(key)) ? asked.get(key) : choices[0]);
  const model = number("model", data.models.length, 0);
  const state = {
    model,
    layer: number("layer", data.models[model].layers.length, data.models[model].layers.length - 1),
    color: choice("color", COLORS),
    map: choice("map", data.maps),
    theme: choice("theme", ["", "light", "dark"]),
    tokens: choice("tokens", ["expert", "cluster"]),
    numbers: choice("numbers", ["no", "yes"]),
    doc: number("doc", data.count, null),
    expert: null,
    filters: {domain: new Set(), text: (asked.get("text") ?? "").slice(0, 200)},
  };
  if (expertOf(data, model, asked.get("page"))) state.expert = asked.get("page");
  for (const name of asked.getAll("domain")) {
    if (data.domains.includes(name)) state.filters.domain.add(data.domains.indexOf(name));
  }
  data.models.forEach((of, m) => {
    const clusters = asked.getAll(`cluster${m}`).filter((c) => /^\d{1,5}$/.test(c) && c < of.clusters.length);
    state.filters[`cluster${m}`] = new Set(clusters.map(Number));
    state.filters[`expert${m}`] = new Set(asked.getAll(`expert${m}`).filter((e) => expertOf(data, m, e)));
  });
  return state;
}

/** Place of the layer and number of the expert in "layer.expert"; null where there is none. */
function expertOf(data, model, text) {
  const found = /^(\d{1,3})\.(\d{1,5})$/.exec(text ?? "");
  const layer = found && Number(found[1]), expert = found && Number(found[2]);
  return found && expert < (data.models[model].experts[layer] ?? 0) ? {layer, expert} : null;
}

/** The address of a state: only what differs from the start. */
function writeState(data, state) {
  const asked = new URLSearchParams();
  const start = readState(data, state.model ? `model=${state.model}` : "");
  if (state.model) asked.set("model", state.model);
  for (const key of ["layer", "color", "map", "theme", "tokens", "numbers", "doc"]) {
    if (state[key] !== start[key]) asked.set(key, state[key]);
  }
  if (state.expert) asked.set("page", state.expert);
  for (const index of state.filters.domain) asked.append("domain", data.domains[index]);
  if (state.filters.text) asked.set("text", state.filters.text);
  for (const key of filterKinds(data).slice(2)) {
    for (const value of state.filters[key]) asked.append(key, value);
  }
  return `#${asked}`;
}

/** Which documents pass which filters. Bit k of `fails` is set where a document fails the filters of
 * the k-th kind, so that a histogram counts what all other kinds leave in one pass. */
class Filters {
  constructor(data) {
    this.data = data;
    this.kinds = filterKinds(data);
    this.fails = new Uint8Array(data.count);
    this.set = {};
    this.version = 0;
    this.passing = Uint32Array.from(this.fails, (_, doc) => doc);
  }

  /** Take the filters of a state; `version` counts their changes. */
  take(filters) {
    let changed = false;
    this.kinds.forEach((kind, k) => {
      const text = kind === "text" ? `${filters.text} ${Boolean(this.data.texts)}` : [...filters[kind]].join();
      if (this.set[kind] === text) return;
      this.set[kind] = text;
      changed = true;
      const passes = this.test(kind, filters[kind]), bit = 1 << k;
      for (let doc = 0; doc < this.data.count; doc++) {
        if (passes && !passes(doc)) this.fails[doc] |= bit;
        else this.fails[doc] &= ~bit;
      }
    });
    if (!changed) return;
    this.version++;
    this.passing = Uint32Array.from(this.fails.keys()).filter((doc) => !this.fails[doc]);
  }

  /** Whether a document passes the filters of a kind; null where there are none. */
  test(kind, wanted) {
    const {data} = this;
    if (kind === "text") {
      const words = wanted.toLowerCase();
      return words && data.texts ? (doc) => data.texts[doc].includes(words) : null;
    }
    if (!wanted.size) return null;
    if (kind === "domain") return (doc) => wanted.has(data.columns.domain[doc]);
    const model = Number(kind.slice(-1));
    if (kind.startsWith("cluster")) return (doc) => wanted.has(data.clusterOf(model, doc));
    const experts = [...wanted].map((text) => expertOf(data, model, text));
    const pool = data.columns[`pool${model}`], width = data.pool;
    return (doc) => experts.some(({layer, expert}) => {
      const at = (layer * data.count + doc) * width;
      for (let i = at; i < at + width; i++) if (pool[i] === expert) return true;
      return false;
    });
  }

  /** Documents of each value that all other kinds of filters leave -> counts of the values. */
  histogram(kind, size, layer) {
    const {data, fails} = this, others = ~(1 << this.kinds.indexOf(kind));
    const counts = new Uint32Array(size + 1);  // the last one counts empty places of a pool
    const model = Number(kind.slice(-1)), values = data.columns[kind], pool = data.pool;
    const experts = data.columns[`pool${model}`], base = layer * data.count;
    for (let doc = 0; doc < data.count; doc++) {
      if (fails[doc] & others) continue;
      if (values) counts[values[doc]]++;
      else for (let i = 0; i < pool; i++) counts[Math.min(experts[(base + doc) * pool + i], size)]++;
    }
    return counts.subarray(0, size);
  }
}
