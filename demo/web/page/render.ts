/** Draws a segmentation over its image. */

import type { Segmentation } from "../src/index.js";

export interface Shown {
  kind: "classes" | "confidence";
  /** The only class to show, if one is chosen. */
  only?: number;
}

// Red through white to blue: a scale that people who confuse red and green can read.
const UNSURE = [178, 24, 43];
const MIDDLE = [253, 219, 199];
const SURE = [33, 102, 172];

function blend(first: number[], second: number[], share: number): number[] {
  return first.map((value, i) => value + share * (second[i] - value));
}

/** The color of a probability from 0 to 1. */
function confidenceColor(probability: number): number[] {
  return probability < 0.5 ? blend(UNSURE, MIDDLE, 2 * probability) : blend(MIDDLE, SURE, 2 * probability - 1);
}

/** Fill a canvas with the colors of a segmentation; the canvas has the size of the map. */
export function drawOverlay(canvas: HTMLCanvasElement, segmentation: Segmentation, { kind, only }: Shown): void {
  const { classMap, labels, confidence, height, width } = segmentation;
  canvas.height = height;
  canvas.width = width;
  const context = canvas.getContext("2d")!;
  const image = context.createImageData(width, height);
  const byConfidence = Array.from({ length: 256 }, (_, level) => confidenceColor(level / 255));
  for (let pixel = 0; pixel < classMap.length; pixel++) {
    const id = classMap[pixel];
    if (only !== undefined && id !== only) continue; // stays transparent
    const color =
      kind === "classes" || !confidence ? labels[id].color : byConfidence[Math.round(255 * confidence[pixel])];
    const at = 4 * pixel;
    image.data[at] = color[0];
    image.data[at + 1] = color[1];
    image.data[at + 2] = color[2];
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** The image with the overlay over it, as a PNG file. */
export function composite(photo: HTMLCanvasElement, overlay: HTMLCanvasElement, opacity: number): Promise<Blob> {
  const canvas = document.createElement("canvas");
  canvas.height = photo.height;
  canvas.width = photo.width;
  const context = canvas.getContext("2d")!;
  context.drawImage(photo, 0, 0);
  context.globalAlpha = opacity;
  context.imageSmoothingEnabled = false;
  context.drawImage(overlay, 0, 0, photo.width, photo.height);
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The image is too large to save."))), "image/png"),
  );
}

/** A share as a percentage that is never rounded to nothing. */
export function percentage(share: number): string {
  return share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}
