// The page of `memflow serve`: plays the fragments of one session, and shows what each chunk remembered.
"use strict";

const $ = (id) => document.getElementById(id);
const BEHIND = 30; // seconds of video that stay in the player's buffer
const TALLEST = 4.2; // rem, of a bar
const PAST = 60; // chunks in the strip

// ------------------------------------------------------------------------------------------------------- the player

/** Plays fragments through Media Source Extensions. Each lies in time where its chunk does. */
class Player {
  constructor(video) {
    this.video = video;
    this.waiting = [];
    this.source = this.buffer = this.goal = null;
  }

  /** Begins anew. mime: of the fragments. start: the bytes that come before the first of them. */
  open(mime, start) {
    this.waiting = [start];
    this.goal = this.buffer = null;
    const source = (this.source = new MediaSource());
    const address = URL.createObjectURL(source);
    source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(address);
      if (source !== this.source) return;
      this.buffer = source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.work());
      this.work();
    });
    this.video.src = address;
  }

  /** Adds a fragment that begins at a time, in seconds. now: what lies before it is not to be waited for. */
  add(fragment, at, now) {
    this.waiting.push(fragment);
    if (now) this.goal = at;
    this.work();
  }

  work() {
    const buffer = this.buffer;
    if (!buffer || buffer.updating || this.source.readyState !== "open") return;
    if (this.waiting.length) {
      try {
        buffer.appendBuffer(this.waiting[0]);
        this.waiting.shift();
        return;
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        buffer.remove(0, Math.max(0.1, this.video.currentTime - 2));
        return;
      }
    }
    const { video } = this;
    const ranges = video.buffered;
    if (!ranges.length) return;
    const inside = (t) => [...Array(ranges.length).keys()].some((i) => ranges.start(i) <= t && t < ranges.end(i));
    if (this.goal !== null && inside(this.goal)) {
      video.currentTime = this.goal;
      this.goal = null;
    } else if (!inside(video.currentTime)) {
      // A chunk that was never sent leaves a gap, behind which the video goes on.
      for (let i = 0; i < ranges.length; i++) {
        if (ranges.start(i) > video.currentTime) {
          video.currentTime = ranges.start(i);
          break;
        }
      }
    }
    if (video.currentTime - ranges.start(0) > 2 * BEHIND) buffer.remove(0, video.currentTime - BEHIND);
  }
}

// ------------------------------------------------------------------------------------------------------- the session

const player = new Player($("video"));
const asked = new URLSearchParams(location.hash.slice(1));
const token = asked.get("token") ?? sessionStorage.getItem("token");
let wanted = asked.get("session") ?? sessionStorage.getItem("session");
let info = null; // what the server said of the session
let rows = new Map(); // chunk -> what is known of it
let pictures = new Map(); // latent frame -> the address of its picture
let newest = null;
let shown = null;
let socket = null;
let pauseBetween = 500; // milliseconds, before the next try to connect
let opened = performance.now();
let playing = false;

if (token !== null) sessionStorage.setItem("token", token);
if (asked.has("token")) history.replaceState(null, "", location.pathname + (wanted ? `#session=${wanted}` : ""));

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
  socket.binaryType = "arraybuffer";
  const own = socket;
  own.onopen = () => say({ type: "open", token, session: wanted, seed: info?.seed ?? Number($("seed").value) });
  own.onmessage = ({ data }) => {
    if (own !== socket) return;
    if (typeof data === "string") hear(JSON.parse(data));
    else hearChunk(data);
  };
  own.onclose = ({ code }) => {
    if (own !== socket) return;
    if (code === 4409 && wanted) {
      wanted = null; // That session is over: open a new one.
      sessionStorage.removeItem("session");
      connect();
    } else if (code === 1009) {
      tell("That message was too long for the server.", true);
      setTimeout(connect, pauseBetween);
    } else if (code < 4400 || code > 4409) {
      tell("The connection is lost. Trying again.", true);
      setTimeout(connect, pauseBetween);
      pauseBetween = Math.min(5000, 2 * pauseBetween);
    }
  };
}

function say(words) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(words));
  else tell("There is no connection at the moment.", true);
}

function hear(words) {
  if (words.type === "session") begin(words);
  else if (words.type === "prompt") tell(`“${words.prompt}” begins with chunk ${words.takes_effect + 1}.`);
  else if (words.type === "paused") setPaused(words.paused);
  else if (words.type === "ended") tell(words.why, true);
  else if (words.type === "refused") tell(words.why, true);
  else if (words.type === "forked") {
    const link = document.createElement("a");
    link.href = `#session=${words.session}${token === null ? "" : `&token=${encodeURIComponent(token)}`}`;
    link.target = "_blank";
    link.textContent = `Open “${words.prompt}” in another tab`;
    tell("");
    $("status").replaceChildren("It goes on from here in its own session. ", link);
  }
}

function begin(words) {
  const again = info && info.session === words.session && info.generation === words.generation;
  info = words;
  wanted = words.session;
  sessionStorage.setItem("session", wanted);
  history.replaceState(null, "", `${location.pathname}#session=${wanted}`);
  pauseBetween = 500;
  if (!again) {
    rows = new Map();
    pictures = new Map();
    newest = shown = null;
    $("past").replaceChildren();
    $("memory").replaceChildren();
    $("now").textContent = "";
    player.open(words.mime, Uint8Array.from(atob(words.start), (letter) => letter.charCodeAt(0)));
  }
  for (const row of words.rows) if (!rows.has(row.chunk)) keep(row);
  $("about").textContent = `${words.about}, streamed ${words.kinds.length > 1 ? "with memory and without, from the same noise" : `with memory "${words.kinds[0]}"`}`;
  $("sides").replaceChildren(...(words.kinds.length > 1 ? ["with memory", "without memory"] : []).map((text) => element("span", text)));
  $("video").setAttribute("aria-label", words.kinds.length > 1 ? "The video that is being made: on the left with memory, on the right without" : "The video that is being made");
  $("hint").textContent = words.hint;
  $("seed").value = words.seed;
  if (!$("prompt").value) $("prompt").value = words.prompt;
  $("examples").replaceChildren(...words.examples.map(exampleButton));
  setPaused(words.paused);
  tell(words.ended, true);
}

function exampleButton(prompt) {
  const item = element("li");
  const button = element("button", prompt);
  button.type = "button";
  button.addEventListener("click", () => {
    $("prompt").value = prompt;
    say({ type: "prompt", prompt });
  });
  item.append(button);
  return item;
}

function hearChunk(data) {
  const size = new DataView(data).getUint32(0);
  const row = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
  if (!info || row.generation !== info.generation) return;
  const repeated = newest !== null && row.chunk <= newest.chunk;
  for (const [frame, content] of Object.entries(row.pictures)) pictures.set(Number(frame), `data:image/png;base64,${content}`);
  keep(row);
  showLatency(row.latency);
  if (repeated) return;
  const cut = newest === null || row.prompt !== newest.prompt;
  newest = row;
  player.add(new Uint8Array(data, 4 + size), row.video_start, cut);
  if (!info.paused) $("video").play().catch(() => {});
}

// ---------------------------------------------------------------------------------------------------------- the page

function keep(row) {
  const known = rows.has(row.chunk);
  rows.set(row.chunk, row);
  if (known) return;
  const item = element("li");
  item.dataset.chunk = row.chunk;
  const image = element("img");
  image.alt = `frame ${row.first_frame}: ${row.prompt}`;
  image.title = image.alt;
  picture(image, row.first_frame);
  item.append(image);
  const strip = $("past");
  const atEnd = strip.scrollLeft + strip.clientWidth > strip.scrollWidth - 60;
  strip.append(item);
  while (strip.children.length > PAST) strip.firstChild.remove();
  if (atEnd) strip.scrollLeft = strip.scrollWidth;
}

/** Shows the picture of a past frame, which is asked for where it did not come with its chunk. */
async function picture(image, frame) {
  if (!pictures.has(frame)) {
    const content = await get(`sessions/${info.session}/pictures/${frame}`);
    if (content && !pictures.has(frame)) pictures.set(frame, URL.createObjectURL(content));
  }
  if (pictures.has(frame)) image.src = pictures.get(frame);
}

/** Follows the video: what the chunk that is on the screen has remembered. */
function follow() {
  if (!rows.size) return;
  const time = $("video").currentTime + 1e-3;
  let row = null;
  for (const one of rows.values()) if (one.video_start <= time && (!row || one.chunk > row.chunk)) row = one;
  if (!row || row === shown) return;
  shown = row;
  $("now").textContent = `“${row.prompt}”, chunk ${row.chunk + 1}, frames ${row.first_frame} to ${row.first_frame + info.chunk_frames - 1}`;
  const kept = new Set(row.retrieved);
  const largest = Math.max(...row.activation, 1e-9);
  const items = row.candidates.map((frame, i) => {
    const item = element("li");
    const share = row.activation[i];
    const place = row.retrieved.indexOf(frame);
    item.className = kept.has(frame) ? "retrieved" : "sink";
    Object.assign(item.dataset, { frame, share, relevance: place < 0 ? "" : row.relevance[place] });
    const bar = element("span");
    bar.className = "bar";
    bar.style.height = `${(TALLEST * share) / largest}rem`;
    const image = element("img");
    image.alt = "";
    picture(image, frame);
    const number = element("span", `${Math.round(100 * share)} %`);
    number.className = "share";
    const words = element("span", kept.has(frame) ? " of what was picked: retrieved" : " of what was picked: from the first frames");
    words.className = "hidden";
    item.append(number, words, bar, image, element("span", `frame ${frame}`));
    return item;
  });
  if (!items.length) {
    const kind = info.kinds[0];
    const chooses = kind === "memflow" || kind === "released";
    const none = chooses ? "no older frames yet" : `memory "${kind}" retrieves nothing`;
    items.push(element("li", row.retrieved.length ? `in the bank: frames ${row.retrieved.join(", ")}` : none));
    items[0].className = "nothing";
  }
  $("memory").dataset.chunk = row.chunk;
  $("memory").replaceChildren(...items);
  for (const item of $("past").children) {
    const first = rows.get(Number(item.dataset.chunk)).first_frame;
    const used = row.candidates.some((frame) => frame === first);
    item.className = kept.has(first) ? "retrieved" : used ? "sink" : "";
    item.classList.toggle("shown", Number(item.dataset.chunk) === row.chunk);
  }
}

function showLatency(figures) {
  const seconds = (x) => `${x.toFixed(2)} s`;
  $("first-server").textContent = seconds(figures.time_to_first_frame);
  $("chunk-p50").textContent = seconds(figures.chunk_p50);
  $("chunk-p95").textContent = seconds(figures.chunk_p95);
  $("factor").textContent = figures.real_time_factor.toFixed(2);
  $("missed").textContent = `${figures.missed_deadlines} of ${figures.chunks}`;
  const rate = Math.max(0.1, Math.min(1, Math.floor(20 * figures.real_time_factor) / 20));
  $("video").playbackRate = rate;
  $("speed").textContent =
    rate < 1 ? `Shown at ${rate.toFixed(2)} of its speed: this machine does not make a second of video in a second.` : "";
}

function setPaused(paused) {
  info.paused = paused;
  $("pause").textContent = paused ? "Resume" : "Pause";
  if (paused) $("video").pause();
  else if (rows.size) $("video").play().catch(() => {});
}

function tell(words, problem = false) {
  $("status").textContent = words;
  $("status").classList.toggle("problem", problem && words !== "");
}

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

async function get(path) {
  const answer = await fetch(path, token === null ? {} : { headers: { Authorization: `Bearer ${token}` } });
  return answer.ok ? answer.blob() : null;
}

async function save(name) {
  const content = await get(`sessions/${info.session}/${name}`);
  if (!content) return tell(`${name} could not be fetched.`, true);
  const link = element("a");
  link.href = URL.createObjectURL(content);
  link.download = `memflow-${name}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  say({ type: "prompt", prompt: $("prompt").value });
});
$("fork").addEventListener("click", () => say({ type: "fork", prompt: $("prompt").value }));
$("restart").addEventListener("click", () => {
  opened = performance.now();
  playing = false;
  say({ type: "restart", seed: Math.max(0, Math.floor(Number($("seed").value) || 0)) });
});
$("pause").addEventListener("click", () => say({ type: info?.paused ? "resume" : "pause" }));
$("save-video").addEventListener("click", () => save("video.mp4"));
$("save-timeline").addEventListener("click", () => save("timeline.json"));
$("video").addEventListener("playing", () => {
  if (playing) return;
  playing = true;
  $("first-page").textContent = `${((performance.now() - opened) / 1000).toFixed(2)} s`;
});
setInterval(follow, 100);

if (!window.MediaSource) {
  tell("This browser cannot play a video that grows (it has no Media Source Extensions).", true);
} else if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  $("start").hidden = false; // Nothing moves before it is asked to.
  $("start").addEventListener("click", () => {
    $("start").hidden = true;
    opened = performance.now();
    connect();
  });
} else {
  connect();
}
