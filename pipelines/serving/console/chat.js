// Client of the server: models, limits and streamed answers. Independent of the page.

/** A failed request, with a message for the user. */
export class ChatError extends Error {
  /**
   * @param {string} title What happened.
   * @param {string} advice What to do about it.
   * @param {"key"|"models"|null} remedy Action that the page offers besides another try.
   */
  constructor(title, advice, remedy = null) {
    super(title);
    this.title = title;
    this.advice = advice;
    this.remedy = remedy;
  }
}

/** URL of the endpoints; the page may be mounted below a prefix. */
export const API_URL = new URL("v1", document.baseURI).href;

const GONE = ["The server does not answer.", "It may have stopped or be restarting. Check that it runs, then try again."];
const CUT_OFF = ["The connection broke before the answer was complete.", "Check that the server runs, then try again."];

// By status: what happened, advice, and a remedy of the page.
const REFUSALS = {
  401: ["The server wants a valid API key.", "Enter the key that its operator gave you.", "key"],
  403: ["This API key may not do that.", "Enter another key, or ask the operator of the server.", "key"],
  404: ["The server does not know this model.", "Load the list again and choose another one.", "models"],
  408: ["The request took too long.", "Try a shorter clip, or again later."],
  413: ["The request is too large for this server.", "Use a smaller or shorter file, or start a new chat."],
  415: ["The server cannot use this kind of file.", "Convert it to JPEG, PNG or MP4."],
  422: ["The server cannot use this request.", "Use a smaller file or a shorter question."],
  429: ["The server accepts no more requests from you now.", "Wait a little, then try again."],
  503: ["The server is busy.", "Wait a little, then try again."],
  504: ["The answer took too long.", "Try a shorter clip or a shorter answer."],
};

/**
 * List the models of the server.
 * @param {string} key API key, or "".
 * @returns {Promise<string[]>} Names of the models.
 */
export async function listModels(key) {
  const response = await request(`${API_URL}/models`, { headers: authorization(key) });
  const { data } = await response.json();
  return data.map((model) => model.id);
}

/** @returns {Promise<number>} The longest request body in bytes; Infinity if the server gives no limit. */
export async function bodyLimit() {
  try {
    const response = await fetch("console/limits.json");
    return (await response.json()).max_body_bytes ?? Infinity;
  } catch {
    return Infinity;
  }
}

/**
 * Send a request, and yield the answer piece by piece.
 * @param {object} body Body of POST /v1/chat/completions, with `stream: true`.
 * @param {string} key API key, or "".
 * @param {AbortSignal} signal Signal that ends the request.
 * @yields {{text: string, finish: string|null}}
 */
export async function* streamAnswer(body, key, signal) {
  const headers = { "Content-Type": "application/json", ...authorization(key) };
  const response = await request(`${API_URL}/chat/completions`, { method: "POST", headers, body: JSON.stringify(body), signal });
  let isComplete = false;
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") {
      isComplete = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ChatError("The server could not finish this answer.", sentence(chunk.error.message));
    const choice = chunk.choices?.[0];
    if (choice) yield { text: choice.delta?.content ?? "", finish: choice.finish_reason ?? null };
  }
  if (!isComplete) throw new ChatError(...CUT_OFF);
}

function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ChatError(...GONE);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = "";
  try {
    message = (await response.json()).error.message ?? "";
  } catch {
    // The page of a proxy, not the server's answer: use the status.
  }
  const fallback = response.status < 500 ? "The server refused this request." : "The server failed on this request.";
  const [title, advice, remedy] = REFUSALS[response.status] ?? [fallback, "Try again. If it fails again, see the server’s log."];
  const seconds = Number(response.headers.get("Retry-After"));
  const wait = seconds > 0 ? ` It says to wait ${seconds} s.` : "";
  return new ChatError(title, (message ? `It says: ${sentence(message)} ` : "") + advice + wait, remedy);
}

/** Data of server-sent events; several data lines of one event are joined, as in the standard. */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ChatError(...CUT_OFF);
    }
    if (part.done) return;
    rest += part.value;
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

function sentence(text) {
  const trimmed = String(text).trim();
  return /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
}
