-- What the relay needs to set aside whatever cannot be carried, so that no content stops it.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- Why capture could not render the row; null for all others. The relay sends such an event without its rows.
ALTER TABLE tidewire.outbox ADD COLUMN IF NOT EXISTS omitted text;
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'tidewire_capture') THEN
        GRANT INSERT (omitted) ON tidewire.outbox TO tidewire_capture;
    END IF;
END $$;

-- The columns of what was set aside, as they were: copied without being read, so that a letter can hold what no JSON can (two
-- images of 600 MB are more than one value may have). `rows` stays for letters that are small enough.
ALTER TABLE tidewire.dead_letters
    ADD COLUMN table_name text, ADD COLUMN operation text, ADD COLUMN event_id uuid, ADD COLUMN event_type text,
    ADD COLUMN row_key json, ADD COLUMN old_key json, ADD COLUMN before_data json, ADD COLUMN after_data json,
    ADD COLUMN headers json;
COMMENT ON TABLE tidewire.dead_letters IS
    'What could not be carried, as it was. Where a text is not in the database''s encoding: SET client_encoding = SQL_ASCII before you look.';

-- Bytes of a text in UTF-8, in which everything leaves the server; null if it has no such form (a byte that is not UTF-8 in a
-- database of SQL_ASCII, a character without equivalent in others). In databases of UTF-8 it is not called for what goes well.
-- Without a SET clause: it is called for each event elsewhere.
CREATE FUNCTION tidewire.utf8_bytes(value text) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN pg_catalog.octet_length(pg_catalog.convert_to(value, 'UTF8'));
EXCEPTION WHEN character_not_in_repertoire OR untranslatable_character THEN
    RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION tidewire.utf8_bytes(text) FROM PUBLIC;

-- A name that can leave the server whatever it is: what is beyond 1,000 bytes is cut off, what is not ASCII where the encoding
-- is not UTF-8 becomes a question mark.
CREATE FUNCTION tidewire.shown_name(name text) RETURNS text LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN octet_length(shown) > 1000 THEN concat(left(shown, 240), '...') ELSE shown END
    FROM (SELECT CASE WHEN octet_length(name) <= 1000 AND tidewire.utf8_bytes(name) IS NOT NULL THEN name
                      WHEN getdatabaseencoding() = 'UTF8' THEN name
                      ELSE regexp_replace(left(name, 1001), '[^ -~]', '?', 'g') END AS shown) AS t
$$;
REVOKE ALL ON FUNCTION tidewire.shown_name(text) FROM PUBLIC;

-- A key or a name of an event that is sent without its rows: null unless it is short and can leave the server.
CREATE FUNCTION tidewire.short_text(value text, most bigint) RETURNS text LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN octet_length(value) <= least(most, 8192)
        AND (getdatabaseencoding() = 'UTF8' OR tidewire.utf8_bytes(value) IS NOT NULL) THEN value END
$$;
CREATE FUNCTION tidewire.short_json(value json, most bigint) RETURNS json LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN pg_column_size(value) <= 8192 AND tidewire.short_text(value::text, most) IS NOT NULL THEN value END
$$;
REVOKE ALL ON FUNCTION tidewire.short_text(text, bigint), tidewire.short_json(json, bigint) FROM PUBLIC;

RESET ROLE;
