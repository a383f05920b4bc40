import assert from "node:assert/strict";
import { test } from "node:test";

import { enlargedSize, mergeTaps, resizedSize, resizeTaps, windowStarts, type Interpolation } from "../src/geometry.js";
import { resize, roundHalfToEven } from "../src/preprocess.js";

function closeTo(found: ArrayLike<number>, expected: number[], tolerance: number): void {
  assert.equal(found.length, expected.length);
  expected.forEach((value, i) => assert.ok(Math.abs(found[i] - value) <= tolerance, `${i}: ${found[i]}, not ${value}`));
}

// torch 2.14: interpolate(x, size, mode, align_corners=False, antialias) of these seven numbers.
const ROW = [10, 20, 70, 30, 250, 0, 90];
const RESIZED: [Interpolation, boolean, number[]][] = [
  ["bilinear", false, [16.6667, 30.0, 30.0]],
  ["bilinear", true, [27.1429, 88.8235, 85.7143]],
  ["bilinear", false, [10.0, 14.5455, 24.5455, 56.3636, 55.4546, 30.0, 170.0, 181.8183, 22.7273, 49.0909, 90.0]],
  ["bicubic", false, [10.3076, 67.1533, 244.5459, 41.0889]],
  ["nearest", false, [10.0, 70.0, 250.0, 90.0]],
  ["bilinear", true, [10.0, 14.5455, 24.5455, 56.3636, 55.4546, 30.0, 170.0, 181.8183, 22.7273, 49.0909, 90.0]],
];

for (const [mode, antialias, expected] of RESIZED) {
  test(`${mode} to ${expected.length} samples${antialias ? " with antialias" : ""} is that of torch`, () => {
    const channels = Float32Array.from([...ROW, ...ROW.map((v) => 2 * v), ...ROW.map((v) => 255 - v)]);
    for (const [from, to] of [
      [{ height: 1, width: 7 }, { height: 1, width: expected.length }],
      [{ height: 7, width: 1 }, { height: expected.length, width: 1 }],
    ]) {
      const all = [...expected, ...expected.map((v) => 2 * v), ...expected.map((v) => 255 - v)];
      closeTo(resize(channels, from, to, mode, antialias), all, 1e-3);
    }
  });
}

test("weights of every sample sum to 1", () => {
  for (const mode of ["nearest", "bilinear", "bicubic"] as const) {
    for (const [old, size] of [[7, 3], [3, 7], [1, 5], [5, 1], [640, 511]]) {
      for (const antialias of [false, true]) {
        const { offsets, weights } = resizeTaps(old, size, mode, antialias);
        for (let i = 0; i < size; i++) {
          const sum = weights.slice(offsets[i], offsets[i + 1]).reduce((a, b) => a + b, 0);
          assert.ok(Math.abs(sum - 1) < 1e-12);
        }
      }
    }
  }
});

test("sizes keep the aspect ratio and round half up", () => {
  assert.deepEqual(resizedSize({ height: 480, width: 640 }, 512, 2048), { height: 512, width: 683 });
  assert.deepEqual(resizedSize({ height: 100, width: 1000 }, 512, 2048), { height: 205, width: 2048 });
  assert.deepEqual(resizedSize({ height: 4, width: 5 }, 2, null), { height: 2, width: 3 });
  assert.deepEqual(resizedSize({ height: 1, width: 3000 }, 10, 20), { height: 1, width: 20 });
});

test("an image that is shorter than a window is enlarged to it and cut to whole pixels", () => {
  assert.deepEqual(enlargedSize({ height: 20, width: 33 }, 32), { height: 32, width: 52 });
  assert.deepEqual(enlargedSize({ height: 33, width: 20 }, 32), { height: 52, width: 32 });
  assert.deepEqual(enlargedSize({ height: 40, width: 33 }, 32), { height: 40, width: 33 });
});

test("the last window ends at the border", () => {
  assert.deepEqual(windowStarts(32, 32, 16), [0]);
  assert.deepEqual(windowStarts(70, 32, 16), [0, 16, 32, 38]);
  assert.deepEqual(windowStarts(64, 32, 32), [0, 32]);
  assert.throws(() => windowStarts(31, 32, 16), /shorter than window_size/);
  assert.throws(() => windowStarts(64, 32, 33), /from 1 to window_size/);
});

test("halves are rounded to the even number", () => {
  assert.deepEqual([0.5, 1.5, 2.5, 2.49, 2.51, 254.5].map(roundHalfToEven), [0, 2, 2, 2, 3, 254]);
});

test("a mirrored axis is the axis read backwards", () => {
  const forward = mergeTaps([0, 16, 24], 32, 32, 4, 56, 41);
  const mirrored = mergeTaps([0, 16, 24], 32, 32, 4, 56, 41, true);
  for (let i = 0; i < 41; i++) {
    const at = ({ offsets, indices, weights }: typeof forward, sample: number) =>
      [...indices.slice(offsets[sample], offsets[sample + 1])].map((k, j) => [k, weights[offsets[sample] + j]]);
    assert.deepEqual(at(mirrored, i), at(forward, 40 - i));
  }
});
