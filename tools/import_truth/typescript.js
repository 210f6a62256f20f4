// JavaScript and TypeScript: imports and their files by the TypeScript compiler's own scanner and resolver.
// Usage: node typescript.js TYPESCRIPT_FOLDER PROJECT < list of paths, one a line > edges as JSON
const path = require("path");
const fs = require("fs");
const ts = require(process.argv[2]);
const root = fs.realpathSync(process.argv[3]);
const files = fs.readFileSync(0, "utf8").split("\n").filter(Boolean);
const options = {
  allowJs: true,
  resolveJsonModule: true,
  moduleResolution: ts.ModuleResolutionKind.NodeJs,
  module: ts.ModuleKind.CommonJS,
  target: ts.ScriptTarget.ESNext,
  jsx: ts.JsxEmit.Preserve,
};
// what a workspace's package manager links into node_modules, by the root's own list of workspaces
const manifest = (folder) => {
  try {
    return JSON.parse(fs.readFileSync(path.join(root, folder, "package.json"), "utf8"));
  } catch {
    return {};
  }
};
const listed = manifest("").workspaces || [];
options.baseUrl = root;
options.paths = {};
for (const pattern of Array.isArray(listed) ? listed : listed.packages || []) {
  const parent = pattern.replace(/\/\*+$/, "");
  const folders = parent === pattern ? [pattern] : fs.readdirSync(path.join(root, parent)).map((name) => `${parent}/${name}`);
  for (const folder of folders) {
    const name = manifest(folder).name;
    if (name) {
      options.paths[name] = [folder, `${folder}/src/index`];
      options.paths[`${name}/*`] = [`${folder}/*`, `${folder}/src/*`];
    }
  }
}
const edges = [];
for (const file of files) {
  const from = path.join(root, file);
  const info = ts.preProcessFile(fs.readFileSync(from, "utf8"), true, true);
  const targets = info.referencedFiles.map((reference) => path.resolve(path.dirname(from), reference.fileName));
  for (const { fileName } of info.importedFiles) {
    const exact = path.resolve(path.dirname(from), fileName); // what Node loads; the compiler would take its .d.ts
    if (fileName.startsWith(".") && fs.existsSync(exact) && fs.statSync(exact).isFile()) {
      targets.push(exact);
      continue;
    }
    const found = ts.resolveModuleName(fileName, from, options, ts.sys).resolvedModule;
    if (found) targets.push(found.resolvedFileName);
  }
  for (const target of targets) edges.push([file, path.relative(root, target)]);
}
process.stdout.write(JSON.stringify(edges));
