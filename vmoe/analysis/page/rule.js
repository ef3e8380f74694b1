"use strict";

// Arrays of the record: {type, shape, data: base64, little endian}.
const TYPES = {u1: Uint8Array, u2: Uint16Array, f4: Float32Array};

function decode({type, shape, data}) {
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
  return {shape, values: new TYPES[type](bytes.buffer)};
}

// The values of one row: at(array, i, j) is array[i, j, :].
function at({shape, values}, ...index) {
  let start = 0, size = values.length;
  index.forEach((i, axis) => { size /= shape[axis]; start += i * size; });
  return values.subarray(start, start + size);
}

// The images of a group, in the order of their tokens.
function imagesOfGroup(block, group) {
  const images = [];
  block.groups.values.forEach((own, image) => { if (own === group) images.push(image); });
  return images;
}

// The tokens of a group, most important first; ties keep the order in the group.
function order(block, images, priority) {
  const n = block.chosen.shape[1];
  const tokens = images.flatMap((image, place) => Array.from({length: n}, (_, token) => {
    const score = {
      order: () => 0,
      largest_gate: () => at(block.gates, image, token)[0],
      sum_of_gates: () => block.sums.values[image * n + token],
      random: () => block.draws.values[place * n + token],
    }[priority]();
    return {image, token, score};
  }));
  return tokens.sort((one, other) => other.score - one.score);
}

// For each image in the group of the given one: whether each choice gets a slot, [token * k + rank].
// All first choices come before any second one; within a rank the priority decides.
function keptInGroup(block, image, slots, priority) {
  const images = imagesOfGroup(block, block.groups.values[image]);
  const [, n, k] = block.chosen.shape;
  const kept = new Map(images.map(each => [each, new Uint8Array(n * k)]));
  const queues = new Int32Array(block.experts + 1);
  const tokens = order(block, images, priority);
  for (let rank = 0; rank < k; rank++) {
    for (const {image, token} of tokens) {
      const expert = at(block.chosen, image, token)[rank];
      if (expert < block.experts && queues[expert]++ < slots) kept.get(image)[token * k + rank] = 1;
    }
  }
  return kept;
}
