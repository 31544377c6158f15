// The README's browser code in a real Chromium, cross-origin, while nodes and the backend are killed.
//
//   node tests/browser/run.mjs [path of tidewire] [path of chromium]
//
// Ends with 0 when the page saw every change once and in order, and stopped when it was refused a ticket. The reference is
// the log, read over the same API after the fact.
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { createInterface } from 'node:readline';

import { Chromium } from './chromium.mjs';

const [tidewire = 'target/debug/tidewire', chromium = '/usr/bin/chromium'] = process.argv.slice(2);
const root = new URL('../../', import.meta.url);
const DEADLINE_MS = 60_000;
const children = [];

function start(program, args, options = {}) {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'], ...options });
  child.lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  children.push(child);
  return child;
}

async function until(what, check) {
  const deadline = Date.now() + DEADLINE_MS;
  for (;;) {
    const found = await check();
    if (found) return found;
    if (Date.now() > deadline) throw new Error(`not in time: ${what}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

function equal(what, got, want) {
  if (got !== want) throw new Error(`${what}: ${got}, not ${want}`);
}

// README and example are one text, so that what is tested is what people copy.
function checkReadme() {
  const readme = readFileSync(new URL('README.md', root), 'utf8');
  const code = readFileSync(new URL('examples/browser/follow.js', root), 'utf8');
  if (!readme.includes(`\`\`\`js\n${code}`)) throw new Error('README.md does not hold examples/browser/follow.js as it is');
}

async function backend(nodes, key, port) {
  const env = { ...process.env, TIDEWIRE_KEY: key, TIDEWIRE_URLS: nodes.map((node) => node.url).join(','), PORT: port };
  const child = start(process.execPath, [fileURLToPath(new URL('examples/browser/backend.mjs', root))], { env });
  const url = (await child.lines.next()).value;
  return { child, url, port: new URL(url).port };
}

async function kill(child) {
  const gone = new Promise((done) => child.once('exit', done));
  child.kill('SIGKILL');
  await gone;
}

async function killNode(node) {
  const { pid } = await until(`${node.name} runs`, () => node.pid && node);
  node.pid = null;
  process.kill(pid, 'SIGKILL');
}

// Ids of the log's events from `first` to `last`, asked of a live node.
async function log(nodes, key, first, last) {
  for (const node of nodes) {
    try {
      const headers = { authorization: `Bearer ${key}` };
      const answer = await fetch(`${node.url}/v1/sse?table=public.orders&from=oldest`, { headers });
      let text = '';
      for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) {
        text += piece;
        if (text.includes('event: caught_up')) break;
      }
      const frames = [...text.matchAll(/^event: events\nid: .*\ndata: (.*)$/gm)];
      const ids = frames.flatMap((frame) => JSON.parse(frame[1]).events).map((event) => event.id);
      return ids.slice(ids.indexOf(first), ids.indexOf(last) + 1);
    } catch (error) {
      console.error(`${node.url}: ${error.cause ?? error}`);
    }
  }
  throw new Error('no node gives the log');
}

// What the page makes of JSON: no number may change its value, and what need not be a text is none.
async function parsesLosslessly(page) {
  const cases = [
    ['[1, -7.5, 42.00, 1e3, 9007199254740991]', [1, -7.5, 42, 1000, 9007199254740991]],
    ['[9007199254740992, 9007199254740993, -9223372036854775808]', [9007199254740992, '9007199254740993', '-9223372036854775808']],
    ['{"a":{"b":[12345678901234567890.123]}}', { a: { b: ['12345678901234567890.123'] } }],
    ['[0.30000000000000004, "9007199254740993", null, true]', [0.30000000000000004, '9007199254740993', null, true]],
  ];
  for (const [text, want] of cases) {
    const got = await page(`import('./follow.js').then(({ parse }) => JSON.stringify(parse(${JSON.stringify(text)})))`);
    equal(`what the page reads from ${text}`, got, JSON.stringify(want));
  }
}

// Keys that differ by less than a double can tell.
async function largeKeys(database, page) {
  const keys = ['9007199254740992', '9007199254740993', '9223372036854775807'];
  const sql = `INSERT INTO public.orders (id, customer, amount, status) OVERRIDING SYSTEM VALUE
    SELECT key, 'Large', 1, 'new' FROM unnest('{${keys}}'::bigint[]) AS keys(key)`;
  const psql = start('psql', ['-qXd', database, '-v', 'ON_ERROR_STOP=1', '-c', sql]);
  const code = await new Promise((done) => psql.once('exit', done));
  equal('the end of psql', code, 0);
  const lines = () => page('[...document.querySelectorAll("li")].map((one) => one.textContent.replaceAll(/\\W/g, " ")).join("\\n")');
  await until('rows with large keys', async () => ((await lines()).match(/ 9\d{15,}/g) ?? []).length >= keys.length);
  equal('large keys', (await lines()).match(/ 9\d{15,}/g).join().replaceAll(' ', ''), keys.join());
}

async function test(browser) {
  const dev = start(tidewire, ['dev', '--nodes', '2', '--json'], { stdio: ['ignore', 'pipe', 'pipe'] });
  const said = createInterface({ input: dev.stderr });
  said.on('line', (line) => console.error(line));
  const { nodes, api_key: key, database_url: database } = JSON.parse((await dev.lines.next()).value);
  // dev starts a dead node again and says what its process is then.
  said.on('line', (line) => {
    const [, name, pid] = /^(\S+) runs again, process (\d+)/.exec(line) ?? [];
    if (name) nodes.find((node) => node.name === name).pid = Number(pid);
  });
  let server = await backend(nodes, key, '0');
  const page = await browser.open(server.url);
  const seen = async () => JSON.parse(await page('JSON.stringify([...document.querySelectorAll("li")].map((one) => one.dataset.id))'));
  const status = () => page('document.querySelector("#status")?.textContent');
  // The connection must have been there before, else nothing was lost.
  const goesOn = async (what) => {
    const before = (await seen()).length;
    await until(`events after ${what}`, async () => (await seen()).length > before + 2);
    console.log(`events go on: ${what}`);
  };
  await until('the page follows', async () => (await status()) === 'following');
  await goesOn('the start');

  await parsesLosslessly(page);
  await largeKeys(database, page);

  await killNode(nodes[0]);
  await goesOn('the first node was killed');
  // No ticket for a while: the page must go on asking.
  await kill(server.child);
  await killNode(nodes[1]);
  await until('ticket requests fail', () => page('performance.getEntriesByType("resource").filter((one) => one.name.endsWith("/ticket") && one.responseStatus === 0).length > 1'));
  server = await backend(nodes, key, server.port);
  await goesOn('the second node and the backend were killed');

  const ids = await seen();
  const want = await log(nodes, key, ids[0], ids.at(-1));
  equal('changes that the page saw', JSON.stringify(ids), JSON.stringify(want));
  console.log(`${ids.length} changes, each once and in order`);

  // Whoever is refused stops.
  await kill(server.child);
  server = await backend(nodes, `${key}x`, server.port);
  await Promise.all(nodes.map(killNode));
  await until('the page stops', async () => (await status()).startsWith('ended'));
  equal('the end', await status(), 'ended: no ticket: 403');
}

checkReadme();
const browser = new Chromium(chromium);
try {
  await test(browser);
  console.log(`PASSED in ${Math.round(performance.now() / 1000)} s`);
} catch (error) {
  console.error(error);
  process.exitCode = 1;
} finally {
  await browser.close();
  await Promise.all(children.filter((child) => child.exitCode === null && child.signalCode === null).map((child) => {
    const gone = new Promise((done) => child.once('exit', done));
    child.kill('SIGTERM');
    return gone;
  }));
}
