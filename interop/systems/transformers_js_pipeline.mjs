// system: transformers.js, pipeline('text-classification')
// artifact: onnx int8
// requires: @huggingface/transformers@4.3.0
// largest error: inf
import path from 'node:path';
import { text } from 'node:stream/consumers';
import { env, pipeline } from '@huggingface/transformers';

const [folder] = process.argv.slice(2);
const { query, documents } = JSON.parse(await text(process.stdin));

env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const classify = await pipeline('text-classification', path.basename(folder), { dtype: 'q8' });
const results = await classify(documents.map((document) => `${query}[SEP]${document}`));
const scores = results.map(({ score }) => score);
if (scores.every((score) => score === 1)) throw new Error('every score is 1: it takes the softmax of one logit');
console.log(JSON.stringify(scores));
