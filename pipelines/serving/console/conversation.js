// View of a conversation. Texts of users and models are inserted as text nodes only.

import { inMegabytes } from "./media.js";

/** @param {string} tag @param {object} properties @param {...(Node|string)} children @returns {HTMLElement} */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** A preview of one attached file: the picture, a player, or its name where the browser shows neither. */
export function preview(attachment) {
  const name = element("span", { className: "file-name" }, `${attachment.name} · ${inMegabytes(attachment.file.size)}`);
  const media =
    attachment.kind === "image"
      ? element("img", { src: attachment.previewUrl, alt: attachment.name })
      : element("video", { src: attachment.previewUrl, controls: true, muted: true, playsInline: true, preload: "metadata", title: attachment.name });
  const figure = element("span", { className: "preview" }, media, name);
  media.addEventListener("error", () => {
    media.replaceWith(element("span", { className: "no-preview" }, "no preview in this browser"));
  });
  return figure;
}

/** One question and its answer in the log. */
export class TurnView {
  /** @param {HTMLElement} log @param {{files: object[], text: string, model: string}} turn */
  constructor(log, turn) {
    const files = element("div", { className: "media" }, ...turn.files.map(preview));
    this.text = document.createTextNode("");
    this.answer = element("p", { className: "answer" }, this.text);
    this.note = element("p", { className: "note", hidden: true });
    this.failure = element("div", { className: "failure", hidden: true });
    this.failure.setAttribute("role", "alert");
    const question = element("div", { className: "question" }, element("h3", { className: "hidden" }, "You"));
    if (turn.files.length) question.append(files);
    if (turn.text) question.append(element("p", {}, turn.text));
    this.reply = element("div", { className: "reply" }, element("h3", {}, turn.model), this.answer, this.note, this.failure);
    this.root = element("article", { className: "turn" }, question, this.reply);
    log.append(this.root);
  }

  /** Clear the answer and wait for its first piece. */
  begin() {
    this.text.data = "";
    this.note.hidden = this.failure.hidden = true;
    this.root.classList.add("is-streaming");
    this.reply.setAttribute("aria-busy", "true"); // screen readers then wait for the whole answer
  }

  /** @param {string} text The next piece of the answer. */
  extend(text) {
    this.text.appendData(text);
  }

  /** @param {string} note A remark below the answer, or "". */
  end(note = "") {
    this.root.classList.remove("is-streaming");
    this.reply.removeAttribute("aria-busy");
    this.note.textContent = note;
    this.note.hidden = !note;
  }

  /**
   * @param {{title: string, advice: string}} error
   * @param {[string, () => void][]} remedies Labels of buttons and what they do.
   */
  fail(error, remedies) {
    this.end();
    this.failure.replaceChildren(...errorView(error, remedies));
    this.failure.hidden = false;
  }

  /** Remove the buttons, which have no use after a later question. */
  settle() {
    this.failure.querySelectorAll("button").forEach((button) => button.remove());
  }
}

/** An error's title, advice and buttons. */
export function errorView(error, remedies) {
  const buttons = remedies.map(([label, act]) => {
    const button = element("button", { type: "button" }, label);
    button.addEventListener("click", act);
    return button;
  });
  const row = buttons.length ? [element("div", { className: "row" }, ...buttons)] : [];
  return [element("strong", {}, error.title), element("p", {}, error.advice), ...row];
}
