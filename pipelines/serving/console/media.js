// Attached files: kind, size in a request, content as a data URL.

const EXTENSIONS = {
  image: ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"],
  video: ["mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ogv"],
};

/** One attached file. */
export class Attachment {
  /** @param {File} file @param {"image"|"video"} kind */
  constructor(file, kind) {
    this.file = file;
    this.kind = kind;
    this.name = file.name || `pasted.${file.type.split("/")[1] || "png"}`;
    this.previewUrl = URL.createObjectURL(file);
  }

  /** Size in a request, in bytes: base64 encodes three bytes as four. */
  get requestBytes() {
    return Math.ceil(this.file.size / 3) * 4;
  }

  /** MIME type for the data URL; the server detects the format from the content. */
  get mime() {
    return this.file.type || `${this.kind}/${this.name.split(".").pop().toLowerCase()}`;
  }

  /** @returns {Promise<string>} The content as a data URL. */
  async dataUrl() {
    this.content ??= read(this.file);
    const url = await this.content;
    return `data:${this.mime};base64,${url.slice(url.indexOf(",") + 1)}`;
  }

  /** Free the memory of the file. */
  release() {
    URL.revokeObjectURL(this.previewUrl);
    this.content = undefined;
  }
}

/** @param {File} file @returns {"image"|"video"|null} */
export function kindOf(file) {
  const declared = file.type.split("/")[0];
  if (declared in EXTENSIONS) return declared;
  const extension = file.name.split(".").pop().toLowerCase();
  return Object.keys(EXTENSIONS).find((kind) => EXTENSIONS[kind].includes(extension)) ?? null;
}

/** @param {number} bytes */
export function inMegabytes(bytes) {
  const megabytes = bytes / 2 ** 20;
  return megabytes >= 10 ? `${Math.round(megabytes)} MB` : megabytes >= 0.1 ? `${megabytes.toFixed(1)} MB` : `${Math.ceil(bytes / 2 ** 10)} kB`;
}

/** @param {(files: FileList) => void} attach Callback for files that are dropped on or pasted into the page. */
export function listenForFiles(attach) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("is-dragging");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("is-dragging");
  });
  addEventListener("drop", (event) => {
    document.body.classList.remove("is-dragging");
    if (!hasFiles(event)) return;
    event.preventDefault();
    attach(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData?.files.length) {
      event.preventDefault();
      attach(event.clipboardData.files);
    }
  });
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
