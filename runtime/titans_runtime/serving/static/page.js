"use strict";

const SHOWN = 60000;  // characters of a text that are shown; figures and curves are of all
const POINTS = 400;   // of a curve
const UNIFORM = 8;    // bits of the first byte that a memory sees

const at = (id) => document.getElementById(id);
let token = "", state = null, damaged = [], aborter = null;

// --- the server

async function ask(method, path, body, signal) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try { message = (await answer.json()).error.message; } catch { /* no JSON: the status says it */ }
  throw Object.assign(new Error(message), { status: answer.status });
}

const json = async (...asked) => (await ask(...asked)).json();

async function* events(body, signal) {
  const answer = await ask("POST", "v1/completions", { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off; the memory is as it was before");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      yield part;
    }
  }
}

// --- one text, read in one way

class Side {
  constructor(name, text) {
    this.figure = at(`bits-${name}`);
    this.place = at(`text-${name}`);
    this.place.textContent = "";
    this.characters = Array.from(text);
    this.bits = [];        // of every byte
    this.sums = [0];       // of the bits so far
    this.shown = 0;        // characters
    this.used = 0;         // bytes of these
  }

  take(logprobs) {
    for (const p of logprobs) {
      const bits = p === null ? UNIFORM : -p / Math.LN2;
      this.bits.push(bits);
      this.sums.push(this.sums.at(-1) + bits);
    }
    this.show();
  }

  get mean() { return this.sums.at(-1) / Math.max(this.bits.length, 1); }

  show() {
    this.figure.textContent = this.bits.length ? this.mean.toFixed(3) : "–";
    const fragment = document.createDocumentFragment();
    let run = "", level = -1;
    const flush = () => {
      if (!run) return;
      const piece = document.createElement("i");
      if (level) piece.className = `c${level}`;
      piece.textContent = run;
      fragment.append(piece);
      run = "";
    };
    const limit = Math.min(this.characters.length, SHOWN);
    while (this.shown < limit) {
      const character = this.characters[this.shown];
      const end = this.used + bytesOf(character);
      if (end > this.bits.length) break;
      const own = Math.min(8, Math.floor(this.sums[end] - this.sums[this.used]));
      if (own !== level) { flush(); level = own; }
      run += character;
      this.used = end;
      this.shown += 1;
    }
    flush();
    this.place.append(fragment);
    this.place.scrollTop = this.place.scrollHeight;
  }

  curve(total, window) {
    const step = Math.max(1, Math.floor(total / POINTS)), points = [];
    for (let end = step; end <= this.bits.length; end += step) {
      const begin = Math.max(0, end - window);
      points.push([end / total, (this.sums[end] - this.sums[begin]) / (end - begin)]);
    }
    return points;
  }
}

const encoder = new TextEncoder();
const bytesOf = (text) => encoder.encode(text).length;

function draw(off, on, total) {
  const window = Math.max(64, Math.round(total / 40)), height = 170;
  at("window").textContent = window;
  const curves = { off: off.curve(total, window), on: on.curve(total, window) };
  const most = Math.max(1, ...curves.off.map((p) => p[1]), ...curves.on.map((p) => p[1]));
  const y = (bits) => (height - (bits / most) * height).toFixed(1);
  let parts = "";
  for (let bits = 0; bits <= most; bits += most > 4 ? 2 : 1)
    parts += `<line class="grid" x1="24" x2="960" y1="${y(bits)}" y2="${y(bits)}"/><text x="0" y="${+y(bits) + 4}">${bits}</text>`;
  for (const [name, points] of Object.entries(curves))
    parts += `<polyline class="line-${name}" points="${points.map(([x, b]) => `${(24 + 936 * x).toFixed(1)},${y(b)}`).join(" ")}"/>`;
  parts += `<text x="960" y="186" text-anchor="end">${total.toLocaleString("en")} bytes</text>`;
  at("chart").innerHTML = parts;
  const both = Math.min(off.bits.length, on.bits.length);
  if (!both) return;
  const saved = off.sums[both] - on.sums[both];
  at("won").textContent = `${((100 * saved) / off.sums[both]).toFixed(1)} %`;
  at("saved-bytes").textContent = `${Math.round(saved / 8).toLocaleString("en")} bytes so far`;
}

async function read() {
  const text = new TextDecoder().decode(encoder.encode(at("text").value));  // as the server will see it
  if (!text) return say("There is no text to read.", true);
  const total = bytesOf(text);
  at("results").hidden = false;
  at("cut").textContent = text.length > SHOWN ? `The first ${SHOWN.toLocaleString("en")} characters are shown; figures are of all.` : "";
  const off = new Side("off", text), on = new Side("on", text);
  draw(off, on, total);
  const scoring = { prompt: text, max_tokens: 0, echo: true, logprobs: 0 };
  const ways = [[off, { editing: { edit: 0, editor: "none" } }], [on, { memory: state.id, save: false }]];
  let frame = 0;
  await work("Reading …", async (signal) => {
    await Promise.all(ways.map(async ([side, extra]) => {
      for await (const part of events({ ...scoring, ...extra }, signal)) {
        for (const choice of part.choices) if (choice.logprobs) side.take(choice.logprobs.token_logprobs);
        if (part.memory) show(part.memory);
        frame ||= requestAnimationFrame(() => { frame = 0; draw(off, on, total); });
      }
    }));
    return "Read. Read the same text again, or a similar one: the memory has learnt from it. It is kept for good when you save it.";
  });
  draw(off, on, total);
}

async function write() {
  const prompt = at("prompt").value, place = at("written");
  place.hidden = false;
  place.textContent = prompt;
  const drawn = document.createElement("b");
  place.append(drawn);
  const asked = { prompt, memory: state.id, save: false, max_tokens: +at("count").value, temperature: +at("temperature").value };
  await work("Writing …", async (signal) => {
    for await (const part of events(asked, signal)) {
      for (const choice of part.choices) drawn.textContent += choice.text;
      if (part.memory) show(part.memory);
      place.scrollTop = place.scrollHeight;
    }
    return "Written. The memory has seen what it wrote, and has learnt from your words alone.";
  });
}

// --- memories

function show(memory) {
  state = memory;
  const badge = at("state");
  badge.textContent = memory.damaged ? "damaged in the store; it can only be deleted"
    : `${memory.position.toLocaleString("en")} bytes read · ${memory.saved ? "saved" : "not saved"}`;
  badge.classList.toggle("unsaved", !memory.saved);
  at("save").disabled = memory.saved || memory.damaged;
  at("memory").value = memory.id;
  localStorage.setItem("memory", memory.id);
}

async function list(wanted) {
  let { data } = await json("GET", "v1/memories");
  if (!data.length) data = [await json("POST", "v1/memories", {})];
  at("memory").replaceChildren(...data.map((one) => new Option(one.id, one.id)));
  damaged = data.filter((one) => one.damaged);
  show(data.find((one) => one.id === wanted) || data.find((one) => !one.damaged) || data[0]);
}

const button = (id, doing) => at(id).addEventListener("click", () => work("", doing));

async function save() { show(await json("POST", `v1/memories/${state.id}/save`)); return "Saved."; }
async function reset() { show(await json("POST", `v1/memories/${state.id}/reset`)); return "As new: it has seen nothing."; }
async function create() {
  const name = prompt("A name for the new memory: letters, digits, - or _; empty for any", "");
  if (name === null) return "";
  await list((await json("POST", "v1/memories", name ? { id: name } : {})).id);
  return "A new memory, which has seen nothing.";
}
async function fork() {
  const name = prompt("A name for the twin: letters, digits, - or _; empty for any", "");
  if (name === null) return "";
  await list((await json("POST", `v1/memories/${state.id}/fork`, name ? { id: name } : {})).id);
  return "A twin: it goes on from where the other one stands.";
}
async function remove() {
  if (!confirm(`Delete ${state.id} for good?`)) return "";
  await json("DELETE", `v1/memories/${state.id}`);
  await list();
  return "Deleted.";
}
async function choose() {
  const wanted = at("memory").value;
  show(damaged.find((one) => one.id === wanted) || await json("GET", `v1/memories/${wanted}`));
  return "";
}
async function take(event) {
  event.preventDefault();
  const content = await (await ask("GET", `v1/memories/${state.id}/export`)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = `${state.id}.memory`;
  link.click();
  URL.revokeObjectURL(link.href);
}

// --- the rest

function say(text, wrong = false) {
  at("said").textContent = text;
  at("said").classList.toggle("wrong", wrong);
}

async function work(text, doing) {
  if (aborter) return;
  aborter = new AbortController();
  const buttons = [...document.querySelectorAll("main button:not(#stop), main select")].filter((one) => !one.disabled);
  buttons.forEach((one) => { one.disabled = true; });
  at("stop").hidden = !text;
  say(text);
  try {
    say((await doing(aborter.signal)) || "");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped. The memory is as it was before.");
    else say(error.message, true);
  } finally {
    aborter = null;
    at("stop").hidden = true;
    buttons.forEach((one) => { one.disabled = false; });
    if (state) at("save").disabled = state.saved || state.damaged;
  }
}

const SAMPLES = {
  "a log": () => Array.from({ length: 90 }, (_, i) =>
    `2026-03-${String(1 + Math.floor(i / 8)).padStart(2, "0")} ${String(8 + (i % 8)).padStart(2, "0")}:${String((i * 17) % 60).padStart(2, "0")}:00 ` +
    `status ${["installed", "unpacked", "half-configured"][i % 3]} lib${["archive", "colour", "tensor", "editor"][i % 4]}${i % 7}:amd64 1.${i % 5}.${i}-2`).join("\n") + "\n",
  "Python": () => Array.from({ length: 24 }, (_, i) =>
    `class Shape${i}(Shape):\n    """A shape with ${i + 3} corners."""\n\n    def __init__(self, side: float) -> None:\n        super().__init__(corners=${i + 3})\n` +
    `        self.side = side\n\n    def area(self) -> float:\n        return self.corners * self.side ** 2 / (4 * math.tan(math.pi / self.corners))\n\n`).join(""),
  "a rhyme": () => "The house that Jack built.\n" + (() => {
    const lines = ["the house that Jack built", "the malt that lay in", "the rat that ate", "the cat that killed", "the dog that worried",
      "the cow with the crumpled horn that tossed", "the maiden all forlorn that milked", "the man all tattered and torn that kissed",
      "the priest all shaven and shorn that married", "the cock that crowed in the morn that woke", "the farmer sowing his corn that kept"];
    return lines.map((_, i) => `This is ${lines.slice(0, i + 1).reverse().join("\n")}.\n\n`).join("");
  })(),
};

function measure() { at("size").textContent = `${bytesOf(at("text").value).toLocaleString("en")} bytes`; }

async function enter() {
  try {
    const { data } = await json("GET", "v1/models");
    at("model").textContent = `Model: ${data[0].id}.`;
    await list(localStorage.getItem("memory"));
    at("door").hidden = true;
    at("room").hidden = false;
    say("");
  } catch (error) {
    at("door").hidden = error.status !== 401;
    at("room").hidden = error.status === 401;
    if (token || error.status !== 401) say(error.message, true);
    at("token").setCustomValidity(token ? "The server does not know this token." : "");
    if (token) at("token").reportValidity();
  }
}

at("sample").replaceChildren(...Object.keys(SAMPLES).map((name) => new Option(name)), new Option("your own", ""));
at("sample").addEventListener("change", () => { if (at("sample").value) at("text").value = SAMPLES[at("sample").value](); measure(); });
at("text").addEventListener("input", () => { at("sample").value = ""; measure(); });
at("file").addEventListener("change", async () => {
  const [file] = at("file").files;
  if (!file) return;
  at("text").value = await file.text();
  at("sample").value = "";
  at("file").value = "";
  measure();
});
at("read").addEventListener("click", read);
at("write").addEventListener("click", write);
at("stop").addEventListener("click", () => aborter?.abort());
at("memory").addEventListener("change", () => work("", choose));
at("export").addEventListener("click", take);
for (const [id, doing] of Object.entries({ new: create, fork, save, reset, delete: remove })) button(id, doing);
at("door").addEventListener("submit", (event) => { event.preventDefault(); token = at("token").value.trim(); at("token").setCustomValidity(""); enter(); });
at("token").addEventListener("input", () => at("token").setCustomValidity(""));
at("text").value = SAMPLES["a log"]();
measure();
enter();
