// Draws what the server found: props.value is a result of describe_segmentation, props.attention of describe_attention.
const find = (selector) => element.querySelector(selector);
const viewer = find(".viewer"), stage = find(".stage"), layer = find(".layer"), tip = find(".tip");
const sourceMenu = find(".source select"), depth = find(".depth input"), headMenu = find(".head select");
const opacity = find(".opacity input");

const CONFIDENCE = ramp([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]);
const HEAT = ramp([[0, 0, 0], [170, 20, 20], [245, 130, 20], [255, 255, 235]]);
const EXPLANATIONS = {
  spot: "Click anywhere in the image. Bright is what the network compares that spot with.",
  class: "Bright is where the network looks for this class.",
};

let ids = null;  // class of each pixel
let confidence = null;  // 0 to 255 for each pixel
let view = "classes";
let pinned = null, pointed = null;  // classes to bring out: clicked, and under the pointer
let spot = null;  // [x, y], whose attention is shown

function ramp(stops) {
  return Array.from({length: 256}, (_, level) => {
    const position = level / 255 * (stops.length - 1), left = Math.min(Math.floor(position), stops.length - 2);
    return stops[left].map((start, channel) => start + (position - left) * (stops[left + 1][channel] - start));
  });
}

function percent(share) {
  return share >= 0.0005 ? (100 * share).toFixed(1) + " %" : "< 0.1 %";
}

async function pixelsOf(url, width, height) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, width, height).data;
}

function paint(width, height, colorAt) {
  const image = new ImageData(width, height);
  for (let index = 0; index < width * height; index++) colorAt(index, image.data, 4 * index);
  layer.width = width;
  layer.height = height;
  layer.getContext("2d").putImageData(image, 0, 0);
}

function put(data, at, color, alpha = 255) {
  data[at] = color[0];
  data[at + 1] = color[1];
  data[at + 2] = color[2];
  data[at + 3] = alpha;
}

function draw() {
  if (ids === null) return;
  const {width, height, classes} = props.value;
  layer.style.opacity = opacity.value / 100;
  find(".marker").hidden = view !== "attention" || spot === null || sourceMenu.value !== "spot";
  if (view === "classes") {
    const colors = new Map(classes.map(({id, color}) => [id, color]));
    const bright = new Map(classes.map(({id, color}) => [id, color.map((part) => 0.65 * part + 0.35 * 255)]));
    const chosen = pointed ?? pinned;
    paint(width, height, (index, data, at) => {
      const id = ids[index];
      const border = (index % width && ids[index - 1] !== id) || (index >= width && ids[index - width] !== id);
      put(data, at, (border ? bright : colors).get(id), chosen === null || chosen === id ? 255 : 40);
    });
  } else if (view === "confidence") {
    paint(width, height, (index, data, at) => put(data, at, CONFIDENCE[confidence[index]]));
  } else if (props.attention) {
    const {rows, columns, maps} = props.attention, bytes = atob(maps), start = rows * columns * headMenu.value;
    paint(columns, rows, (index, data, at) => put(data, at, HEAT[bytes.charCodeAt(start + index)]));
  } else {
    paint(1, 1, () => {});
  }
}

function fillLegend(classes) {
  find(".legend").replaceChildren(...classes.map(({id, name, color, share}) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.title = name;
    button.ariaPressed = "false";
    for (const [kind, text] of [["swatch", ""], ["name", name], ["share", percent(share)]]) {
      const part = document.createElement("span");
      part.className = kind;
      part.textContent = text;
      button.append(part);
    }
    button.firstChild.style.background = `rgb(${color})`;
    const bringOut = (chosen) => { pointed = chosen; draw(); };
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && bringOut(id));
    button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && bringOut(null));
    button.addEventListener("click", () => {
      pinned = pinned === id ? null : id;
      for (const other of element.querySelectorAll(".legend button")) other.ariaPressed = String(other === button && pinned === id);
      draw();
    });
    item.append(button);
    return item;
  }));
}

function fillMenu(menu, entries) {
  menu.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

async function showResult() {
  const result = props.value;
  viewer.hidden = !result;
  find(".empty").hidden = Boolean(result);
  ids = confidence = pinned = pointed = spot = null;
  tip.hidden = true;
  if (!result) return;
  const {width, height, classes} = result;
  const data = await pixelsOf(result.pixels, width, height);
  if (result !== props.value) return;  // another one has come meanwhile
  ids = Uint16Array.from({length: width * height}, (_, index) => data[4 * index] + 256 * data[4 * index + 1]);
  confidence = Uint8Array.from({length: width * height}, (_, index) => data[4 * index + 2]);
  find(".photograph").src = result.photograph;
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.maxWidth = `calc(75vh * ${width / height})`;
  find(".download").href = result.label_map;
  find(".download").download = "label_map.png";
  find(".average").textContent = percent(confidence.reduce((sum, level) => sum + level, 0) / 255 / confidence.length);
  fillLegend(classes);
  fillMenu(sourceMenu, [["spot", "the spot I click"], ...classes.map(({id, name}) => [id, name])]);
  find("[value=attention]").parentElement.hidden = !result.encoder_layers;  // an exported model has none
  find(".source").hidden = !result.decoder_layers;
  fillMenu(headMenu, [[0, "all, averaged"]]);
  chooseSource();
  if (stage.getBoundingClientRect().top > 0.8 * innerHeight) viewer.scrollIntoView({behavior: "smooth"});  // on a phone
}

function chooseSource() {
  const ofSpot = sourceMenu.value === "spot";
  find(".explanation").textContent = EXPLANATIONS[ofSpot ? "spot" : "class"];
  depth.max = ofSpot ? props.value.encoder_layers : props.value.decoder_layers;
  depth.value = depth.max;
  nameLayer();
  ask();
}

function nameLayer() {
  find(".depth output").textContent = `${depth.value} of ${depth.max}`;
}

function ask() {
  if (view === "attention" && ids !== null) {
    const {width, height} = props.value;
    spot ??= [Math.floor(width / 2), Math.floor(height / 2)];
    find(".marker").style.left = `${100 * (spot[0] + 0.5) / width}%`;
    find(".marker").style.top = `${100 * (spot[1] + 0.5) / height}%`;
    const asked = sourceMenu.value === "spot" ? {x: spot[0], y: spot[1]} : {class_id: Number(sourceMenu.value)};
    trigger("select", {...asked, layer: depth.value - 1});
  }
  draw();
}

function showAttention() {
  if (props.attention) {
    const {rows, columns, maps} = props.attention, heads = atob(maps).length / rows / columns - 1;
    const chosen = Math.min(headMenu.value, heads);
    fillMenu(headMenu, [[0, "all, averaged"], ...Array.from({length: heads}, (_, head) => [head + 1, head + 1])]);
    headMenu.value = chosen;
  }
  draw();
}

function pixelUnder(event) {
  const box = stage.getBoundingClientRect(), {width, height} = props.value;
  const inside = (position, side) => Math.max(0, Math.min(side - 1, Math.floor(position * side)));
  return [inside((event.clientX - box.left) / box.width, width), inside((event.clientY - box.top) / box.height, height)];
}

function pointAt(event) {
  if (ids === null) return;
  const [x, y] = pixelUnder(event), index = y * props.value.width + x, box = stage.getBoundingClientRect();
  tip.textContent = `${props.value.classes.find(({id}) => id === ids[index]).name} · ${Math.round(confidence[index] / 2.55)} % sure`;
  tip.hidden = false;
  const left = event.clientX - box.left + 14, top = event.clientY - box.top - tip.offsetHeight - 10;
  tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth))}px`;
  tip.style.top = `${Math.max(0, top)}px`;
}

stage.addEventListener("pointermove", pointAt);
stage.addEventListener("pointerdown", pointAt);
stage.addEventListener("pointerleave", (event) => { tip.hidden = tip.hidden || event.pointerType === "mouse"; });
stage.addEventListener("click", (event) => {
  if (view !== "attention" || ids === null) return;
  spot = pixelUnder(event);
  if (sourceMenu.value === "spot") return ask();
  sourceMenu.value = "spot";
  chooseSource();
});
for (const choice of element.querySelectorAll(".views input")) {
  choice.addEventListener("change", () => {
    view = choice.value;
    for (const section of element.querySelectorAll("section")) section.hidden = section.dataset.view !== view;
    if (view === "attention" && !props.attention) ask();
    else draw();
  });
}
opacity.addEventListener("input", () => { layer.style.opacity = opacity.value / 100; });
sourceMenu.addEventListener("change", chooseSource);
depth.addEventListener("input", nameLayer);
depth.addEventListener("change", ask);
headMenu.addEventListener("change", draw);
find(".ramp").style.background = `linear-gradient(to right, ${[0, 64, 128, 191, 255].map((level) => `rgb(${CONFIDENCE[level].map(Math.round)})`)})`;
watch("value", showResult);
watch("attention", showAttention);
showResult();
