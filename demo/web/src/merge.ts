/**
 * From the patch logits of the windows to the class map, as the published protocol has it: linear upsampling to pixels,
 * mean over the windows at a pixel, linear resize to the original size, softmax, mean over the views, argmax.
 *
 * All but softmax and argmax is linear and separable, so a pixel is a weighted sum of the few logits under it: two short
 * lists of taps, one for its row and one for its column. The upsampled logits of a whole image never exist.
 */

import { mergeTaps, type Size, type Taps } from "./geometry.js";

/** Where the windows of a view lie. */
export interface WindowGrid extends Size {
  flip: boolean;
  windowHeight: number;
  windowWidth: number;
  tops: number[];
  lefts: number[];
}

export interface MergedMap {
  classMap: Uint8Array | Uint16Array;
  /** The probability of each pixel's class, from 0 to 1. */
  confidence?: Float32Array;
}

/** The logits of a view with its windows side by side: (patch rows, patch columns, classes). */
export class ViewLogits {
  /** Classes of the map: those of the model, and of a model of one class that and the background. */
  readonly classes: number;
  private readonly logits: Float32Array;
  private readonly columns: number;

  /**
   * @param grid Where the windows lie.
   * @param channels Logits of a patch, and `patchRows` x `patchColumns` patches of a window.
   * @param multiple Side in pixels to whose multiple the logits of a window reach.
   */
  constructor(
    private readonly grid: WindowGrid,
    private readonly channels: number,
    private readonly patchRows: number,
    private readonly patchColumns: number,
    private readonly multiple: number,
  ) {
    this.classes = Math.max(channels, 2);
    this.columns = grid.lefts.length * patchColumns;
    this.logits = new Float32Array(grid.tops.length * patchRows * this.columns * this.classes);
  }

  /** Take the logits (channels, patch rows, patch columns) of window number `index`, counted row by row. */
  add(index: number, values: Float32Array): void {
    const { channels, classes, patchRows, patchColumns } = this;
    const top = Math.floor(index / this.grid.lefts.length) * patchRows;
    const left = (index % this.grid.lefts.length) * patchColumns;
    const first = classes - channels; // of one class the background comes first, with the logit 0
    for (let channel = 0; channel < channels; channel++) {
      for (let row = 0; row < patchRows; row++) {
        const from = (channel * patchRows + row) * patchColumns;
        const to = ((top + row) * this.columns + left) * classes + first + channel;
        for (let column = 0; column < patchColumns; column++) {
          this.logits[to + column * classes] = values[from + column];
        }
      }
    }
  }

  private padded(length: number): number {
    return Math.ceil(length / this.multiple) * this.multiple;
  }

  rowTaps(side: number): Taps {
    const { tops, windowHeight, height } = this.grid;
    return mergeTaps(tops, windowHeight, this.padded(windowHeight), this.patchRows, height, side);
  }

  columnTaps(side: number): Taps {
    const { lefts, windowWidth, width, flip } = this.grid;
    return mergeTaps(lefts, windowWidth, this.padded(windowWidth), this.patchColumns, width, side, flip);
  }

  /** The weighted sum of the rows of patches that a row of pixels lies in: (patch columns, classes). */
  sumRows(taps: Taps, row: number, sum: Float32Array): void {
    const length = this.columns * this.classes;
    sum.fill(0);
    for (let k = taps.offsets[row]; k < taps.offsets[row + 1]; k++) {
      const from = taps.indices[k] * length;
      const weight = taps.weights[k];
      for (let i = 0; i < length; i++) sum[i] += weight * this.logits[from + i];
    }
  }

  emptyRow(): Float32Array {
    return new Float32Array(this.columns * this.classes);
  }
}

/** The logits of one pixel out of the sum of its rows. */
function sumColumns(row: Float32Array, taps: Taps, column: number, classes: number, scores: Float64Array): void {
  scores.fill(0);
  for (let k = taps.offsets[column]; k < taps.offsets[column + 1]; k++) {
    const from = taps.indices[k] * classes;
    const weight = taps.weights[k];
    for (let i = 0; i < classes; i++) scores[i] += weight * row[from + i];
  }
}

/** Add the softmax of scores to a total. */
function addSoftmax(scores: Float64Array, total: Float64Array): void {
  let largest = -Infinity;
  for (let i = 0; i < scores.length; i++) if (scores[i] > largest) largest = scores[i];
  let sum = 0;
  for (let i = 0; i < scores.length; i++) {
    scores[i] = Math.exp(scores[i] - largest);
    sum += scores[i];
  }
  for (let i = 0; i < scores.length; i++) total[i] += scores[i] / sum;
}

/** The greatest of the scores; of equal ones the first. */
function argmax(scores: Float64Array): number {
  let best = 0;
  for (let i = 1; i < scores.length; i++) if (scores[i] > scores[best]) best = i;
  return best;
}

/**
 * Merge the logits of all views of an image.
 *
 * @param size Size in pixels of the map, that of the original image.
 * @param confidence Whether the probability of each pixel's class is wanted too.
 * @param onRow Called with the number of rows that are done.
 */
export function mergeViews(
  views: ViewLogits[],
  size: Size,
  confidence = false,
  onRow: (rows: number) => void = () => {},
): MergedMap {
  const { height, width } = size;
  const classes = views[0].classes;
  const parts = views.map((view) => ({
    view,
    rows: view.rowTaps(height),
    columns: view.columnTaps(width),
    sum: view.emptyRow(),
  }));
  const softmax = confidence || views.length > 1;
  const classMap = classes > 256 ? new Uint16Array(height * width) : new Uint8Array(height * width);
  const probabilities = confidence ? new Float32Array(height * width) : undefined;
  const [scores, total] = [new Float64Array(classes), new Float64Array(classes)];
  for (let y = 0; y < height; y++) {
    for (const { view, rows, sum } of parts) view.sumRows(rows, y, sum);
    for (let x = 0; x < width; x++) {
      if (softmax) total.fill(0);
      for (const { columns, sum } of parts) {
        sumColumns(sum, columns, x, classes, scores);
        if (softmax) addSoftmax(scores, total);
      }
      const best = argmax(softmax ? total : scores);
      classMap[y * width + x] = best;
      if (probabilities) probabilities[y * width + x] = total[best] / views.length;
    }
    onRow(y + 1);
  }
  return { classMap, confidence: probabilities };
}
