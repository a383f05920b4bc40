/** What the page and the worker say to each other. */

import type { Label } from "./config.js";
import type { Progress, Segmentation, SegmentOptions } from "./core.js";
import type { Device } from "./model.js";
import type { Dtype } from "./model_files.js";
import type { Pixels } from "./preprocess.js";

export type ModelSource = { address: string } | { files: File[] };

export interface LoadRequest {
  kind: "load";
  source: ModelSource;
  dtype: Dtype;
  device: Device | "auto";
  runtime: string;
}

export interface SegmentRequest {
  kind: "segment";
  image: ImageBitmap | Blob | Pixels;
  options: Omit<SegmentOptions, "onProgress">;
}

export type Request = (LoadRequest | SegmentRequest) & { id: number };

export interface Loaded {
  labels: Label[];
  device: Device;
}

export type Reply =
  | { id: number; kind: "progress"; progress: Progress }
  | { id: number; kind: "done"; result: Loaded | Segmentation }
  | { id: number; kind: "error"; message: string };
