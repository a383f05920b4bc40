/**
 * Segmenter and SETR in the browser.
 *
 * ```ts
 * import { Segmenter } from "segmenter-hf-web";
 *
 * const segmenter = await Segmenter.from("https://example.org/my_model/");
 * const { classMap, labels, height, width } = await segmenter(document.querySelector("img"));
 * ```
 *
 * The image stays in the browser: only the files of the model are fetched. Everything runs in a worker.
 */

import type { Label } from "./config.js";
import type { Progress, Segmentation, SegmentOptions } from "./core.js";
import type { Loaded, LoadRequest, Reply, Request, SegmentRequest } from "./messages.js";
import type { Device } from "./model.js";
import { folderAddress, type Dtype } from "./model_files.js";
import type { Pixels } from "./preprocess.js";

export type { Label } from "./config.js";
export type { LabelShare, Progress, Segmentation, SegmentOptions } from "./core.js";
export type { Device } from "./model.js";
export { DTYPE_SUFFIXES, hubAddress, type Dtype } from "./model_files.js";
export { labelMapPng } from "./png.js";
export type { Pixels } from "./preprocess.js";

/** An address of a folder, or the files of one: a list of files, or a ZIP archive. */
export type ModelInput = string | URL | Blob | Iterable<File>;

/** An image: an address, a file, RGBA pixels, or what a canvas can draw. */
export type ImageInput = string | URL | Blob | Pixels | ImageData | ImageBitmapSource;

export interface SegmenterOptions {
  /** The number format to load; `"fp32"` gives the class maps of the Python package. */
  dtype?: Dtype;
  /** `"auto"` takes WebGPU where there is a GPU, else WebAssembly. */
  device?: Device | "auto";
  /** Address of the folder with `worker.js` and `ort/`; by default that of this module. */
  assets?: string | URL;
  onProgress?: (progress: Progress) => void;
}

export interface Segmenter {
  /** Segment an image. */
  (image: ImageInput, options?: SegmentOptions): Promise<Segmentation>;
  /** The classes of the model, by id. */
  readonly labels: readonly Label[];
  /** What it runs on. */
  readonly device: Device;
  /** Stop the worker and free its memory. */
  dispose(): void;
}

interface Waiting {
  resolve(result: Loaded | Segmentation): void;
  reject(error: Error): void;
  onProgress?: (progress: Progress) => void;
}

/** Sends requests to a worker and gives the replies to who waits for them. */
class WorkerClient {
  private readonly waiting = new Map<number, Waiting>();
  private last = 0;
  private stopped: Error | undefined;

  constructor(private readonly worker: Worker) {
    worker.onmessage = ({ data }: MessageEvent<Reply>) => {
      const waiting = this.waiting.get(data.id);
      if (data.kind === "progress") {
        waiting?.onProgress?.(data.progress);
        return;
      }
      this.waiting.delete(data.id);
      if (data.kind === "error") waiting?.reject(new Error(data.message));
      else waiting?.resolve(data.result);
    };
    worker.onerror = (event) => this.stop(new Error(`The worker failed: ${event.message || "it cannot be loaded"}.`));
  }

  ask(request: LoadRequest, onProgress?: Waiting["onProgress"]): Promise<Loaded>;
  ask(request: SegmentRequest, onProgress?: Waiting["onProgress"]): Promise<Segmentation>;
  ask(request: LoadRequest | SegmentRequest, onProgress?: Waiting["onProgress"]): Promise<Loaded | Segmentation> {
    if (this.stopped) return Promise.reject(this.stopped);
    const id = ++this.last;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onProgress });
      const transfer = request.kind === "segment" && request.image instanceof ImageBitmap ? [request.image] : [];
      this.worker.postMessage({ ...request, id } satisfies Request, transfer);
    });
  }

  stop(error = new Error("The segmenter was disposed of.")): void {
    this.worker.terminate();
    this.stopped ??= error;
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }
}

/** The image in a form that goes to a worker. */
async function sendable(image: ImageInput): Promise<SegmentRequest["image"]> {
  if (typeof image === "string" || image instanceof URL) {
    const response = await fetch(image);
    if (!response.ok) throw new Error(`${image}: the server answers ${response.status} ${response.statusText}.`);
    return response.blob();
  }
  if (image instanceof Blob) return image;
  if ("data" in image) return { data: image.data as Pixels["data"], height: image.height, width: image.width };
  return createImageBitmap(image, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
}

function modelSource(model: ModelInput): LoadRequest["source"] {
  if (typeof model === "string" || model instanceof URL) return { address: folderAddress(model, document.baseURI) };
  if (model instanceof File) return { files: [model] };
  if (model instanceof Blob) return { files: [new File([model], "model.zip")] };
  return { files: [...model] };
}

async function from(model: ModelInput, options: SegmenterOptions = {}): Promise<Segmenter> {
  const assets = new URL(options.assets ?? ".", import.meta.url);
  const client = new WorkerClient(new Worker(new URL("worker.js", assets), { type: "module" }));
  try {
    const { labels, device } = await client.ask(
      {
        kind: "load",
        source: modelSource(model),
        dtype: options.dtype ?? "fp32",
        device: options.device ?? "auto",
        runtime: new URL("ort/", assets).href,
      },
      options.onProgress,
    );
    const segment = async (image: ImageInput, { onProgress, ...settings }: SegmentOptions = {}) =>
      client.ask({ kind: "segment", image: await sendable(image), options: settings }, onProgress);
    return Object.assign(segment, { labels, device, dispose: () => client.stop() });
  } catch (error) {
    client.stop();
    throw error;
  }
}

export const Segmenter = {
  /**
   * Load a model that `segmenter-hf export` wrote.
   *
   * @param model The address of its folder, its files, or a ZIP archive of them.
   * @throws Error If the model cannot be fetched or is not an exported model.
   */
  from,
};
