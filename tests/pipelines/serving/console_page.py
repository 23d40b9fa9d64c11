"""What a person does on the console's page, for Playwright."""

import base64
import time

ANSWER = ".turn:last-child .answer"
FAILURE = ".turn:last-child .failure"
NOTE = ".turn:last-child .note"

# Files as a person drops them, made of the bytes given.
DROP = """(files) => {
  const transfer = new DataTransfer();
  for (const { name, type, content } of files) {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type }));
  }
  const options = { bubbles: true, cancelable: true, dataTransfer: transfer };
  document.body.dispatchEvent(new DragEvent("dragover", options));
  document.body.dispatchEvent(new DragEvent("drop", options));
}"""


def drop(page, *files):
    """Files as Playwright describes them: name, mimeType, buffer."""
    described = [
        {"name": file["name"], "type": file["mimeType"], "content": base64.b64encode(file["buffer"]).decode()}
        for file in files
    ]
    page.evaluate(DROP, described)


def ask(page, text):
    """Write a question and press Enter."""
    page.locator("#question").fill(text)
    page.locator("#question").press("Enter")


def wait_for(condition, timeout_s=10):
    """Until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_text(page, selector, text):
    """Until an element has it."""
    page.locator(selector).filter(has_text=text).wait_for()
