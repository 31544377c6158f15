// A headless Chromium, spoken to over its debugging pipe: JSON messages that end with a zero byte, on descriptors 3 and 4.
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const FLAGS = [
  '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
  '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage', '--remote-debugging-pipe',
];

export class Chromium {
  #process; #folder; #waiting = new Map(); #number = 0; #rest = '';

  constructor(program) {
    this.#folder = mkdtempSync(join(tmpdir(), 'tidewire-chromium-'));
    const options = { stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'], detached: true };
    this.#process = spawn(program, [...FLAGS, `--user-data-dir=${this.#folder}`, 'about:blank'], options);
    this.#process.on('error', (error) => { throw error; });
    this.#process.stdio[4].on('data', (piece) => this.#read(piece.toString()));
  }

  #read(text) {
    const messages = (this.#rest + text).split('\0');
    this.#rest = messages.pop();
    for (const message of messages.map((one) => JSON.parse(one))) {
      const waiting = this.#waiting.get(message.id);
      this.#waiting.delete(message.id);
      if (message.error) waiting?.fail(new Error(message.error.message));
      else waiting?.done(message.result);
    }
  }

  #call(method, params = {}, sessionId = undefined) {
    const id = ++this.#number;
    this.#process.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
    return new Promise((done, fail) => this.#waiting.set(id, { done, fail }));
  }

  // Opens a page; gives a function that evaluates an expression in it.
  async open(url) {
    const { targetId } = await this.#call('Target.createTarget', { url });
    const { sessionId } = await this.#call('Target.attachToTarget', { targetId, flatten: true });
    return async (expression) => {
      const params = { expression, awaitPromise: true, returnByValue: true };
      const { result, exceptionDetails } = await this.#call('Runtime.evaluate', params, sessionId);
      if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
      return result.value;
    };
  }

  async close() {
    const gone = new Promise((done) => this.#process.once('exit', done));
    this.#call('Browser.close').catch(() => {});
    const forced = setTimeout(() => { try { process.kill(-this.#process.pid, 'SIGKILL'); } catch { /* it has gone */ } }, 5_000);
    await gone;
    clearTimeout(forced);
    rmSync(this.#folder, { recursive: true, force: true, maxRetries: 5 });
  }
}
