// Conversations in the browser's IndexedDB. Where it cannot be used, they live as long as the page.

const NAME = "dymoe", TABLE = "conversations";

export class Storage {
  /** `failed(reason)` is called with "none" if nothing can be kept here, or "full" if there is no room. */
  constructor(failed) {
    this.failed = failed;
    this.memory = new Map();
    this.opened = open();
    this.channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;
  }

  /** Call `changed(id)` when another tab has changed or deleted a conversation. */
  whenChangedElsewhere(changed) {
    if (this.channel) this.channel.onmessage = (event) => changed(event.data);
  }

  async all() {
    const database = await this.database();
    if (!database) return [...this.memory.values()];
    return result(database.transaction(TABLE).objectStore(TABLE).getAll());
  }

  async save(conversation) {
    await this.write((table) => table.put(conversation), () => this.memory.set(conversation.id, conversation));
    this.channel?.postMessage(conversation.id);
  }

  async delete(id) {
    await this.write((table) => table.delete(id), () => this.memory.delete(id));
    this.channel?.postMessage(id);
  }

  async clear() {
    await this.write((table) => table.clear(), () => this.memory.clear());
    this.channel?.postMessage(null);
  }

  async write(change, otherwise) {
    const database = await this.database();
    if (!database) return otherwise();
    try {
      const transaction = database.transaction(TABLE, "readwrite");
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onerror = transaction.onabort = () => reject(transaction.error);
        change(transaction.objectStore(TABLE));
      });
    } catch (error) {
      this.failed(error?.name === "QuotaExceededError" ? "full" : "none");
    }
  }

  async database() {
    try {
      return await this.opened;
    } catch {
      this.failed("none");
      this.opened = Promise.resolve(null);
      return null;
    }
  }
}

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onerror = request.onblocked = () => reject(request.error);
    request.onsuccess = () => resolve(request.result);
  });
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
