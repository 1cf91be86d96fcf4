// Streams a file through a bundle's ONNX graphs and edits the memory on the way. No Python.
//
//   node stream.mjs BUNDLE FILE [--no-edit]      prints bits per byte, as `titans run` does

import fs from 'node:fs';
import path from 'node:path';
import ort from 'onnxruntime-node';

const SEGMENT = 512; // tokens at once where nothing is edited in between

class Graph {
  static async load(bundle, spec) {
    const graph = new Graph();
    graph.session = await ort.InferenceSession.create(path.join(bundle, spec.file), { logSeverityLevel: 3 });
    graph.names = spec.inputs.map((tensor) => tensor.name);
    return graph;
  }
  run(given) {
    return this.session.run(Object.fromEntries(this.names.map((name) => [name, given[name]])));
  }
}

const size = (shape) => shape.reduce((product, axis) => product * axis, 1);
const float = (data, shape) => new ort.Tensor('float32', data, shape);
const integers = (values, shape) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), shape);

// Memories that do not begin with one number: safetensors, a length, a JSON header, the tensors' bytes.
function learned(file, name) {
  const content = fs.readFileSync(file);
  const length = Number(content.readBigUInt64LE(0));
  const entry = JSON.parse(content.subarray(8, 8 + length))[name];
  const bytes = new Uint8Array(content.subarray(8 + length + entry.data_offsets[0], 8 + length + entry.data_offsets[1]));
  return float(new Float32Array(bytes.buffer), [1, ...entry.shape]);
}

// The state before the first token, as past.<name>, one row of every entry.
function initialState(bundle, manifest) {
  const state = {};
  for (const { name, dtype, shape, initial } of manifest.state) {
    const axes = [1, ...shape.slice(1)];
    if (typeof initial === 'string') state[`past.${name}`] = learned(path.join(bundle, initial), name);
    else if (dtype === 'int64') state[`past.${name}`] = integers(new Array(size(axes)).fill(initial), axes);
    else state[`past.${name}`] = float(new Float32Array(size(axes)).fill(initial), axes);
  }
  return state;
}

// The readout memory's editor: one gradient step a period, taken once the period's last target is known.
class ReadoutEditor {
  constructor(graph, editor, memory) {
    Object.assign(this, { graph, editor, memory });
    this.energy = new Float32Array(memory.dims[1]);
    // The logits hold the memory's part already, so the graph is given a memory of zeros beside them.
    this.nothing = float(new Float32Array(memory.data.length), memory.dims);
  }
  async learn(scored, targets) {
    const result = await this.graph.run({
      input_ids: targets,
      'past.readout': this.nothing,
      readout_key: scored.readout_key,
      readout_rows: scored.readout_rows,
      base_logits: scored.logits,
    });
    const [, width, vocab] = result['grad.readout'].dims;
    const gradient = result['grad.readout'].data;
    for (let row = 0; row < width; row++) this.update(row, gradient.subarray(row * vocab, (row + 1) * vocab));
    // The key's one-hot parts: what each position adds to every row that it picks, summed over positions.
    const contexts = scored.readout_rows.dims[2];
    const parts = result['grad.readout_rows'].data;
    const sums = new Map();
    scored.readout_rows.data.forEach((picked, place) => {
      const row = Number(picked);
      if (!sums.has(row)) sums.set(row, new Float32Array(vocab));
      const sum = sums.get(row);
      const start = Math.floor(place / contexts) * vocab;
      for (let v = 0; v < vocab; v++) sum[v] += parts[start + v];
    });
    for (const [row, sum] of sums) this.update(row, sum);
  }
  update(row, gradient) {
    let rate = this.editor.step;
    if (this.editor.optimizer === 'adagrad') {
      this.energy[row] += gradient.reduce((total, value) => total + value * value, 0);
      rate /= Math.sqrt(1 + this.energy[row]);
    }
    const start = row * gradient.length;
    for (let v = 0; v < gradient.length; v++) this.memory.data[start + v] -= rate * gradient[v];
  }
}

function logProbability(logits, target) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  return logits[target] - most - Math.log(logits.reduce((total, value) => total + Math.exp(value - most), 0));
}

async function run(bundle, text, edit) {
  const manifest = JSON.parse(fs.readFileSync(path.join(bundle, 'titans.json'), 'utf8'));
  const { vocab_size: vocab, edit_layers: layers, graphs, recommended } = manifest;
  const model = await Graph.load(bundle, graphs.model);
  const state = initialState(bundle, manifest);
  state.edit = float(new Float32Array(layers).fill(edit ? recommended.edit : 0), [1, layers]);
  let editor = null;
  if (edit && recommended.editor) {
    const graph = await Graph.load(bundle, graphs['gradient.readout']);
    editor = new ReadoutEditor(graph, recommended.editor, state['past.readout']);
  }
  const period = editor ? recommended.editor.chunk : SEGMENT;
  let nats = Math.log(vocab); // the first token, of which nothing is known
  for (let start = 0; start < text.length; start += period) {
    const ids = text.subarray(start, start + period);
    const scored = await model.run({ ...state, input_ids: integers(ids, [1, ids.length]) });
    const targets = text.subarray(start + 1, start + 1 + ids.length);
    targets.forEach((target, t) => {
      nats -= logProbability(scored.logits.data.subarray(t * vocab, (t + 1) * vocab), target);
    });
    for (const name of Object.keys(scored)) {
      if (name.startsWith('present.')) state[`past.${name.slice('present.'.length)}`] = scored[name];
    }
    if (editor && targets.length === ids.length) await editor.learn(scored, integers(targets, [1, ids.length]));
  }
  return nats / Math.log(2) / text.length;
}

const [bundle, file, option, ...rest] = process.argv.slice(2);
if (!file || rest.length || (option && option !== '--no-edit')) {
  console.error('node stream.mjs BUNDLE FILE [--no-edit]');
  process.exit(2);
}
try {
  const text = fs.readFileSync(file);
  if (!text.length) throw new Error(`${file}: is empty; give at least one byte`);
  console.log(`bits_per_byte  ${(await run(bundle, text, !option)).toFixed(6)}`);
} catch (error) {
  console.error(`stream: ${error.message}`);
  process.exit(3);
}
