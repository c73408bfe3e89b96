// What the page holds: compressed blocks in script elements that no browser runs. The index, the
// columns (a value a document) and the vocabulary are opened at once; tokens when they are needed.
// All of it is data: it reaches the page through textContent alone, never as markup.

const ARRAYS = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array};
const utf8 = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true});
const lenient = new TextDecoder("utf-8", {ignoreBOM: true});

/** The bytes of a block: base64 of zlib. */
async function bytesOf(name) {
  const block = document.getElementById(`block-${name}`);
  if (!block) throw new Error(`the file is not whole: its part ${name} is missing`);
  const text = block.textContent;
  let packed;
  if (Uint8Array.fromBase64) {
    packed = Uint8Array.fromBase64(text);
  } else {
    const binary = atob(text);
    packed = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) packed[i] = binary.charCodeAt(i);
  }
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** The documents, their routing and their tokens. U documents; a document is its number from 0. */
class Data {
  static async open() {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser is too old: it needs one of 2024 or newer");
    }
    const [index, columns, words] = await Promise.all(["index", "columns", "vocabulary"].map(bytesOf));
    return new Data(JSON.parse(utf8.decode(index)), columns, new Uint8Array(words));
  }

  constructor(index, columns, words) {
    Object.assign(this, index);  // models, domains, and the rest of what page.py calls the index
    this.columns = {};
    for (const [name, [kind, start, end]] of Object.entries(index.columns)) {
      this.columns[name] = new ARRAYS[kind](columns.slice(start, end));
    }
    this.words = words;
    this.count = this.columns.domain.length;
    this.opened = new Map();  // blocks of tokens
    this.texts = null;  // lower case, once `readTexts` is done
    // The script runs before the browser has read the blocks of tokens, which follow it.
    this.whole = new Promise((resolve) => {
      if (document.readyState !== "loading") resolve();
      else addEventListener("DOMContentLoaded", resolve, {once: true});
    });
  }

  domainOf(doc) { return this.domains[this.columns.domain[doc]]; }
  clusterOf(model, doc) { return this.columns[`cluster${model}`][doc]; }
  lengthOf(doc) { return this.columns.start[doc + 1] - this.columns.start[doc]; }

  /** Experts of a document in a layer (its place in the model's list), the most used first, and
   * their mean probabilities times 255. A layer with fewer experts has none in the last places. */
  poolOf(model, layer, doc) {
    const width = this.pool, at = (layer * this.count + doc) * width;
    return {
      experts: this.columns[`pool${model}`].subarray(at, at + width),
      shares: this.columns[`share${model}`].subarray(at, at + width),
    };
  }

  /** Token ids of a document and, for each model and layer, the first expert of each token. */
  async tokensOf(doc) {
    await this.whole;
    const number = Math.floor(doc / this.block_documents);
    if (!this.opened.has(number)) this.opened.set(number, bytesOf(`tokens${number}`));
    const buffer = await this.opened.get(number);
    const starts = this.columns.start, first = number * this.block_documents;
    const last = Math.min(first + this.block_documents, this.count);
    const size = starts[last] - starts[first], from = starts[doc] - starts[first];
    const length = this.lengthOf(doc);
    let at = 0;
    const take = (kind) => {
      const width = ARRAYS[kind].BYTES_PER_ELEMENT, begin = at + from * width;
      at += size * width;
      return new ARRAYS[kind](buffer.slice(begin, begin + length * width));
    };
    const ids = take(this.token_kind);
    return {ids, experts: this.models.map((model) => model.layers.map(() => take(model.expert_kind)))};
  }

  /** Bytes of a token of the vocabulary. */
  bytesOfToken(id) {
    const ends = this.columns.word_end;
    return this.words.subarray(id ? ends[id - 1] : 0, ends[id]);
  }

  /** What each token shows -> [[text, isBytes], …] for each. A character stands in the token that
   * holds its last byte. A token in which none ends shows its bytes in hexadecimal: half of a
   * character is never shown as an unknown one. */
  pieces(ids) {
    let held = [], heldIsShown = false;
    const shown = Array.from(ids, (id) => {
      const own = this.bytesOfToken(id), bytes = [...held, ...own], parts = [];
      let at = 0;
      while (at < bytes.length) {
        const size = characterSize(bytes, at);
        if (size > bytes.length - at) break;  // the rest comes with the next token
        if (size) parts.push([utf8.decode(Uint8Array.from(bytes.slice(at, at + size))), false]);
        else if (at >= held.length || !heldIsShown) parts.push([hex([bytes[at]]), true]);
        at += size || 1;
      }
      if (at) heldIsShown = false;
      held = bytes.slice(at);
      if (held.length && !parts.length) {
        parts.push([hex(heldIsShown ? [...own] : bytes), true]);
        heldIsShown = true;
      }
      return parts;
    });
    if (held.length && !heldIsShown) shown[shown.length - 1].push([hex(held), true]);
    return shown;
  }

  /** The start of a document's text, on one line. */
  async snippet(doc, tokens = 48) {
    const {ids} = await this.tokensOf(doc);
    const parts = this.pieces(ids.subarray(0, tokens)).flat();
    return parts.map(([text]) => text).join("").replace(/\s+/g, " ").trim();
  }

  /** The text of one token, for lists: blanks are named by signs. */
  tokenText(id) {
    const text = this.pieces([id]).flat().map(([part]) => part).join("");
    return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
  }

  /** Make the texts that the search reads, a few documents at a time so that the page stays quick. */
  async readTexts() {
    const texts = [];
    let pause = performance.now() + 12;
    for (let doc = 0; doc < this.count; doc++) {
      const {ids} = await this.tokensOf(doc);
      let size = 0;
      for (const id of ids) size += this.bytesOfToken(id).length;
      const bytes = new Uint8Array(size);
      let at = 0;
      for (const id of ids) {
        const own = this.bytesOfToken(id);
        bytes.set(own, at);
        at += own.length;
      }
      // Bytes of a character that the end cuts match no search; these texts are never shown.
      texts.push(lenient.decode(bytes).toLowerCase());
      if (performance.now() > pause) {
        await new Promise((resolve) => setTimeout(resolve));
        pause = performance.now() + 12;
      }
    }
    this.texts = texts;
  }
}

/** Bytes of the UTF-8 character that starts at a place: 0 where none can, and more than there are
 * where the last ones are missing. */
function characterSize(bytes, at) {
  const lead = bytes[at];
  const size = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  for (let i = at + 1; i < Math.min(at + size, bytes.length); i++) {
    if ((bytes[i] & 0xc0) !== 0x80) return 0;
  }
  const second = bytes[at + 1];
  if (second !== undefined) {  // the shortest form alone, no surrogates, at most U+10FFFF
    if ((lead === 0xe0 && second < 0xa0) || (lead === 0xed && second > 0x9f)) return 0;
    if ((lead === 0xf0 && second < 0x90) || (lead === 0xf4 && second > 0x8f)) return 0;
  }
  return size;
}

function hex(bytes) {
  return `‹${bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ")}›`;
}
