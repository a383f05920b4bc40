/** Class maps as PNG files whose pixel values are class ids, as the Python package writes them. */

import type { Label } from "./config.js";
import { crc32 } from "./crc32.js";
import type { Size } from "./geometry.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

function chunk(kind: string, content: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(12 + content.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  for (let i = 0; i < 4; i++) bytes[4 + i] = kind.charCodeAt(i);
  bytes.set(content, 8);
  view.setUint32(8 + content.length, crc32(bytes.subarray(4, 8 + content.length)));
  return bytes;
}

async function deflate(content: Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
  const packed = new Blob([content]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(packed).arrayBuffer());
}

/**
 * A class map as a PNG file.
 *
 * Up to 256 classes are an image of 8 bits with the colors of the classes as its palette, more are gray of 16 bits.
 *
 * @param segmentation What a segmenter returned.
 * @param size Size in pixels of the image, which takes the nearest pixel of the map; that of the map by default.
 */
export async function labelMapPng(
  segmentation: Size & { classMap: Uint8Array | Uint16Array; labels: readonly Label[] },
  size: Size = segmentation,
): Promise<Blob> {
  const { classMap, labels } = segmentation;
  const bytesPerPixel = labels.length > 256 ? 2 : 1;
  const rowLength = 1 + size.width * bytesPerPixel; // each row begins with its filter: none
  const rows = new Uint8Array(size.height * rowLength);
  for (let y = 0; y < size.height; y++) {
    const from = Math.floor(((y + 0.5) * segmentation.height) / size.height) * segmentation.width;
    for (let x = 0; x < size.width; x++) {
      const id = classMap[from + Math.floor(((x + 0.5) * segmentation.width) / size.width)];
      const to = y * rowLength + 1 + x * bytesPerPixel;
      if (bytesPerPixel === 2) rows[to] = id >> 8;
      rows[to + bytesPerPixel - 1] = id & 255;
    }
  }
  const header = new Uint8Array(13);
  new DataView(header.buffer).setUint32(0, size.width);
  new DataView(header.buffer).setUint32(4, size.height);
  header.set([8 * bytesPerPixel, bytesPerPixel === 2 ? 0 : 3], 8);
  const chunks = [chunk("IHDR", header)];
  if (bytesPerPixel === 1) chunks.push(chunk("PLTE", Uint8Array.from(labels.flatMap(({ color }) => color))));
  chunks.push(chunk("IDAT", await deflate(rows)), chunk("IEND", new Uint8Array()));
  return new Blob([Uint8Array.from(SIGNATURE), ...chunks], { type: "image/png" });
}
