// One minified file of the chart library, its licences first; the same bytes from the same versions.
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const of = (name) => readFileSync(new URL(`node_modules/${name}`, import.meta.url), "utf8").trim();
const version = (name) => JSON.parse(of(`${name}/package.json`)).version;
const assets = new URL("../../torchprune/reports/assets/", import.meta.url);

const banner = [
  `/*! Apache ECharts ${version("echarts")}, a build of the parts in tools/charts/charts.js.`,
  of("echarts/NOTICE"),
  "Licensed under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0).",
  "",
  `With zrender ${version("zrender")}:`,
  of("zrender/LICENSE"),
  "",
  `With tslib ${version("tslib")}:`,
  of("tslib/LICENSE.txt"),
  "*/",
].join("\n");

const { outputFiles } = await build({
  entryPoints: ["charts.js"],
  bundle: true,
  minify: true,
  format: "iife",
  globalName: "echarts",
  target: "es2020",
  charset: "ascii",
  legalComments: "none",
  banner: { js: banner },
  define: { "process.env.NODE_ENV": '"production"' },
  write: false,
});
const text = outputFiles[0].text;
writeFileSync(new URL("echarts.min.js", assets), text);
writeFileSync(new URL("echarts.LICENSE", assets), `${of("echarts/LICENSE")}\n`);
writeFileSync(new URL("echarts.NOTICE", assets), `${of("echarts/NOTICE")}\n`);
console.log(`${createHash("sha256").update(text).digest("hex")}  ${text.length} bytes`);
