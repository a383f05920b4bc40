// Builds the package into dist/ and the page into build/; with --tests the tests into .test-build/.
import { execFileSync } from "node:child_process";
import { copyFileSync, cpSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { build } from "esbuild";

// What the two builds of onnxruntime-web that are used load while they run.
const RUNTIME_FILES = ["ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"].flatMap((name) => [
  `${name}.mjs`,
  `${name}.wasm`,
]);

const browser = {
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  legalComments: "linked",
  // onnxruntime-web without its glue code inside: that is loaded from ort/, for its threads too.
  conditions: ["onnxruntime-web-use-extern-wasm"],
};

async function buildPackage(folder) {
  const entries = ["index", "core", "worker"].map((name) => `src/${name}.ts`);
  await build({ ...browser, entryPoints: entries, outdir: folder, splitting: true, chunkNames: "chunks/[name]-[hash]" });
  mkdirSync(`${folder}/ort`, { recursive: true });
  for (const name of RUNTIME_FILES) copyFileSync(`node_modules/onnxruntime-web/dist/${name}`, `${folder}/ort/${name}`);
}

async function buildPage(folder) {
  await build({ ...browser, entryPoints: ["page/page.ts", "page/page.css"], outdir: folder });
  for (const name of ["index.html", "README.md", "icon.svg"]) copyFileSync(`page/${name}`, `${folder}/${name}`);
  cpSync("dist", `${folder}/lib`, { recursive: true, filter: (path) => !path.endsWith(".d.ts") });
}

async function buildTests() {
  const names = readdirSync("test").filter((name) => name.endsWith(".test.ts"));
  await build({
    entryPoints: names.map((name) => `test/${name}`),
    outdir: ".test-build",
    bundle: true,
    format: "esm",
    platform: "node",
    target: "node20",
    sourcemap: "inline",
    outExtension: { ".js": ".mjs" },
  });
}

if (process.argv.includes("--tests")) {
  rmSync(".test-build", { recursive: true, force: true });
  await buildTests();
} else {
  for (const folder of ["dist", "build"]) rmSync(folder, { recursive: true, force: true });
  await buildPackage("dist");
  execFileSync("node", ["node_modules/typescript/bin/tsc", "-p", "tsconfig.types.json"], { stdio: "inherit" });
  await buildPage("build");
}
