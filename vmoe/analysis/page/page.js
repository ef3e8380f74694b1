const record = JSON.parse(document.getElementById("record").textContent, (_, value) =>
  value && value.data !== undefined && value.shape ? decode(value) : value);
const {models, images, classes, palette, inks} = record;
const PRIORITY_NAMES = {
  order: "order in the batch", largest_gate: "largest gate", sum_of_gates: "sum of gates", random: "random",
};
const EMPTY = "#8a8f96"; // a patch without a routed expert
const SIZE = new Blob([document.documentElement.outerHTML]).size; // bytes, before anything is drawn

// ------------------------------------------------------------------ state, kept in the address

const START = {image: 0, model: 0, block: null, token: null, expert: null, show: "experts", opacity: 55,
  slots: null, priority: null, removal: null, class: "", wrong: false};
const SHOWS = [["experts", "experts"], ["attention", "attention of the selected patch"]];
const range = length => Array.from({length}, (_, i) => i);
const blockOf = (model, number) => models[model].blocks.find(block => block.number === number);
const isShown = (model, block) => model === state.model && block.number === state.block;
const state = fromAddress(new URLSearchParams(location.hash.slice(1)));

// The state in the address; START has the values that are missing or invalid.
function fromAddress(words) {
  const given = {...START};
  const take = known => Object.entries(known).forEach(([name, values]) => {
    given[name] = values.find(value => `${value}` === words.get(name)) ?? given[name];
  });
  take({image: range(images.length), model: range(models.length)});
  const {blocks, tokens, removed} = models[given.model];
  given.block = blocks.at(-1).number;
  take({block: blocks.map(({number}) => number)});
  const block = blockOf(given.model, given.block);
  take({token: range(tokens), expert: range(block.experts), show: SHOWS.map(([name]) => name), opacity: range(101),
    slots: range(block.drops ? block.most + 1 : 0), priority: block.drops ? Object.keys(PRIORITY_NAMES) : [],
    removal: range(removed?.which.length ?? 0), class: range(classes.length), wrong: [true]});
  return given;
}

function toAddress() {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== START[name] && value !== null) words.set(name, value);
  }
  try { history.replaceState(null, "", `#${words}`); } catch { /* a notebook's frame has no address */ }
}

// Like set; if the filters hide the current image, the first visible one becomes current.
function filter(changes) {
  Object.assign(state, changes);
  const shown = visible();
  set(shown.length && !shown.includes(state.image) ? {image: shown[0]} : {});
}

function set(changes) {
  const moves = ["model", "block"].some(name => name in changes && changes[name] !== state[name]);
  Object.assign(state, moves && {slots: null, priority: null, expert: null}, changes);
  toAddress();
  draw();
}

// Like set, but without redrawing the controls, since one of them is being dragged.
function slide(changes) {
  Object.assign(state, changes);
  toAddress();
  for (const part of [drawPanels, drawPath, drawCapacityResult]) part();
}

// ------------------------------------------------------------------ small parts

// An element; text is never read as HTML.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else if (name === "style") Object.assign(element.style, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}
const byId = id => document.getElementById(id);
const fill = (id, ...children) => byId(id).replaceChildren(...children);
const nameOf = label => classes[label] ?? `class ${label}`; // a model can have more logits than classes
const percent = (value, digits = 0) => `${(100 * value).toFixed(digits)}%`;
const color = expert => expert === null ? EMPTY : palette[expert % palette.length];
const ink = expert => expert === null ? "#000" : inks[expert % inks.length];

function choice(name, label, options, value, change = set) {
  const select = make("select", {onchange: () => change({[name]: JSON.parse(select.value)})});
  for (const [key, text] of options) {
    select.append(make("option", {value: JSON.stringify(key), selected: key === value}, text));
  }
  select.id = `choice-${name}`;
  return make("label", {}, label, select);
}

function table(columns, rows, className = "") {
  const head = make("tr", {}, ...columns.map(text => make("th", {scope: "col"}, text)));
  const body = rows.map(([first, ...rest]) => make("tr", {},
    make("th", {scope: "row"}, first), ...rest.map(cell => make("td", {}, cell))));
  return make("div", {className: "scroll"}, make("table", {className},
    ...(columns.length ? [make("thead", {}, head)] : []), make("tbody", {}, ...body)));
}

function chip(expert, text, properties = {}) {
  return make("button", {type: "button", className: `chip${ink(expert) === "#ffffff" ? " light" : ""}`,
    style: {background: color(expert)}, ...properties}, text);
}

// The five likeliest classes as bars; the true ones are bold.
function bars(top, probabilities, labels) {
  const rows = Array.from(top, (one, i) => {
    const bar = make("div", {className: "fill", style: {width: percent(probabilities[i] / 255, 1)}});
    const isTrue = labels.includes(one);
    return make("tr", {className: isTrue ? "true" : ""},
      make("th", {scope: "row", title: isTrue ? "a true class" : ""}, (isTrue ? "✓\u00a0" : "") + nameOf(one)),
      make("td", {className: "bar"}, bar), make("td", {}, percent(probabilities[i] / 255)));
  });
  return make("table", {className: "bars"}, make("tbody", {}, ...rows));
}

function prediction(array, ...index) {
  return bars(at(array.top, ...index), at(array.probabilities, ...index), images[index.at(-1)].labels);
}
const predicted = (array, ...index) => at(array.top, ...index)[0];
const named = labels => labels.map(label => classes[label]).join(", ");

// ------------------------------------------------------------------ tokens

// The experts of a token, best first: {expert, gate, kept, weight}; all experts for soft routing.
function choices(block, image, token, kept) {
  const gates = at(block.all, image, token);
  if (!block.chosen.shape[2]) {
    return Array.from(gates, (gate, expert) => ({expert, gate: gate / 255, weight: gate / 255, kept: true}))
      .sort((one, other) => other.gate - one.gate);
  }
  const chosen = at(block.chosen, image, token), own = at(block.gates, image, token);
  const k = chosen.length;
  const weights = at(block.weights, image, token);
  return Array.from(chosen, (expert, rank) => {
    const held = Boolean(kept[token * k + rank]);
    return {expert, gate: own[rank], kept: held, weight: held ? weights[rank] : 0};
  }).filter(({expert}) => expert < block.experts);
}

// Whether an expert is one of a token's choices; for soft routing, the one with the largest gate.
const isAt = (block, chosen, expert) =>
  (block.chosen.shape[2] ? chosen : chosen.slice(0, 1)).some(each => each.expert === expert);

const isChanged = () => state.slots !== null || state.priority !== null;

// As recorded, or in the current block as decided with the slots and the priority of the controls.
function keptNow(model, block, image) {
  if (!block.drops || !isShown(model, block) || !isChanged()) return at(block.kept, image);
  return keptInGroup(block, image, state.slots ?? block.slots, state.priority ?? block.priority).get(image);
}

// ------------------------------------------------------------------ pictures

const loaded = images.map(({source}) => Object.assign(new Image(), {src: source}));
const SIDE = 248;

function canvasOf(width, height) {
  const scale = window.devicePixelRatio || 1;
  const canvas = make("canvas", {width: width * scale, height: height * scale});
  canvas.getContext("2d").scale(scale, scale);
  return canvas;
}

function patchPicture(model, block, image) {
  const {rows, columns, prefix} = models[model];
  const height = SIDE * rows / columns, w = SIDE / columns, h = height / rows;
  const canvas = canvasOf(SIDE, height), pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = loaded[image].naturalWidth > 100;
  if (state.opacity > 0) pen.filter = "grayscale(1) contrast(.5)"; // so that all color shows experts
  pen.drawImage(loaded[image], 0, 0, SIDE, height);
  pen.filter = "none";
  const kept = keptNow(model, block, image);
  const wanted = isShown(model, block) ? state.expert : null;
  const attention = state.show === "attention" && attentionOf(model, block, image);
  for (let patch = 0; patch < rows * columns; patch++) {
    const token = patch + prefix, x = patch % columns * w, y = Math.floor(patch / columns) * h;
    const chosen = choices(block, image, token, kept);
    if (attention) heat(pen, x, y, w, h, attention[token] / 255);
    else paint(pen, x, y, w, h, chosen, wanted !== null && !isAt(block, chosen, wanted));
    if (token === tokenIn(model)) frame(pen, x, y, w, h);
  }
  return canvas;
}

// The color of the first choice, and lines for dropped choices; dim if not at the selected expert.
function paint(pen, x, y, w, h, chosen, dim) {
  const first = chosen.length ? chosen[0].expert : null, held = chosen.some(({kept}) => kept);
  pen.globalAlpha = state.opacity / 100 * (dim ? .25 : 1);
  pen.fillStyle = held ? color(first) : EMPTY;
  pen.fillRect(x, y, w + .3, h + .3);
  pen.globalAlpha = dim ? .3 : 1;
  pen.strokeStyle = "#fff";
  pen.lineWidth = 1.5;
  pen.beginPath();
  if (!held || !chosen[0].kept) { pen.moveTo(x + 2, y + h - 2); pen.lineTo(x + w - 2, y + 2); }
  if (!held) { pen.moveTo(x + 2, y + 2); pen.lineTo(x + w - 2, y + h - 2); }
  pen.stroke();
  if (w >= 20 && first !== null && state.opacity > 0) {
    pen.font = "600 11px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineWidth = 2.5;
    pen.strokeStyle = ink(first) === "#ffffff" ? "#0008" : "#fff8";
    pen.fillStyle = ink(first);
    pen.strokeText(first, x + w / 2, y + h / 2);
    pen.fillText(first, x + w / 2, y + h / 2);
  }
  pen.globalAlpha = 1;
}

function heat(pen, x, y, w, h, value) {
  pen.fillStyle = `rgb(240 228 66 / ${(value * .85).toFixed(3)})`;
  pen.fillRect(x, y, w + .3, h + .3);
  pen.fillStyle = `rgb(0 0 0 / ${((1 - value) * .5).toFixed(3)})`;
  pen.fillRect(x, y, w + .3, h + .3);
}

function frame(pen, x, y, w, h) {
  for (const [style, width] of [["#000", 4], ["#fff", 2]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.strokeRect(x + 1, y + 1, w - 2, h - 2);
  }
}

const isClassToken = ({classToken}, token) => classToken && token === 0; // the others before patches are registers

// The selected token in a model; in a model with another grid, the token at the same position.
function tokenIn(model) {
  const own = models[state.model], other = models[model];
  if (state.token === null || model === state.model) return state.token;
  if (state.token < own.prefix) return isClassToken(own, state.token) && other.classToken ? 0 : null;
  const patch = state.token - own.prefix;
  const row = Math.floor((Math.floor(patch / own.columns) + .5) / own.rows * other.rows);
  const column = Math.floor((patch % own.columns + .5) / own.columns * other.columns);
  return other.prefix + row * other.columns + column;
}

// How much the selected token attends to each token, as a fraction of the largest to a patch; null if unknown.
function attentionOf(model, block, image) {
  const token = tokenIn(model);
  return block.attention && token !== null && image < block.attention.shape[0]
    ? at(block.attention, image, token) : null;
}

// ------------------------------------------------------------------ sections

function drawFilters() {
  fill("filters",
    choice("class", "class", [["", "all"], ...classes.map((name, i) => [i, name])], state.class, filter),
    choice("expert", `block ${state.block} uses expert`, [[null, "any"],
      ...range(blockOf(state.model, state.block).experts).map(expert => [expert, `${expert}`])],
    state.expert, filter),
    make("label", {}, make("input", {type: "checkbox", id: "wrong", checked: state.wrong,
      onchange: event => filter({wrong: event.target.checked})}), "only wrong predictions"));
}

// Any label of an image is right; without a label, a prediction is neither right nor wrong.
const isRight = (image, array, ...index) => images[image].labels.includes(predicted(array, ...index, image));
const isWrong = image => images[image].labels.length > 0 && !isRight(image, models[state.model].predictions);

// The number of an image's patches that are at an expert.
function patchesAt(block, image, expert) {
  const kept = at(block.kept, image), {prefix, tokens} = models[state.model];
  let count = 0;
  for (let token = prefix; token < tokens; token++) count += isAt(block, choices(block, image, token, kept), expert);
  return count;
}

function visible() {
  let shown = images.map((_, image) => image).filter(image =>
    (state.class === "" || images[image].labels.includes(state.class)) && (!state.wrong || isWrong(image)));
  if (state.expert !== null) {
    const block = blockOf(state.model, state.block);
    const counts = new Map(shown.map(image => [image, patchesAt(block, image, state.expert)]));
    shown = shown.filter(image => counts.get(image)).sort((one, other) => counts.get(other) - counts.get(one));
  }
  return shown;
}

function drawGallery() {
  const shown = visible();
  fill("gallery", ...shown.map(image => {
    const {source, labels} = images[image];
    const guess = nameOf(predicted(models[state.model].predictions, image));
    const text = !labels.length ? `predicted ${guess}`
      : `${named(labels)}, predicted ${isWrong(image) ? guess : "correctly"}`;
    return make("img", {src: source, alt: text, title: text, id: `image-${image}`, role: "option",
      className: `pixels${isWrong(image) ? " wrong" : ""}`, "aria-selected": image === state.image,
      onclick: () => set({image})});
  }));
  const isAmong = shown.includes(state.image);
  byId("gallery").setAttribute("aria-activedescendant", isAmong ? `image-${state.image}` : "");
  byId("gallery").onkeydown = event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!step || !shown.length) return;
    event.preventDefault();
    const place = shown.indexOf(state.image) + step;
    set({image: shown[Math.min(Math.max(place, 0), shown.length - 1)]});
    byId(`image-${state.image}`)?.scrollIntoView({block: "nearest"});
  };
  fill("count", `${shown.length} of ${images.length} images; an orange line marks a wrong prediction`
    + `${models.length > 1 ? ` of ${models[state.model].name}` : ""}. `,
  ...(isAmong ? [] : [make("span", {className: "changed"}, "The image below is not among them.")]));
}

function drawView() {
  const attends = models.some(model => model.blocks.some(block => block.attention));
  fill("view", ...(attends
    ? [choice("show", "show", SHOWS, state.show)]
    : []), make("label", {}, "color", make("input", {type: "range", min: 0, max: 100, id: "opacity",
    value: state.opacity, oninput: event => slide({opacity: Number(event.target.value)})})),
  ...(models[state.model].classToken ? [make("button", {type: "button", id: "class-token",
    onclick: () => set({token: 0})}, "select the class token")] : []));
  const block = blockOf(state.model, state.block);
  if (state.show === "attention" && attentionOf(state.model, block, state.image)) {
    return fill("legend", make("span", {className: "note"}, "attention (mean over the heads): 0"),
      make("span", {className: "scale", role: "img", "aria-label": "from dark to yellow"}),
      make("span", {className: "note"}, "maximum of the selected patch"));
  }
  fill("legend", ...range(block.experts).map(expert => chip(expert, `${expert}`, {
    "aria-pressed": state.expert === expert, "aria-label": `expert ${expert}`, id: `expert-${expert}`,
    title: `expert ${expert}: show where it is used`,
    onclick: () => filter({expert: state.expert === expert ? null : expert})})));
}

function drawPanels() {
  fill("live"); // the announced patch may have changed
  const {image} = state, {source, labels} = images[image];
  const picture = make("div", {className: "panel"}, make("h3", {}, named(labels) || "image"),
    make("img", {src: source, alt: named(labels) || "the image", className: "pixels"}));
  const panels = models.flatMap((model, m) => [
    ...(models.length > 1 ? [make("h3", {className: "model"}, model.name)] : []),
    ...(m ? [] : [picture]),
    ...model.blocks.map(block => panel(m, block)),
    make("div", {className: "panel prediction"},
      make("h3", {}, `prediction${model.sigmoid ? " (sigmoid probabilities)" : ""}`), prediction(model.predictions, image),
      ...(m === state.model && isChanged() ? [make("p", {className: "note"}, "the model as loaded, without the changed slots")] : []))]);
  fill("panels", ...panels);
  const block = blockOf(state.model, state.block);
  if (state.show === "attention" && !attentionOf(state.model, block, image)) {
    fill("hint", state.token === null ? "Select a patch to see its attention."
      : `Attention is stored for the first ${block.attention.shape[0]} images.`);
  }
}

function panel(model, block) {
  const canvas = patchPicture(model, block, state.image), {rows, columns, prefix} = models[model];
  Object.assign(canvas, {tabIndex: 0, id: `picture-${model}-${block.number}`});
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-roledescription", "picture of patches");
  canvas.setAttribute("aria-label", `block ${block.number}: ${described(model, block)}`);
  canvas.onclick = event => {
    const box = canvas.getBoundingClientRect();
    const place = (offset, size, count) => Math.min(count - 1, Math.max(0, Math.floor(offset / size * count)));
    const row = place(event.clientY - box.top, box.height, rows);
    select(model, block, prefix + row * columns + place(event.clientX - box.left, box.width, columns));
  };
  canvas.onkeydown = event => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[event.key];
    if (!step) return;
    event.preventDefault();
    const patch = (tokenIn(model) ?? prefix) - prefix, next = patch + step;
    const sameRow = Math.abs(step) > 1 || Math.floor(next / columns) === Math.floor(patch / columns);
    const inside = next >= 0 && next < rows * columns && sameRow;
    select(model, block, prefix + (state.token === null || !inside ? patch : next));
  };
  return make("div", {className: `panel${isShown(model, block) ? " shown" : ""}`}, make("h3", {}, `block ${block.number}`), canvas);
}

function select(model, block, token) {
  set({model, block: block.number, token});
  byId(`picture-${model}-${block.number}`).focus({preventScroll: true});
  fill("live", described(model, block));
}

const positionName = ({columns}, patch) => `row ${Math.floor(patch / columns) + 1}, column ${patch % columns + 1}`;

// A sentence for screen readers.
function described(model, block) {
  const token = tokenIn(model), {prefix} = models[model];
  if (token === null) return "no patch is selected; use the arrow keys";
  const before = isClassToken(models[model], token) ? "class token" : "register";
  const where = token < prefix ? before : positionName(models[model], token - prefix);
  const chosen = choices(block, state.image, token, keptNow(model, block, state.image)).slice(0, 3);
  const experts = chosen.map(({expert, gate, kept}) =>
    `expert ${expert}, gate ${gate.toFixed(2)}${kept ? "" : ", dropped"}`);
  return `${where}: ${experts.join("; ") || "no routed expert"}`;
}

function drawPath() {
  if (state.token === null) return fill("path");
  const parts = models.map((model, m) => {
    const token = tokenIn(m);
    const rows = token === null ? [] : model.blocks.map(block => {
      const gates = at(block.all, state.image, token), total = gates.reduce((sum, gate) => sum + gate, 0) || 1;
      const strip = make("span", {className: "gates", role: "img", "aria-label": "all gates",
        title: Array.from(gates, (gate, expert) => `expert ${expert}: ${percent(gate / 255)}`).join("\n")},
      ...Array.from(gates, (gate, expert) => make("span",
        {style: {width: percent(gate / total, 2), background: color(expert)}})));
      const chosen = choices(block, state.image, token, keptNow(m, block, state.image)).slice(0, 4);
      const chips = make("span", {className: "chips"}, ...chosen.map(({expert}) => chip(expert, `${expert}`,
        {"aria-label": `expert ${expert}`, onclick: () => set({model: m, block: block.number, token, expert})})));
      const digits = block.chosen.shape[2] ? 3 : 2; // soft routing: gates are stored in units of 1/255
      return [`block ${block.number}`, chips, chosen.map(({gate}) => gate.toFixed(digits)).join("  "),
        chosen.map(({weight, kept}) => !kept ? "dropped" : Number.isNaN(weight) ? "unknown" : weight.toFixed(digits)).join("  "), strip];
    });
    return table([models.length > 1 ? model.name : "the selected patch", "experts", "gates", "weights", "all gates"], rows);
  });
  fill("path", ...parts);
}

const capacityFactor = (block, slots) => slots * block.experts / (block.tokens * block.chosen.shape[2]);

function drawCapacity() {
  const block = blockOf(state.model, state.block);
  byId("capacity-section").hidden = !block.drops;
  if (!block.drops) return;
  fill("capacity", make("label", {}, `block ${block.number}`, make("input", {type: "range", id: "slots", min: 0,
    max: block.most, step: block.step, value: state.slots ?? block.slots,
    oninput: event => slide({slots: Number(event.target.value)})})),
  make("span", {id: "slots-text"}),
  choice("priority", "priority", Object.entries(PRIORITY_NAMES), state.priority ?? block.priority),
  make("button", {type: "button", id: "reset", onclick: () => set({slots: null, priority: null})},
    `as loaded: ${block.dropless ? "dropless" : `${block.slots} slots, ${PRIORITY_NAMES[block.priority]}`}`));
  drawCapacityResult();
}

function drawCapacityResult() {
  const block = blockOf(state.model, state.block), {grid} = models[state.model];
  if (!block.drops) return;
  const slots = state.slots ?? block.slots, priority = state.priority ?? block.priority;
  const text = `${slots} slots per expert: capacity factor ${capacityFactor(block, slots).toFixed(2)}`;
  byId("slots").setAttribute("aria-valuetext", text);
  fill("slots-text", text);
  const kept = keptInGroup(block, state.image, slots, priority);
  const own = count(block, state.image, kept.get(state.image));
  const group = [...kept].map(([image, kept]) => count(block, image, kept));
  const sum = name => group.reduce((total, each) => total + each[name], 0);
  const rows = [
    ["this image", percent(own.dropped / own.choices, 1), percent(own.unprocessed / own.patches, 1)],
    [`its group of ${kept.size} images`, percent(sum("dropped") / sum("choices"), 1), percent(sum("unprocessed") / sum("patches"), 1)]];
  const nearest = grid && grid.slots.reduce((best, each) => Math.abs(each - slots) <= Math.abs(best - slots) ? each : best);
  fill("capacity-result", make("div", {className: "columns"},
    make("div", {}, make("h3", {}, `block ${block.number} alone`),
      make("p", {className: "note"}, "Slots are assigned again for the recorded inputs of this block; later blocks are not recomputed."),
      table(["", "choices dropped", "patches without a routed expert"], rows), ...(block.about ? [make("p", {className: "note"}, block.about)] : [])),
    ...(grid ? [gridResult(grid, nearest, nearest === slots ? "" : "nearest computed: ", priority)] : [])));
}

// Counts for an image: choices, dropped choices, patches, and patches without a routed expert.
function count(block, image, kept) {
  const [, n, k] = block.chosen.shape, chosen = at(block.chosen, image), {prefix} = models[state.model];
  let choices = 0, dropped = 0, unprocessed = 0;
  for (let token = 0; token < n; token++) {
    let held = 0;
    for (let rank = 0; rank < k; rank++) {
      if (chosen[token * k + rank] >= block.experts) continue;
      choices++;
      if (kept[token * k + rank]) held++; else dropped++;
    }
    unprocessed += token >= prefix && !held;
  }
  return {choices, dropped, unprocessed, patches: n - prefix};
}

// The number of labeled images that are predicted correctly, also by the model as loaded.
function accuracy(array, ...index) {
  const known = range(images.length).filter(image => images[image].labels.length);
  const right = (...which) => known.filter(image => isRight(image, ...which)).length;
  return known.length ? `${right(array, ...index)} of ${known.length} images are predicted correctly; `
    + `as loaded, ${right(models[state.model].predictions)}` : "";
}

function gridResult(grid, slots, which, priority) {
  const index = [grid.slots.indexOf(slots), grid.priorities.indexOf(priority)];
  const now = predicted(grid, ...index, state.image), before = predicted(models[state.model].predictions, state.image);
  return make("div", {}, make("h3", {}, `the whole model, ${which}${slots} slots in every sparse block`),
    prediction(grid, ...index, state.image),
    make("p", {className: now === before ? "note" : "changed"}, now === before ? "the same prediction" : "another prediction"),
    make("p", {className: "note"}, accuracy(grid, ...index)));
}

function drawRemoval() {
  const {removed, predictions} = models[state.model];
  byId("removal-section").hidden = !removed;
  if (!removed) return;
  const own = removed.which.flatMap(([block], i) => block === state.block ? [i] : []);
  const which = own.includes(state.removal) ? state.removal : own[0];
  const changes = i => images.filter((_, image) => predicted(removed, i, image) !== predicted(predictions, image)).length;
  fill("removal", choice("removal", `block ${state.block}, without expert`, own.map(i =>
    [i, `${removed.which[i][1]}, ${removed.which[i][2]} (changes ${changes(i)} of ${images.length})`]), which));
  const changed = predicted(removed, which, state.image) !== predicted(predictions, state.image);
  fill("removal-result", make("p", {className: "note"},
    "Ablated: its output is zero, so its patches keep only their residual connection. Masked: its patches go to other experts."),
  make("div", {className: "columns"},
    make("div", {}, make("h3", {}, "with all experts"), prediction(predictions, state.image)),
    make("div", {}, make("h3", {}, "without it"), prediction(removed, which, state.image),
      make("p", {className: changed ? "changed" : "note"}, changed ? "another prediction" : "the same prediction"),
      make("p", {className: "note"}, accuracy(removed, which)))));
}

// ------------------------------------------------------------------ statistics of the whole sample

function drawExperts() {
  const model = models[state.model], block = blockOf(state.model, state.block);
  fill("expert-controls", choice("block", models.length > 1 ? model.name : "", model.blocks.map(({number}) =>
    [number, `block ${number}`]), state.block));
  fill("experts", ...[loadTable(block), topPatches(block), byClass(block), positions(model, block)].filter(Boolean));
}

function loadTable(block) {
  const most = Math.max(...block.load, ...block.importance), share = 1 / block.experts;
  const fraction = (value, background) => make("div", {className: "fill", style: {width: percent(value / most, 1), background}});
  const uniform = ["uniform", fraction(share, EMPTY), percent(share, 1), percent(share, 1)];
  const rows = Array.from(block.load, (load, expert) => [chip(expert, `${expert}`, {"aria-label": `expert ${expert}`,
    onclick: () => filter({expert})}),
  fraction(load, color(expert)), percent(load, 1), percent(block.importance[expert], 1)]);
  const chooses = block.positions !== null, over = `over ${block.images.toLocaleString("en")} images`;
  const drawn = chooses ? table(["expert", "", "load", "importance"], [...rows, uniform], "bars")
    : table(["expert", "", "importance"], [...rows, uniform].map(row => row.slice(0, -1)), "bars");
  drawn.querySelectorAll("tbody td:nth-child(2)").forEach(cell => { cell.className = "bar"; });
  return make("div", {}, make("h3", {}, chooses ? `Load: share of the choices, ${over}` : `Importance: mean gate, ${over}`), drawn,
    ...(chooses ? [make("p", {className: "note"}, `${percent(block.dropped, 1)} of the choices are dropped, in all groups`)] : []));
}

function topPatches(block) {
  if (!block.topPatches) return null;
  const {source, side, items} = block.topPatches;
  const grid = make("div", {className: "mosaic"});
  const sprite = Object.assign(new Image(), {src: source});
  items.forEach((patches, expert) => {
    const row = make("div", {className: "row"});
    patches.forEach(({gate, labels}, place) => {
      const name = labels.map(label => `${classes[label]}, `).join("");
      const canvas = make("canvas", {width: side, height: side, title: `${name}gate ${gate.toFixed(2)}`,
        className: side < 64 ? "pixels" : "", role: "img", "aria-label": `${name}gate ${gate.toFixed(2)}`});
      sprite.decode().then(() => {
        const corner = [place * side, expert * side];
        canvas.getContext("2d").drawImage(sprite, ...corner, side, side, 0, 0, side, side);
        canvas.dataset.drawn = true;
      });
      row.append(canvas);
    });
    grid.append(chip(expert, `${expert}`, {"aria-label": `expert ${expert}`, onclick: () => filter({expert})}), row);
  });
  return make("div", {}, make("h3", {}, "Top patches: the largest gates of each expert"), grid);
}

function byClass(block) {
  if (block.information === null) return null;
  return make("div", {}, make("h3", {}, `Choices by class${block.classes ? ", in percent of the class" : ""}`),
    block.classes ? classTable(block) : make("p", {}, `The table is left out above ${record.mostClasses} classes.`),
    make("p", {className: "note"}, `Normalized mutual information of expert and class: ${block.information.toFixed(3)}; `
      + `chance baseline (shuffled classes): ${block.chance.toFixed(3)}`));
}

function classTable(block) {
  const largest = Math.max(...block.classes.flat());
  const rows = block.classes.map((row, expert) => [`expert ${expert}`, ...row.map(value => percent(value))]);
  const drawn = table(["", ...classes], rows, "heat");
  drawn.querySelectorAll("tbody tr").forEach((row, expert) => row.querySelectorAll("td").forEach((cell, y) => {
    cell.style.background = `color-mix(in srgb, var(--bar) ${Math.round(100 * block.classes[expert][y] / largest)}%, transparent)`;
  }));
  return drawn;
}

function positions(model, block) {
  if (!block.positions) return null;
  const {rows, columns} = model, figures = block.positions.map((shares, expert) => {
    const most = Math.max(...shares), best = shares.indexOf(most);
    const canvas = make("canvas", {width: columns, height: rows, className: "pixels", role: "img", "aria-label": most > 0
      ? `expert ${expert}: most choices in ${positionName(model, best)}` : `expert ${expert}: no choices`});
    const pen = canvas.getContext("2d");
    shares.forEach((value, patch) => {
      pen.globalAlpha = value / (most || 1);
      pen.fillStyle = color(expert);
      pen.fillRect(patch % columns, Math.floor(patch / columns), 1, 1);
    });
    return make("figure", {}, canvas, make("figcaption", {className: "note"}, `expert ${expert}`));
  });
  return make("div", {}, make("h3", {}, "Choices by position in the image"),
    make("div", {className: "positions"}, ...figures),
    make("p", {className: "note"}, `Normalized mutual information of expert and position: ${block.position.toFixed(3)}; `
      + `chance baseline (shuffled positions): ${block.positionChance.toFixed(3)}`));
}

// ------------------------------------------------------------------ start

const HINT = byId("hint").textContent;
let drawnExperts = "";

function draw() {
  fill("hint", HINT);
  for (const part of [drawFilters, drawGallery, drawView, drawPanels, drawPath, drawCapacity, drawRemoval]) keepFocus(part);
  const shown = `${state.model} ${state.block}`;
  if (shown !== drawnExperts) keepFocus(drawExperts);
  drawnExperts = shown;
}

// Redraws a part, and restores the focus.
function keepFocus(part) {
  const {id} = document.activeElement ?? {};
  part();
  if (id && document.activeElement?.id !== id) byId(id)?.focus({preventScroll: true});
}

fill("summary", record.summary);
window.addEventListener("hashchange", () => location.reload());
Promise.all(loaded.map(image => image.decode())).then(() => {
  draw();
  const milliseconds = Math.round(performance.now());
  document.documentElement.dataset.drawn = milliseconds;
  fill("measured", `${(SIZE / 1e6).toFixed(2)} MB, no network; first picture after ${milliseconds} ms`);
});
