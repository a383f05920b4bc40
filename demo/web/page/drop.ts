/** Files and folders that were dropped on the page. */

function readEntry(entry: FileSystemEntry): Promise<File[]> {
  if (entry.isFile) {
    return new Promise((resolve, reject) => (entry as FileSystemFileEntry).file((file) => resolve([file]), reject));
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const readSome = () => new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
  return (async () => {
    const files: File[] = [];
    // A reader gives some entries at a time, and none at its end.
    for (let entries = await readSome(); entries.length; entries = await readSome()) {
      for (const inner of entries) files.push(...(await readEntry(inner)));
    }
    return files;
  })();
}

/** All files of a drop, those in folders too. */
export async function droppedFiles(transfer: DataTransfer): Promise<File[]> {
  const files = [...transfer.files];
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  if (!entries.some((entry) => entry.isDirectory)) return files;
  return (await Promise.all(entries.map(readEntry))).flat();
}

/** Whether files are a model rather than an image. */
export function isModel(files: readonly File[]): boolean {
  return files.some(({ name }) => /\.(zip|onnx|json)$/i.test(name));
}
