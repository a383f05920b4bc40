/** From pixels to the windows that go through the network. */

import type { Protocol } from "./config.js";
import { enlargedSize, resizeTaps, resizedSize, windowStarts, type Interpolation, type Size, type Taps } from "./geometry.js";

/** Pixels as a canvas has them: RGBA, 8 bits, row by row from the top. */
export interface Pixels extends Size {
  data: Uint8Array | Uint8ClampedArray;
}

/** One look at an image: at a scale, mirrored or not. `values` are (3, height, width), normalized. */
export interface View extends Size {
  values: Float32Array;
  flip: boolean;
  windowHeight: number;
  windowWidth: number;
  tops: number[];
  lefts: number[];
}

const CHANNELS = 3;
const MAX_PIXELS = 2 ** 26; // of a view: beyond any real use, and as many floats as a browser can be expected to hold

/** Round to the nearest whole number, halves to the even one, as torch and numpy do. */
export function roundHalfToEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** The taps of an axis that keeps its length. */
function identityTaps(size: number): Taps {
  return {
    offsets: Int32Array.from({ length: size + 1 }, (_, i) => i),
    indices: Int32Array.from({ length: size }, (_, i) => i),
    weights: new Float64Array(size).fill(1),
  };
}

/**
 * Apply taps along rows: to (channels, taps, width).
 *
 * @param at Where the value of a channel, row and column lies in `values`: the stride of each.
 */
function resizeRows(
  values: Float32Array | Uint8Array | Uint8ClampedArray,
  width: number,
  taps: Taps,
  at: { channel: number; row: number; column: number },
): Float32Array {
  const size = taps.offsets.length - 1;
  const resized = new Float32Array(CHANNELS * size * width);
  for (let channel = 0; channel < CHANNELS; channel++) {
    for (let row = 0; row < size; row++) {
      const to = (channel * size + row) * width;
      for (let k = taps.offsets[row]; k < taps.offsets[row + 1]; k++) {
        const from = channel * at.channel + taps.indices[k] * at.row;
        const weight = taps.weights[k];
        for (let x = 0; x < width; x++) resized[to + x] += weight * values[from + x * at.column];
      }
    }
  }
  return resized;
}

/** Apply taps along columns: (channels, height, width) to (channels, height, taps). */
function resizeColumns(values: Float32Array, { height, width }: Size, taps: Taps): Float32Array {
  const size = taps.offsets.length - 1;
  const resized = new Float32Array(CHANNELS * height * size);
  for (let row = 0; row < CHANNELS * height; row++) {
    for (let x = 0; x < size; x++) {
      let sum = 0;
      for (let k = taps.offsets[x]; k < taps.offsets[x + 1]; k++) {
        sum += taps.weights[k] * values[row * width + taps.indices[k]];
      }
      resized[row * size + x] = sum;
    }
  }
  return resized;
}

/** Resize (3, height, width). */
export function resize(values: Float32Array, from: Size, to: Size, mode: Interpolation, antialias = false): Float32Array {
  let resized = values;
  if (from.height !== to.height) {
    const strides = { channel: from.height * from.width, row: from.width, column: 1 };
    resized = resizeRows(resized, from.width, resizeTaps(from.height, to.height, mode, antialias), strides);
  }
  if (from.width !== to.width) {
    const size = { height: to.height, width: from.width };
    resized = resizeColumns(resized, size, resizeTaps(from.width, to.width, mode, antialias));
  }
  return resized;
}

/** Resize RGBA to (3, height, width) of whole numbers from 0 to 255; transparency is dropped. */
export function resizePixels(pixels: Pixels, to: Size, mode: Interpolation, antialias = false): Float32Array {
  const { height, width } = pixels;
  const taps = height === to.height ? identityTaps(height) : resizeTaps(height, to.height, mode, antialias);
  const rows = resizeRows(pixels.data, width, taps, { channel: 1, row: 4 * width, column: 4 });
  const resized = resize(rows, { height: to.height, width }, to, mode, antialias);
  for (let i = 0; i < resized.length; i++) resized[i] = Math.min(Math.max(roundHalfToEven(resized[i]), 0), 255);
  return resized;
}

function normalize(values: Float32Array, { rescaleFactor, mean, std }: Protocol): void {
  const size = values.length / CHANNELS;
  const factor = Math.fround(rescaleFactor);
  for (let channel = 0; channel < CHANNELS; channel++) {
    const [center, spread] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    for (let pixel = channel * size; pixel < (channel + 1) * size; pixel++) {
      values[pixel] = Math.fround(Math.fround(values[pixel] * factor) - center) / spread;
    }
  }
}

/** The image at one scale, normalized, with no side shorter than a window. */
function scaleImage(pixels: Pixels, scale: number, protocol: Protocol): Size & { values: Float32Array } {
  const size = { height: pixels.height, width: pixels.width };
  const longest = protocol.longestEdge === null ? null : Math.trunc(protocol.longestEdge * scale);
  const resized = protocol.doResize
    ? resizedSize(size, Math.trunc(protocol.shortestEdge * scale), longest)
    : resizedSize(size, Math.min(size.height, size.width) * scale);
  const enlarged = enlargedSize(resized, protocol.splitWindows ? protocol.windowSize : 1);
  if (Math.max(resized.height * resized.width, enlarged.height * enlarged.width) > MAX_PIXELS) {
    throw new RangeError(
      `An image of ${size.height} x ${size.width} pixels would become one of ${enlarged.height} x ${enlarged.width}, ` +
        `expected at most ${MAX_PIXELS} pixels: crop it, or resize it first.`,
    );
  }
  const values = resizePixels(pixels, resized, protocol.interpolation, protocol.antialias);
  normalize(values, protocol);
  // The protocol enlarges after normalization.
  return { values: resize(values, resized, enlarged, protocol.interpolation), ...enlarged };
}

function mirror(values: Float32Array, width: number): Float32Array {
  const mirrored = new Float32Array(values.length);
  for (let row = 0; row < values.length; row += width) {
    for (let x = 0; x < width; x++) mirrored[row + x] = values[row + width - 1 - x];
  }
  return mirrored;
}

/**
 * The views of an image, one after the other: each scale, and with `flip` its mirror image.
 *
 * @throws RangeError If the image is empty, or a view would be too large.
 */
export function* imageViews(pixels: Pixels, protocol: Protocol): Generator<View> {
  const { height, width } = pixels;
  if (!(height > 0 && width > 0) || pixels.data.length !== 4 * height * width) {
    throw new RangeError(
      `Expected RGBA pixels of at least 1 x 1, four values each; got ${height} x ${width} and ${pixels.data.length} values.`,
    );
  }
  for (const scale of protocol.scales) {
    const scaled = scaleImage(pixels, scale, protocol);
    const windowHeight = protocol.splitWindows ? protocol.windowSize : scaled.height;
    const windowWidth = protocol.splitWindows ? protocol.windowSize : scaled.width;
    const tops = windowStarts(scaled.height, windowHeight, Math.min(protocol.windowStride, windowHeight));
    const lefts = windowStarts(scaled.width, windowWidth, Math.min(protocol.windowStride, windowWidth));
    const view = { ...scaled, windowHeight, windowWidth, tops, lefts };
    yield { ...view, flip: false };
    if (protocol.flip) yield { ...view, values: mirror(scaled.values, scaled.width), flip: true };
  }
}

/** Copy one window of a view into (3, window height, window width) values from `offset` on. */
export function copyWindow(view: View, top: number, left: number, target: Float32Array, offset: number): void {
  const { values, height, width, windowHeight, windowWidth } = view;
  for (let channel = 0; channel < CHANNELS; channel++) {
    for (let row = 0; row < windowHeight; row++) {
      const from = (channel * height + top + row) * width + left;
      target.set(values.subarray(from, from + windowWidth), offset + (channel * windowHeight + row) * windowWidth);
    }
  }
}
