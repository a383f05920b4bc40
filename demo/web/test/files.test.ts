import assert from "node:assert/strict";
import { test } from "node:test";
import { crc32, deflateRawSync } from "node:zlib";

import { defaultColor, readLabels, readProtocol } from "../src/config.js";
import { filesAt, filesFrom, folderAddress, hubAddress, zipEntries } from "../src/model_files.js";

function zip(files: Record<string, string>, { packed = true, lie = 0 } = {}): Uint8Array<ArrayBuffer> {
  const [parts, directory]: Buffer[][] = [[], []];
  let offset = 0;
  for (const [name, text] of Object.entries(files)) {
    const content = Buffer.from(text);
    const body = packed ? deflateRawSync(content) : content;
    const header = Buffer.alloc(46);
    header.writeUInt32LE(0x02014b50, 0);
    header.writeUInt16LE(packed ? 8 : 0, 10);
    header.writeUInt32LE(crc32 ? crc32(content) : 0, 16);
    header.writeUInt32LE(body.length, 20);
    header.writeUInt32LE(Math.max(content.length - lie, 0), 24);
    header.writeUInt16LE(name.length, 28);
    header.writeUInt32LE(offset, 42);
    const local = Buffer.alloc(30);
    local.writeUInt32LE(0x04034b50, 0);
    local.writeUInt16LE(name.length, 26);
    parts.push(local, Buffer.from(name), body);
    directory.push(header, Buffer.from(name));
    offset += 30 + name.length + body.length;
  }
  const end = Buffer.alloc(22);
  end.writeUInt32LE(0x06054b50, 0);
  end.writeUInt16LE(Object.keys(files).length, 10);
  end.writeUInt32LE(Buffer.concat(directory).length, 12);
  end.writeUInt32LE(offset, 16);
  return new Uint8Array(Buffer.concat([...parts, ...directory, end]));
}

const FILES = { "my_model/preprocessor_config.json": "{}", "my_model/onnx/model.onnx": "weights".repeat(100), "my_model/onnx/": "" };
const text = (content?: Uint8Array) => new TextDecoder().decode(content);

for (const packed of [true, false]) {
  test(`files are read from a ${packed ? "packed" : "stored"} archive with a folder around them`, async () => {
    const files = await filesFrom([new File([zip(FILES, { packed })], "my_model.ZIP")]);
    assert.equal(text(await files.read("onnx/model.onnx")), "weights".repeat(100));
    assert.equal(await files.read("onnx/model_fp16.onnx"), undefined);
    assert.equal(files.name, "my_model.ZIP");
  });
}

test("an archive that holds more than it says is refused", async () => {
  const files = await filesFrom([new File([zip(FILES, { lie: 1 })], "a.zip")]);
  await assert.rejects(files.read("onnx/model.onnx"), /damaged/);
});

for (const packed of [true, false]) {
  test(`a ${packed ? "packed" : "stored"} file that was changed is refused`, async () => {
    const archive = zip(FILES, { packed });
    archive[Buffer.from(archive).indexOf("model.onnx") + "model.onnx".length + 1] ^= 1; // the second byte of the weights
    const files = await filesFrom([new File([archive], "a.zip")]);
    await assert.rejects(files.read("onnx/model.onnx"));
  });
}

test("what is no archive or no model is refused in words", async () => {
  await assert.rejects(zipEntries(new Blob(["no archive"])), /Expected a ZIP archive/);
  const damaged = zip(FILES);
  damaged.fill(0, damaged.length - 150, damaged.length - 120);
  await assert.rejects(zipEntries(new Blob([damaged])), /damaged/);
  await assert.rejects(filesFrom([new File([zip({ "a.txt": "b" })], "a.zip")]), /a.zip: expected an exported model/);
  await assert.rejects(filesFrom([]), /there is no preprocessor_config.json in it/);
});

test("files that were chosen one by one are found without their folder", async () => {
  const files = await filesFrom(["preprocessor_config.json", "model_fp16.onnx"].map((name) => new File([name], name)));
  assert.equal(text(await files.read("onnx/model_fp16.onnx")), "model_fp16.onnx");
  assert.equal(files.name, "The chosen files");
});

test("addresses end with a slash and are of the web", () => {
  assert.equal(folderAddress("models/a", "http://localhost/page/"), "http://localhost/page/models/a/");
  assert.equal(folderAddress("https://a.org/m/"), "https://a.org/m/");
  assert.throws(() => folderAddress("file:///etc/"), /http address/);
  assert.throws(() => folderAddress("javascript:alert(1)"), /http address/);
  assert.equal(hubAddress("owner/name"), "https://huggingface.co/owner/name/resolve/main/");
  assert.throws(() => hubAddress("../name"), /owner\/name|resolve/);
  assert.throws(() => hubAddress("a/b/c"), /Expected owner\/name/);
});

test("a missing file of an address is undefined, an error of the server is an error", async (context) => {
  const asked: string[] = [];
  context.mock.method(globalThis, "fetch", async (url: URL) => {
    asked.push(url.href);
    return new Response("abc", { status: url.pathname.endsWith("a.json") ? 200 : url.pathname.endsWith("b") ? 404 : 500 });
  });
  const files = filesAt("http://localhost/m/?token=1");
  const progress: number[] = [];
  assert.equal(text(await files.read("a.json", ({ done }) => progress.push(done))), "abc");
  assert.equal(await files.read("b"), undefined);
  await assert.rejects(files.read("c"), /answers 500/);
  assert.deepEqual(asked[0], "http://localhost/m/a.json?token=1");
  assert.deepEqual(progress, [3]);
});

test("a protocol has the defaults of the image processor", () => {
  const protocol = readProtocol({ window_size: 512, size: { shortest_edge: 512 } });
  assert.deepEqual(protocol.mean, [0.5, 0.5, 0.5]);
  assert.deepEqual(
    [protocol.windowStride, protocol.longestEdge, protocol.interpolation, protocol.antialias, protocol.flip],
    [512, null, "bilinear", false, false],
  );
  assert.equal(protocol.paddingMultiple, 16);
  assert.equal(readProtocol({ window_size: 20, size: { shortest_edge: 20 }, padding: "center" }).paddingMultiple, 1);
  const off = readProtocol({ window_size: 8, do_resize: false, do_normalize: false, do_rescale: false, antialias: true });
  assert.deepEqual([off.doResize, off.std, off.rescaleFactor, off.antialias], [false, [1, 1, 1], 1, true]);
});

test("a protocol that this package cannot follow is refused", () => {
  const fields = { window_size: 512, size: { shortest_edge: 512 } };
  for (const [wrong, expected] of [
    [{ image_mean: [1, 2, 3, 4] }, /three numbers as image_mean/],
    [{ resample: 1 }, /as resample, got 1/],
    [{ scales: [0] }, /factors above 0/],
    [{ window_size: "512" }, /as window_size, got "512"/],
    [{ size: { height: 5 } }, /shortest_edge/],
    [{ padding: "start" }, /"end" or "center" as padding/],
    [{ do_resize_to_window: true }, /no do_resize_to_window/],
    [{ value_range: [0, 4095] }, /no value_range, which a browser does not follow, got \[0,4095\]/],
  ] as const) {
    assert.throws(() => readProtocol({ ...fields, ...wrong }), expected);
  }
  assert.throws(() => readProtocol([]), /expected an object/);
});

test("classes have the names and colors of the label set, else the names of the configuration", () => {
  const set = { labels: [{ id: 0, name: "sky", color: [1, 2, 3] }, { id: 1, name: "road" }] };
  assert.deepEqual(readLabels(set, undefined)[0], { id: 0, name: "sky", color: [1, 2, 3] });
  assert.deepEqual(readLabels(set, undefined)[1].color, defaultColor(1));
  assert.deepEqual(readLabels(undefined, { id2label: { 0: "a", 1: "b" } }).map(({ name }) => name), ["a", "b"]);
  assert.deepEqual(readLabels(undefined, { id2label: { 0: "road" } }).map(({ name }) => name), ["background", "road"]);
  assert.throws(() => readLabels(undefined, {}), /names of the classes/);
  assert.throws(() => readLabels({ labels: [{}] }, undefined), /a name for label 0/);
  const swapped = { labels: [{ id: 1, name: "road" }, { id: 0, name: "sky" }] };
  assert.throws(() => readLabels(swapped, undefined), /in the order of their ids, with 0 as the next, got 1/);
});
