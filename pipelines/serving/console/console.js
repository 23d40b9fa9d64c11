// The page: attachments, the question, the conversation and its settings. All state lives here, in memory.

import { bodyLimit, ChatError, listModels, streamAnswer } from "./chat.js";
import { listenForCode } from "./code.js";
import { element, errorView, preview, TurnView } from "./conversation.js";
import { Attachment, inMegabytes, kindOf, listenForFiles } from "./media.js";
import { toMessage } from "./snippets.js";

const $ = (id) => document.getElementById(id);
const ENVELOPE_BYTES = 4096; // size of a request without texts and files

let attachments = []; // files of the next question
let turns = []; // {files, text, model, answer, view}; those with an answer are part of the next request
let running = null; // {abort, turn} while an answer streams
let maxBodyBytes = Infinity;

// Models

async function loadModels() {
  const select = $("model");
  const wanted = select.value;
  try {
    const names = await listModels($("key").value.trim());
    if (!names.length) throw new ChatError("The server has no model.", "See its log, then try again.");
    select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    if (names.includes(wanted)) select.value = wanted;
    select.disabled = false;
    $("notice").hidden = true;
  } catch (error) {
    select.replaceChildren(element("option", { value: "" }, "none"));
    select.disabled = true;
    const remedies = [["Try again", loadModels]];
    if (error.remedy === "key") remedies.unshift(["Enter API key", askForKey]);
    $("notice").replaceChildren(...errorView(asChatError(error), remedies));
    $("notice").hidden = false;
  }
}

function askForKey() {
  $("settings").showModal();
  $("key").focus();
}

// Attachments

function attach(files) {
  refuse("");
  for (const file of files) {
    const kind = kindOf(file);
    if (!kind) {
      refuse(`“${file.name}” is neither an image nor a video. Choose a JPEG, PNG, WebP or GIF picture, or an MP4, WebM or MOV clip.`);
      continue;
    }
    const attachment = new Attachment(file, kind);
    if (sizeWith([...attachments, attachment]) > maxBodyBytes) {
      attachment.release();
      refuse(`“${attachment.name}” (${inMegabytes(file.size)}) is too large: ${limitInWords()}. Use a smaller or shorter file${turns.length ? ", or start a new chat" : ""}.`);
      continue;
    }
    attachments.push(attachment);
  }
  showAttachments();
  $("question").focus();
}

/** Size of the next request in bytes, including earlier turns. */
function sizeWith(files) {
  const sent = [...answered().flatMap((turn) => turn.files), ...files];
  return sent.reduce((sum, file) => sum + file.requestBytes, ENVELOPE_BYTES);
}

function limitInWords() {
  return `a request to this server may carry ${inMegabytes((maxBodyBytes - ENVELOPE_BYTES) * 0.75)} of files, those of earlier questions included`;
}

function showAttachments() {
  const items = attachments.map((attachment) => {
    const remove = element("button", { type: "button", className: "remove", title: "Remove" }, "×");
    remove.setAttribute("aria-label", `Remove ${attachment.name}`);
    remove.addEventListener("click", () => {
      attachment.release();
      attachments = attachments.filter((other) => other !== attachment);
      showAttachments();
      $("question").focus();
    });
    return element("li", {}, preview(attachment), remove);
  });
  $("attachments").replaceChildren(...items);
  $("attachments").hidden = !items.length;
  $("drop-zone").hidden = Boolean(items.length);
}

function refuse(message) {
  $("refusal").textContent = message;
  $("refusal").hidden = !message;
}

// Asking

function send() {
  const text = $("question").value.trim();
  if (running) return;
  if (!text && !attachments.length) {
    refuse("Write a question, or attach a file, first.");
    $("question").focus();
    return;
  }
  refuse("");
  turns.at(-1)?.view.settle();
  const turn = { files: attachments, text, model: $("model").value, answer: "" };
  turn.view = new TurnView($("log"), turn);
  turns.push(turn);
  attachments = [];
  $("question").value = "";
  $("welcome").hidden = true;
  showAttachments();
  answer(turn);
}

async function answer(turn) {
  running = { abort: new AbortController(), turn };
  showRunning();
  turn.answer = "";
  turn.view.begin();
  scrollDown();
  let note = "";
  try {
    const messages = await Promise.all(conversation(turn).map(withContent));
    const body = { model: turn.model, messages, ...options(), stream: true };
    for await (const piece of streamAnswer(body, $("key").value.trim(), running.abort.signal)) {
      turn.answer += piece.text;
      turn.view.extend(piece.text);
      if (piece.finish === "length") note = "Cut at the longest length; Settings can raise it.";
    }
    if (!turn.answer) note = "The model answered nothing.";
    turn.view.end(note);
    say("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      turn.view.end("Stopped.");
      say("Stopped.");
    } else {
      turn.answer = ""; // an incomplete answer is not part of later requests
      turn.view.fail(asChatError(error), remediesOf(error, turn));
    }
  } finally {
    running = null;
    showRunning();
  }
}

function remediesOf(error, turn) {
  const again = () => {
    turn.view.root.querySelector(".reply h3").textContent = turn.model = $("model").value || turn.model;
    answer(turn);
    $("question").focus();
  };
  const remedies = [["Try again", again]];
  if (error.remedy === "key") remedies.unshift(["Enter API key", askForKey]);
  if (error.remedy === "models") remedies.unshift(["Load models again", loadModels]);
  return remedies;
}

/** Turns with an answer. */
function answered() {
  return turns.filter((turn) => turn.answer);
}

/** Messages up to and including the question of a turn; files are still attachments. */
function conversation(turn) {
  const before = answered().filter((other) => other !== turn);
  return [
    ...before.flatMap(({ files, text, answer }) => [{ role: "user", text, files }, { role: "assistant", text: answer, files: [] }]),
    { role: "user", text: turn.text, files: turn.files },
  ];
}

async function withContent(message) {
  const urls = new Map();
  for (const file of message.files) urls.set(file, await file.dataUrl());
  return toMessage(message, (file) => urls.get(file));
}

/** max_tokens and temperature, if set. */
function options() {
  const found = {};
  if ($("max-tokens").value) found.max_tokens = Number($("max-tokens").value);
  if ($("temperature").value) found.temperature = Number($("temperature").value);
  return found;
}

function stop() {
  running?.abort.abort();
}

function showRunning() {
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  if (hadFocus) $(running ? "stop" : "question").focus();
  if (running) say("Answering.");
}

function newChat() {
  stop();
  for (const file of [...attachments, ...turns.flatMap((turn) => turn.files)]) file.release();
  [attachments, turns] = [[], []];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  refuse("");
  showAttachments();
  $("question").focus();
}

function asChatError(error) {
  if (error instanceof ChatError) return error;
  return new ChatError("This page met an error.", `${error.name}: ${error.message}. Load the page again; a file may have changed since it was chosen.`);
}

function say(text) {
  $("status").textContent = text;
}

function scrollDown() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

/** Keep the end of the log visible while it grows, unless the user has scrolled up. */
function followTheEnd() {
  const area = $("scroller");
  let isAtEnd = true;
  area.addEventListener("scroll", () => {
    isAtEnd = area.scrollHeight - area.scrollTop - area.clientHeight < 40;
  });
  new ResizeObserver(() => isAtEnd && turns.length && scrollDown()).observe($("log"));
}

/** The request that Send would make, or the last one. */
function requestForCode() {
  const text = $("question").value.trim();
  const isDraft = Boolean(text || attachments.length || !turns.length);
  const draft = { files: attachments, text: text || "What is in this picture?", model: $("model").value };
  const turn = isDraft ? draft : turns.at(-1);
  const request = { model: turn.model, messages: conversation(turn), options: options() };
  const hasKey = Boolean($("key").value.trim());
  const about = [isDraft ? "What Send would ask now." : "The last question asked here."];
  if (request.messages.some((message) => message.files.length)) about.push("Run it in the folder of the files.");
  if (hasKey) about.push("It takes the key from the variable QFORMER_API_KEY.");
  return { about: about.join(" "), request, hasKey };
}

// Wiring

function listen() {
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
  });
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", newChat);
  $("open-settings").addEventListener("click", () => $("settings").showModal());
  $("key").addEventListener("change", loadModels);
  for (const opener of [$("attach"), $("drop-zone")]) opener.addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    attach($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  });
  for (const example of document.querySelectorAll(".example")) {
    example.addEventListener("click", () => {
      $("question").value = example.textContent;
      $("question").focus();
    });
  }
}

listen();
listenForFiles(attach);
followTheEnd();
listenForCode(requestForCode);
loadModels();
bodyLimit().then((bytes) => {
  maxBodyBytes = bytes;
  if (bytes < Infinity) $("limit-hint").textContent = `up to ${inMegabytes((bytes - ENVELOPE_BYTES) * 0.75)}`;
});
if (matchMedia("(pointer: fine)").matches) $("question").focus(); // on a phone, focus opens the keyboard
