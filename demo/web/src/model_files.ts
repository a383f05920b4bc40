/** Where the files of a model come from: an address, a list of files, or a ZIP archive. */

import type { Progress } from "./core.js";
import { crc32 } from "./crc32.js";

/** The files of an export of `segmenter-hf export`, by their path inside it. */
export interface ModelFiles {
  /** The content of a file, or `undefined` if there is none. */
  read(path: string, onProgress?: (progress: Progress) => void): Promise<Uint8Array<ArrayBuffer> | undefined>;
  /** What the messages call the model. */
  readonly name: string;
}

/** File names of `onnx/` by dtype, as transformers.js has them. */
export const DTYPE_SUFFIXES = {
  fp32: "",
  fp16: "_fp16",
  q8: "_quantized",
  int8: "_int8",
  uint8: "_uint8",
  q4: "_q4",
  q4f16: "_q4f16",
  bnb4: "_bnb4",
} as const;

export type Dtype = keyof typeof DTYPE_SUFFIXES;

/** Read a response to its end and say how far it is. */
async function readResponse(
  response: Response,
  onProgress: (progress: Progress) => void,
): Promise<Uint8Array<ArrayBuffer>> {
  const total = Number(response.headers.get("content-length")) || 0;
  if (!response.body) return new Uint8Array(await response.arrayBuffer());
  const reader = response.body.getReader();
  const parts: Uint8Array[] = [];
  let done = 0;
  for (;;) {
    const { value, done: ended } = await reader.read();
    if (ended) break;
    parts.push(value);
    done += value.length;
    onProgress({ stage: "download", done, total: Math.max(total, done) });
  }
  const content = new Uint8Array(done);
  let offset = 0;
  for (const part of parts) {
    content.set(part, offset);
    offset += part.length;
  }
  return content;
}

/** The address of a model's files, with a slash at its end. */
export function folderAddress(source: string | URL, base?: string): string {
  const address = new URL(source, base);
  if (!["http:", "https:"].includes(address.protocol)) {
    throw new TypeError(`Expected the http address of the folder of an exported model, got ${source}.`);
  }
  if (!address.pathname.endsWith("/")) address.pathname += "/";
  return address.href;
}

/** The address of the files of a repository `owner/name` of the Hugging Face Hub. */
export function hubAddress(repository: string, revision = "main"): string {
  if (!/^\w[\w.-]*\/\w[\w.-]*$/.test(repository)) throw new TypeError(`Expected owner/name, got ${repository}.`);
  return `https://huggingface.co/${repository}/resolve/${encodeURIComponent(revision)}/`;
}

/** The files under an address. */
export function filesAt(address: string): ModelFiles {
  return {
    name: address,
    async read(path, onProgress = () => {}) {
      const url = new URL(path, address);
      url.search = new URL(address).search;
      const response = await fetch(url);
      if (response.status === 404) return undefined;
      if (!response.ok) throw new Error(`${url}: the server answers ${response.status} ${response.statusText}.`);
      return readResponse(response, onProgress);
    },
  };
}

/** Files by path, with the folder around them left out. */
function filesByPath(files: Map<string, () => Promise<Uint8Array<ArrayBuffer>>>, name: string): ModelFiles {
  const known = "preprocessor_config.json";
  const found = [...files.keys()].filter((path) => path === known || path.endsWith(`/${known}`));
  if (!found.length) throw new Error(`${name}: expected an exported model, but there is no ${known} in it.`);
  const shortest = found.reduce((best, path) => (path.length < best.length ? path : best));
  const root = shortest.slice(0, -known.length);
  return {
    name,
    async read(path) {
      // Files that were chosen one by one have lost their folder.
      const open = files.get(root + path) ?? files.get(root + path.split("/").pop());
      return open?.();
    },
  };
}

/** The files of a list, such as a folder or several files that were dropped, or of a single ZIP archive. */
export async function filesFrom(files: readonly File[]): Promise<ModelFiles> {
  if (files.length === 1 && files[0].name.toLowerCase().endsWith(".zip")) {
    return filesByPath(await zipEntries(files[0]), files[0].name);
  }
  const opened = new Map<string, () => Promise<Uint8Array<ArrayBuffer>>>();
  for (const file of files) {
    opened.set(file.webkitRelativePath || file.name, async () => new Uint8Array(await file.arrayBuffer()));
  }
  const folder = files[0]?.webkitRelativePath?.split("/")[0];
  return filesByPath(opened, folder || "The chosen files");
}

const END_OF_DIRECTORY = 0x06054b50;
const DIRECTORY_ENTRY = 0x02014b50;

/** The entries of a ZIP archive, each unpacked when it is read. */
export async function zipEntries(archive: Blob): Promise<Map<string, () => Promise<Uint8Array<ArrayBuffer>>>> {
  const damaged = () => new Error("Expected a ZIP archive, got a file that is damaged or something else.");
  const tail = new DataView(await archive.slice(Math.max(0, archive.size - 65557)).arrayBuffer());
  let end = tail.byteLength - 22;
  while (end >= 0 && tail.getUint32(end, true) !== END_OF_DIRECTORY) end -= 1;
  if (end < 0) throw damaged();
  const count = tail.getUint16(end + 10, true);
  const [size, start] = [tail.getUint32(end + 12, true), tail.getUint32(end + 16, true)];
  if (start === 0xffffffff) throw new Error("ZIP archives of more than 4 GB cannot be read: choose the folder instead.");
  const directory = new DataView(await archive.slice(start, start + size).arrayBuffer());
  const entries = new Map<string, () => Promise<Uint8Array<ArrayBuffer>>>();
  for (let index = 0, at = 0; index < count; index++) {
    if (at + 46 > directory.byteLength || directory.getUint32(at, true) !== DIRECTORY_ENTRY) throw damaged();
    const method = directory.getUint16(at + 10, true);
    const checksum = directory.getUint32(at + 16, true);
    const packed = directory.getUint32(at + 20, true);
    const unpacked = directory.getUint32(at + 24, true);
    const nameLength = directory.getUint16(at + 28, true);
    const extra = directory.getUint16(at + 30, true) + directory.getUint16(at + 32, true);
    const header = directory.getUint32(at + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(directory.buffer, at + 46, nameLength));
    if (!name.endsWith("/")) entries.set(name, () => unzip(archive, name, { method, checksum, packed, unpacked, header }));
    at += 46 + nameLength + extra;
  }
  return entries;
}

type Entry = Record<"method" | "checksum" | "packed" | "unpacked" | "header", number>;

async function unzip(archive: Blob, name: string, entry: Entry): Promise<Uint8Array<ArrayBuffer>> {
  const content = await unpack(archive, name, entry);
  if (content.length !== entry.unpacked || crc32(content) !== entry.checksum) {
    throw new Error(`${name}: the archive is damaged.`);
  }
  return content;
}

async function unpack(
  archive: Blob,
  name: string,
  { method, packed, unpacked, header }: Entry,
): Promise<Uint8Array<ArrayBuffer>> {
  const local = new DataView(await archive.slice(header, header + 30).arrayBuffer());
  const start = header + 30 + local.getUint16(26, true) + local.getUint16(28, true);
  const content = archive.slice(start, start + packed);
  if (method === 0) return new Uint8Array(await content.arrayBuffer());
  if (method !== 8) throw new Error(`${name}: the archive is packed in a way that browsers cannot unpack (${method}).`);
  // What the directory says is the most that is unpacked: a small archive could hold any amount of zeros.
  const result = new Uint8Array(unpacked);
  const reader = content.stream().pipeThrough(new DecompressionStream("deflate-raw")).getReader();
  let offset = 0;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    if (offset + value.length > unpacked) throw new Error(`${name}: the archive is damaged.`);
    result.set(value, offset);
    offset += value.length;
  }
  return result.subarray(0, offset);
}
