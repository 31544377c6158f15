// A backend for the page: it keeps the API key and hands out tickets. Node 18 or later, no dependencies.
//
//   TIDEWIRE_KEY=cdc_… TIDEWIRE_URLS=http://127.0.0.1:8080 TABLE=public.orders PORT=3000 node examples/browser/backend.mjs
//
// TIDEWIRE_URLS: where browsers and this program reach the nodes (or their balancer), separated by commas.
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';

const key = process.env.TIDEWIRE_KEY;
const urls = (process.env.TIDEWIRE_URLS ?? '').split(',').filter(Boolean);
const table = process.env.TABLE ?? 'public.orders';
if (!key || urls.length === 0) {
  console.error('set TIDEWIRE_KEY (tidewire keys create) and TIDEWIRE_URLS (http://host:port, …)');
  process.exit(2);
}
const page = new URL('./', import.meta.url);
const files = { '/': ['index.html', 'text/html'], '/follow.js': ['follow.js', 'text/javascript'] };

// A ticket from the first node that answers. 403: Tidewire refuses our key, so asking again does not help.
async function ticket() {
  for (const url of urls) {
    try {
      const headers = { authorization: `Bearer ${key}` };
      const answer = await fetch(`${url}/v1/tickets`, { method: 'POST', headers, signal: AbortSignal.timeout(3_000) });
      if (answer.ok) return { status: 200, body: await answer.json() };
      console.error(`${url} gave no ticket: ${answer.status} ${await answer.text()}`);
      if (answer.status === 401 || answer.status === 403) return { status: 403, body: {} };
    } catch (error) {
      console.error(`${url} does not answer: ${error.cause?.code ?? error}`);
    }
  }
  return { status: 503, body: {} };
}

const server = createServer(async (request, response) => {
  const send = (status, type, body) => response.writeHead(status, { 'content-type': type, 'cache-control': 'no-store' }).end(body);
  try {
    if (request.method === 'POST' && request.url === '/ticket') {
      // Your check comes here: who is signed in, and may this user read that table? Answer 401 or 403 if not.
      const { status, body } = await ticket();
      return send(status, 'application/json', JSON.stringify(body));
    }
    if (request.method !== 'GET') return send(405, 'text/plain', 'GET, or POST /ticket\n');
    if (request.url === '/config.json') return send(200, 'application/json', JSON.stringify({ urls, table }));
    const [name, type] = files[request.url] ?? [];
    if (!name) return send(404, 'text/plain', 'not here\n');
    return send(200, type, await readFile(new URL(name, page)));
  } catch (error) {
    console.error(error);
    return send(500, 'text/plain', 'see the log\n');
  }
});
server.listen(Number(process.env.PORT ?? 3000), '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}`));
