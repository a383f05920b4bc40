/** A model that onnxruntime-web runs: loads the files of an export and makes a `Network` of them. */

import type { InferenceSession } from "onnxruntime-web";

import { readLabels, readProtocol, type Label, type Protocol } from "./config.js";
import type { Network, Progress } from "./core.js";
import { DTYPE_SUFFIXES, type Dtype, type ModelFiles } from "./model_files.js";

export type Device = "webgpu" | "wasm";

export interface LoadOptions {
  /** The number format: which of the files in `onnx/` is loaded. */
  dtype: Dtype;
  device: Device;
  /** Address of the folder with the files of onnxruntime-web. */
  runtime: string;
  onProgress?: (progress: Progress) => void;
}

export interface LoadedModel {
  protocol: Protocol;
  labels: Label[];
  network: Network;
  device: Device;
  release(): Promise<void>;
}

/** Whether WebGPU has an adapter here; a browser may have the interface and no GPU that it can use. */
export async function hasWebGpu(): Promise<boolean> {
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<unknown> } }).gpu;
  try {
    return Boolean(gpu && (await gpu.requestAdapter()));
  } catch {
    return false;
  }
}

async function readJson(files: ModelFiles, path: string): Promise<unknown> {
  const content = await files.read(path);
  if (content === undefined) return undefined;
  try {
    return JSON.parse(new TextDecoder().decode(content));
  } catch {
    throw new TypeError(`${files.name}, ${path}: expected JSON, got a file that is not.`);
  }
}

async function readModel(
  files: ModelFiles,
  dtype: Dtype,
  onProgress?: (progress: Progress) => void,
): Promise<{ model: Uint8Array; options: InferenceSession.SessionOptions }> {
  const path = `onnx/model${DTYPE_SUFFIXES[dtype]}.onnx`;
  const model = await files.read(path, onProgress);
  if (model === undefined) {
    throw new Error(
      `${files.name}: there is no ${path}. Export the model with "segmenter-hf export", and with --dtypes ${dtype} if ` +
        "the folder has other number formats.",
    );
  }
  const config = (await readJson(files, "config.json")) as Record<string, Record<string, unknown>> | undefined;
  const split = config?.["transformers.js_config"]?.use_external_data_format as Record<string, number> | undefined;
  const name = path.split("/")[1];
  if (!split?.[name]) return { model, options: {} };
  const data = await files.read(`${path}_data`, onProgress);
  if (data === undefined) throw new Error(`${files.name}: there is no ${path}_data, which holds the weights.`);
  return { model, options: { externalData: [{ path: `${name}_data`, data }] } };
}

/**
 * Load a model.
 *
 * @throws Error If files are missing, damaged, or not of an exported model.
 */
export async function loadModel(files: ModelFiles, options: LoadOptions): Promise<LoadedModel> {
  const content = await readJson(files, "preprocessor_config.json");
  if (content === undefined) {
    throw new Error(`${files.name}: there is no preprocessor_config.json. Expected the folder of an exported model.`);
  }
  const protocol = readProtocol(content);
  const labelSet = await readJson(files, "label_set.json");
  const labels = readLabels(labelSet, labelSet === undefined ? await readJson(files, "config.json") : undefined);
  const { model, options: sessionOptions } = await readModel(files, options.dtype, options.onProgress);

  const ort = await (options.device === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"));
  ort.env.wasm.wasmPaths = options.runtime;
  ort.env.logLevel = "error";
  // Threads need memory that workers share, which a page has only when it is isolated from other origins.
  if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(model, {
    executionProviders: [options.device],
    ...sessionOptions,
  });
  const network: Network = async ({ data, dims }) => {
    const { logits } = await session.run({ pixel_values: new ort.Tensor("float32", data, dims) });
    const values = (await logits.getData()) as Float32Array;
    logits.dispose();
    return { data: values, dims: logits.dims };
  };
  return { protocol, labels, network, device: options.device, release: () => session.release() };
}
