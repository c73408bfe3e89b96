// Colours and shapes. Eight colours that colour-blind readers tell apart, times six shapes: a mark is
// never told by its colour alone.

const NUM_COLORS = 8;
const SHAPES = [  // paths of radius 1: circle, square, triangle, diamond, ring, cross
  "M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0Z",
  "M-.85 -.85H.85V.85H-.85Z",
  "M0 -1.1L1 .8H-1Z",
  "M0 -1.2L1 0L0 1.2L-1 0Z",
  "M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0ZM.5 0A.5 .5 0 1 0 -.5 0A.5 .5 0 1 0 .5 0Z",
  "M-.35 -1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",
];
const SVG = "http://www.w3.org/2000/svg";  // a name, not an address

const colorOf = (rank) => `var(--c${rank % NUM_COLORS})`;
const shapeOf = (rank) => SHAPES[Math.floor(rank / NUM_COLORS) % SHAPES.length];

/** A colour of the style sheet as a canvas wants it, in the theme of the moment. */
function resolved(color) {
  const probe = document.createElement("i");
  probe.style.color = color;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** A mark as a picture for canvases, of a radius in pixels. */
function markPicture(rank, radius) {
  const size = Math.ceil(2.6 * radius);
  const picture = element("canvas", {width: size, height: size});
  const context = picture.getContext("2d");
  context.translate(size / 2, size / 2);
  context.scale(radius, radius);
  context.fillStyle = resolved(colorOf(rank));
  context.fill(new Path2D(shapeOf(rank)));
  return picture;
}

/** A mark as an element, for legends; its colour follows the theme. */
function markElement(rank) {
  const mark = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
  mark.setAttribute("viewBox", "-1.3 -1.3 2.6 2.6");
  mark.setAttribute("class", "mark");
  mark.ariaHidden = "true";
  path.setAttribute("d", shapeOf(rank));
  mark.style.fill = colorOf(rank);
  mark.append(path);
  return mark;
}

/** An element with properties and children. Text is always text. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
