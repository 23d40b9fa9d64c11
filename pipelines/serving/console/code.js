// The dialog that shows a request as code.

import { API_URL } from "./chat.js";
import { asCurl, asPython } from "./snippets.js";

const $ = (id) => document.getElementById(id);

/** @param {() => {about: string, request: object, hasKey: boolean}} describe Function that gives the request, called at each opening. */
export function listenForCode(describe) {
  const tabs = { curl: $("tab-curl"), python: $("tab-python") };
  const writers = { curl: asCurl, python: asPython };
  let chosen = "curl";
  let shown = null;

  function show() {
    $("code-about").textContent = shown.about;
    $("snippet").textContent = writers[chosen](API_URL, shown.request, shown.hasKey);
    $("copied").textContent = "";
    for (const [language, tab] of Object.entries(tabs)) {
      tab.setAttribute("aria-selected", String(language === chosen));
      tab.tabIndex = language === chosen ? 0 : -1;
    }
    $("code-panel").setAttribute("aria-labelledby", tabs[chosen].id);
  }

  function choose(language) {
    chosen = language;
    show();
  }

  $("open-code").addEventListener("click", () => {
    shown = describe();
    show();
    $("code").showModal();
  });
  for (const [language, tab] of Object.entries(tabs)) {
    tab.addEventListener("click", () => choose(language));
    tab.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      choose(chosen === "curl" ? "python" : "curl");
      tabs[chosen].focus();
    });
  }
  $("copy").addEventListener("click", copy);
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copied").textContent = "Copied.";
  } catch {
    // Browsers allow clipboard access only to pages on HTTPS or this machine.
    getSelection().selectAllChildren($("snippet"));
    $("copied").textContent = document.execCommand("copy") ? "Copied." : "Selected: press Ctrl+C.";
  }
}
