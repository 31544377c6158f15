-- What the change of a row in tracked_tables says to others.
--
-- A row goes when its table is untracked, or when the table is gone; then its subscribers must hear of it before anything
-- of a later table of that name. Whoever notices first deletes the row (the leader, or track() of the new table), and the
-- event comes with the deletion: exactly once, and in order.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

CREATE FUNCTION tidewire.tracked_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' AND NOT EXISTS (SELECT FROM pg_class WHERE oid = OLD.relid) THEN
        INSERT INTO tidewire.outbox (table_name, operation, after_data)
        VALUES (coalesce(OLD.fingerprint ->> 'name', OLD.table_name), 'SCHEMA', jsonb_build_object(
            'changes', '[{"kind": "drop_table"}]'::jsonb, 'columns', '[]'::jsonb, 'relid', OLD.relid::bigint)::json);
    END IF;
    -- Every node keeps the tracked tables in mind.
    IF tidewire.wake_mode() = 'notify' THEN
        PERFORM pg_notify('tidewire_schema', '');
    END IF;
    RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION tidewire.tracked_changed() FROM PUBLIC;

-- Not of `fingerprint`: that is the leader's own note.
CREATE TRIGGER changed AFTER INSERT OR DELETE
    OR UPDATE OF table_name, key_columns, columns, except_columns, before_image, notify, bulk, deferred, replica
    ON tidewire.tracked_tables FOR EACH ROW EXECUTE FUNCTION tidewire.tracked_changed();

RESET ROLE;
