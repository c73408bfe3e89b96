// The panel: the list of the documents that the filters leave, one document, or one expert.

const ROW_HEIGHT = 34;  // of a row of the list, as in the style sheet
const NUM_TINTS = 8;  // experts of a doc that get a colour

class Panel {
  constructor(root, app) {
    Object.assign(this, {root, app, shown: ""});
  }

  show() {
    const {app} = this, {state} = app;
    const key = [state.doc, state.expert, state.model, state.layer, state.tokens, state.numbers, state.color,
      state.doc ?? app.filters.version].join();
    if (this.shown === key) return;
    const view = state.doc !== null ? "doc" : state.expert ? "expert" : "list";
    const moved = this.view !== undefined && this.view !== view && this.root.contains(document.activeElement);
    Object.assign(this, {shown: key, view});
    if (view === "doc") this.doc(state.doc);
    else if (view === "expert") this.expert(expertOf(app.data, state.model, state.expert));
    else this.list();
    if (moved) this.root.focus({preventScroll: true});  // what had the focus is gone
  }

  /** Show a view: a line with its title and buttons, and what is under it. */
  put(title, buttons, ...content) {
    this.root.className = this.view;
    this.root.replaceChildren(element("div", {className: "head"}, element("h2", {textContent: title}), ...buttons),
      ...content);
    if (this.view !== "list") this.root.scrollTop = 0;
  }

  button(text, act, label = text) {
    return element("button", {type: "button", textContent: text, onclick: act, ariaLabel: label, title: label});
  }

  back() {
    return this.button("✕", () => this.app.go({doc: null, expert: null}), "Back to the list (Esc)");
  }

  // ---- the list

  list() {
    const {app} = this, {passing} = app.filters, all = app.data.count.toLocaleString("en");
    const some = passing.length.toLocaleString("en");
    const chips = app.activeFilters().map(({text, remove}) => this.button(`${text} ✕`, remove, `Remove ${text}`));
    if (chips.length) chips.push(this.button("Clear all", () => app.clear(), "Clear all filters (Esc)"));
    const room = element("div", {className: "room"}), rows = element("div", {className: "rows", tabIndex: 0}, room);
    rows.setAttribute("role", "list");
    rows.ariaLabel = "Documents";
    room.style.height = `${passing.length * ROW_HEIGHT}px`;
    rows.onscroll = () => this.fill(rows, room);
    this.put(chips.length ? `${some} of ${all} documents` : `${all} documents`, [],
      element("div", {className: "chips"}, ...chips),
      passing.length ? rows : element("p", {className: "empty", textContent: "No document passes these filters."}));
    this.watch?.disconnect();
    this.watch = new ResizeObserver(() => this.fill(rows, room));  // also when it is first shown
    this.watch.observe(rows);
  }

  /** Make the rows that can be seen. */
  fill(rows, room) {
    const {app} = this, {passing} = app.filters;
    const first = Math.max(0, Math.floor(rows.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(passing.length, first + Math.ceil(rows.clientHeight / ROW_HEIGHT) + 8);
    room.replaceChildren(...Array.from({length: last - first}, (_, i) => {
      const doc = passing[first + i], row = this.row(doc);
      row.style.top = `${(first + i) * ROW_HEIGHT}px`;
      row.setAttribute("role", "listitem");
      return row;
    }));
  }

  /** A document as a button, with what it starts with. */
  row(doc, note = this.app.data.domainOf(doc)) {
    const {app} = this, text = element("span", {className: "text"});
    app.data.snippet(doc).then((snippet) => { text.textContent = snippet; });
    const button = element("button", {type: "button", className: "entry", onclick: () => app.open(doc)},
      markElement(app.ranks[app.state.model][doc]), text, element("small", {textContent: note}));
    button.onpointerenter = () => app.point(doc);
    button.onpointerleave = () => app.point(null);
    return element("div", {}, button);
  }

  // ---- a document

  async doc(number) {
    const {app} = this, {data, state} = app, shown = this.shown;
    const {ids, experts} = await data.tokensOf(number);
    if (shown !== this.shown) return;  // another one was asked for meanwhile
    const texts = data.pieces(ids), domain = data.columns.domain[number];
    const choose = element("div", {className: "chips"},
      this.button(data.domainOf(number), () => app.filter("domain", new Set([domain])),
        `Filter by domain ${data.domainOf(number)}`),
      element("span", {textContent: "Tokens by"}),
      ...[["expert", "expert"], ["cluster", "expert's cluster"]].map(([by, name]) => {
        const button = this.button(name, () => app.go({tokens: by}), `Colour tokens by ${by === "expert"
          ? "their expert" : "the cluster of documents that uses their expert most"}`);
        button.ariaPressed = String(state.tokens === by);
        return button;
      }));
    const numbers = this.button("numbers", () => app.go({numbers: state.numbers === "yes" ? "no" : "yes"}),
      "Show the number of each token's expert");
    numbers.ariaPressed = String(state.numbers === "yes");
    choose.append(numbers);
    const columns = data.models.map((_, m) => this.tokens(number, m, texts, experts[m]));
    this.put(`Document ${data.columns.doc[number]}`, [
      this.button("←", () => app.step(-1), "The document before (←)"),
      this.button("→", () => app.step(1), "The next document (→)"), this.back()],
    choose, element("div", {className: "columns"}, ...columns));
  }

  /** A document's tokens as one model routes them, with a legend of its experts, or of the clusters of
   * documents that use these experts most: what its experts are for, not clusters of tokens. */
  tokens(number, m, texts, ofLayers) {
    const {app} = this, {data, state} = app, model = data.models[m];
    const layer = Math.min(state.layer, model.layers.length - 1), first = ofLayers[layer];
    const byCluster = state.tokens === "cluster", none = model.experts[layer];
    const valueOf = (e) => (e >= none ? -1 : byCluster ? model.pages[layer][e].cluster : e);
    const counts = new Map();
    for (const e of first) counts.set(valueOf(e), (counts.get(valueOf(e)) ?? 0) + 1);
    const order = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b);
    const text = element("p", {className: "tokens"});
    first.forEach((e, i) => {
      const value = valueOf(e), tint = order.indexOf(value), token = element("span", {className: "t"});
      token.dataset.value = value;
      token.dataset.say = `${e >= none ? "no expert" : `expert ${e}`}`;
      if (tint < NUM_TINTS) {
        token.style.setProperty("--t", colorOf(tint));
        if (tint >= NUM_TINTS / 2) token.classList.add("dashed");
      }
      for (const [part, isBytes] of texts[i]) {
        token.append(isBytes ? element("code", {textContent: part}) : part);
      }
      if (/^\s*\n\s*$/.test(token.textContent)) token.classList.add("line");
      if (state.numbers === "yes") token.append(element("sub", {textContent: byCluster ? value : e}));
      text.append(token);
    });
    text.onpointermove = ({target, clientX, clientY}) => app.say(target.closest(".t")?.dataset.say, clientX, clientY);
    text.onpointerleave = () => app.say();
    const legend = element("div", {className: "chips legend"});
    const focus = (value) => {
      legend.dataset.focus = legend.dataset.focus === String(value) ? "" : value;
      for (const chip of legend.children) chip.ariaPressed = String(chip.dataset.value === legend.dataset.focus);
      for (const token of text.children) {
        token.classList.toggle("dim", legend.dataset.focus !== "" && token.dataset.value !== legend.dataset.focus);
      }
    };
    text.onclick = ({target}) => target.closest(".t") && focus(target.closest(".t").dataset.value);
    order.slice(0, NUM_TINTS).forEach((value, tint) => {
      const name = value < 0 ? "none" : byCluster ? `${value} ${model.clusters[value]}` : `${value}`;
      const share = `${Math.round((100 * counts.get(value)) / first.length)} %`;
      const chip = this.button("", () => focus(value), `${byCluster ? "Experts of cluster" : "Expert"} ${name}, ${share}: show their tokens`);
      chip.dataset.value = value;
      chip.ariaPressed = "false";
      chip.style.setProperty("--t", colorOf(tint));
      chip.className = tint >= NUM_TINTS / 2 ? "key dashed" : "key";
      chip.append(element("b", {textContent: name}), ` ${share}`);
      legend.append(chip);
    });
    const {experts, shares} = data.poolOf(m, layer, number), cluster = data.clusterOf(m, number);
    const links = [...experts].filter((e) => e < none).map((e, i) =>
      this.expertLink(m, layer, e, `${Math.round(shares[i] / 2.55)} %`));
    return element("article", {},
      element("h3", {}, model.name, element("small", {textContent: ` layer ${model.layers[layer]}, first expert of each token`})),
      legend, text,
      element("p", {className: "facts"}, "Cluster ", this.button(`${cluster} ${model.clusters[cluster]}`,
        () => app.filter(`cluster${m}`, new Set([cluster])), `Filter by cluster ${cluster}`)),
      element("p", {className: "facts"}, "Experts by mean probability ", ...links));
  }

  /** A button that opens an expert's page. */
  expertLink(model, layer, expert, note) {
    const button = this.button(`${expert}`, () => this.app.go({model, layer, expert: `${layer}.${expert}`, doc: null}),
      `Page of expert ${expert}, ${note}`);
    button.append(element("small", {textContent: ` ${note}`}));
    return button;
  }

  // ---- an expert

  expert({layer, expert}) {
    const {app} = this, {data, state} = app, m = state.model, model = data.models[m];
    const page = model.pages[layer][expert], value = `${layer}.${expert}`;
    const card = (title, note, ...content) => element("article", {},
      element("h3", {}, title, element("small", {textContent: ` ${note}`})), ...content);
    const chosen = state.filters[`expert${m}`].has(value);
    const filter = this.button(chosen ? "Do not filter by it" : "Filter by it", () => app.toggle(`expert${m}`, value));
    const most = Math.max(...page.domains), order = [...page.domains.keys()].sort((a, b) => page.domains[b] - page.domains[a]);
    const domains = element("ul", {className: "bars"}, ...order.map((d) => {
      const bar = element("i");
      bar.style.width = `${(100 * page.domains[d]) / (most || 1)}%`;
      return element("li", {}, element("span", {className: "name", textContent: data.domains[d]}),
        element("span", {className: "bar"}, bar),
        element("span", {className: "number", textContent: `${(100 * page.domains[d]).toFixed(1)} %`}));
    }));
    const tokens = element("ul", {className: "words"}, ...page.tokens.map(([id, count, share]) =>
      element("li", {title: `${count} times, ${Math.round(100 * share)} % of this token's places`},
        element("code", {textContent: data.tokenText(id)}), element("small", {textContent: ` ${count}`}))));
    const links = (pairs, say) => element("p", {className: "facts"},
      ...pairs.map(([e, number]) => this.expertLink(m, layer, e, say(number))));
    this.put(`Expert ${expert}`, [element("small", {textContent: `layer ${model.layers[layer]} of ${model.name}`}),
      filter, this.back()],
    element("p", {className: "lead", textContent: `It gets ${(100 * page.load).toFixed(1)} % of the routing probability, ` +
      `${(page.load * model.experts[layer]).toFixed(1)} times an even share. It serves cluster ` +
      `${page.cluster} (${model.clusters[page.cluster]}) most.`}),
    element("div", {className: "columns"},
      card("Tokens", "that choose it first, the most typical first; and how often", tokens),
      card("Domains", "mean probability of the expert", domains),
      card("Documents", "with the largest mean probability",
        ...page.documents.map(([doc, share]) => this.row(doc, `${(100 * share).toFixed(0)} % · ${data.domainOf(doc)}`))),
      card("Pool partners", "in the same pools; times as often as by chance", links(page.partners, (lift) => `${lift.toFixed(1)}×`)),
      card("Neighbours", "cosine of the router's rows, their mean taken off", links(page.neighbours, (cos) => cos.toFixed(2)))));
  }
}
