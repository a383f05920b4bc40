import assert from "node:assert/strict";
import { test } from "node:test";

import { segmentPixels, type Network, type Progress, type Protocol } from "../src/core.js";
import { linearTap } from "../src/geometry.js";

const PROTOCOL: Protocol = {
  doResize: true,
  shortestEdge: 40,
  longestEdge: 90,
  interpolation: "bilinear",
  antialias: false,
  rescaleFactor: 1 / 255,
  mean: [0.5, 0.4, 0.3],
  std: [0.2, 0.25, 0.3],
  splitWindows: true,
  windowSize: 32,
  windowStride: 24,
  paddingMultiple: 8,
  scales: [1],
  flip: false,
};

function labelsOf(count: number) {
  return Array.from({ length: count }, (_, id) => ({ id, name: `class ${id}`, color: [id, 0, 0] as [number, number, number] }));
}

/** Smooth noise, the same at each run. */
function image(height: number, width: number) {
  const data = new Uint8ClampedArray(4 * height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) {
        data[4 * (y * width + x) + c] = 128 + 120 * Math.sin(0.06 * x * (c + 1) + 0.05 * y + c) * Math.cos(0.07 * y - 0.03 * x);
      }
      data[4 * (y * width + x) + 3] = 255;
    }
  }
  return { data, height, width };
}

/** A network of one layer: the mean color of a patch times fixed weights. */
function linearNetwork(classes: number, seen: number[][] = []): Network {
  return async ({ data, dims }) => {
    seen.push([...dims]);
    const [count, , height, width] = dims;
    const [rows, columns] = [Math.ceil(height / 8), Math.ceil(width / 8)];
    const logits = new Float32Array(count * classes * rows * columns);
    for (let n = 0; n < count; n++) {
      for (let k = 0; k < classes; k++) {
        for (let r = 0; r < rows; r++) {
          for (let q = 0; q < columns; q++) {
            let sum = 0;
            for (let c = 0; c < 3; c++) {
              for (let y = 8 * r; y < Math.min(8 * r + 8, height); y++) {
                for (let x = 8 * q; x < Math.min(8 * q + 8, width); x++) {
                  sum += Math.sin(1 + 3 * k + c) * data[((n * 3 + c) * height + y) * width + x];
                }
              }
            }
            logits[((n * classes + k) * rows + r) * columns + q] = sum / 16 + (classes === 1 ? -0.2 : 0);
          }
        }
      }
    }
    return { data: logits, dims: [count, classes, rows, columns] };
  };
}

/** Upsample (rows, columns) to (height, width) linearly. */
function upsample(values: Float64Array, rows: number, columns: number, height: number, width: number): Float64Array {
  const result = new Float64Array(height * width);
  for (let y = 0; y < height; y++) {
    const [top, bottom, down] = linearTap(rows, height, y);
    for (let x = 0; x < width; x++) {
      const [left, right, across] = linearTap(columns, width, x);
      const at = (r: number) => (1 - across) * values[r * columns + left] + across * values[r * columns + right];
      result[y * width + x] = (1 - down) * at(top) + down * at(bottom);
    }
  }
  return result;
}

/** The merge as it is defined: every window to pixels, added up, divided, resized. One map for each class. */
async function naiveScores(pixels: ReturnType<typeof image>, classes: number, view: { height: number; width: number }) {
  const [tops, lefts] = [view.height, view.width].map((side) => {
    const starts = [];
    for (let start = 0; start < side - 32; start += 24) starts.push(start);
    return [...starts, side - 32];
  });
  // The values of the view, as the network sees them: caught by a network that keeps what it is given.
  const windows: Float32Array[] = [];
  const keep: Network = async (input) => {
    windows.push(input.data.slice());
    return linearNetwork(classes)(input);
  };
  await segmentPixels(pixels, PROTOCOL, labelsOf(Math.max(classes, 2)), keep, { windowBatchSize: 1 });
  assert.equal(windows.length, tops.length * lefts.length);
  const sums = Array.from({ length: classes }, () => new Float64Array(view.height * view.width));
  const counts = new Float64Array(view.height * view.width);
  let index = 0;
  for (const top of tops) {
    for (const left of lefts) {
      const { data } = await linearNetwork(classes)({ data: windows[index++], dims: [1, 3, 32, 32] });
      for (let k = 0; k < classes; k++) {
        const pixelsOf = upsample(Float64Array.from(data.subarray(16 * k, 16 * k + 16)), 4, 4, 32, 32);
        for (let y = 0; y < 32; y++) {
          for (let x = 0; x < 32; x++) {
            sums[k][(top + y) * view.width + left + x] += pixelsOf[32 * y + x];
            if (k === 0) counts[(top + y) * view.width + left + x] += 1;
          }
        }
      }
    }
  }
  return sums.map((sum) => upsample(sum.map((v, i) => v / counts[i]), view.height, view.width, pixels.height, pixels.width));
}

test("maps of several classes are those of the plain merge", async () => {
  const pixels = image(61, 93);
  const scores = await naiveScores(pixels, 5, { height: 40, width: 61 });
  const { classMap, confidence, labels } = await segmentPixels(pixels, PROTOCOL, labelsOf(5), linearNetwork(5), { confidence: true });
  assert.ok(new Set(classMap).size > 2);
  for (let i = 0; i < classMap.length; i++) {
    const logits = scores.map((map) => map[i]);
    const best = Math.max(...logits);
    assert.ok(logits[classMap[i]] >= best - 1e-5);
    const probability = 1 / logits.reduce((sum, value) => sum + Math.exp(value - best), 0);
    assert.ok(Math.abs(confidence![i] - probability) < 1e-5);
  }
  assert.ok(Math.abs(labels.reduce((sum, { share }) => sum + share, 0) - 1) < 1e-9);
  assert.equal(labels[2].share, classMap.filter((id) => id === 2).length / classMap.length);
});

test("a model of one class marks the pixels whose logit is above 0", async () => {
  const pixels = image(61, 93);
  const [scores] = await naiveScores(pixels, 1, { height: 40, width: 61 });
  const { classMap, labels } = await segmentPixels(pixels, PROTOCOL, labelsOf(2), linearNetwork(1));
  assert.equal(labels.length, 2);
  assert.ok(labels.every(({ share }) => share > 0.05));
  for (let i = 0; i < classMap.length; i++) {
    if (Math.abs(scores[i]) > 1e-5) assert.equal(classMap[i], Number(scores[i] > 0));
  }
});

test("windows go through the network in batches, whatever their size the map is the same", async () => {
  const seen: number[][] = [];
  const one = await segmentPixels(image(61, 93), PROTOCOL, labelsOf(5), linearNetwork(5, seen), { windowBatchSize: 1 });
  const many = await segmentPixels(image(61, 93), PROTOCOL, labelsOf(5), linearNetwork(5, seen), { windowBatchSize: 4 });
  assert.deepEqual(seen, [...Array(6).fill([1, 3, 32, 32]), [4, 3, 32, 32], [2, 3, 32, 32]]);
  assert.deepEqual(many.classMap, one.classMap);
});

test("an image and its mirror image have mirrored maps with flip", async () => {
  const pixels = image(50, 70);
  const mirrored = { ...pixels, data: new Uint8ClampedArray(pixels.data.length) };
  for (let y = 0; y < 50; y++) {
    for (let x = 0; x < 70; x++) {
      const from = 4 * (y * 70 + 69 - x);
      mirrored.data.set(pixels.data.subarray(from, from + 4), 4 * (y * 70 + x));
    }
  }
  const options = { scales: [0.8, 1.25], flip: true };
  const [a, b] = [
    await segmentPixels(pixels, PROTOCOL, labelsOf(5), linearNetwork(5), options),
    await segmentPixels(mirrored, PROTOCOL, labelsOf(5), linearNetwork(5), options),
  ];
  let equal = 0;
  for (let y = 0; y < 50; y++) for (let x = 0; x < 70; x++) equal += Number(a.classMap[y * 70 + x] === b.classMap[y * 70 + 69 - x]);
  assert.ok(equal >= 0.999 * 50 * 70);
});

test("more than 256 classes need 16 bits", async () => {
  const { classMap } = await segmentPixels(image(40, 40), PROTOCOL, labelsOf(300), linearNetwork(300));
  assert.ok(classMap instanceof Uint16Array);
  assert.ok(classMap.some((id) => id > 255));
});

test("progress goes from 0 to the end in its stages", async () => {
  const reports: Progress[] = [];
  await segmentPixels(image(61, 93), PROTOCOL, labelsOf(5), linearNetwork(5), { onProgress: (each) => reports.push(each) });
  assert.deepEqual([...new Set(reports.map(({ stage }) => stage))], ["prepare", "windows", "merge"]);
  for (const stage of ["windows", "merge"]) {
    const last = reports.filter((report) => report.stage === stage).pop()!;
    assert.equal(last.done, last.total);
  }
});

test("what does not fit is refused", async () => {
  const pixels = image(40, 50);
  const segment = (options = {}, labels = 5, network = linearNetwork(5), input = pixels, protocol = PROTOCOL) =>
    segmentPixels(input, protocol, labelsOf(labels), network, options);
  await assert.rejects(segment({}, 4), /5 classes and 4 names/);
  await assert.rejects(segment({ windowBatchSize: 0 }), /windowBatchSize must be a whole number/);
  await assert.rejects(segment({ scales: [] }), /scales must be/);
  await assert.rejects(segment({ scales: [17] }), /scales must be/);
  await assert.rejects(segment({}, 5, linearNetwork(5), { ...pixels, height: 41 }), /Expected RGBA pixels/);
  await assert.rejects(segment({}, 5, async () => ({ data: new Float32Array(8), dims: [8] })), /Expected logits \(4/);
  const thin = { data: new Uint8ClampedArray(4 * 100_000), height: 1, width: 100_000 };
  const large = { ...PROTOCOL, longestEdge: null, shortestEdge: 100 };
  await assert.rejects(segment({}, 5, linearNetwork(5), thin, large), /expected at most/);
});
