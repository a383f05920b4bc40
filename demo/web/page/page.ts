/** The page: a model and an image go in, colors come out. All work is done by the package, in its worker. */

import { hubAddress, labelMapPng, Segmenter, type Dtype, type ModelInput, type Progress, type Segmentation } from "../src/index.js";
import { droppedFiles, isModel } from "./drop.js";
import { composite, drawOverlay, percentage, type Shown } from "./render.js";

const MAX_SHOWN_PIXELS = 3_000_000; // of the map: larger images are seen by the model as they are, and shown smaller

function element<T extends HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

const photo = element<HTMLCanvasElement>("photo");
const overlay = element<HTMLCanvasElement>("overlay");
const opacity = element<HTMLInputElement>("opacity");
const progressBar = element<HTMLProgressElement>("progress");

interface Photo {
  image: Blob;
  name: string;
  height: number;
  width: number;
}

interface Result extends Photo {
  segmentation: Segmentation;
}

let segmenter: Segmenter | undefined;
let turns: Promise<void> = Promise.resolve(); // ends when nothing is left to do
let newest: Blob | undefined; // what was chosen last, shown or not yet
let shownPhoto: Photo | undefined;
let waiting: Photo | undefined; // what is segmented next
let current: Result | undefined;
const shown: Shown = { kind: "classes" };

function showError(message?: string): void {
  element("error").hidden = !message;
  element("error").textContent = message ?? "";
}

function showProgress(text?: string, share?: number): void {
  element("working").hidden = !text;
  element("doing").textContent = text ?? "";
  progressBar.hidden = share === 0;
  if (share === undefined) progressBar.removeAttribute("value");
  else progressBar.value = share;
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}

function reportLoading({ done, total }: Progress): void {
  if (done && done < total) showProgress(`Loading the model: ${megabytes(done)} of ${megabytes(total)}`, done / total);
  else showProgress("Starting the model");
}

function reportSegmenting({ stage, done, total }: Progress): void {
  if (stage === "windows") showProgress("Looking at the image", Math.max((0.8 * done) / total, 0.01));
  else if (stage === "merge") showProgress("Merging what was seen", 0.8 + (0.2 * done) / total);
  else showProgress("Reading the image");
}

/** Do one thing after another, show what goes wrong, and then segment the image that waits. */
function work(action: () => Promise<void>): void {
  turns = turns.then(async () => {
    element("model-form").inert = true;
    try {
      await action();
    } catch (error) {
      showError(error instanceof Error ? error.message : String(error));
    }
    element("model-form").inert = false;
    showProgress();
    segmentWaiting();
  });
}

function loadModel(model: ModelInput, name: string): void {
  work(async () => {
    showError();
    showProgress("Loading the model");
    const dtype = element<HTMLSelectElement>("dtype").value as Dtype;
    const loaded = await Segmenter.from(model, {
      dtype,
      assets: new URL("lib/", import.meta.url),
      onProgress: reportLoading,
    });
    segmenter?.dispose();
    segmenter = loaded;
    waiting ??= shownPhoto;
    const device = loaded.device === "webgpu" ? "the GPU" : "the processor";
    element("loaded").textContent = `${name}: ${loaded.labels.length} classes, runs on ${device}`;
    element("loaded").hidden = false;
  });
}

/** Show an image at once, whether or not there is a model yet. */
function showPhoto(image: Blob, bitmap: ImageBitmap): Photo {
  const { height, width } = bitmap;
  const scale = Math.min(1, Math.sqrt(MAX_SHOWN_PIXELS / (height * width)));
  photo.height = Math.max(1, Math.round(height * scale));
  photo.width = Math.max(1, Math.round(width * scale));
  photo.getContext("2d")!.drawImage(bitmap, 0, 0, photo.width, photo.height);
  bitmap.close();
  overlay.height = photo.height; // also clears it
  overlay.width = photo.width;
  element("stage").hidden = false;
  element("invitation").hidden = true;
  element("result").hidden = true;
  element("tip").hidden = true;
  element("drop").classList.add("filled");
  const name = image instanceof File ? image.name.replace(/\.[^.]*$/, "") : "image";
  return { image, name, height, width };
}

async function takeImage(image: Blob, others: number): Promise<void> {
  newest = image;
  const bitmap = await createImageBitmap(image).catch(() => undefined);
  if (newest !== image) { // another one was chosen meanwhile
    bitmap?.close();
    return;
  }
  if (!bitmap) {
    showError("This file cannot be read as an image. JPEG, PNG and WebP work.");
    return;
  }
  shownPhoto = waiting = showPhoto(image, bitmap);
  current = undefined;
  showError();
  segmentWaiting();
  if (others) showError(`One image at a time: the first is taken, ${others} more ${others === 1 ? "is" : "are"} left out.`);
}

function segmentWaiting(): void {
  if (!waiting) return;
  if (!segmenter) {
    const working = element("model-form").inert;
    if (!working && element("error").hidden) showProgress("Choose a model to see what is where.", 0);
    return;
  }
  work(async () => {
    if (!waiting || !segmenter) return; // an earlier turn has segmented it
    const [segment, job] = [segmenter, waiting];
    waiting = undefined;
    showProgress("Reading the image");
    const size = { height: photo.height, width: photo.width };
    const segmentation = await segment(job.image, { confidence: true, size, onProgress: reportSegmenting });
    if (waiting) return; // another image is shown by now
    current = { ...job, segmentation };
    shown.only = undefined;
    showResult(current);
  });
}

function showResult({ segmentation }: Result): void {
  const legend = element("legend");
  legend.replaceChildren();
  const present = segmentation.labels.filter(({ share }) => share > 0).sort((a, b) => b.share - a.share);
  for (const { id, name, color, share } of present) {
    const button = document.createElement("button");
    button.type = "button";
    button.ariaPressed = "false";
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `rgb(${color.map(Math.round).join(" ")})`;
    const [text, part] = [document.createElement("span"), document.createElement("span")];
    text.className = "name";
    text.textContent = name;
    part.className = "share";
    part.textContent = percentage(share);
    const meter = document.createElement("meter");
    meter.value = share;
    button.append(swatch, text, part, meter);
    button.onclick = () => chooseClass(button, id);
    const item = document.createElement("li");
    item.append(button);
    legend.append(item);
  }
  element("result").hidden = false;
  drawCurrent();
}

function chooseClass(button: HTMLButtonElement, id: number): void {
  shown.only = shown.only === id ? undefined : id;
  for (const other of document.querySelectorAll(".legend button")) other.ariaPressed = "false";
  button.ariaPressed = String(shown.only === id);
  drawCurrent();
}

function drawCurrent(): void {
  element("scale").hidden = shown.kind !== "confidence";
  if (current) drawOverlay(overlay, current.segmentation, shown);
}

/** Say what is under the pointer. */
function showTip(event: PointerEvent): void {
  const tip = element("tip");
  tip.hidden = !current;
  if (!current) return;
  const { classMap, labels, confidence, height, width } = current.segmentation;
  const box = overlay.getBoundingClientRect();
  const x = Math.min(Math.max(Math.floor(((event.clientX - box.left) / box.width) * width), 0), width - 1);
  const y = Math.min(Math.max(Math.floor(((event.clientY - box.top) / box.height) * height), 0), height - 1);
  const pixel = y * width + x;
  const sure = confidence ? `, ${Math.round(100 * confidence[pixel])} % sure` : "";
  tip.textContent = `${labels[classMap[pixel]].name}${sure}`;
  const stage = element("stage").getBoundingClientRect();
  const left = Math.min(event.clientX - stage.left + 14, stage.width - tip.offsetWidth - 6);
  const above = event.clientY - stage.top - tip.offsetHeight - 12;
  tip.style.left = `${Math.max(left, 6)}px`;
  tip.style.top = `${above > 0 ? above : event.clientY - stage.top + 18}px`;
}

function save(content: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function takeFiles(files: File[]): void {
  if (!files.length) return;
  if (isModel(files)) loadModel(files, files.length === 1 ? files[0].name : "Your files");
  else void takeImage(files[0], files.length - 1);
}

function onFiles(id: string, take: (files: File[]) => void): void {
  const input = element<HTMLInputElement>(id);
  input.onchange = () => {
    const files = [...(input.files ?? [])];
    input.value = ""; // the same file may be chosen again
    if (files.length) take(files);
  };
}

function loadAddress(address: string): void {
  if (!address) return;
  element<HTMLInputElement>("address").value = address;
  try {
    const isName = /^\w[\w.-]*\/\w[\w.-]*$/.test(address);
    loadModel(isName ? hubAddress(address) : new URL(address, document.baseURI), address);
  } catch {
    showError(`Expected an address or owner/name, got ${address}.`);
  }
}

function listen(): void {
  onFiles("image", takeFiles);
  onFiles("another", takeFiles);
  for (const id of ["files", "folder"]) {
    const folder = (files: File[]) => files[0].webkitRelativePath.split("/")[0];
    onFiles(id, (files) => loadModel(files, folder(files) || (files.length === 1 ? files[0].name : "Your files")));
  }
  element<HTMLFormElement>("model-form").onsubmit = (event) => {
    event.preventDefault();
    loadAddress(element<HTMLInputElement>("address").value.trim());
  };
  for (const radio of document.querySelectorAll<HTMLInputElement>("input[name=shown]")) {
    radio.onchange = () => {
      shown.kind = radio.value as Shown["kind"];
      drawCurrent();
    };
  }
  opacity.oninput = () => (overlay.style.opacity = String(Number(opacity.value) / 100));
  overlay.onpointermove = showTip;
  overlay.onpointerdown = showTip;
  overlay.onpointerleave = () => (element("tip").hidden = true);
  element("save-map").onclick = async () => {
    if (current) save(await labelMapPng(current.segmentation, current), `${current.name}_labels.png`);
  };
  element("save-overlay").onclick = async () => {
    if (current) save(await composite(photo, overlay, Number(opacity.value) / 100), `${current.name}_overlay.png`);
  };
  document.addEventListener("paste", (event) => takeFiles([...(event.clipboardData?.files ?? [])]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    element("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => element("drop").classList.remove("over"));
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    element("drop").classList.remove("over");
    if (event.dataTransfer) takeFiles(await droppedFiles(event.dataTransfer));
  });
}

/** Load the model that the address of the page names, or the one in the folder `model` beside it. */
async function loadFirstModel(): Promise<void> {
  const asked = new URLSearchParams(location.search);
  const dtype = asked.get("dtype");
  if (dtype) {
    const menu = element<HTMLSelectElement>("dtype");
    const known = [...menu.options].map(({ value }) => value);
    if (!known.includes(dtype)) {
      showError(`The address of this page asks for dtype=${dtype}: expected ${known.join(", ")}.`);
      return;
    }
    menu.value = dtype;
  }
  const model = asked.get("model");
  if (model) {
    loadAddress(model);
    return;
  }
  const beside = new URL("model/", document.baseURI);
  const answer = await fetch(new URL("preprocessor_config.json", beside), { method: "HEAD" }).catch(() => undefined);
  if (answer?.ok) loadModel(beside, "The model of this page");
}

overlay.style.opacity = String(Number(opacity.value) / 100);
listen();
void loadFirstModel();
