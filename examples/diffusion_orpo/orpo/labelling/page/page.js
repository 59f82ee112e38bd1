"use strict";
// One question at a time. An answer counts only when no other is on its way, and people can have seen the images of the question:
// they have been painted, on a page that is in front, for some time. So the second click of a double click, a key that bounces, or
// a tap that a touch screen reports late is no vote on the next question.

const SEEN = 400;     // milliseconds
const FLICKER = 500;  // milliseconds an image: two changes a second, below the three that can harm
const element = id => document.getElementById(id);
const images = element("images"), caption = element("caption"), message = element("message");

let state = null;     // as the server gives it
let ready = false;    // whether a key counts
let now = () => performance.now();
let visibleSince = null;  // when the question was painted; null while it is not to be seen
let isUndone = false;     // whether the question is asked again
let best = null;      // of a ranking, the place that was chosen first
let loaded = new Map();  // url to a decoded image, for this question and the next

const isRanking = () => state.question.images.length > 2;

const isSeen = () => visibleSince !== null && now() - visibleSince >= SEEN;

async function watch() {
  visibleSince = null;
  const {question} = state;
  await new Promise(painted => requestAnimationFrame(() => requestAnimationFrame(painted)));
  if (state.question === question && !document.hidden) visibleSince = now();
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) visibleSince = null;
  else if (state) watch();
});

const isStacked = () => matchMedia("(max-width: 40rem) and (orientation: portrait)").matches;  // as in page.css
const sides = () => isStacked() ? ["upper", "lower"] : ["left", "right"];

async function ask(path, body) {
  const options = body ? {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)} : {};
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    const error = new Error("The server does not answer. Your votes are safe. Start label_preferences.py again, and open the address that it prints.");
    setTimeout(reconnect, 1000);
    throw error;
  }
  const answer = await response.json().catch(() => ({error: response.statusText}));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// Once the server answers again, the page goes on, or says that it has another address.
async function reconnect() {
  try {
    show(await ask("/state"));
  } catch (error) {
    complain(error.message);
  }
}

function load(url) {
  if (!loaded.has(url)) {
    const image = new Image();
    image.src = url;
    const decoded = image.decode().then(() => image);
    decoded.catch(() => loaded.delete(url));
    loaded.set(url, decoded);
  }
  return loaded.get(url);
}

async function send(path, body, isUndo = false) {
  if (!ready) return;
  ready = false;
  try {
    const next = await ask(path, body);
    isUndone = isUndo;
    show(next);
  } catch (error) {
    complain(error.message);
    ready = true;  // the same key tries again
  }
}

function answer(choice, best = null, worst = null) {
  if (!ready || !state.question || !isSeen()) return;
  if (choice === "best") images.children[best].classList.add("best");
  send("/answer", {question: state.question.id, choice, best, worst, seconds: (now() - visibleSince) / 1000});
}

function pick(place) {
  if (!ready || !state.question || !isSeen() || place >= state.question.images.length) return;
  if (!isRanking()) return answer("best", place, 1 - place);
  if (best === null) {
    best = place;
    images.children[place].classList.add("best");
    instruct();
  } else if (place !== best) {
    images.children[place].classList.add("worst");
    answer("best", best, place);
  }
}

function undo() {
  if (!ready || (isUndone && !isSeen())) return;  // a mistake is taken back at once, but one at a time
  if (best !== null) {  // of a ranking, the first half of an answer
    images.children[best].classList.remove("best");
    best = null;
    instruct();
  } else {
    send("/undo", {}, true);
  }
}

function skip() {
  if (ready && state.upcoming && isSeen()) send("/skip", {question: state.question.id});
}

async function show(next) {
  stopFlicker();
  state = next;
  visibleSince = null;
  best = null;
  message.hidden = true;
  progress();
  keys();
  if (!state.question) return finish();
  const {question, upcoming} = state, urls = [...question.images, ...(upcoming ? upcoming.images : [])];
  loaded = new Map([...loaded].filter(([url]) => urls.includes(url)));
  images.dataset.ready = "no";
  let decoded;
  try {
    decoded = await Promise.all(question.images.map(load));
  } catch {
    complain("An image can't be shown: its file is gone, or has changed. Stop the server with Ctrl-C, start it again, and open the address that it prints.");
    return;
  }
  element("prompt").textContent = question.prompt;
  images.style.setProperty("--columns", question.images.length > 4 ? 3 : 2);
  images.replaceChildren(...decoded.map(tile));
  images.dataset.ready = "yes";
  instruct();
  watch();
  ready = true;
  if (upcoming) upcoming.images.map(load).forEach(promise => promise.catch(() => {}));
}

function tile(image, place) {
  const button = document.createElement("button");
  button.type = "button";
  image.alt = isRanking() ? `Image ${place + 1}` : `The ${sides()[place]} image`;
  image.classList.toggle("enlarged", image.naturalWidth < 256);
  button.append(image);
  if (isRanking()) {
    const number = document.createElement("span");
    number.textContent = place + 1;
    button.append(number);
  }
  button.addEventListener("click", event => { if (event.detail < 2) pick(place); });
  return button;
}

function instruct() {
  element("ask").textContent = !isRanking() ? "Which is better?" : best === null ? "Which is the best?" : "And which is the worst?";
  element("spoken").textContent = `${element("ask").textContent} ${state.question.prompt}`;
}

function finish() {
  element("ask").textContent = "";
  element("prompt").textContent = "";
  const done = document.createElement("div"), title = document.createElement("h2"), text = document.createElement("p");
  done.className = "done";
  done.style.gridColumn = "1 / -1";
  title.textContent = state.progress.total ? "All done. Thank you!" : "There is nothing to label.";
  text.append("Every vote is stored. Stop the server with Ctrl-C, and make a dataset: ", Object.assign(document.createElement("code"), {textContent: state.export}));
  done.append(title, text);
  images.replaceChildren(done);
  images.dataset.ready = "yes";
  element("spoken").textContent = title.textContent;
  watch();
  ready = true;
}

function progress() {
  const {answered, total, seconds} = state.progress, left = total - answered;
  const parts = [`${answered} of ${total}`];
  if (seconds !== null) {
    parts.push(`${seconds.toFixed(1)} s each`);
    if (left) parts.push(`about ${duration(left * seconds)} left`);
  }
  element("progress").textContent = parts.join(" · ");
  element("annotator").textContent = `${state.folder} · annotator: ${state.annotator}`;
  const bar = element("bar");
  bar.setAttribute("aria-valuemax", total);
  bar.setAttribute("aria-valuenow", answered);
  bar.firstElementChild.style.width = total ? `${100 * answered / total}%` : "100%";
  document.title = left ? `${left} left: which is better?` : "All done";
}

function duration(seconds) {
  const minutes = Math.ceil(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function keys() {
  const ranking = state.question && isRanking();
  const entries = !state.question ? [] : ranking
    ? [[`1 – ${state.question.images.length}`, "best, then worst"], ["↓", "no difference", () => answer("tie")], ["X", "all bad", () => answer("bad")]]
    : [["←", sides()[0], () => pick(0)], ["→", sides()[1], () => pick(1)], ["↓", "no difference", () => answer("tie")], ["X", "both bad", () => answer("bad")]];
  if (state.upcoming) entries.push(["S", "skip", skip]);
  if (state.progress.answered || ranking) entries.push(["⌫", "undo", undo]);
  if (state.question) entries.push(["space", ranking ? "hold to compare" : "hold to flicker", null, startFlicker]);
  element("keys").replaceChildren(...entries.map(([key, text, action, hold]) => {
    const entry = document.createElement(action || hold ? "button" : "span");
    const label = document.createElement("kbd");
    label.textContent = key;
    entry.append(label, text);
    if (action) {
      entry.type = "button";
      entry.addEventListener("click", event => { entry.blur(); if (event.detail < 2) action(); });
    } else if (hold) {
      entry.type = "button";
      entry.tabIndex = -1;
      entry.addEventListener("pointerdown", hold);
    }
    return entry;
  }));
}

function complain(text) {
  message.textContent = text;
  message.hidden = false;
}

let flicker = null;

function startFlicker() {
  if (!ready || !state.question || flicker !== null) return;
  const tiles = [...images.children];
  let place = -1;
  const turn = () => {
    tiles[place]?.classList.remove("full");
    place = (place + 1) % tiles.length;
    tiles[place].classList.add("full");
    caption.textContent = tiles.length > 2 ? String(place + 1) : sides()[place];
  };
  turn();
  caption.hidden = false;
  flicker = setInterval(turn, FLICKER);
}

function stopFlicker() {
  clearInterval(flicker);
  flicker = null;
  caption.hidden = true;
  for (const tile of images.children) tile.classList.remove("full");
}

const KEYS = {
  ArrowLeft: () => state.question && !isRanking() && pick(0),
  ArrowRight: () => state.question && !isRanking() && pick(1),
  ArrowDown: () => answer("tie"),
  t: () => answer("tie"),
  x: () => answer("bad"),
  s: skip,
  Backspace: undo,
  u: undo,
};

document.addEventListener("keydown", event => {
  if (!state || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === " ") {
    event.preventDefault();
    if (!event.repeat) startFlicker();
  } else if (KEYS[key]) {
    event.preventDefault();
    if (!event.repeat) KEYS[key]();  // a key that is held down is one answer
  } else if (/^[1-9]$/.test(key) && state.question && isRanking() && !event.repeat) {
    pick(Number(key) - 1);
  }
});
document.addEventListener("keyup", event => { if (event.key === " ") { event.preventDefault(); stopFlicker(); } });
for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, stopFlicker);
window.addEventListener("blur", stopFlicker);
window.addEventListener("resize", () => { if (state) keys(); });

ask("/state").then(show, error => complain(error.message));
