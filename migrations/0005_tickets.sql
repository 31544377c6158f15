-- Single-use tickets: hashes only. Worthless after half a minute, and after a crash clients ask for new ones, so not logged.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

CREATE UNLOGGED TABLE tidewire.tickets (
    ticket_hash bytea       PRIMARY KEY,
    key_id      text        NOT NULL,
    expires_at  timestamptz NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
CREATE INDEX tickets_key ON tidewire.tickets (key_id, expires_at);
CREATE INDEX tickets_expiry ON tidewire.tickets (expires_at);
