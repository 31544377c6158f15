//! The statements of the claim, in the order of their steps.

// Bytes of a row of `s` as they are stored: known without reading a value. A text of JSON is at most 255 times as long (lz4), a
// name at most 6 times in JSON.
macro_rules! stored {
    () => {
        "(COALESCE(pg_column_size(s.before_data), 0) + COALESCE(pg_column_size(s.after_data), 0)
            + COALESCE(pg_column_size(s.headers), 0) + COALESCE(pg_column_size(s.row_key), 0)
            + COALESCE(pg_column_size(s.old_key), 0) + COALESCE(octet_length(s.event_type), 0))"
    };
}

// The columns of the log that come from the outbox. `fate` is why an event cannot be carried whole; null for all others. It goes
// into the log without its rows then, with what of its names and keys is short enough, and as it was into dead_letters.
macro_rules! append_rows {
    ($source:literal) => {
        concat!(
            "x AS MATERIALIZED (
                SELECT s.*, CASE
                    WHEN s.omitted IS NOT NULL THEN s.omitted
                    WHEN octet_length(s.table_name) > 1000 OR octet_length(s.operation) > 16
                        THEN 'the name of the table or aggregate is longer than 1000 bytes'
                    WHEN octet_length(s.event_type) > LEAST($2, 100000000)
                        THEN format('the event is larger than %s bytes', $2)
                    WHEN ", stored!(), " > $2 / 256 AND CASE WHEN ", stored!(), " > $2 THEN true
                        ELSE COALESCE(octet_length(s.before_data::text), 0) + COALESCE(octet_length(s.after_data::text), 0)
                            + COALESCE(octet_length(s.headers::text), 0) + COALESCE(octet_length(s.row_key::text), 0)
                            + COALESCE(octet_length(s.old_key::text), 0)
                            + COALESCE(octet_length(to_json(s.event_type)::text), 0) > $2 END
                        THEN format('the event is larger than %s bytes', $2)
                    WHEN (SELECT getdatabaseencoding() <> 'UTF8') THEN
                        (SELECT CASE WHEN bytes IS NULL THEN 'a text of the event has no form in UTF-8'
                                     WHEN bytes > $2 THEN format('the event is larger than %s bytes', $2) END
                         FROM tidewire.utf8_bytes(concat_ws(' ', s.table_name, s.operation, s.before_data, s.after_data,
                             s.headers, s.row_key, s.old_key, s.event_type)) AS bytes)
                    END AS fate
                FROM ", $source, " s),
            dead AS (
                INSERT INTO tidewire.dead_letters (seq, reader, error, rows, table_name, operation, event_id, event_type,
                    row_key, old_key, before_data, after_data, headers)
                SELECT $1 + rn, 'relay', fate,
                       CASE WHEN ", stored!(), " <= 1048576 THEN json_build_object(
                           'event_id', event_id, 'key', row_key, 'before', before_data, 'after', after_data) END,
                       table_name, operation, event_id, event_type, row_key, old_key, before_data, after_data, headers
                FROM x s
                WHERE fate IS NOT NULL
                RETURNING 1),
            ins AS (
                INSERT INTO tidewire.event_log (seq, xid, tx_end, omitted, event_id, table_name, operation, key_hash,
                    row_key, old_key, before_data, after_data, event_type, headers, created_at, relayed_at)
                SELECT $1 + rn, xid, tx_end, fate IS NOT NULL, event_id,
                       CASE WHEN fate IS NULL THEN table_name ELSE tidewire.shown_name(table_name) END,
                       CASE WHEN fate IS NULL THEN operation ELSE COALESCE(tidewire.short_text(operation, 16), 'UPDATE') END,
                       CASE WHEN fate IS NULL THEN hashtextextended(row_key::text, 0) END,
                       CASE WHEN fate IS NULL THEN row_key ELSE tidewire.short_json(row_key, $2 / 4) END,
                       CASE WHEN fate IS NULL THEN old_key ELSE tidewire.short_json(old_key, $2 / 4) END,
                       CASE WHEN fate IS NULL THEN before_data END, CASE WHEN fate IS NULL THEN after_data END,
                       CASE WHEN fate IS NULL THEN event_type ELSE tidewire.short_text(event_type, $2 / 8) END,
                       CASE WHEN fate IS NULL THEN headers END, created_at, clock_timestamp()
                FROM x
                ORDER BY rn
                RETURNING *)"
        )
    };
}

// What goes back to the leader: the appended rows, and one row (seq NULL) that says how the claim went.
macro_rules! answer {
    ($meta:literal) => {
        concat!(
            "SELECT seq, xid::text::bigint, tx_end, omitted, event_id, table_name, operation, row_key, old_key,
                    before_data, after_data, event_type, headers, created_at, NULL::json AS meta
             FROM ins
             UNION ALL
             SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, ",
            $meta
        )
    };
}

// $1 newest seq, $2 event bytes, $3 batch (as in every statement here); $4 low, $5 window, $6 unseen xids, $7 newest xid.
//
// `id + 0 <= $4`: without the `+ 0` a generic plan walks the id index over every dead row.
// A transaction that was left out before is looked at again only once its last row is inside the window; then at most
// one row more than a batch is read of it, and its highest id is one index probe.
/// The claim's text, for `EXPLAIN`. Reads and writes: run it through [`claim`] only.
pub const CLAIM: &str = concat!(
    "WITH w AS MATERIALIZED (
        SELECT ctid AS t, xid, id FROM tidewire.outbox WHERE id > $4 ORDER BY id LIMIT $5),
    lim AS MATERIALIZED (SELECT count(*) = $5 AS full_window, max(id) AS last FROM w),
    back AS MATERIALIZED (
        SELECT u.x,
               (SELECT full_window FROM lim)
               AND EXISTS (SELECT FROM tidewire.outbox o WHERE o.xid = u.x AND o.id > (SELECT last FROM lim)) AS skipped
        FROM unnest($6::text[]::xid8[]) AS u(x)
        WHERE pg_visible_in_snapshot(u.x, pg_current_snapshot())),
    c AS MATERIALIZED (
        SELECT t, xid, id FROM w
        UNION ALL
        SELECT r.t, r.xid, r.id
        FROM back
        CROSS JOIN LATERAL (
            SELECT o.ctid AS t, o.xid, o.id FROM tidewire.outbox o
            WHERE o.xid = back.x AND o.id + 0 <= $4 ORDER BY o.xid, o.id LIMIT $3 + 1) r
        WHERE NOT back.skipped
        UNION ALL
        SELECT ctid, xid, id FROM tidewire.outbox WHERE xid >= $7::text::xid8 AND id + 0 <= $4),
    t AS MATERIALIZED (
        SELECT xid, count(*) AS k,
               CASE WHEN count(*) > $3 THEN (SELECT max(o.id) FROM tidewire.outbox o WHERE o.xid = c.xid)
                    ELSE max(id) END AS m
        FROM c GROUP BY xid),
    ok AS MATERIALIZED (
        SELECT xid, m, k, sum(k) OVER (ORDER BY m) AS cum
        FROM t
        WHERE NOT ((SELECT full_window FROM lim)
            AND EXISTS (SELECT FROM tidewire.outbox o WHERE o.xid = t.xid AND o.id > (SELECT last FROM lim)))),
    take AS MATERIALIZED (SELECT xid, m, k FROM ok WHERE cum <= $3),
    pick AS MATERIALIZED (SELECT c.t, c.xid, take.m FROM c JOIN take USING (xid)),
    held AS MATERIALIZED (
        SELECT o.ctid AS t, o.xid FROM tidewire.outbox o
        WHERE o.ctid = ANY (ARRAY(SELECT t FROM pick)) FOR UPDATE SKIP LOCKED),
    bar AS MATERIALIZED (
        SELECT CASE WHEN (SELECT count(*) FROM held) < (SELECT count(*) FROM pick)
                    THEN (SELECT min(take.m) FROM take LEFT JOIN (SELECT xid, count(*) AS k FROM held GROUP BY xid) h
                              ON h.xid = take.xid
                          WHERE COALESCE(h.k, 0) < take.k) END AS m),
    d AS (
        DELETE FROM tidewire.outbox
        WHERE ctid = ANY (ARRAY(SELECT p.t FROM pick p WHERE (SELECT m FROM bar) IS NULL OR p.m < (SELECT m FROM bar)))
        RETURNING *),
    o AS (
        SELECT d.*, row_number() OVER v AS rn, lead(d.xid) OVER v IS DISTINCT FROM d.xid AS tx_end
        FROM d JOIN take USING (xid)
        WINDOW v AS (ORDER BY take.m, d.id)),
    ",
    append_rows!("o"),
    answer!(
        " json_build_object(
            'full', (SELECT full_window FROM lim), 'last', (SELECT last FROM lim),
            'candidates', (SELECT count(*) FROM c), 'ok', (SELECT count(*) FROM ok), 'take', (SELECT count(*) FROM take),
            'first', (SELECT xid::text FROM ok ORDER BY m LIMIT 1), 'torn', (SELECT m IS NOT NULL FROM bar),
            'left_out', (SELECT COALESCE(json_agg(xid::text), '[]') FROM t WHERE xid NOT IN (SELECT xid FROM ok)),
            'skipped', (SELECT COALESCE(json_agg(x::text), '[]') FROM back WHERE skipped),
            'snapshot', pg_current_snapshot()::text, 'sequence', (SELECT last_value FROM tidewire.outbox_id_seq),
            'poison', (SELECT count(*) FROM dead),
            'lag_ms', (SELECT extract(epoch FROM max(relayed_at - created_at)) * 1000 FROM ins))"
    )
);

// $4 xid: the next part of one large transaction. All of it is committed, so
// its rows do not change; nothing else is relayed in between.
pub(super) const PART: &str = concat!(
    "WITH p AS MATERIALIZED (
        SELECT ctid AS t, id FROM tidewire.outbox WHERE xid = $4::text::xid8 ORDER BY xid, id LIMIT $3 + 1),
    pick AS MATERIALIZED (SELECT t FROM p ORDER BY id LIMIT $3),
    held AS MATERIALIZED (
        SELECT o.ctid AS t FROM tidewire.outbox o
        WHERE o.ctid = ANY (ARRAY(SELECT t FROM pick)) FOR UPDATE SKIP LOCKED),
    bar AS MATERIALIZED (SELECT (SELECT count(*) FROM held) < (SELECT count(*) FROM pick) AS torn),
    d AS (
        DELETE FROM tidewire.outbox
        WHERE ctid = ANY (ARRAY(SELECT t FROM held WHERE NOT (SELECT torn FROM bar))) RETURNING *),
    o AS (
        SELECT d.*, row_number() OVER (ORDER BY d.id) AS rn,
               row_number() OVER (ORDER BY d.id) = (SELECT count(*) FROM p) AS tx_end
        FROM d),
    ",
    append_rows!("o"),
    answer!(
        " json_build_object('torn', (SELECT torn FROM bar), 'rows', (SELECT count(*) FROM p),
            'poison', (SELECT count(*) FROM dead),
            'lag_ms', (SELECT extract(epoch FROM max(relayed_at - created_at)) * 1000 FROM ins))"
    )
);

// $1 newest seq, $2 why, $3 xid, $4 what of the row can be read (2 all, 1 its names, 0 nothing): the next row of one
// transaction, sent without its content.
pub(super) const SET_ASIDE: &str = concat!(
    "WITH p AS MATERIALIZED (
        SELECT ctid AS t, id FROM tidewire.outbox WHERE xid = $3::text::xid8 ORDER BY xid, id LIMIT 2),
    held AS MATERIALIZED (
        SELECT o.ctid AS t FROM tidewire.outbox o
        WHERE o.ctid = ANY (ARRAY(SELECT t FROM p ORDER BY id LIMIT 1)) FOR UPDATE SKIP LOCKED),
    d AS (DELETE FROM tidewire.outbox WHERE ctid = ANY (ARRAY(SELECT t FROM held)) RETURNING *),
    dead AS (
        INSERT INTO tidewire.dead_letters (seq, reader, error, table_name, operation, event_id, event_type, row_key, old_key,
            before_data, after_data, headers)
        SELECT $1 + 1, 'relay', $2, CASE WHEN $4 > 0 THEN table_name END, CASE WHEN $4 > 0 THEN operation END, event_id,
               CASE WHEN $4 > 1 THEN event_type END, CASE WHEN $4 > 1 THEN row_key END, CASE WHEN $4 > 1 THEN old_key END,
               CASE WHEN $4 > 1 THEN before_data END, CASE WHEN $4 > 1 THEN after_data END, CASE WHEN $4 > 1 THEN headers END
        FROM d
        RETURNING 1),
    ins AS (
        INSERT INTO tidewire.event_log (seq, xid, tx_end, omitted, event_id, table_name, operation, created_at, relayed_at)
        SELECT $1 + 1, xid, (SELECT count(*) FROM p) < 2, true, event_id,
               CASE WHEN $4 > 0 THEN tidewire.shown_name(table_name) ELSE 'unknown' END,
               COALESCE(CASE WHEN $4 > 0 THEN tidewire.short_text(operation, 16) END, 'UPDATE'), created_at, clock_timestamp()
        FROM d
        RETURNING *)
    ",
    answer!(
        " json_build_object('torn', NOT EXISTS (SELECT FROM d) AND EXISTS (SELECT FROM p), 'rows', (SELECT count(*) FROM p),
            'poison', (SELECT count(*) FROM dead),
            'lag_ms', (SELECT extract(epoch FROM max(relayed_at - created_at)) * 1000 FROM ins))"
    )
);
