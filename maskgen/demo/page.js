"use strict";
const $ = id => document.getElementById(id);
const model = JSON.parse($("model").textContent);
const can = Object.fromEntries(model.methods.map(method => [method, true]));
const COUNTS = [1, 2, 4, model.most_images];

// The picture {image: ImageData, hole: Uint8Array of 0 and 1}; older ones; and the candidates of the last request.
let now = null, before = [], made = null, running = null, erasing = false;
const brush = {x: 0, y: 0, down: false};

// Talking to the server

async function ask(method, body) {
  running?.abort();
  const mine = running = new AbortController();
  const token = new URLSearchParams(location.search).get("token");
  $("error").hidden = true;
  say("Sending");
  try {
    const response = await fetch(method, {method: "POST", body: JSON.stringify(body), signal: mine.signal,
      headers: {"Content-Type": "application/json", ...token && {Authorization: "Bearer " + token}}});
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (const unfinished = [];;) {  // the parts of a line that has not ended
      const {done, value} = await reader.read();
      if (done) throw new Error("The connection was lost: is the server still there?");
      const parts = value.split("\n");
      while (parts.length > 1) {
        const state = JSON.parse(unfinished.splice(0).join("") + parts.shift());
        if (state.error) throw new Error(state.error[0].toUpperCase() + state.error.slice(1) + ".");
        if (state.result) return state.result;
        if (state.ahead !== undefined) say(state.ahead ? `Waiting for ${state.ahead} before this` : "Next");
        else if (state.compiles && state.seconds > 1) say(`Compiling, once for these settings: ${state.seconds} s`);
        else say(`Computing: ${state.seconds} s`);
      }
      unfinished.push(parts[0]);
    }
  } catch (error) {
    if (error.name === "AbortError") return null;
    fail(error instanceof TypeError ? "The server does not answer: is it still there?" : error.message);
    return null;
  } finally {
    if (running === mine) { running = null; $("progress").hidden = true; }
  }
}

function say(text) {
  $("note").textContent = text;
  $("progress").hidden = false;
}

// Pictures

function canvasOf(image) {
  const canvas = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height});
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const toBase64 = image => canvasOf(image).toDataURL("image/png").split(",")[1];

async function fromBase64(text) {
  const element = new Image();
  element.src = "data:image/png;base64," + text;
  await element.decode();
  return pixels(element, element.naturalWidth, element.naturalHeight);
}

function pixels(source, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

async function openFile(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return fail("This file is not a picture that the browser can show.");
  const most = Math.min(model.most_side / 1.5, model.images ? 2 * Math.max(...model.size) : Infinity);
  const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
  const image = pixels(bitmap, Math.max(1, Math.round(scale * bitmap.width)), Math.max(1, Math.round(scale * bitmap.height)));
  const hole = new Uint8Array(image.width * image.height);
  for (let i = 0; i < hole.length; i++) {  // what is transparent is to be filled
    const alpha = image.data[4 * i + 3];
    hole[i] = can.inpaint && alpha < 128;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 + (image.data[4 * i + c] - 255) * alpha / 255;
    image.data[4 * i + 3] = 255;
  }
  if (model.images) return addToPrompt(image);
  change({image, hole});
  forget();
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = false;
}

const empty = image => new Uint8Array(image.width * image.height);

function change(next) {
  if (now) before.push({image: now.image, hole: now.hole.slice()});
  before = before.slice(-50);
  now = next;
  draw();
}

function undo() {
  if (!before.length) return;
  const {image} = now;
  now = before.pop();
  if (now.image !== image) forget();
  draw();
}

function forget() {
  made = null;
  $("made").hidden = true;
}

function draw(shown = now.image) {
  for (const id of ["picture", "hole"]) Object.assign($(id), {width: shown.width, height: shown.height});
  $("picture").getContext("2d").putImageData(shown, 0, 0);
  $("empty").hidden = true;
  $("board").hidden = false;
  $("undo").disabled = !before.length;
  $("save").disabled = false;
  $("feather").max = Math.ceil(Math.min(shown.width, shown.height) / 8);
  fit();
  drawHole(shown === now.image ? now.hole : empty(shown));
}

function drawHole(hole) {
  const {width, height} = $("hole"), image = new ImageData(width, height);
  const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--hole").match(/[\da-f]{2}/gi).map(hex => parseInt(hex, 16));
  hole.forEach((inside, i) => inside && image.data.set([r, g, b, 255], 4 * i));
  $("hole").getContext("2d").putImageData(image, 0, 0);
}

function fit() {
  if (!now) return;
  const {clientWidth, clientHeight} = $("stage"), {width, height} = $("picture"), margin = can.inpaint ? 68 : 32;
  const scale = Math.min((clientWidth - margin) / width, (clientHeight - margin) / height);
  Object.assign($("board").style, {width: scale * width + "px", height: scale * height + "px"});
  $("board").classList.toggle("large", scale > 2);
  showBrush();
}

// Painting

// The diameter of the brush in pixels of the picture, from one to half of its shorter side.
const diameter = () => Math.max(1, (Math.min(now.image.width, now.image.height) / 2) ** ($("size").value / 100) * 1.0001);

function showBrush() {
  const scale = $("board").clientWidth / now.image.width;
  Object.assign($("brush").style, {left: brush.x * scale + "px", top: brush.y * scale + "px",
    width: diameter() * scale + "px", height: diameter() * scale + "px"});
}

function stamp(x, y, value) {
  const {width, height} = now.image, radius = diameter() / 2;
  for (let j = Math.max(0, Math.floor(y - radius)); j <= Math.min(height - 1, y + radius); j++) {
    for (let i = Math.max(0, Math.floor(x - radius)); i <= Math.min(width - 1, x + radius); i++) {
      const inside = Math.hypot(i + .5 - x, j + .5 - y) <= radius || (i === Math.floor(x) && j === Math.floor(y));
      if (inside) now.hole[j * width + i] = value;
    }
  }
}

function stroke(x, y, value) {
  const steps = brush.down ? Math.ceil(Math.hypot(x - brush.x, y - brush.y) * 4 / diameter()) : 0;
  for (let i = 0; i < steps; i++) stamp(brush.x + (x - brush.x) * i / steps, brush.y + (y - brush.y) * i / steps, value);
  stamp(x, y, value);
  Object.assign(brush, {x, y});
  drawHole(now.hole);
}

// The place of a pointer in pixels of the picture.
function place(event) {
  const box = $("hole").getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * now.image.width, (event.clientY - box.top) / box.height * now.image.height];
}

// Extends the picture by pixels on each side; what is new is a hole.
function extend(from, sides) {
  const {width, height} = from.image, [top, right, bottom, left] = sides;
  const image = new ImageData(width + left + right, height + top + bottom), hole = empty(image).fill(1);
  const context = canvasOf(image).getContext("2d");
  context.fillStyle = "#777";
  context.fillRect(0, 0, image.width, image.height);
  context.putImageData(from.image, left, top);
  for (let j = 0; j < height; j++) hole.set(from.hole.subarray(j * width, (j + 1) * width), (j + top) * image.width + left);
  return {image: context.getImageData(0, 0, image.width, image.height), hole};
}

const SIDES = ["top", "right", "bottom", "left"];

function extendBy(from, side, pixels) {
  const length = SIDES.indexOf(side) % 2 ? from.image.width : from.image.height;
  const most = Math.min(length, model.most_side - length);
  return extend(from, SIDES.map(name => name === side ? Math.round(Math.min(Math.max(pixels, 0), most)) : 0));
}

// Requests

function settings() {
  const chosen = {count: COUNTS[$("count").value]};
  const typed = $("fixed").value.trim();
  chosen.seed = /^\d+$/.test(typed) ? Number(typed) : crypto.getRandomValues(new Uint32Array(1))[0];
  for (const option of model.options) chosen[option.name] = Number($(option.name).value);
  if (model.classes.length && $("label").value) chosen.label = Number($("label").value);
  for (const name of ["prompt", "negative_prompt"]) if (model[name] && $(name).value.trim()) chosen[name] = $(name).value;
  return chosen;
}

// Asks for pictures; `repeat` asks once more, with another seed.
async function run(method, body, repeat) {
  const result = await ask(method, body);
  if (!result) return;
  made = {method, body, repeat, images: await Promise.all((result.images ?? []).map(fromBase64)), chosen: 0};
  if (made.images.length) change({image: made.images[0], hole: empty(made.images[0])});
  showMade(result.guesses ?? []);
}

function fill(options = {}, from = now) {
  if (!from?.hole.some(Boolean)) return made?.method === "inpaint" ? made.repeat() : fail("Paint a hole first.");
  const image = from.image, hole = from.hole.slice(), painted = new ImageData(image.width, image.height);
  hole.forEach((inside, i) => painted.data.set(inside ? [255, 255, 255, 255] : [0, 0, 0, 255], 4 * i));
  const body = {image: toBase64(image), hole: toBase64(painted), feather: Number($("feather").value), ...settings(), ...options};
  run("inpaint", body, () => fill(options, {image, hole}));
}

// Takes what is painted away: the hole grows over its edges, and no words ask for anything in its place.
function remove() {
  if (!now) return fail("Open a picture first.");
  const grow = Math.max(1, Math.round(Math.min(now.image.width, now.image.height) / 48));
  fill({grow, label: undefined, prompt: undefined, negative_prompt: undefined});
}

const create = () => run("generate", {...settings(), ...promptImages()}, create);
const ofPicture = method => now ? run(method, {image: toBase64(now.image)}) : fail("Open a picture first.");

function again() {
  if (!running) made?.repeat?.();
}

function choose(i) {
  if (!made?.images[i]) return;
  made.chosen = i;
  if (now.hole.some(Boolean)) before.push({image: now.image, hole: now.hole});
  now = {image: made.images[i], hole: empty(made.images[i])};
  $("scrub").hidden = true;
  [...$("thumbs").children].forEach((button, j) => button.setAttribute("aria-pressed", i === j));
  draw();
}

function showMade(guesses) {
  $("made").hidden = false;
  $("thumbs").replaceChildren(...made.images.map((image, i) => {
    const button = document.createElement("button"), canvas = canvasOf(image);
    canvas.className = image.width < 128 ? "large" : "";
    button.append(canvas);
    button.setAttribute("aria-label", `Candidate ${i + 1}`);
    button.setAttribute("aria-pressed", i === 0);
    button.title = `Candidate ${i + 1} (${i + 1})`;
    button.onclick = () => choose(i);
    return button;
  }));
  $("seed").textContent = made.repeat ? `Seed ${made.body.seed}` : "";
  $("again").hidden = !made.repeat;
  $("watch").hidden = !(made.method === "generate" && can.trajectory);
  $("scrub").hidden = true;
  $("guesses").replaceChildren(...guesses.map(({name, share, image}) => {
    const item = document.createElement("li"), percent = `${(100 * share).toFixed(1)}%`;
    item.style.setProperty("--share", percent);
    if (image) item.append(Object.assign(new Image(), {src: "data:image/png;base64," + image, alt: ""}));
    for (const text of [name, percent]) item.append(Object.assign(document.createElement("span"), {textContent: text}));
    return item;
  }));
}

async function watch() {
  const result = await ask("trajectory", {...made.body, which: made.chosen});
  if (!result) return;
  made.frames = await Promise.all(result.images.map(fromBase64));
  $("frame").max = made.frames.length - 1;
  $("scrub").hidden = false;
  $("frame").focus();
  for (let i = 0; i < made.frames.length && !$("scrub").hidden; i++) {
    showFrame(i);
    await new Promise(done => setTimeout(done, 120));
  }
}

function showFrame(i) {
  $("frame").value = i;
  $("step").textContent = `${i + 1} of ${made.frames.length}`;
  draw(Number(i) === made.frames.length - 1 ? now.image : made.frames[i]);
}

function save() {
  if (!now) return;
  canvasOf(now.image).toBlob(blob => {
    const link = Object.assign(document.createElement("a"), {href: URL.createObjectURL(blob), download: "maskgen.png"});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
