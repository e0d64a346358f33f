"use strict";
// The page of a GMSA server. No framework, no build; everything goes through the public API.

const $ = (id) => document.getElementById(id);
const KEY = "gmsa-key";
const PAGE_SIZE = 20;
const SIDES = ["gmsa", "chosen", "original"]; // of the answers
const FOR_A_QUESTION = 2; // by what the server merges sentences that are chosen for a question
const MOST_COMPARED = 2000; // words: comparing takes the product of both lengths
const SAMPLE_QUESTIONS = [
  "How many bricks were used?",
  "How long did the work take?",
  "Who was the chief engineer of the Metropolitan Board of Works?",
];

// What is shown: the memory in use, the text it was made of as far as this page knows it, and what checks found by id.
const state = { memory: null, text: null, checks: {}, shown: 0, restoring: null, asking: null };

// -- talking to the server ----------------------------------------------------------------------------------------

class ApiError extends Error {}

async function api(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}) };
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (key && /[^\x20-\x7e]/.test(key)) { // cannot be sent: pasted with a curly quote, most likely
        await askForKey();
        continue;
      }
      throw new ApiError("The server cannot be reached.");
    }
    if (response.status === 401) {
      await askForKey();
      continue;
    }
    if (!response.ok) throw new ApiError(await messageOf(response));
    return response;
  }
}

async function messageOf(response) {
  try {
    const said = (await response.json()).error.message;
    return said.charAt(0).toUpperCase() + said.slice(1) + ".";
  } catch {
    return `The server answered ${response.status}.`;
  }
}

const post = (path, body, signal) => api(path, { method: "POST", body: JSON.stringify(body), signal });

let keyAsked = null; // several requests may find the key missing at once
function askForKey() {
  keyAsked ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key").value = "";
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      keyAsked = null;
      resolve();
    };
    dialog.showModal();
  });
  return keyAsked;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message);
      yield event;
    }
  }
}

// -- small things -------------------------------------------------------------------------------------------------

const number = (value) => value.toLocaleString("en");
const seconds = (value) => (value < 10 ? value.toFixed(2) : value.toFixed(1)) + " s";
const plural = (value, one) => `${number(value)} ${one}${value === 1 ? "" : "s"}`;

function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(bytes < 1e4 ? 1 : 0)} kB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function age(created) {
  const passed = Math.max(0, Date.now() / 1000 - created);
  for (const [unit, length] of [["day", 86400], ["hour", 3600], ["minute", 60]])
    if (passed >= length) return plural(Math.floor(passed / length), unit) + " ago";
  return "just now";
}

function say(id, text, error = false) {
  $(id).textContent = text;
  $(id).classList.toggle("error", error);
}

function report(id, error) {
  if (error.name === "AbortError") say(id, "Stopped.");
  else say(id, error instanceof ApiError ? error.message : `Something went wrong on this page: ${error.message}`, true);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// -- document -----------------------------------------------------------------------------------------------------

function setDocument(text) {
  $("document").value = text;
  $("document").dispatchEvent(new Event("input"));
}

async function openFile(file) {
  if (!file) return;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new TypeError();
    setDocument(text);
    $("document").dataset.label = file.name;
    say("document-status", `${file.name}, ${size(file.size)}`);
  } catch {
    say("document-status", `${file.name} is not UTF-8 text: convert it first.`, true);
  }
}

const chosenSize = () => document.querySelector("input[name=size]:checked").value;
const mergeSize = () => Number(chosenSize() === "other" ? $("other-size").value : chosenSize());

function labelOf(text) {
  const label = $("document").dataset.label ?? text.trim().split(/\s+/).slice(0, 7).join(" ");
  return [...label].slice(0, 60).join(""); // by characters: half an emoji is no text
}

async function compress(event) {
  event.preventDefault();
  const text = $("document").value;
  if (!text.trim()) {
    say("document-status", "There is no text yet: paste one, drop a file, or take the sample.", true);
    $("document").focus();
    return;
  }
  $("compress").disabled = true;
  say("document-status", "Compressing …");
  try {
    const body = { text, merge_size: mergeSize(), label: labelOf(text) };
    const memory = await (await post("v1/memories", body)).json();
    say("document-status", "");
    use(memory, text);
    refreshStored();
  } catch (error) {
    report("document-status", error);
  } finally {
    $("compress").disabled = false;
  }
}

// -- memory -------------------------------------------------------------------------------------------------------

function use(memory, text) {
  state.restoring?.abort();
  state.asking?.abort();
  Object.assign(state, { memory, text, restoring: null });
  $("memory-card").hidden = $("ask-card").hidden = !memory;
  markStored();
  if (!memory) return;
  $("memory-id").textContent = memory.id.slice(0, 12);
  $("memory-id").title = memory.id;
  $("tokens-before").textContent = number(memory.origin_tokens);
  $("tokens-after").textContent = number(memory.soft_tokens);
  $("bytes").textContent = size(memory.bytes);
  const made = memory.seconds !== undefined;
  $("seconds-name").textContent = !made ? "Made" : memory.existing ? "Found in" : "Compressed in";
  $("seconds").textContent = made ? seconds(memory.seconds) : age(memory.created);
  $("rail-before").style.width = "100%";
  $("rail-after").style.width = `${(100 * memory.soft_tokens) / memory.origin_tokens}%`;
  say("restore-status", "Ask the decoder to restate the text from its soft tokens alone.");
  $("restored").hidden = $("legend").hidden = true;
  for (const side of SIDES)
    for (const part of ["said", "times"]) $(`${side}-${part}`).textContent = "";
  $("gmsa-reads").textContent = `reads ${plural(memory.soft_tokens, "soft token")}`;
  const kept = "The server keeps no text: paste it above and compress to compare.";
  $("original-reads").textContent = text === null ? kept : `reads all ${plural(memory.origin_tokens, "token")}`;
  $("chosen-reads").textContent = memory.merge_size <= FOR_A_QUESTION
    ? `At ${memory.merge_size}× the whole text is read: nothing to choose.`
    : text === null ? kept : `reads sentences that fit, in at most ${plural(memory.soft_tokens, "soft token")}`;
  showDoubt();
  $("suggestions").hidden = !(text !== null && text === state.sample);
}

async function restore(check) {
  const { memory, text } = state;
  const stop = (state.restoring = new AbortController());
  const started = performance.now();
  $("restore").disabled = $("check").disabled = true;
  $("stop-restore").hidden = $("restored").hidden = false;
  $("legend").hidden = true;
  $("restored").textContent = "";
  say("restore-status", check ? "Restoring, and compressing again …" : "Restoring …");
  const pieces = [];
  try {
    const response = await post(`v1/memories/${memory.id}/restore`, { stream: true, check }, stop.signal);
    for await (const event of events(response)) {
      if (state.restoring !== stop) return;
      pieces.push(event);
      $("restored").append(event.confirmed === false ? element("mark", {}, event.text) : event.text);
      if (check) say("restore-status", `Checking: ${plural(pieces.length, "soft token")} of ${number(memory.soft_tokens)} …`);
    }
    const spent = seconds((performance.now() - started) / 1000);
    const restored = pieces.map((piece) => piece.text).join("");
    const words = text === null ? null : showDifferences(text, restored);
    const sure = pieces.filter((piece) => piece.confirmed).length;
    if (check) state.checks[memory.id] = { sure, of: pieces.length, doubts: doubtsOf(pieces) };
    showDoubt();
    const proven = check ? ` · ${sure} of ${plural(pieces.length, "soft token")} confirmed` : "";
    const nothing = check ? (sure < pieces.length ? "; what is in doubt is marked" : "") : "; the text itself is not here to compare with";
    say("restore-status", words ? `${words} restored in ${spent}${proven}` : `Restored in ${spent}${proven}${nothing}`);
  } catch (error) {
    if (state.restoring === stop) report("restore-status", error);
  } finally {
    if (state.restoring === stop) state.restoring = null;
    $("restore").disabled = $("check").disabled = false;
    $("stop-restore").hidden = true;
  }
}

// What runs of unconfirmed pieces say.
function doubtsOf(pieces) {
  const runs = [];
  pieces.forEach((piece, i) => {
    if (piece.confirmed) return;
    if (i && !pieces[i - 1].confirmed) runs.push(runs.pop() + piece.text);
    else runs.push(piece.text);
  });
  return runs.map((run) => run.trim()).filter((run) => run);
}

// An answer is no surer than what it was read from.
function showDoubt() {
  const found = state.checks[state.memory?.id];
  const doubtful = found && found.sure < found.of;
  $("gmsa-doubt").hidden = !doubtful || !$("gmsa-said").textContent;
  if (!doubtful) return;
  const shown = found.doubts.slice(0, 3).map((run) => `“${run}”`).join(", ") + (found.doubts.length > 3 ? ", …" : "");
  const where = shown ? ` (where it says ${shown})` : "";
  $("gmsa-doubt").textContent =
    `In doubt: ${found.of - found.sure} of ${plural(found.of, "soft token")} fail the check${where}. What rests on them may be wrong.`;
}

// Each word with the white space before it.
const wordsOf = (text) => text.match(/\s*(?:[\p{L}\p{N}]+|[^\s\p{L}\p{N}])/gu) ?? [];

function showDifferences(original, restored) {
  const a = wordsOf(original.trim()), b = wordsOf(restored.trim());
  const parts = differences(a.slice(0, MOST_COMPARED), b.slice(0, MOST_COMPARED));
  const right = parts.filter(([kind]) => kind === "right").length;
  const compared = Math.min(a.length, MOST_COMPARED);
  $("restored").replaceChildren();
  for (let i = 0; i < parts.length; ) {
    const kind = parts[i][0];
    let text = "";
    for (; i < parts.length && parts[i][0] === kind; i++) text += parts[i][1];
    const words = text.trimStart();
    $("restored").append(text.slice(0, text.length - words.length)); // white space is neither right nor wrong
    $("restored").append(kind === "missing" ? element("del", {}, words) : element("ins", { className: kind }, words));
  }
  $("restored").append(b.slice(MOST_COMPARED).join(""));
  $("legend").hidden = false;
  const which = a.length > compared ? ` of the first ${number(compared)}` : "";
  return `${Math.floor((100 * right) / compared)} % of words${which}`;
}

// The longest common subsequence of two lists of words, as [kind, word] in reading order.
function differences(a, b) {
  const plainA = a.map((w) => w.trim()), plainB = b.map((w) => w.trim());
  const width = b.length + 1;
  const best = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      best[i * width + j] = plainA[i] === plainB[j]
        ? best[(i + 1) * width + j + 1] + 1
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  const parts = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && plainA[i] === plainB[j]) {
      parts.push(["right", b[j++]]);
      i++;
    } else if (i < a.length && (j === b.length || best[(i + 1) * width + j] >= best[i * width + j + 1])) {
      parts.push(["missing", a[i++]]);
    } else {
      parts.push(["wrong", b[j++]]);
    }
  }
  return parts;
}

// -- ask ----------------------------------------------------------------------------------------------------------

async function ask(event) {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || !state.memory) return;
  state.asking?.abort();
  const stop = (state.asking = new AbortController());
  const { memory, text } = state;
  for (const side of SIDES)
    for (const part of ["said", "times"]) $(`${side}-${part}`).textContent = "";
  $("ask").disabled = true;
  $("stop-ask").hidden = false;
  say("ask-status", "Reading …");
  try {
    await answer("gmsa", { type: "memory", memory_id: memory.id }, question, { auto_compress: 0 }, stop.signal);
    showDoubt();
    const whole = { type: "text", text };
    if (text !== null && memory.merge_size > FOR_A_QUESTION) {
      // The text is long by this measure, and the question is not.
      const choice = { auto_compress: Math.max(1, Math.floor(memory.origin_tokens / 2)), select: true, merge_size: memory.merge_size };
      await answer("chosen", whole, question, choice, stop.signal);
    }
    if (text !== null) await answer("original", whole, question, { auto_compress: 0 }, stop.signal);
    say("ask-status", "All answers come from the same decoder, one after the other, so that their times compare.");
  } catch (error) {
    if (state.asking === stop) report("ask-status", error);
  } finally {
    refreshSaved();
    if (state.asking === stop) {
      // Else another question is being answered by now.
      state.asking = null;
      $("ask").disabled = false;
      $("stop-ask").hidden = true;
    }
  }
}

async function answer(side, context, question, how, signal) {
  const started = performance.now();
  const body = {
    messages: [{ role: "user", content: [context, { type: "text", text: question }] }],
    ...how, max_tokens: 128, stream: true, stream_options: { include_usage: true },
  };
  const said = $(`${side}-said`);
  said.classList.add("busy");
  let first = null, usage = null;
  try {
    for await (const event of events(await post("v1/chat/completions", body, signal))) {
      const text = event.choices[0]?.delta.content;
      if (text) {
        first ??= performance.now();
        said.textContent += text;
      }
      usage = event.usage ?? usage;
    }
    const now = performance.now();
    const total = seconds((now - started) / 1000);
    const until = seconds(((first ?? now) - started) / 1000);
    $(`${side}-times`).textContent = `first word ${until} · ${plural(usage.completion_tokens, "token")} in ${total}`;
    if (!said.textContent.trim()) said.textContent = "(nothing)";
    const { soft_tokens: soft, saved_tokens: saved } = usage.prompt_tokens_details;
    $(`${side}-reads`).textContent = soft
      ? `read ${plural(soft, "soft token")} and ${plural(usage.prompt_tokens - soft, "token")} of prompt, saved ${number(saved)}`
      : `read ${plural(usage.prompt_tokens, "token")} in all`;
  } finally {
    said.classList.remove("busy");
  }
}

// -- stored memories ----------------------------------------------------------------------------------------------

async function refreshStored(more = false) {
  try {
    const limit = more ? PAGE_SIZE : Math.min(Math.max(PAGE_SIZE, state.shown), 1000);
    const page = await (await api(`v1/memories?limit=${limit}&offset=${more ? state.shown : 0}`)).json();
    if (!more) $("stored").replaceChildren();
    $("stored").append(...page.data.map(storedItem));
    state.shown = $("stored").children.length;
    $("more").hidden = !page.has_more;
    say("stored-status", state.shown ? "" : "None yet. A text that was compressed once is here to be asked again.");
    markStored();
  } catch (error) {
    report("stored-status", error);
  }
}

// Prompt tokens that nobody had to read, of all requests since the server started.
async function refreshSaved() {
  try {
    const saved = /^gmsa_saved_tokens_total (\S+)$/m.exec(await (await api("metrics")).text());
    const total = Math.round(Number(saved?.[1] ?? 0));
    $("saved").hidden = !total;
    $("saved").textContent = `${plural(total, "prompt token")} saved since the server started`;
  } catch (error) {
    report("stored-status", error);
  }
}

function storedItem(memory) {
  const name = memory.label || memory.id.slice(0, 12);
  const rate = (memory.origin_tokens / memory.soft_tokens).toFixed(1);
  const what = `${number(memory.origin_tokens)} → ${number(memory.soft_tokens)} (${rate}×) · ${size(memory.bytes)} · ${age(memory.created)}`;
  const take = element("button", { type: "button", className: "quiet", textContent: "Use", ariaLabel: `Use ${name}` });
  take.disabled = !memory.readable;
  take.title = memory.readable ? "" : "made for another model";
  take.onclick = () => {
    use(memory, state.memory?.id === memory.id ? state.text : null);
    $("memory-card").scrollIntoView({ block: "nearest" });
    $("question").focus();
  };
  const remove = element("button", { type: "button", className: "quiet", textContent: "Delete", ariaLabel: `Delete ${name}` });
  remove.onclick = () => removeStored(remove, memory, name);
  const item = element("li", {}, element("p", { className: "name", textContent: name }),
    element("p", { className: "what", textContent: what }), element("div", { className: "tools" }, take, remove));
  item.dataset.id = memory.id;
  return item;
}

async function removeStored(button, memory, name) {
  if (!button.classList.contains("danger")) { // once more, to be sure
    button.classList.add("danger");
    button.textContent = "Really delete";
    button.ariaLabel = `Really delete ${name}`;
    setTimeout(() => {
      button.classList.remove("danger");
      button.textContent = "Delete";
      button.ariaLabel = `Delete ${name}`;
    }, 5000);
    return;
  }
  try {
    await api(`v1/memories/${memory.id}`, { method: "DELETE" });
    if (state.memory?.id === memory.id) use(null, null);
    await refreshStored();
    say("stored-status", `Deleted ${name}.`);
  } catch (error) {
    report("stored-status", error);
  }
}

function markStored() {
  for (const item of $("stored").children) item.classList.toggle("here", item.dataset.id === state.memory?.id);
}

// -- start --------------------------------------------------------------------------------------------------------

$("compress-form").onsubmit = compress;
$("ask-form").onsubmit = ask;
$("restore").onclick = () => restore(false);
$("check").onclick = () => restore(true);
$("stop-restore").onclick = () => state.restoring?.abort();
$("stop-ask").onclick = () => state.asking?.abort();
$("more").onclick = () => refreshStored(true);
$("file").onchange = (event) => openFile(event.target.files[0]).then(() => (event.target.value = ""));
$("sample").onclick = async () => {
  try {
    state.sample = (await (await api("sample.txt")).text()).trim();
    setDocument(state.sample);
    $("document").dataset.label = "The Thames in 1858";
    say("document-status", "A text on the sewers of London.");
  } catch (error) {
    report("document-status", error);
  }
};
$("document").oninput = () => {
  delete $("document").dataset.label;
  say("document-status", "");
};
$("document").ondragover = (event) => {
  event.preventDefault();
  $("document").classList.add("over");
};
$("document").ondragleave = () => $("document").classList.remove("over");
$("document").ondrop = (event) => {
  $("document").classList.remove("over");
  if (event.dataTransfer.files.length) {
    event.preventDefault();
    openFile(event.dataTransfer.files[0]);
  }
};
for (const radio of document.querySelectorAll("input[name=size]"))
  radio.onchange = () => {
    $("other-size").hidden = $("other-size").disabled = chosenSize() !== "other"; // what is hidden is not checked
  };
for (const question of SAMPLE_QUESTIONS)
  $("suggestions").append(element("button", {
    type: "button", className: "quiet", textContent: question,
    onclick: () => { $("question").value = question; $("ask-form").requestSubmit(); },
  }));

(async () => {
  try {
    const model = (await (await api("v1/models")).json()).data[0];
    $("model").textContent = `${model.id} · compressor ${model.fingerprint.slice(0, 8)}`;
    await refreshStored();
  } catch (error) {
    report("stored-status", error);
  }
})();
