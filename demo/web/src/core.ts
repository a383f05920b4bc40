/**
 * Segmentation without a browser: pixels in, class map out, and any function that runs the network.
 *
 * The entry point `segmenter-hf-web/core`. `Segmenter` in `segmenter-hf-web` is this with onnxruntime-web, in a worker.
 */

import type { Label, Protocol } from "./config.js";
import type { Size } from "./geometry.js";
import { mergeViews, ViewLogits } from "./merge.js";
import { copyWindow, imageViews, type Pixels, type View } from "./preprocess.js";

export { readLabels, readProtocol, type Label, type Protocol } from "./config.js";
export type { Size } from "./geometry.js";
export { mergeViews, ViewLogits } from "./merge.js";
export { labelMapPng } from "./png.js";
export { imageViews, type Pixels } from "./preprocess.js";

export interface Tensor {
  data: Float32Array;
  dims: readonly number[];
}

/** Runs the network: `pixel_values` (windows, 3, height, width) to `logits` (windows, classes, rows, columns). */
export type Network = (pixelValues: Tensor) => Promise<Tensor>;

export interface Progress {
  stage: "download" | "prepare" | "windows" | "merge";
  done: number;
  total: number;
}

export interface SegmentOptions {
  /** Whether the probability of each pixel's class is wanted. */
  confidence?: boolean;
  /** Factors of the size that are averaged over; by default those of the model. */
  scales?: number[];
  /** Whether each scale is also seen mirrored; by default as the model has it. */
  flip?: boolean;
  /** Size in pixels of the class map; that of the image by default. */
  size?: Size;
  /** Windows that go through the network at once; 4 by default. */
  windowBatchSize?: number;
  onProgress?: (progress: Progress) => void;
}

export interface LabelShare extends Label {
  /** The share of the image's pixels that have the class, from 0 to 1. */
  share: number;
}

export interface Segmentation {
  /** The class of each pixel, row by row from the top left. */
  classMap: Uint8Array | Uint16Array;
  /** All classes, by id. */
  labels: LabelShare[];
  height: number;
  width: number;
  /** The probability of each pixel's class, from 0 to 1, if it was asked for. */
  confidence?: Float32Array;
}

const ROWS_BETWEEN_REPORTS = 64;

/** Run the windows of a view through the network, some at a time. */
async function viewLogits(
  view: View,
  protocol: Protocol,
  network: Network,
  batchSize: number,
  onWindows: (count: number) => void,
): Promise<ViewLogits> {
  const corners = view.tops.flatMap((top) => view.lefts.map((left) => [top, left]));
  const windowLength = 3 * view.windowHeight * view.windowWidth;
  let merged: ViewLogits | undefined;
  for (let first = 0; first < corners.length; first += batchSize) {
    const batch = corners.slice(first, first + batchSize);
    const data = new Float32Array(batch.length * windowLength);
    batch.forEach(([top, left], index) => copyWindow(view, top, left, data, index * windowLength));
    const logits = await network({ data, dims: [batch.length, 3, view.windowHeight, view.windowWidth] });
    const [count, channels, rows, columns] = logits.dims;
    if (logits.dims.length !== 4 || count !== batch.length) {
      throw new Error(`Expected logits (${batch.length}, classes, rows, columns), got (${logits.dims.join(", ")}).`);
    }
    merged ??= new ViewLogits(view, channels, rows, columns, protocol.paddingMultiple);
    const length = channels * rows * columns;
    for (let index = 0; index < count; index++) {
      merged.add(first + index, logits.data.subarray(index * length, (index + 1) * length));
    }
    onWindows(batch.length);
  }
  return merged!;
}

function countWindows({ tops, lefts }: View): number {
  return tops.length * lefts.length;
}

/**
 * Segment an image.
 *
 * @param pixels The image, RGBA.
 * @param protocol From `readProtocol`.
 * @param labels From `readLabels`.
 * @param network Runs the network.
 * @throws Error If the network's classes are not those of `labels`.
 */
export async function segmentPixels(
  pixels: Pixels,
  protocol: Protocol,
  labels: Label[],
  network: Network,
  options: SegmentOptions = {},
): Promise<Segmentation> {
  const chosen = { ...protocol, scales: options.scales ?? protocol.scales, flip: options.flip ?? protocol.flip };
  const report = options.onProgress ?? (() => {});
  const batchSize = options.windowBatchSize ?? 4;
  if (!Number.isInteger(batchSize) || batchSize < 1) {
    throw new RangeError(`windowBatchSize must be a whole number of at least 1, got ${batchSize}.`);
  }
  if (options.size && !(options.size.height >= 1 && options.size.width >= 1)) {
    throw new RangeError(`size must be at least 1 x 1 pixels, got ${options.size.height} x ${options.size.width}.`);
  }
  if (!chosen.scales.length || !chosen.scales.every((scale) => scale > 0 && scale <= 16)) {
    throw new RangeError(`scales must be one or more factors above 0 and up to 16, got ${chosen.scales}.`);
  }
  report({ stage: "prepare", done: 0, total: 1 });
  const merged: ViewLogits[] = [];
  const viewCount = chosen.scales.length * (chosen.flip ? 2 : 1);
  for (const view of imageViews(pixels, chosen)) {
    let done = 0;
    const onWindows = (count: number) => {
      done += count;
      report({ stage: "windows", done: merged.length + done / countWindows(view), total: viewCount });
    };
    merged.push(await viewLogits(view, chosen, network, batchSize, onWindows));
    if (merged[0].classes !== labels.length) {
      throw new Error(`The model has ${merged[0].classes} classes and ${labels.length} names: their files do not fit.`);
    }
  }
  const { height, width } = options.size ?? pixels;
  const { classMap, confidence } = mergeViews(merged, { height, width }, options.confidence, (rows) => {
    if (rows % ROWS_BETWEEN_REPORTS === 0 || rows === height) report({ stage: "merge", done: rows, total: height });
  });
  const counts = new Float64Array(labels.length);
  for (const id of classMap) counts[id] += 1;
  const shares = labels.map((label) => ({ ...label, share: counts[label.id] / classMap.length }));
  return { classMap, labels: shares, height, width, confidence };
}
