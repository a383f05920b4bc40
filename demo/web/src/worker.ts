/** Loads one model and segments images with it, one at a time, away from the page. */

import { segmentPixels, type Progress, type Segmentation } from "./core.js";
import type { Loaded, LoadRequest, Reply, Request, SegmentRequest } from "./messages.js";
import { hasWebGpu, loadModel, type LoadedModel } from "./model.js";
import { filesAt, filesFrom } from "./model_files.js";
import type { Pixels } from "./preprocess.js";

const scope = globalThis as unknown as {
  onmessage: ((event: MessageEvent<Request>) => void) | null;
  postMessage(message: Reply, transfer?: Transferable[]): void;
};

let model: LoadedModel | undefined;
let queue: Promise<void> = Promise.resolve();

async function load(request: LoadRequest, onProgress: (progress: Progress) => void): Promise<Loaded> {
  const { source, dtype, runtime } = request;
  const files = "address" in source ? filesAt(source.address) : await filesFrom(source.files);
  const device = request.device === "auto" ? ((await hasWebGpu()) ? "webgpu" : "wasm") : request.device;
  try {
    model = await loadModel(files, { dtype, device, runtime, onProgress });
  } catch (error) {
    // A GPU may lack an operator or memory. WebAssembly runs every model, and nobody asked for the GPU.
    if (request.device !== "auto" || device === "wasm") throw error;
    model = await loadModel(files, { dtype, device: "wasm", runtime, onProgress });
  }
  return { labels: model.labels, device: model.device };
}

/** The pixels of an image, upright, in the colors of its file. */
async function decode(image: ImageBitmap | Blob | Pixels): Promise<Pixels> {
  if ("data" in image) return image;
  let bitmap = image as ImageBitmap;
  if (image instanceof Blob) {
    try {
      bitmap = await createImageBitmap(image, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    } catch {
      throw new TypeError("This file cannot be read as an image. JPEG, PNG and WebP work.");
    }
  }
  try {
    return readPixels(bitmap);
  } finally {
    bitmap.close();
  }
}

function readPixels(bitmap: ImageBitmap): Pixels {
  const { height, width } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error(`The browser has no memory for an image of ${width} x ${height} pixels.`);
  context.fillRect(0, 0, 1, 1);
  if (context.getImageData(0, 0, 1, 1).data[3] !== 255) { // a canvas that is too long on a side stays empty
    throw new Error(`The browser cannot read an image of ${width} x ${height} pixels. Make it smaller.`);
  }
  context.clearRect(0, 0, 1, 1);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, width, height);
}

async function segment(request: SegmentRequest, onProgress: (progress: Progress) => void): Promise<Segmentation> {
  if (!model) throw new Error("No model is loaded.");
  const pixels = await decode(request.image);
  return segmentPixels(pixels, model.protocol, model.labels, model.network, { ...request.options, onProgress });
}

async function answer(request: Request): Promise<void> {
  const { id } = request;
  const onProgress = (progress: Progress) => scope.postMessage({ id, kind: "progress", progress });
  try {
    if (request.kind === "load") {
      scope.postMessage({ id, kind: "done", result: await load(request, onProgress) });
    } else {
      const result = await segment(request, onProgress);
      const transfer = [result.classMap.buffer, ...(result.confidence ? [result.confidence.buffer] : [])];
      scope.postMessage({ id, kind: "done", result }, transfer);
    }
  } catch (error) {
    scope.postMessage({ id, kind: "error", message: error instanceof Error ? error.message : String(error) });
  }
}

scope.onmessage = (event) => {
  queue = queue.then(() => answer(event.data));
};
