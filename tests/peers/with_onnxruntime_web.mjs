// Runs a graph in onnxruntime-web (wasm, under Node), the engine of transformers.js: MODULE_FOLDER ONNX CASES.json OUT.json
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const [folder, graph, cases, out] = process.argv.slice(2);
const ort = createRequire(`${folder}/`)("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(graph), { executionProviders: ["wasm"] });
const results = [];
for (const { shape, input_ids, attention_mask } of JSON.parse(readFileSync(cases))) {
  const tensor = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  const outputs = await session.run({ input_ids: tensor(input_ids), attention_mask: tensor(attention_mask) });
  results.push(Array.from(outputs.sentence_embedding.data));
}
writeFileSync(out, JSON.stringify(results));
