-- Capture: what turns a change of a tracked table into a row of the outbox, inside the writer's transaction.
--
-- One generic function for each kind of trigger. They name no column of a user's table (a rename must not break a write),
-- have no EXCEPTION block (each would cost a subtransaction a row), and pin what to_json depends on, so that a value has one
-- text whatever the session's settings. The table's name is never an argument: it is read from the trigger's own relation,
-- so whoever may attach these functions to a table can only speak for that table.
--
-- Arguments of every capture trigger: [0] flags (p partitioned, b before image, l column list), [1] the options of track()
-- as JSON in hex, [2…] the names of the key columns. The triggers, not tidewire.tracked_tables, are the truth.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- The canonical text of a table's name: docs/PROTOCOL.md, "Names of tables".
CREATE FUNCTION tidewire.name_text(part text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN part OPERATOR(pg_catalog.~) '[."*: ]'
        THEN '"' OPERATOR(pg_catalog.||) pg_catalog.replace(part, '"', '""') OPERATOR(pg_catalog.||) '"' ELSE part END
$$;
CREATE FUNCTION tidewire.table_text(relation oid) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT tidewire.name_text(nspname) || '.' || tidewire.name_text(relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE c.oid = relation
$$;
COMMENT ON FUNCTION tidewire.table_text(oid) IS 'The name of a table as events carry it; null if there is none.';

-- The key of a row: those members of its image, in order; null if one is missing. to_json(name) is its quoted form.
CREATE FUNCTION tidewire.key_of(image json, names text[]) RETURNS json LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    AS $$
DECLARE
    composed pg_catalog.text;
    name     pg_catalog.text;
    value    pg_catalog.text;
BEGIN
    FOREACH name IN ARRAY names LOOP
        value := image OPERATOR(pg_catalog.->) name;
        IF value IS NULL THEN
            RETURN NULL;
        END IF;
        composed := pg_catalog.concat(composed, CASE WHEN composed IS NULL THEN '{' ELSE ',' END, pg_catalog.to_json(name), ':', value);
    END LOOP;
    RETURN pg_catalog.concat(composed, '}');
END $$;

-- The columns that an option means now. Options hold attribute numbers, valid for the relation they were taken from, and
-- names for after a dump and restore, which renumbers both.
CREATE FUNCTION tidewire.column_names(relation oid, options jsonb, list text) RETURNS text[] LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT array_agg(coalesce(a.attname::text, item ->> 'name') ORDER BY position)
    FROM jsonb_array_elements(options -> list) WITH ORDINALITY AS t (item, position)
    LEFT JOIN pg_attribute a ON (options ->> 'relid')::oid = relation
        AND attrelid = relation AND attnum = (item ->> 'attnum')::int2 AND NOT attisdropped
$$;

CREATE FUNCTION tidewire.options_of(argument text) RETURNS jsonb LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT convert_from(decode(argument, 'hex'), 'UTF8')::jsonb
$$;

-- Which columns of a table with a column list to leave out, and a JSON object that turns them into nulls before the row is
-- rendered, so that large values are not even read. Domains are left alone there: one may forbid null.
CREATE FUNCTION tidewire.left_out(relation oid, options jsonb, OUT names text[], OUT nulls json) LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(attname::text), '{}'), coalesce(json_object_agg(attname, NULL) FILTER (WHERE typtype <> 'd'), '{}')
    FROM pg_attribute a JOIN pg_type t ON t.oid = atttypid
    WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
        AND attname <> ALL (coalesce(tidewire.column_names(relation, options, 'key'), '{}'))
        AND CASE WHEN options ? 'columns' THEN attname <> ALL (coalesce(tidewire.column_names(relation, options, 'columns'), '{}'))
            ELSE attname = ANY (coalesce(tidewire.column_names(relation, options, 'except_columns'), '{}')) END
$$;

-- An image without some members, in the style of to_json.
CREATE FUNCTION tidewire.without(image json, names text[]) RETURNS json LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT ('{' || coalesce(string_agg(to_json(key) || ':' || value, ',' ORDER BY position), '') || '}')::json
    FROM json_each(image) WITH ORDINALITY AS t (key, value, position)
    WHERE key <> ALL (names)
$$;

-- AFTER … FOR EACH ROW. The UPDATE trigger of a table without a column list has WHEN (OLD.* *<> NEW.*); of one with, the
-- comparison is made here on the shortened rows first: it would read large values that did not change.
CREATE FUNCTION tidewire.capture() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
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
    out_names text[];
    nulls     json;
    short_old record;
    short_new record;
    context   json;
BEGIN
    IF strpos(TG_ARGV[0], 'p') > 0 THEN
        relation := pg_partition_root(TG_RELID);
        -- With this search_path always qualified, and quoted if anything needs it.
        name := relation::regclass::text;
    END IF;
    IF length(translate(name, '."*: ', '')) <> length(name) - 1 THEN
        name := tidewire.table_text(relation);
    END IF;

    IF strpos(TG_ARGV[0], 'l') > 0 THEN
        SELECT l.names, l.nulls INTO out_names, nulls FROM tidewire.left_out(relation, tidewire.options_of(TG_ARGV[1])) l;
        IF TG_OP <> 'INSERT' THEN
            short_old := json_populate_record(OLD, nulls);
            before := to_json(short_old);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            short_new := json_populate_record(NEW, nulls);
            after := to_json(short_new);
        END IF;
        IF TG_OP = 'UPDATE' AND short_old *= short_new AND OLD *= NEW THEN
            RETURN NULL;
        END IF;
    ELSE
        IF TG_OP <> 'INSERT' THEN
            before := to_json(OLD);
        END IF;
        IF TG_OP <> 'DELETE' THEN
            after := to_json(NEW);
        END IF;
    END IF;

    IF TG_NARGS > 2 THEN
        value := coalesce(after, before) -> TG_ARGV[2];
        IF TG_NARGS = 3 AND value IS NOT NULL THEN
            key := concat('{', to_json(TG_ARGV[2]), ':', value, '}');
            IF TG_OP = 'UPDATE' AND value <> (before -> TG_ARGV[2])::text THEN
                key_was := concat('{', to_json(TG_ARGV[2]), ':', before -> TG_ARGV[2], '}');
            END IF;
        ELSE
            names := TG_ARGV[2:];
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

    IF out_names IS NOT NULL THEN
        IF before IS NOT NULL THEN
            before := tidewire.without(before, out_names);
        END IF;
        IF after IS NOT NULL THEN
            after := tidewire.without(after, out_names);
        END IF;
    END IF;
    IF strpos(TG_ARGV[0], 'b') = 0 THEN
        before := NULL;
    END IF;
    IF current_setting('tidewire.traceparent', true) <> '' OR current_setting('tidewire.headers', true) <> '' THEN
        context := tidewire.context_headers(NULL);
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
    VALUES (name, TG_OP, key, key_was, before, after, context);
    RETURN NULL;
END $$;

-- AFTER … FOR EACH STATEMENT with transition tables: about half the cost for statements that change many rows. Old and new
-- rows have no link but their position: both tables are filled together, row by row.
CREATE FUNCTION tidewire.capture_bulk() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET TimeZone = 'UTC' SET DateStyle = 'ISO' SET IntervalStyle = 'iso_8601' SET bytea_output = 'hex' SET extra_float_digits = 1
    AS $$
DECLARE
    relation  oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    options   jsonb := tidewire.options_of(TG_ARGV[1]);
    keeps     boolean := strpos(TG_ARGV[0], 'b') > 0;
    name      text;
    names     text[];
    out_names text[];
    nulls     json := '{}';
    context   json;
BEGIN
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
    context := tidewire.context_headers(NULL);
    IF strpos(TG_ARGV[0], 'l') > 0 THEN
        SELECT l.names, l.nulls INTO out_names, nulls FROM tidewire.left_out(relation, options) l;
    END IF;

    IF TG_OP = 'INSERT' THEN
        INSERT INTO tidewire.outbox (table_name, operation, row_key, after_data, headers)
        SELECT name, TG_OP, tidewire.key_of(image, names),
               CASE WHEN out_names IS NULL THEN image ELSE tidewire.without(image, out_names) END, context
        FROM (SELECT CASE WHEN out_names IS NULL THEN to_json(n) ELSE to_json(json_populate_record(n, nulls)) END AS image
              FROM new_rows n OFFSET 0) AS t;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO tidewire.outbox (table_name, operation, row_key, before_data, headers)
        SELECT name, TG_OP, tidewire.key_of(image, names),
               CASE WHEN keeps THEN CASE WHEN out_names IS NULL THEN image ELSE tidewire.without(image, out_names) END END, context
        FROM (SELECT CASE WHEN out_names IS NULL THEN to_json(o) ELSE to_json(json_populate_record(o, nulls)) END AS image
              FROM old_rows o OFFSET 0) AS t;
    ELSE
        INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
        SELECT name, TG_OP, key, CASE WHEN key_was::text <> key::text THEN key_was END,
               CASE WHEN keeps THEN CASE WHEN out_names IS NULL THEN before ELSE tidewire.without(before, out_names) END END,
               CASE WHEN out_names IS NULL THEN after ELSE tidewire.without(after, out_names) END, context
        FROM (
            SELECT position, before, after, tidewire.key_of(before, names) AS key_was, tidewire.key_of(after, names) AS key
            FROM (
                SELECT position,
                       CASE WHEN out_names IS NULL THEN to_json(old_row) ELSE to_json(json_populate_record(old_row, nulls)) END AS before,
                       CASE WHEN out_names IS NULL THEN to_json(new_row) ELSE to_json(json_populate_record(new_row, nulls)) END AS after
                FROM (SELECT row_number() OVER () AS position, o AS old_row FROM old_rows o) AS olds
                JOIN (SELECT row_number() OVER () AS position, n AS new_row FROM new_rows n) AS news USING (position)
                WHERE old_row *<> new_row
                OFFSET 0) AS images
            OFFSET 0) AS keyed
        ORDER BY position;
    END IF;
    RETURN NULL;
END $$;

-- AFTER TRUNCATE, on the root and on every leaf. TRUNCATE of the root fires them all: the leaves' say nothing new unless
-- something was written in between. A truncated leaf alone is told from a whole table by the header tidewire.partition.
CREATE FUNCTION tidewire.capture_truncate() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    root    oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    name    text := tidewire.table_text(root);
    context json := tidewire.context_headers(NULL);
BEGIN
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

RESET ROLE;
