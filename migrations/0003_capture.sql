-- Capture: what turns a change of a tracked table into a row of the outbox, inside the writer's transaction.
--
-- One generic function for each kind of trigger. They name no column of a user's table (a rename must not break a write),
-- have no EXCEPTION block (each would cost a subtransaction a row), and pin what to_json depends on, so that a value has one
-- text whatever the session's settings. The table's name is never an argument: it is read from the trigger's own relation,
-- so whoever may attach these functions to a table can only speak for that table.
--
-- Arguments of every capture trigger: [0] flags (p partitioned, b before image, i columns to include, x columns to leave
-- out), [1] the options of track() as JSON in hex, [2], [3] attribute numbers and names of those columns, [4] a JSON object
-- that turns unwanted columns into nulls before a row is rendered, so that large values are not even read; [5…] the names of
-- the key columns. The triggers, not tidewire.tracked_tables, are the truth.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- The helpers have no rights of their own, so they need no search_path of their own: they run under the pinned one of the
-- capture functions. They are PL/pgSQL because that keeps plans: an SQL function plans its query again for every row.

-- The canonical text of a table's name: docs/PROTOCOL.md, "Names of tables".
CREATE FUNCTION tidewire.name_text(part text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN part ~ '[."*: ]' THEN '"' || replace(part, '"', '""') || '"' ELSE part END
$$;
CREATE FUNCTION tidewire.table_text(relation oid) RETURNS text LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
BEGIN
    RETURN (
        SELECT tidewire.name_text(nspname) || '.' || tidewire.name_text(relname)
        FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
        WHERE c.oid = relation);
END $$;
COMMENT ON FUNCTION tidewire.table_text(oid) IS 'The name of a table as events carry it; null if there is none.';

-- The key of a row: those members of its image, in order; null if one is missing.
CREATE FUNCTION tidewire.key_of(image json, names text[]) RETURNS json LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    composed text;
    name     text;
    value    text;
BEGIN
    FOREACH name IN ARRAY names LOOP
        value := image -> name;
        IF value IS NULL THEN
            RETURN NULL;
        END IF;
        composed := concat(composed, CASE WHEN composed IS NULL THEN '{' ELSE ',' END, to_json(name), ':', value);
    END LOOP;
    RETURN concat(composed, '}');
END $$;

-- The columns that an option means now. Options hold attribute numbers, valid for the relation they were taken from, and
-- names for after a dump and restore, which renumbers both.
CREATE FUNCTION tidewire.column_names(relation oid, options jsonb, list text) RETURNS text[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF (options ? list) IS NOT TRUE THEN
        RETURN NULL;
    END IF;
    RETURN ARRAY(
        SELECT coalesce(a.attname::text, item ->> 'name')
        FROM jsonb_array_elements(options -> list) WITH ORDINALITY AS t (item, position)
        LEFT JOIN pg_attribute a ON (options ->> 'relid')::oid = relation
            AND attrelid = relation AND attnum = (item ->> 'attnum')::int2 AND NOT attisdropped
        ORDER BY position);
END $$;

CREATE FUNCTION tidewire.options_of(argument text) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN convert_from(decode(argument, 'hex'), 'UTF8')::jsonb;
END $$;

-- An image with only the listed members, or only the others, in the style of to_json.
CREATE FUNCTION tidewire.picked(image json, listed text[], keep boolean) RETURNS json LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN (
        SELECT concat('{', string_agg(concat(to_json(key), ':', value), ',' ORDER BY position), '}')
        FROM json_each(image) WITH ORDINALITY AS t (key, value, position)
        WHERE (key = ANY (listed)) = keep);
END $$;

-- Whether the columns with these numbers still have these names. The arrays stand in FILTER, not in WHERE: there, Postgres
-- would find a plan for every row's own arrays better than one it can keep.
CREATE FUNCTION tidewire.still_named(relation oid, attnums int2[], names text[]) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (
        SELECT count(*) FILTER (WHERE attnum = ANY (attnums) AND attname = ANY (names)) = cardinality(names)
        FROM pg_attribute
        WHERE attrelid = relation AND attnum > 0);
END $$;

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
    keep      boolean;
    listed    text[];
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
    keep      boolean;
    listed    text[];
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
