// A request as a shell command and as a Python program. Both read the attached files from the folder they run in.

/**
 * @typedef {object} RequestDescription A request with names of files in place of their content.
 * @property {string} model
 * @property {{role: string, text: string, files: {name: string, kind: string, mime: string}[]}[]} messages
 * @property {object} options max_tokens and temperature, where set.
 */

/** @param {string} apiUrl @param {RequestDescription} request @param {boolean} hasKey */
export function asCurl(apiUrl, request, hasKey) {
  const files = [];
  const mark = `@${Math.random()}@`; // occurs in no question
  const body = {
    model: request.model,
    messages: request.messages.map((message) => toMessage(message, (file) => `${mark}${files.push(file) - 1}${mark}`)),
    ...request.options,
    stream: true,
  };
  // In an unquoted here-document the shell expands $(…), so other dollars, backticks and backslashes are escaped.
  const text = JSON.stringify(body, null, 2)
    .replace(/[\\$`]/g, "\\$&")
    .replace(new RegExp(`"${mark}(\\d+)${mark}"`, "g"), (_, index) => `"data:${files[index].mime};base64,$(base64 < ${shellQuoted(files[index].name)} | tr -d '\\n')"`);
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $QFORMER_API_KEY"` : "";
  return `curl -N ${shellQuoted(`${apiUrl}/chat/completions`)} \\\n  -H 'Content-Type: application/json'${key} \\\n  --data-binary @- <<END\n${text}\nEND`;
}

/** @param {string} apiUrl @param {RequestDescription} request @param {boolean} hasKey */
export function asPython(apiUrl, request, hasKey) {
  const hasFiles = request.messages.some((message) => message.files.length);
  const imports = [hasFiles && "import base64", hasKey && "import os", hasFiles && "from pathlib import Path"].filter(Boolean);
  const helper = `def data_url(path, mime):
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"\n\n\n`;
  const key = hasKey ? 'os.environ["QFORMER_API_KEY"]' : '"none"';
  const messages = request.messages.map((message) => `        ${pythonMessage(message)},\n`).join("");
  const options = Object.entries(request.options).map(([name, value]) => `    ${name}=${value},\n`).join("");
  return `${imports.join("\n")}${imports.length ? "\n\n" : ""}from openai import OpenAI

${hasFiles ? `\n${helper}` : ""}client = OpenAI(base_url=${quoted(apiUrl)}, api_key=${key})
stream = client.chat.completions.create(
    model=${quoted(request.model)},
    messages=[
${messages}    ],
${options}    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)`;
}

/**
 * A message in the format of the API; without files, its content is a plain string.
 * @param {{role: string, text: string, files: object[]}} message
 * @param {(file: object) => string} urlOf
 */
export function toMessage(message, urlOf) {
  if (!message.files.length) return { role: message.role, content: message.text };
  const parts = message.files.map((file) => ({ type: `${file.kind}_url`, [`${file.kind}_url`]: { url: urlOf(file) } }));
  if (message.text) parts.push({ type: "text", text: message.text });
  return { role: message.role, content: parts };
}

function pythonMessage(message) {
  if (!message.files.length) return `{"role": ${quoted(message.role)}, "content": ${quoted(message.text)}}`;
  const parts = message.files.map(
    (file) => `{"type": "${file.kind}_url", "${file.kind}_url": {"url": data_url(${quoted(file.name)}, ${quoted(file.mime)})}}`,
  );
  if (message.text) parts.push(`{"type": "text", "text": ${quoted(message.text)}}`);
  return `{"role": ${quoted(message.role)}, "content": [\n${parts.map((part) => `            ${part},\n`).join("")}        ]}`;
}

/** A JSON string is a Python string too. */
function quoted(text) {
  return JSON.stringify(text);
}

function shellQuoted(text) {
  return /^[\w./:@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
