// What the page shows for this model, and what its pointers and keys do.

function add(parent, tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  parent.append(element);
  return element;
}

function titled(name) {
  return name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
}

function addSlider({name, title = titled(name), least, most, step, value}) {
  const label = add($("sliders"), "label", {}, title + " "), shown = add(label, "output");
  const input = add(label, "input", {id: name, type: "range", min: least, max: most, step});
  input.value = value;
  input.oninput = () => { shown.textContent = input.value; };
  input.oninput();
}

function follow(id, show) {
  $(id).oninput = () => { $(id + "_shown").textContent = show($(id).value); };
  $(id).oninput();
}

// Images of a prompt

const given = [];  // [{image, chip}]

function promptImages() {
  if (!given.length) return {};
  const number = Number($("num_tokens").value);  // all of them: as many as fit
  return {images: given.map(({image}) => toBase64(image)), num_tokens: number < model.tokens ? number : null};
}

function addToPrompt(image) {
  if (given.length >= model.most_images) return fail(`A prompt takes at most ${model.most_images} images here.`);
  const chip = add($("given"), "button", {type: "button", title: "Take this image out of the prompt"}, canvasOf(image));
  const one = {image, chip};
  given.push(one);
  chip.setAttribute("aria-label", `Image ${given.length} of the prompt: take it out`);
  chip.onclick = () => { given.splice(given.indexOf(one), 1); chip.remove(); };
}

const facts = [`${model.size[1]} × ${model.size[0]} pixels`];
if (model.classes.length) facts.push(`${model.classes.length} classes`);
$("facts").textContent = facts.join(", ");
if (can.inpaint) $("about").textContent = "Paint over what should change and fill it, or drag an edge to extend the picture.";
else if (model.images) $("about").textContent = "Drop images, and write {} in the prompt in place of each.";
$("empty").textContent = model.prompt ? "Write a prompt and press New pictures." : "Open or drop a picture.";
if (model.images) {
  const box = add($("words"), "div", {}, "Images");
  add(box, "div", {id: "given", className: "thumbs"});
  add(box, "button", {type: "button", textContent: "Add an image", onclick: () => pick()});
}
if (model.classes.length) {
  const select = add(add($("words"), "label", {}, "Class"), "select", {id: "label"});
  select.add(new Option("any", ""));
  model.classes.forEach((name, i) => select.add(new Option(name, i)));
}
for (const name of ["prompt", "negative_prompt"]) {
  if (model[name]) add(add($("words"), "label", {}, titled(name)), "textarea", {id: name, maxLength: model.most_text});
}
if (model.images) addSlider({name: "num_tokens", title: "Tokens of each image", least: 1, most: model.tokens, step: 1, value: model.tokens});
if (model.images) $("prompt").placeholder = "a {} on a red background";
model.options.forEach(addSlider);
follow("count", value => COUNTS[value]);
follow("feather", value => value + " px");
$("brushes").hidden = $("feather_label").hidden = !can.inpaint;
$("board").classList.toggle("still", !can.inpaint);
for (const id of ["count", "fixed"]) $(id).parentElement.hidden = !can.generate && !can.inpaint;

const ACTIONS = [
  ["inpaint", "Fill the hole", "Enter", fill], ["inpaint", "Remove", "Del", remove],
  ["generate", "New pictures", "G", create], ["classify", "Classify", "", () => ofPicture("classify")],
  ["nearest", "Find similar", "", () => ofPicture("nearest")], ["reconstruct", "Reconstruct", "", () => ofPicture("reconstruct")],
];
for (const [method, text, key, action] of ACTIONS.filter(([method]) => can[method])) {
  const first = !$("actions").children.length;
  const button = add($("actions"), "button", {type: "button", textContent: text, className: first ? "main" : ""});
  if (key) button.title = `${text} (${key})`;
  button.onclick = () => action();
}

// Pointers

function press(down) {
  before.push({image: now.image, hole: now.hole.slice()});
  $("undo").disabled = false;
  brush.down = down;
}

$("hole").onpointerdown = event => {
  if (event.button) return;
  $("hole").setPointerCapture(event.pointerId);
  press(false);
  stroke(...place(event), event.shiftKey || erasing ? 0 : 1);
  brush.down = true;
};
$("hole").onpointermove = event => {
  $("brush").classList.add("shown");
  for (const one of event.getCoalescedEvents?.() ?? [event]) {
    if (brush.down) stroke(...place(one), event.shiftKey || erasing ? 0 : 1);
  }
  [brush.x, brush.y] = place(event);
  showBrush();
};
$("hole").onpointerup = $("hole").onpointercancel = () => { brush.down = false; };
$("hole").onpointerleave = () => { if (!brush.down) $("brush").classList.remove("shown"); };

for (const edge of document.querySelectorAll(".edge")) {
  let start = null;
  const side = edge.dataset.side, sign = side === "left" || side === "top" ? -1 : 1;
  const along = event => side === "left" || side === "right" ? event.clientX : event.clientY;
  edge.onpointerdown = event => {
    edge.setPointerCapture(event.pointerId);
    press(false);
    start = {at: along(event), from: before.at(-1), scale: $("board").clientWidth / now.image.width};
  };
  edge.onpointermove = event => {
    if (!start) return;
    now = extendBy(start.from, side, sign * (along(event) - start.at) / start.scale);
    draw();
  };
  edge.onpointerup = edge.onpointercancel = () => { start = null; };
  edge.onkeydown = event => {
    const out = {top: "ArrowUp", right: "ArrowRight", bottom: "ArrowDown", left: "ArrowLeft"}[side];
    if (event.key !== out) return;
    event.preventDefault();
    press(false);
    now = extendBy(now, side, Math.ceil(Math.min(now.image.width, now.image.height) / 8));
    draw();
  };
}

// Buttons

function use(eraser) {
  erasing = eraser;
  $("paint").setAttribute("aria-pressed", !eraser);
  $("erase").setAttribute("aria-pressed", eraser);
}

function clear() {
  if (!now?.hole.some(Boolean)) return;
  press(false);
  now.hole.fill(0);
  draw();
}

function resize(by) {
  $("size").value = Number($("size").value) + by;
  showBrush();
}

const pick = () => $("file").click();
const handlers = {paint: () => use(false), erase: () => use(true), clear, undo, open: pick, save, again, watch};
for (const [id, handler] of Object.entries(handlers)) $(id).onclick = handler;
$("stop").onclick = () => running?.abort();
$("size").addEventListener("input", () => now && showBrush());
$("frame").oninput = () => showFrame(Number($("frame").value));
$("panel").onsubmit = event => event.preventDefault();
$("file").onchange = () => { if ($("file").files[0]) openFile($("file").files[0]); $("file").value = ""; };
addEventListener("paste", event => { const file = event.clipboardData.files[0]; if (file) openFile(file); });
addEventListener("dragover", event => { event.preventDefault(); $("stage").classList.add("drop"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) $("stage").classList.remove("drop"); });
addEventListener("drop", event => {
  event.preventDefault();
  $("stage").classList.remove("drop");
  if (event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
});
new ResizeObserver(fit).observe($("stage"));
matchMedia("(prefers-color-scheme: dark)").onchange = () => now && draw();

// Keys

const KEYS = {
  ...can.inpaint && {Enter: ["fill the hole", fill], Delete: ["remove", remove], B: ["paint", () => use(false)],
    E: ["erase", () => use(true)], "[": ["smaller brush", () => resize(-6)], "]": ["larger brush", () => resize(6)],
    X: ["clear the hole", clear]},
  ...can.generate && {G: ["new pictures", create]},
  R: ["again, with another seed", again], U: ["undo, also Ctrl+Z", undo], O: ["open a picture", pick], S: ["download", save],
};
for (const [key, [text]] of Object.entries(KEYS)) $("keys").append(add($("keys"), "dt", {textContent: key}), add($("keys"), "dd", {textContent: text}));
const MORE = {"1–8": "choose a candidate", ...can.inpaint && {"arrows, Space": "on the picture: move the brush and paint"}};
for (const [key, text] of Object.entries(MORE)) $("keys").append(add($("keys"), "dt", {textContent: key}), add($("keys"), "dd", {textContent: text}));

addEventListener("keydown", event => {
  if (event.target.matches("textarea, select, input:not([type=range])") || event.altKey) return;
  if (event.ctrlKey || event.metaKey) {
    if (event.key.toLowerCase() !== "z") return;
    event.preventDefault();
    return undo();
  }
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  if (event.repeat && key === "Enter") event.preventDefault();  // a button would be pressed again
  if (event.repeat && key !== "[" && key !== "]") return;
  if (event.key === "Enter" && event.target.matches("button, summary")) return;
  if (/^[1-8]$/.test(key)) choose(Number(key) - 1);
  else KEYS[key]?.[1]();
});

$("hole").onkeydown = event => {
  const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key] ?? [0, 0];
  if (!dx && !dy && event.key !== " ") return;
  event.preventDefault();
  const step = Math.max(1, diameter() / 4);
  brush.x = Math.min(Math.max(brush.x + dx * step, 0), now.image.width);
  brush.y = Math.min(Math.max(brush.y + dy * step, 0), now.image.height);
  if (event.key === " ") {
    press(false);
    stroke(brush.x, brush.y, event.shiftKey || erasing ? 0 : 1);
  }
  $("brush").classList.add("shown");
  showBrush();
};

if (can.generate && !model.prompt) create();
