// The search box: it suggests domains, clusters and experts, and searches the text of the documents.

const MOST_OF_A_KIND = 4;

class SearchBox {
  constructor(app) {
    this.app = app;
    this.input = document.getElementById("search");
    this.list = document.getElementById("found");
    this.input.oninput = () => this.suggest();
    this.input.onfocus = () => this.input.value && this.suggest();
    this.input.onblur = () => this.close();
    this.input.onkeydown = (event) => this.key(event);
    // A press must not take the focus before the click is there.
    this.list.onpointerdown = (event) => event.preventDefault();
  }

  show() {
    if (document.activeElement !== this.input) this.input.value = this.app.state.filters.text;
  }

  /** What a text may mean -> [{kind, text, act}, …]; the text itself comes first. */
  suggestions(text) {
    const {app} = this, {data, state} = app, m = state.model, model = data.models[m];
    const words = text.toLowerCase(), found = [];
    const hits = data.texts ? data.texts.reduce((sum, of) => sum + of.includes(words), 0) : null;
    found.push({kind: "Text", text: `“${text}”` + (hits === null ? "" : ` in ${hits.toLocaleString("en")} documents`),
      act: () => app.filter("text", text)});
    const offer = (kind, values, matches, act) => values.map((value, index) => [value, index])
      .filter(([value, index]) => matches(value, index)).slice(0, MOST_OF_A_KIND)
      .forEach(([value, index]) => found.push({kind, text: value, act: () => act(index)}));
    offer("Domain", data.domains, (name) => `domain ${name}`.toLowerCase().includes(words),
      (index) => app.filter("domain", new Set([index])));
    offer("Cluster", model.clusters.map((label, c) => `${c} ${label}`),
      (name) => `cluster ${name}`.toLowerCase().includes(words),
      (index) => app.filter(`cluster${m}`, new Set([index])));
    const [layer, number] = /^(?:expert )?(?:(\d+)\.)?(\d+)$/.exec(words)?.slice(1) ?? [];
    model.layers.forEach((name, l) => {
      const tokens = (e) => model.pages[l][e].tokens.slice(0, 5).map(([id]) => data.tokenText(id));
      const asked = layer === undefined ? l === state.layer : Number(layer) === name;
      const experts = Array.from({length: model.experts[l]}, (_, e) => e).filter((e) =>
        (number !== undefined && asked && e === Number(number)) ||
        (words.length > 1 && l === state.layer && tokens(e).some((t) => t.toLowerCase().includes(words))));
      for (const e of experts.slice(0, MOST_OF_A_KIND)) {
        found.push({kind: "Expert", text: `${name}.${e} ${tokens(e).join(" ")}`,
          act: () => app.go({layer: l, expert: `${l}.${e}`, doc: null})});
      }
    });
    return found;
  }

  suggest() {
    const text = this.input.value.trim().slice(0, 200);
    if (!text) {
      this.close();
      return;
    }
    this.found = this.suggestions(text);
    this.list.replaceChildren(...this.found.map((one, index) => {
      const item = element("li", {id: `found-${index}`, onclick: () => this.take(index)},
        element("small", {textContent: one.kind}), element("span", {textContent: one.text}));
      item.setAttribute("role", "option");
      return item;
    }));
    this.list.hidden = false;
    this.input.ariaExpanded = "true";
    this.point(0);
  }

  point(index) {
    this.at = (index + this.found.length) % this.found.length;
    [...this.list.children].forEach((item, i) => { item.ariaSelected = String(i === this.at); });
    this.input.setAttribute("aria-activedescendant", `found-${this.at}`);
    this.list.children[this.at].scrollIntoView({block: "nearest"});
  }

  take(index) {
    const {act} = this.found[index];
    this.close();
    this.input.value = "";
    this.input.blur();
    act();
  }

  close() {
    this.list.hidden = true;
    this.input.ariaExpanded = "false";
    this.input.removeAttribute("aria-activedescendant");
  }

  key(event) {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (step && !this.list.hidden) this.point(this.at + step);
    else if (event.key === "Enter" && !this.list.hidden) this.take(this.at);
    else if (event.key === "Enter") this.app.filter("text", "");  // an emptied box
    else if (event.key === "Escape") {
      this.input.value = this.app.state.filters.text;
      this.input.blur();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
