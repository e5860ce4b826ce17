// system: onnxruntime-node
// artifact: onnx fp32, int8
// requires: onnxruntime-node@1.30.0 @huggingface/tokenizers@0.2.0
// largest error: 1e-4, 2e-2
// empty documents: no
import { readFile } from 'node:fs/promises';
import { text } from 'node:stream/consumers';
import { Tokenizer } from '@huggingface/tokenizers';
import * as ort from 'onnxruntime-node';

const [folder, precision] = process.argv.slice(2);
const { query, documents } = JSON.parse(await text(process.stdin));

const file = { fp32: 'model.onnx', int8: 'model_quantized.onnx' }[precision];
const session = await ort.InferenceSession.create(await readFile(`${folder}/onnx/${file}`));
const json = async (name) => JSON.parse(await readFile(`${folder}/${name}`, 'utf8'));
const tokenizer = new Tokenizer(await json('tokenizer.json'), await json('tokenizer_config.json'));
const scores = [];
for (const document of documents) {
  const { ids } = tokenizer.encode(query, { text_pair: document });
  const tensor = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, ids.length]);
  const feeds = { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
  scores.push((await session.run(feeds)).logits.data[0]);
}
console.log(JSON.stringify(scores));
