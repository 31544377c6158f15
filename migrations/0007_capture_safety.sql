-- What a reading of capture and tracking found.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- Of a table without a key: null. Bulk capture asks that too, and made every write of such a table fail.
CREATE OR REPLACE FUNCTION tidewire.key_of(image json, names text[]) RETURNS json LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    composed text;
    name     text;
    value    text;
BEGIN
    IF names IS NULL THEN
        RETURN NULL;
    END IF;
    FOREACH name IN ARRAY names LOOP
        value := image -> name;
        IF value IS NULL THEN
            RETURN NULL;
        END IF;
        composed := concat(composed, CASE WHEN composed IS NULL THEN '{' ELSE ',' END, to_json(name), ':', value);
    END LOOP;
    RETURN concat(composed, '}');
END $$;

-- A partition that is detached keeps the triggers that were put on it alone. They sent its changes under its own name, past
-- whatever the table's keys may see.
CREATE OR REPLACE FUNCTION tidewire.capture_bulk() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET TimeZone = 'UTC' SET DateStyle = 'ISO' SET IntervalStyle = 'iso_8601' SET bytea_output = 'hex' SET extra_float_digits = 1
    AS $$
DECLARE
    relation  oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    options   jsonb := tidewire.options_of(TG_ARGV[1]);
    keeps     boolean := strpos(TG_ARGV[0], 'b') > 0;
    name      text;
    names     text[];
    keep      boolean;
    listed    text[];
    nulls     json := '{}';
    context   json;
BEGIN
    -- A partition that was detached: what it kept says nothing of the table any more.
    IF strpos(TG_ARGV[0], 'p') > 0 AND pg_partition_root(TG_RELID) IS NULL THEN
        RETURN NULL;
    END IF;
    -- Statements that changed nothing fire too.
    IF TG_OP = 'DELETE' THEN
        IF NOT EXISTS (SELECT FROM old_rows) THEN
            RETURN NULL;
        END IF;
    ELSIF NOT EXISTS (SELECT FROM new_rows) THEN
        RETURN NULL;
    END IF;
    name := tidewire.table_text(relation);
    names := tidewire.column_names(relation, options, 'key');
    IF current_setting('tidewire.traceparent', true) <> '' OR current_setting('tidewire.headers', true) <> '' THEN
        context := tidewire.context_headers(NULL);
    END IF;
    keep := CASE WHEN strpos(TG_ARGV[0], 'i') > 0 THEN true WHEN strpos(TG_ARGV[0], 'x') > 0 THEN false END;
    IF keep IS NOT NULL THEN
        listed := tidewire.column_names(relation, options, CASE WHEN keep THEN 'columns' ELSE 'except_columns' END);
        IF tidewire.still_named(relation, TG_ARGV[2]::int2[], TG_ARGV[3]::text[]) THEN
            nulls := TG_ARGV[4];
        END IF;
    END IF;

    IF TG_OP = 'INSERT' THEN
        INSERT INTO tidewire.outbox (table_name, operation, row_key, after_data, headers)
        SELECT name, TG_OP, tidewire.key_of(image, names),
               CASE WHEN keep IS NULL THEN image ELSE tidewire.picked(image, listed, keep) END, context
        FROM (SELECT CASE WHEN keep IS NULL THEN to_json(n) ELSE to_json(json_populate_record(n, nulls)) END AS image
              FROM new_rows n OFFSET 0) AS t;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO tidewire.outbox (table_name, operation, row_key, before_data, headers)
        SELECT name, TG_OP, tidewire.key_of(image, names),
               CASE WHEN keeps THEN CASE WHEN keep IS NULL THEN image ELSE tidewire.picked(image, listed, keep) END END, context
        FROM (SELECT CASE WHEN keep IS NULL THEN to_json(o) ELSE to_json(json_populate_record(o, nulls)) END AS image
              FROM old_rows o OFFSET 0) AS t;
    ELSE
        INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
        SELECT name, TG_OP, key, CASE WHEN key_was::text <> key::text THEN key_was END,
               CASE WHEN keeps THEN CASE WHEN keep IS NULL THEN before ELSE tidewire.picked(before, listed, keep) END END,
               CASE WHEN keep IS NULL THEN after ELSE tidewire.picked(after, listed, keep) END, context
        FROM (
            SELECT position, before, after, tidewire.key_of(before, names) AS key_was, tidewire.key_of(after, names) AS key
            FROM (
                SELECT position,
                       CASE WHEN keep IS NULL THEN to_json(old_row) ELSE to_json(json_populate_record(old_row, nulls)) END AS before,
                       CASE WHEN keep IS NULL THEN to_json(new_row) ELSE to_json(json_populate_record(new_row, nulls)) END AS after
                FROM (SELECT row_number() OVER () AS position, o AS old_row FROM old_rows o) AS olds
                JOIN (SELECT row_number() OVER () AS position, n AS new_row FROM new_rows n) AS news USING (position)
                WHERE old_row *<> new_row
                OFFSET 0) AS images
            OFFSET 0) AS keyed
        ORDER BY position;
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION tidewire.capture_truncate() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    root    oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    name    text := tidewire.table_text(root);
    context json := tidewire.context_headers(NULL);
BEGIN
    IF strpos(TG_ARGV[0], 'p') > 0 AND pg_partition_root(TG_RELID) IS NULL THEN
        RETURN NULL;
    END IF;
    IF root <> TG_RELID THEN
        IF (SELECT operation = 'TRUNCATE' AND headers -> 'tidewire.partition' IS NULL
            FROM tidewire.outbox
            WHERE xid = pg_current_xact_id() AND table_name = name
            ORDER BY id DESC LIMIT 1) THEN
            RETURN NULL;
        END IF;
        context := coalesce(context::jsonb, '{}') || jsonb_build_object('tidewire.partition', tidewire.table_text(TG_RELID));
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, headers) VALUES (name, 'TRUNCATE', context);
    RETURN NULL;
END $$;

-- The options that the triggers of a table carry; null if it is not tracked. Whoever owns a table can put our functions on it
-- with arguments of their own: what is no options is not tracked, and stops no look at other tables.
CREATE OR REPLACE FUNCTION tidewire.tracked_options(relation oid) RETURNS jsonb LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    o jsonb;
BEGIN
    SELECT tidewire.options_of(split_part(encode(tgargs, 'escape'), '\000', 2)) INTO o
    FROM pg_trigger
    WHERE tgrelid = relation AND tgparentid = 0 AND tgname LIKE '!tidewire%'
        AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                       'tidewire.capture_truncate()'::regprocedure)
    ORDER BY tgname LIMIT 1;
    RETURN CASE WHEN jsonb_typeof(o) = 'object' AND (o ->> 'relid')::oid IS NOT NULL
        AND (SELECT bool_and(jsonb_typeof(o -> name) IS NOT DISTINCT FROM 'boolean')
             FROM unnest('{before_image,notify,bulk,deferred,replica}'::text[]) name)
        AND coalesce(jsonb_typeof(o -> 'primary'), 'boolean') = 'boolean'
        AND NOT EXISTS (
            SELECT FROM unnest('{key,columns,except_columns}'::text[]) list,
                jsonb_array_elements(coalesce(o -> list, '[]')) item
            WHERE jsonb_typeof(item -> 'name') IS DISTINCT FROM 'string' OR (item ->> 'attnum')::int2 IS NULL)
        THEN o END;
-- Whatever does not fit, one way or the other.
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION tidewire.refresh_tracked(OUT relid oid, OUT table_name text, OUT problem text, OUT detail text)
    RETURNS SETOF record LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    r record;
    f record;
BEGIN
    -- Tables that bear our triggers and are not known: restored from a dump, where everything has another OID; or detached from
    -- a table that is tracked. What those kept is taken away: nobody tracked them, and with it they cannot be attached again.
    FOR r IN
        SELECT tgrelid AS relation, relkind = 'r' AND strpos(split_part(encode(tgargs, 'escape'), '\000', 1), 'p') > 0 AS detached
        FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid
        WHERE tgname = '!tidewire_truncate' AND tgfoid = 'tidewire.capture_truncate()'::regprocedure
            AND NOT relispartition AND tgrelid NOT IN (SELECT t.relid FROM tidewire.tracked_tables t)
    LOOP
        IF NOT r.detached THEN
            PERFORM tidewire.sync_tracked(r.relation);
            CONTINUE;
        END IF;
        BEGIN
            PERFORM tidewire.install_triggers(r.relation, NULL);
        EXCEPTION WHEN lock_not_available OR insufficient_privilege OR deadlock_detected THEN
            -- They say nothing any more; the next look tries again.
            RAISE DEBUG 'tidewire: %', SQLERRM;
        END;
    END LOOP;
    FOR r IN
        SELECT t.relid AS relation, t.table_name AS known_as, c.oid AS present, c.relispartition AS attached, o.options,
               CASE WHEN o.options IS NOT NULL THEN tidewire.current_options(c.oid, o.options) END AS wanted
        FROM tidewire.tracked_tables t
        LEFT JOIN pg_class c ON c.oid = t.relid
        LEFT JOIN LATERAL (SELECT tidewire.tracked_options(c.oid) AS options) AS o ON true
    LOOP
        relid := r.relation;
        table_name := coalesce(tidewire.table_text(r.present), r.known_as);
        detail := NULL;
        IF r.present IS NULL THEN
            problem := 'dropped';
            RETURN NEXT;
            CONTINUE;
        ELSIF r.options IS NULL THEN
            problem := 'trigger_missing';
            detail := 'all';
            RETURN NEXT;
            CONTINUE;
        ELSIF r.attached THEN
            problem := 'attached';
            detail := tidewire.table_text(pg_partition_root(r.present));
            RETURN NEXT;
        END IF;
        FOR f IN SELECT * FROM tidewire.trigger_faults(r.present, r.wanted) LOOP
            IF f.fault = 'different' OR (f.fault = 'missing' AND f.target <> r.present) THEN
                BEGIN
                    PERFORM tidewire.install_triggers(r.present, r.wanted);
                    EXIT;
                EXCEPTION WHEN lock_not_available OR insufficient_privilege OR deadlock_detected THEN
                    problem := CASE f.fault WHEN 'missing' THEN 'partition_trigger_missing' ELSE 'trigger_outdated' END;
                    detail := format('%s on %s: %s', f.name, tidewire.table_text(f.target), SQLERRM);
                    RETURN NEXT;
                    EXIT;
                END;
            ELSE
                problem := CASE f.fault WHEN 'missing' THEN 'trigger_missing' ELSE 'trigger_disabled' END;
                detail := format('%s on %s', f.name, tidewire.table_text(f.target));
                RETURN NEXT;
            END IF;
        END LOOP;
        -- Row triggers reach partitions as clones, which can be disabled one by one.
        FOR f IN
            SELECT tgname, tgrelid FROM pg_trigger
            WHERE tgparentid <> 0 AND tgfoid = 'tidewire.capture()'::regprocedure
                AND tgenabled <> CASE WHEN (r.wanted ->> 'replica')::boolean THEN 'A' ELSE 'O' END
                AND tgrelid IN (SELECT p.relid FROM pg_partition_tree(r.present) p)
        LOOP
            problem := 'trigger_disabled';
            detail := format('%s on %s', f.tgname, tidewire.table_text(f.tgrelid));
            RETURN NEXT;
        END LOOP;
        PERFORM tidewire.sync_tracked(r.present);
    END LOOP;
END $$;

RESET ROLE;

-- Capture runs with the rights of its functions' owner, and to render a row as JSON calls the casts to json of its columns'
-- types, which whoever owns the table may have defined. So that owner may write into the outbox, and nothing else.
DO $$
DECLARE
    owner name := (SELECT pg_catalog.pg_get_userbyid(relowner) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass);
BEGIN
    -- Another database's migration may do the same at the same moment: roles are global.
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'tidewire_capture') THEN
            CREATE ROLE tidewire_capture NOLOGIN;
        END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
    END;
    -- Later migrations replace these functions as the owner of everything else.
    BEGIN
        IF NOT pg_has_role(owner, 'tidewire_capture', 'USAGE') THEN
            EXECUTE format('GRANT tidewire_capture TO %I', owner);
        END IF;
    EXCEPTION WHEN unique_violation OR internal_error THEN NULL;
    END;
    GRANT USAGE, CREATE ON SCHEMA tidewire TO tidewire_capture;
    GRANT INSERT, SELECT (id, xid, table_name, operation, headers) ON tidewire.outbox TO tidewire_capture;
    GRANT EXECUTE ON FUNCTION tidewire.name_text(text), tidewire.table_text(oid), tidewire.key_of(json, text[]),
        tidewire.column_names(oid, jsonb, text), tidewire.options_of(text), tidewire.picked(json, text[], boolean),
        tidewire.still_named(oid, int2[], text[]), tidewire.context_headers(json) TO tidewire_capture;
    ALTER FUNCTION tidewire.capture() OWNER TO tidewire_capture;
    ALTER FUNCTION tidewire.capture_bulk() OWNER TO tidewire_capture;
    ALTER FUNCTION tidewire.capture_truncate() OWNER TO tidewire_capture;
    REVOKE CREATE ON SCHEMA tidewire FROM tidewire_capture;
    IF NOT has_schema_privilege('tidewire_capture', 'tidewire', 'USAGE')
        OR NOT has_table_privilege('tidewire_capture', 'tidewire.outbox', 'INSERT')
        OR NOT has_function_privilege('tidewire_capture', 'tidewire.key_of(json, text[])', 'EXECUTE') THEN
        RAISE insufficient_privilege;
    END IF;
EXCEPTION WHEN insufficient_privilege OR undefined_object THEN
    RAISE NOTICE 'tidewire: role % may not give capture a role of its own: whoever may track tables can act as %', current_user, owner
        USING HINT = format('A superuser can run: CREATE ROLE tidewire_capture NOLOGIN; GRANT tidewire_capture TO %I; before the migration.', owner);
END $$;
