-- What a second reading of capture and tracking found.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- The uppermost table of a partition's family. pg_partition_root() ends at one that is being detached concurrently, whose rows
-- are its parent's until the end of that.
CREATE FUNCTION tidewire.root_of(relation oid) RETURNS oid LANGUAGE plpgsql STABLE AS $$
DECLARE
    parent oid;
BEGIN
    LOOP
        parent := (SELECT inhparent FROM pg_inherits WHERE inhrelid = relation ORDER BY inhseqno LIMIT 1);
        IF parent IS NULL THEN
            RETURN relation;
        END IF;
        relation := parent;
    END LOOP;
END $$;

-- Whether that is the table that was tracked. What was detached keeps the triggers that were put on it alone, and says nothing of
-- that table any more: it is not partitioned, or, where it is, has no trigger for TRUNCATE, which stands on the tracked table and
-- on leaves.
CREATE FUNCTION tidewire.is_tracked_root(relation oid, options jsonb) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (
        SELECT relkind = 'p' AND (oid = (options ->> 'relid')::oid
            OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = relation AND tgname = '!tidewire_truncate'))
        FROM pg_class WHERE oid = relation);
END $$;

CREATE OR REPLACE FUNCTION tidewire.capture() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET TimeZone = 'UTC' SET DateStyle = 'ISO' SET IntervalStyle = 'iso_8601' SET bytea_output = 'hex' SET extra_float_digits = 1
    AS $$
DECLARE
    relation  oid := TG_RELID;
    name      text := TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME;
    before    json;
    after     json;
    value     text;
    key       json;
    key_was   json;
    names     text[];
    keep      boolean;
    listed    text[];
    short_old record;
    short_new record;
    context   json;
BEGIN
    IF strpos(TG_ARGV[0], 'p') > 0 THEN
        relation := pg_partition_root(TG_RELID);
        IF (SELECT relispartition FROM pg_class WHERE oid = relation) THEN
            relation := tidewire.root_of(relation);
        END IF;
        -- With this search_path always qualified, and quoted if anything needs it.
        name := relation::regclass::text;
    END IF;
    IF length(translate(name, '."*: ', '')) <> length(name) - 1 THEN
        name := tidewire.table_text(relation);
    END IF;

    keep := CASE WHEN strpos(TG_ARGV[0], 'i') > 0 THEN true WHEN strpos(TG_ARGV[0], 'x') > 0 THEN false END;
    IF keep IS NOT NULL THEN
        listed := TG_ARGV[3];
        short_old := OLD;
        short_new := NEW;
        IF NOT tidewire.still_named(relation, TG_ARGV[2]::int2[], listed) THEN
            listed := tidewire.column_names(relation, tidewire.options_of(TG_ARGV[1]), CASE WHEN keep THEN 'columns' ELSE 'except_columns' END);
        ELSE
            IF TG_OP <> 'INSERT' THEN
                short_old := json_populate_record(OLD, TG_ARGV[4]::json);
            END IF;
            IF TG_OP <> 'DELETE' THEN
                short_new := json_populate_record(NEW, TG_ARGV[4]::json);
            END IF;
        END IF;
        IF TG_OP = 'UPDATE' AND short_old *= short_new AND OLD *= NEW THEN
            RETURN NULL;
        END IF;
        IF TG_OP <> 'INSERT' THEN
            before := to_json(short_old);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            after := to_json(short_new);
        END IF;
    ELSE
        IF TG_OP <> 'INSERT' THEN
            before := to_json(OLD);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            after := to_json(NEW);
        END IF;
    END IF;

    IF TG_NARGS > 5 THEN
        value := coalesce(after, before) -> TG_ARGV[5];
        IF TG_NARGS = 6 AND value IS NOT NULL THEN
            key := concat('{', to_json(TG_ARGV[5]), ':', value, '}');
            IF TG_OP = 'UPDATE' AND value <> (before -> TG_ARGV[5])::text THEN
                key_was := concat('{', to_json(TG_ARGV[5]), ':', before -> TG_ARGV[5], '}');
            END IF;
        ELSE
            names := TG_ARGV[5:];
            key := tidewire.key_of(coalesce(after, before), names);
            IF key IS NULL THEN
                -- A key column was renamed.
                names := tidewire.column_names(relation, tidewire.options_of(TG_ARGV[1]), 'key');
                key := tidewire.key_of(coalesce(after, before), names);
            END IF;
            IF TG_OP = 'UPDATE' THEN
                key_was := tidewire.key_of(before, names);
                IF key_was::text = key::text THEN
                    key_was := NULL;
                END IF;
            END IF;
        END IF;
    END IF;

    IF strpos(TG_ARGV[0], 'b') = 0 THEN
        before := NULL;
    END IF;
    IF keep IS NOT NULL THEN
        IF before IS NOT NULL THEN
            before := tidewire.picked(before, listed, keep);
        END IF;
        IF after IS NOT NULL THEN
            after := tidewire.picked(after, listed, keep);
        END IF;
    END IF;
    IF current_setting('tidewire.traceparent', true) <> '' OR current_setting('tidewire.headers', true) <> '' THEN
        context := tidewire.context_headers(NULL);
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
    VALUES (name, TG_OP, key, key_was, before, after, context);
    RETURN NULL;
END $$;

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
    IF strpos(TG_ARGV[0], 'p') > 0 THEN
        relation := tidewire.root_of(TG_RELID);
        IF tidewire.is_tracked_root(relation, options) IS NOT TRUE THEN
            RETURN NULL;
        END IF;
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
    relation oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    name     text;
    -- Whoever writes sets the context, and may not say this.
    context  jsonb := tidewire.context_headers(NULL)::jsonb - 'tidewire.partition';
BEGIN
    IF strpos(TG_ARGV[0], 'p') > 0 THEN
        relation := tidewire.root_of(TG_RELID);
        IF tidewire.is_tracked_root(relation, tidewire.options_of(TG_ARGV[1])) IS NOT TRUE THEN
            RETURN NULL;
        END IF;
    END IF;
    name := tidewire.table_text(relation);
    IF relation <> TG_RELID THEN
        IF (SELECT operation = 'TRUNCATE' AND headers -> 'tidewire.partition' IS NULL
            FROM tidewire.outbox
            WHERE xid = pg_current_xact_id() AND table_name = name
            ORDER BY id DESC LIMIT 1) THEN
            RETURN NULL;
        END IF;
        context := coalesce(context, '{}') || jsonb_build_object('tidewire.partition', tidewire.table_text(TG_RELID));
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, headers) VALUES (name, 'TRUNCATE', nullif(context, '{}')::json);
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
    WHERE tgrelid = relation AND tgparentid = 0 AND tgname LIKE '!tidewire%' AND length(tgargs) <= 1 << 20
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
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
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
        SELECT tgrelid AS relation,
               bool_or(strpos(split_part(encode(substring(tgargs FOR 16), 'escape'), '\000', 1), 'p') > 0)
               AND NOT (relkind = 'p' AND bool_or(tgname = '!tidewire_truncate')) AS detached
        FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid
        WHERE tgparentid = 0 AND tgname LIKE '!tidewire%' AND NOT relispartition
            AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                           'tidewire.capture_truncate()'::regprocedure)
            AND tgrelid NOT IN (SELECT t.relid FROM tidewire.tracked_tables t)
        GROUP BY tgrelid, relkind
        ORDER BY tgrelid
    LOOP
        IF r.detached IS NOT TRUE THEN
            PERFORM tidewire.sync_tracked(r.relation);
            CONTINUE;
        END IF;
        BEGIN
            PERFORM tidewire.install_triggers(r.relation, NULL);
        EXCEPTION WHEN OTHERS THEN
            -- They say nothing any more; the next look tries again. One table must not end the look at all others.
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
                EXCEPTION WHEN OTHERS THEN
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

REVOKE ALL ON FUNCTION tidewire.root_of(oid), tidewire.is_tracked_root(oid, jsonb) FROM PUBLIC;

-- TRUNCATE renders no row and calls no cast, so it may read the outbox: with the rights of whoever owns all.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION tidewire.capture_truncate() OWNER TO %I', current_user);
END $$;

RESET ROLE;

-- Whatever a cast to json of a user's type does, it does with capture's rights. It could write xids that no relay can read, or
-- read what others had put into headers.
DO $$
DECLARE
    owner name := (SELECT pg_catalog.pg_get_userbyid(relowner) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass);
BEGIN
    IF (SELECT pg_catalog.pg_get_userbyid(proowner) = owner FROM pg_catalog.pg_proc WHERE oid = 'tidewire.capture()'::regprocedure) THEN
        RETURN;
    END IF;
    PERFORM set_config('role', owner, true);
    REVOKE ALL ON tidewire.outbox FROM tidewire_capture;
    GRANT INSERT (table_name, operation, row_key, old_key, before_data, after_data, headers) ON tidewire.outbox TO tidewire_capture;
    GRANT EXECUTE ON FUNCTION tidewire.root_of(oid), tidewire.is_tracked_root(oid, jsonb) TO tidewire_capture;
END $$;

RESET ROLE;
