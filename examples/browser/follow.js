// Follows a table as long as the page lives, over lost connections and dead nodes, and hands over every change once.
// Ends with the reason when trying again cannot help: no ticket for this user, a subscription that is refused, an old browser.
export async function follow({ urls, ticketUrl, table, load, handle }) {
  if (parse('9007199254740993') !== '9007199254740993') return 'this browser rounds numbers: use Chrome 114, Firefox 135, Safari 18.4 or later';
  let cursor = null; // where to go on; null: from now, with the state loaded anew
  for (let failures = 0; ; failures++) {
    try {
      const answer = await fetch(ticketUrl, { method: 'POST', signal: AbortSignal.timeout(10_000) });
      if (answer.status === 401 || answer.status === 403) return `no ticket: ${answer.status}`;
      if (!answer.ok) throw new Error(`no ticket: ${answer.status}`);
      const query = new URLSearchParams({ table, ticket: (await answer.json()).ticket }); // good for one connection
      if (cursor) query.set('cursor', cursor);
      const url = urls[Math.floor(Math.random() * urls.length)]; // any node will do
      const refusal = await listen(new EventSource(`${url}/v1/sse?${query}`), {
        async events(data, id) {
          for (const event of data.events) await handle(event);
          [cursor, failures] = [id, 0]; // after handling, not before
        },
        async caught_up(data, id) {
          if (!cursor) await load(); // whatever changes from here on comes as an event
          [cursor, failures] = [id, 0];
        },
        progress(data, id) { cursor = id; },
        resync_required(data) { cursor = null; throw new Error(`${data.reason}: ${data.message}`); },
      });
      if (refusal) return `${refusal.code}: ${refusal.message}`;
    } catch (error) {
      console.warn('the feed is tried again:', error);
    }
    await new Promise((again) => setTimeout(again, Math.random() * Math.min(10_000, 500 * 2 ** failures)));
  }
}

// Numbers that this language would round stay the text that they are: rounded, the keys of two rows would be one.
export const parse = (text) => JSON.parse(text, (name, value, context) =>
  typeof value !== 'number' || !(context?.source.length > 15) || String(value) === context.source ? value : context.source);

// One connection. Messages are handled one after the other; what has begun is finished before the next connection.
function listen(feed, on) {
  return new Promise((done, fail) => {
    let work = Promise.resolve();
    let silence;
    const end = (refusal) => { feed.close(); clearTimeout(silence); work.then(() => done(refusal), fail); };
    const heard = () => { clearTimeout(silence); silence = setTimeout(end, 60_000); }; // no word is no connection
    for (const kind of ['events', 'caught_up', 'progress', 'resync_required']) {
      feed.addEventListener(kind, (message) => {
        heard();
        work = work.then(() => on[kind](parse(message.data), message.lastEventId));
        work.catch(() => end());
      });
    }
    feed.addEventListener('error', (message) => { // the server's last word, or the connection's end without one
      const error = message.data ? parse(message.data) : null;
      const stop = error?.retry === 'never' && error.code !== 'unauthenticated'; // the next ticket may be another key's
      end(stop ? error : null);
    });
    heard();
  });
}
