/** Sizes, windows and the samples that a resize looks at: the arithmetic of the Python package, without pixels. */

export interface Size {
  height: number;
  width: number;
}

/** For each new sample, the old samples it is made of: `indices` and `weights` from `offsets[i]` to `offsets[i + 1]`. */
export interface Taps {
  offsets: Int32Array;
  indices: Int32Array;
  weights: Float64Array;
}

export type Interpolation = "nearest" | "bilinear" | "bicubic";

/** Collects taps sample by sample; equal indices of a sample are added up. */
export class TapBuilder {
  private readonly offsets: Int32Array;
  private readonly indices: number[] = [];
  private readonly weights: number[] = [];
  private sample = 0;

  constructor(samples: number) {
    this.offsets = new Int32Array(samples + 1);
  }

  add(index: number, weight: number): void {
    if (weight === 0) return;
    const first = this.offsets[this.sample];
    const found = this.indices.indexOf(index, first);
    if (found >= 0) {
      this.weights[found] += weight;
    } else {
      this.indices.push(index);
      this.weights.push(weight);
    }
  }

  endSample(): void {
    this.sample += 1;
    this.offsets[this.sample] = this.indices.length;
  }

  build(): Taps {
    return { offsets: this.offsets, indices: Int32Array.from(this.indices), weights: Float64Array.from(this.weights) };
  }
}

/** The two old samples that new sample `i` lies between and the share of the second, as torch with align_corners=False. */
export function linearTap(old: number, size: number, i: number): [lower: number, upper: number, share: number] {
  const position = Math.max((i + 0.5) * (old / size) - 0.5, 0);
  const lower = Math.min(Math.floor(position), old - 1);
  return [lower, Math.min(lower + 1, old - 1), position - lower];
}

/** Cubic convolution with a = -0.75, as torch has it. */
function cubic(distance: number): number {
  const a = -0.75;
  const x = Math.abs(distance);
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return 0;
}

/**
 * The taps of a resize from `old` to `size` samples.
 *
 * @param antialias Widen the triangle of "bilinear" when the image shrinks, as Pillow does.
 */
export function resizeTaps(old: number, size: number, mode: Interpolation, antialias = false): Taps {
  const taps = new TapBuilder(size);
  const scale = old / size;
  for (let i = 0; i < size; i++) {
    const center = (i + 0.5) * scale;
    if (mode === "nearest") {
      taps.add(Math.min(Math.floor(center), old - 1), 1);
    } else if (mode === "bicubic") {
      const first = Math.floor(center - 0.5) - 1;
      for (let k = first; k < first + 4; k++) taps.add(Math.min(Math.max(k, 0), old - 1), cubic(center - 0.5 - k));
    } else if (antialias && scale > 1) {
      const first = Math.max(Math.trunc(center - scale + 0.5), 0);
      const last = Math.min(Math.trunc(center + scale + 0.5), old);
      const weights = [];
      for (let k = first; k < last; k++) weights.push(Math.max(1 - Math.abs((k + 0.5 - center) / scale), 0));
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      weights.forEach((weight, k) => taps.add(first + k, weight / total));
    } else {
      const [lower, upper, share] = linearTap(old, size, i);
      taps.add(lower, 1 - share);
      taps.add(upper, share);
    }
    taps.endSample();
  }
  return taps.build();
}

/** The size that fits both edges with the aspect ratio kept, in pixels rounded half up. */
export function resizedSize({ height, width }: Size, shortestEdge: number, longestEdge?: number | null): Size {
  let factor = shortestEdge / Math.min(height, width);
  if (longestEdge != null) factor = Math.min(factor, longestEdge / Math.max(height, width));
  const side = (length: number) => Math.max(Math.trunc(length * factor + 0.5), 1);
  return { height: side(height), width: side(width) };
}

/** The size of an image that is shorter than a window: the short side is `least`, the other is cut to whole pixels. */
export function enlargedSize({ height, width }: Size, least: number): Size {
  if (Math.min(height, width) >= least) return { height, width };
  if (height < width) return { height: least, width: Math.trunc((width / height) * least) };
  return { height: Math.trunc((height / width) * least), width: least };
}

/** First pixels of the windows along a side: multiples of the stride, and one window that ends at the border. */
export function windowStarts(side: number, window: number, stride: number): number[] {
  if (!(stride >= 1 && stride <= window)) {
    throw new RangeError(`window_stride must be from 1 to window_size (${window}), got ${stride}.`);
  }
  if (side < window) throw new RangeError(`A side of ${side} pixels is shorter than window_size ${window}.`);
  const starts = [];
  for (let start = 0; start < side - window; start += stride) starts.push(start);
  starts.push(side - window);
  return starts;
}

/**
 * The taps from the patch logits of the windows along an axis to the pixels of the original image.
 *
 * Each window's logits are upsampled linearly, windows that overlap are averaged, and the result is resized linearly to
 * `side` pixels. All of it is linear, so it is one short list of weights for each pixel.
 *
 * @param starts First pixel of each window in the view.
 * @param window Length of a window in pixels, and `padded` after the model padded it to whole patches.
 * @param patches Logits of a window along the axis; they span `padded` pixels.
 * @param viewSide Length of the side that the windows cover.
 * @param side Length of the side of the original image.
 * @param flip Whether the view is mirrored along the axis.
 */
export function mergeTaps(
  starts: number[],
  window: number,
  padded: number,
  patches: number,
  viewSide: number,
  side: number,
  flip = false,
): Taps {
  const taps = new TapBuilder(side);
  const addViewPixel = (pixel: number, share: number) => {
    const covering = [];
    for (let index = 0; index < starts.length; index++) {
      if (starts[index] <= pixel && pixel < starts[index] + window) covering.push(index);
    }
    for (const index of covering) {
      const [lower, upper, weight] = linearTap(patches, padded, pixel - starts[index]);
      taps.add(index * patches + lower, ((1 - weight) * share) / covering.length);
      taps.add(index * patches + upper, (weight * share) / covering.length);
    }
  };
  for (let i = 0; i < side; i++) {
    const [lower, upper, share] = linearTap(viewSide, side, flip ? side - 1 - i : i);
    addViewPixel(lower, 1 - share);
    if (share > 0) addViewPixel(upper, share);
    taps.endSample();
  }
  return taps.build();
}
