// system: transformers.js in Node
// artifact: onnx fp32, fp16, int8
// requires: @huggingface/transformers@4.3.0
// largest error: 1e-4, 1e-2, 2e-2
// empty documents: no
import path from 'node:path';
import { text } from 'node:stream/consumers';
import { AutoModelForSequenceClassification, AutoTokenizer, env } from '@huggingface/transformers';

const [folder, precision] = process.argv.slice(2);
const { query, documents } = JSON.parse(await text(process.stdin));

env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const dtype = { fp32: 'fp32', fp16: 'fp16', int8: 'q8' }[precision];
const model = await AutoModelForSequenceClassification.from_pretrained(name, { dtype });
// Not `pipeline('text-classification')`: it takes the softmax of one logit, which is always 1.
const queries = documents.map(() => query);
const { logits } = await model(tokenizer(queries, { text_pair: documents, padding: true, truncation: true }));
console.log(JSON.stringify(logits.tolist().map(([logit]) => logit)));
