// The histograms at the side: each row counts documents, and filters by its value when pressed.

class FilterPanel {
  /** `app` has the state, the filters, the marks, and `go`, which asks for another state. */
  constructor(root, app) {
    const closed = new Set(matchMedia("(max-width: 700px)").matches ? COLORS : []);
    Object.assign(this, {root, app, closed, built: ""});
  }

  show() {
    const {state, data} = this.app, model = data.models[state.model];
    const key = [state.model, state.layer, state.color].join();
    if (this.built !== key) {
      this.built = key;
      const of = data.models.length > 1 ? ` of ${model.name}` : "";
      const size = data.pool;
      this.sections = [
        this.section("domain", "Domains", "domain", data.domains.map((name, d) => ({value: d, name}))),
        this.section(`cluster${state.model}`, `Clusters${of}`, "cluster",
          model.clusters.map((name, c) => ({value: c, name: `${c} ${name}`}))),
        this.section(`expert${state.model}`, `Experts of layer ${model.layers[state.layer]}${of}`, "expert",
          Array.from({length: model.experts[state.layer]}, (_, e) => ({
            value: `${state.layer}.${e}`, name: `Expert ${e}`, page: true,
          })), `documents with the expert among the ${size} they use most`),
      ];
      const scrolled = this.root.scrollTop;
      this.root.replaceChildren(...this.sections.map((section) => section.element));
      this.root.scrollTop = scrolled;
    }
    for (const section of this.sections) this.count(section);
  }

  /** A histogram with a row for each value: {kind, element, rows}. */
  section(kind, title, color, values, note = "") {
    const {app} = this, rows = values.map(({value, name, page}, index) => {
      const bar = element("i"), number = element("span", {className: "number"});
      const press = element("button", {type: "button", className: "row", title: name,
        onclick: () => app.toggle(kind, value)},
      element("span", {className: "name", textContent: name}), element("span", {className: "bar"}, bar), number);
      if (app.state.color === color) press.prepend(markElement(app.rankOf(color, app.state.model, index)));
      const item = element("li", {}, press);
      if (page) {
        item.append(element("button", {type: "button", className: "open", textContent: "›",
          ariaLabel: `Page of expert ${index}`, title: `Page of expert ${index}`,
          onclick: () => app.go({expert: value, doc: null})}));
      }
      return {value, name, press, bar, number, item};
    });
    const list = element("ul", {}, ...rows.map((row) => row.item));
    const details = element("details", {open: !this.closed.has(color)},
      element("summary", {}, element("h2", {textContent: title}), element("small", {textContent: note})), list);
    details.ontoggle = () => this.closed[details.open ? "delete" : "add"](color);
    return {kind, rows, element: details};
  }

  count({kind, rows}) {
    const {app} = this, counts = app.filters.histogram(kind, rows.length, app.state.layer);
    const most = Math.max(1, ...counts), pressed = app.state.filters[kind];
    rows.forEach((row, index) => {
      const count = counts[index].toLocaleString("en");
      row.bar.style.width = `${(100 * counts[index]) / most}%`;
      row.number.textContent = count;
      row.press.ariaPressed = String(pressed.has(row.value));
      row.press.ariaLabel = `${row.name}: ${count} documents`;
      row.item.classList.toggle("none", !counts[index]);
    });
  }
}
