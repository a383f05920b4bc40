// Runs an exported model with transformers.js, one window of an image at a time, and prints which classes it sees.
//
//     npm ci
//     node segment.mjs FOLDER MODEL image.png [dtype]
//
// FOLDER/MODEL is what `segmenter-hf export` wrote. transformers.js does not know the model type and loads the network as an
// `AutoModel` of a single file, which is all that it needs. Its image processors do not cut windows: this example takes the
// top left window of the resized image, and `segmenter-hf-web` has the whole protocol.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { AutoModel, env, RawImage, Tensor } from "@huggingface/transformers";

const [folder, name, path, dtype = "fp32"] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;

const settings = JSON.parse(await readFile(join(folder, name, "preprocessor_config.json"), "utf8"));
const { labels } = JSON.parse(await readFile(join(folder, name, "label_set.json"), "utf8"));
const model = await AutoModel.from_pretrained(name, { dtype });

// The top left window of the image, normalized: (1, 3, side, side).
const side = settings.window_size;
const image = (await RawImage.read(path)).rgb();
const factor = Math.max(settings.size.shortest_edge, side) / Math.min(image.width, image.height);
const resized = await image.resize(Math.round(image.width * factor), Math.round(image.height * factor));
const pixels = new Float32Array(3 * side * side);
for (let channel = 0; channel < 3; channel++) {
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const value = resized.data[3 * (y * resized.width + x) + channel] * settings.rescale_factor;
      pixels[(channel * side + y) * side + x] = (value - settings.image_mean[channel]) / settings.image_std[channel];
    }
  }
}

const { logits } = await model({ pixel_values: new Tensor("float32", pixels, [1, 3, side, side]) });
const [, classes, rows, columns] = logits.dims;
const counts = new Array(labels.length).fill(0);
for (let patch = 0; patch < rows * columns; patch++) {
  const scores = Array.from({ length: classes }, (_, id) => logits.data[id * rows * columns + patch]);
  // A model of one class has one logit: above 0 it is the class, else the background.
  counts[classes === 1 ? Number(scores[0] > 0) : scores.indexOf(Math.max(...scores))] += 1;
}
console.log(JSON.stringify(Object.fromEntries(labels.map((label, id) => [label.name, counts[id]]))));
