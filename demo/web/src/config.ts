/** What an exported model says of itself: `preprocessor_config.json`, `label_set.json`, `config.json`. */

import type { Interpolation } from "./geometry.js";

/** A class. `id` is its value in a class map, `color` is RGB from 0 to 255. */
export interface Label {
  id: number;
  name: string;
  color: [red: number, green: number, blue: number];
}

/** The protocol of an image processor, with the names of `preprocessor_config.json` where it has them. */
export interface Protocol {
  doResize: boolean;
  shortestEdge: number;
  longestEdge: number | null;
  interpolation: Interpolation;
  antialias: boolean;
  rescaleFactor: number;
  mean: number[];
  std: number[];
  splitWindows: boolean;
  windowSize: number;
  windowStride: number;
  /** Side in pixels to whose multiple the logits of a window reach: 1 where they end with it (`padding` "center"). */
  paddingMultiple: number;
  scales: number[];
  flip: boolean;
}

type Json = Record<string, unknown>;

const INTERPOLATIONS: Record<number, Interpolation> = { 0: "nearest", 2: "bilinear", 3: "bicubic" };

function fail(file: string, expected: string, got: unknown): never {
  throw new TypeError(`${file}: expected ${expected}, got ${JSON.stringify(got)?.slice(0, 100)}.`);
}

function asObject(value: unknown, file: string): Json {
  if (typeof value !== "object" || value === null || Array.isArray(value)) fail(file, "an object", value);
  return value as Json;
}

function number(fields: Json, name: string, file: string, least: number, fallback?: number): number {
  const value = fields[name] ?? fallback;
  if (typeof value !== "number" || !(value >= least) || !Number.isFinite(value)) {
    fail(file, `a number of at least ${least} as ${name}`, value);
  }
  return value;
}

function threeNumbers(fields: Json, name: string, file: string, fallback: number): number[] {
  let value = fields[name] ?? fallback;
  if (typeof value === "number") value = [value, value, value];
  if (Array.isArray(value) && value.length === 1) value = [value[0], value[0], value[0]];
  if (!Array.isArray(value) || value.length !== 3 || !value.every((each) => typeof each === "number")) {
    fail(file, `three numbers as ${name}, because images in a browser have three channels`, value);
  }
  return value as number[];
}

function scalesOf(fields: Json, file: string): number[] {
  const scales = fields.scales ?? [1];
  if (!Array.isArray(scales) || !scales.length || !scales.every((scale) => typeof scale === "number" && scale > 0)) {
    fail(file, "a list of factors above 0 as scales", scales);
  }
  return scales;
}

/** Read `preprocessor_config.json`. */
export function readProtocol(content: unknown): Protocol {
  const file = "preprocessor_config.json";
  const fields = asObject(content, file);
  const size = asObject(fields.size ?? {}, `${file}, size`);
  const doResize = fields.do_resize !== false;
  const doNormalize = fields.do_normalize !== false;
  const resample = (fields.resample ?? 2) as number;
  if (!(resample in INTERPOLATIONS)) fail(file, "0 (nearest), 2 (bilinear) or 3 (bicubic) as resample", resample);
  if (![undefined, "end", "center"].includes(fields.padding as string)) fail(file, '"end" or "center" as padding', fields.padding);
  for (const name of ["do_resize_to_window", "value_range"]) {
    if (fields[name]) fail(file, `no ${name}, which a browser does not follow`, fields[name]);
  }
  const windowSize = number(fields, "window_size", file, 1);
  return {
    doResize,
    shortestEdge: doResize ? number(size, "shortest_edge", `${file}, size`, 1) : 0,
    longestEdge: size.longest_edge == null ? null : number(size, "longest_edge", `${file}, size`, 1),
    interpolation: INTERPOLATIONS[resample],
    antialias: fields.antialias === true,
    rescaleFactor: fields.do_rescale === false ? 1 : number(fields, "rescale_factor", file, 0, 1 / 255),
    mean: doNormalize ? threeNumbers(fields, "image_mean", file, 0.5) : [0, 0, 0],
    std: doNormalize ? threeNumbers(fields, "image_std", file, 0.5) : [1, 1, 1],
    splitWindows: fields.do_split_windows !== false,
    windowSize,
    windowStride: number(fields, "window_stride", file, 1, windowSize),
    paddingMultiple: fields.padding === "center" ? 1 : number(fields, "patch_size", file, 1, 16),
    scales: scalesOf(fields, file),
    flip: fields.do_flip === true,
  };
}

/** The color of a class that has none: hues in steps of the golden ratio. */
export function defaultColor(index: number): [number, number, number] {
  const hue = ((0.58 + index * 0.6180339887) % 1) * 6;
  const channel = (shift: number) => {
    const k = (shift + hue) % 6;
    return Math.round(255 * (0.85 - 0.55 * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

/**
 * The classes of a model, by id.
 *
 * @param labelSet `label_set.json`, or `undefined` where there is none.
 * @param config `config.json`, whose `id2label` names the classes otherwise.
 */
export function readLabels(labelSet: unknown, config: unknown): Label[] {
  if (labelSet !== undefined) {
    const entries = asObject(labelSet, "label_set.json").labels;
    if (!Array.isArray(entries) || !entries.length) fail("label_set.json", "a list of labels", entries);
    return entries.map((entry, id) => {
      const { id: given = id, name, color } = asObject(entry, "label_set.json");
      if (given !== id) fail("label_set.json", `the labels in the order of their ids, with ${id} as the next`, given);
      if (typeof name !== "string") fail("label_set.json", `a name for label ${id}`, name);
      const isColor = Array.isArray(color) && color.length === 3 && color.every((each) => typeof each === "number");
      return { id, name, color: isColor ? (color as Label["color"]) : defaultColor(id) };
    });
  }
  const names = asObject(asObject(config ?? {}, "config.json").id2label ?? {}, "config.json, id2label");
  const count = Object.keys(names).length;
  if (!count) fail("config.json", "names of the classes as id2label, or a file label_set.json", names);
  const labels = Array.from({ length: count }, (_, id) => String(names[id]));
  if (count === 1) labels.unshift("background"); // a model of one class has one logit, and a map of two values
  return labels.map((name, id) => ({ id, name, color: defaultColor(id) }));
}
