-- Capture that cannot fail a write, and binds keys to columns instead of names.
--
-- * No value is decoded to find a key: `->` over a whole image fails at "\u0000" and, outside UTF8, at harmless escapes. What is
--   rendered is rendered in a block of its own; whatever fails there, a cast of a user's type included, makes the event
--   `omitted`. Such a block draws no transaction id, because nothing is written in it; measured: 0.4 µs a row.
-- * Key columns are attribute numbers, as column lists are: names may change hands within a transaction.
-- * Old and new rows of a statement are paired by position only where that is true.
--
-- Arguments of every capture trigger: those of migration 3, but where the flags of [0] have an n, [5] has the numbers of the key
-- columns, and their names follow; f: the only key column is the first of the table; m: see to_pinned_json(). Triggers without n are those of migration 8; they work until they are installed again.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

ALTER TABLE tidewire.outbox ADD COLUMN IF NOT EXISTS omitted text;
COMMENT ON COLUMN tidewire.outbox.omitted IS 'Why the rows of a change could not be captured; such an event has a key at most.';

-- The columns that an option means now, by number; by name only where the table is not the one that the numbers were taken from
-- (a dump and restore). A key of which a column is gone is none; of other lists the columns that are gone are left out.
CREATE FUNCTION tidewire.bound_columns(relation oid, options jsonb, list text) RETURNS text[] LANGUAGE plpgsql STABLE AS $$
DECLARE
    bound text[];
BEGIN
    IF (options ? list) IS NOT TRUE THEN
        RETURN NULL;
    END IF;
    SELECT array_agg(a.attname::text ORDER BY position) INTO bound
    FROM jsonb_array_elements(options -> list) WITH ORDINALITY AS t (item, position)
    LEFT JOIN pg_attribute a ON attrelid = relation AND attnum > 0 AND NOT attisdropped
        AND CASE WHEN (options ->> 'relid')::oid = relation THEN attnum = (item ->> 'attnum')::int2 ELSE attname = item ->> 'name' END;
    IF list = 'key' AND array_position(bound, NULL) IS NOT NULL THEN
        RETURN NULL;
    END IF;
    RETURN array_remove(coalesce(bound, '{}'), NULL);
END $$;

-- The columns of a row image, in their order: all, those of the list, or all but those.
CREATE FUNCTION tidewire.carried_columns(relation oid, options jsonb) RETURNS text[] LANGUAGE plpgsql STABLE AS $$
DECLARE
    included text[] := tidewire.bound_columns(relation, options, 'columns') || coalesce(tidewire.bound_columns(relation, options, 'key'), '{}');
    excluded text[] := coalesce(tidewire.bound_columns(relation, options, 'except_columns'), '{}');
BEGIN
    RETURN (
        SELECT coalesce(array_agg(attname::text ORDER BY attnum), '{}')
        FROM pg_attribute
        WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
            AND CASE WHEN options ? 'columns' THEN attname = ANY (included) ELSE attname <> ALL (excluded) END);
END $$;

-- `source."a", source."b"`. Every quote in a name is doubled, so whatever names a trigger's arguments hold, this is a list of columns.
CREATE FUNCTION tidewire.select_list(source text, names text[]) RETURNS text LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN CASE names WHEN '{}' THEN '' ELSE
        source || '."' || replace(replace(array_to_string(names, E'\x01'), '"', '""'), E'\x01', concat('", ', source, '."')) || '"' END;
END $$;

-- The statement that renders those columns of a row, its parameter.
CREATE FUNCTION tidewire.image_statement(names text[]) RETURNS text LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN 'SELECT to_json(x.*) FROM (SELECT ' || tidewire.select_list('($1)', names) || ') AS x';
END $$;

-- A row and its key, column by column: what a row trigger does where the direct way fails. `failure`: why the row is known to be
-- beyond rendering.
CREATE FUNCTION tidewire.rendered_slowly(given anyelement, image_statement text, key_statement text, failure text,
    OUT image json, OUT key json, OUT omitted text) LANGUAGE plpgsql
    SET lc_monetary = 'C' SET quote_all_identifiers = off AS $$
BEGIN
    omitted := failure;
    IF key_statement IS NOT NULL THEN
        BEGIN
            EXECUTE key_statement INTO key USING given;
        EXCEPTION
            WHEN transaction_rollback THEN RAISE;
            WHEN OTHERS THEN key := NULL;
        END;
    END IF;
    IF failure IS NULL THEN
        BEGIN
            IF image_statement IS NULL THEN
                image := to_json(given);
            ELSE
                EXECUTE image_statement INTO image USING given;
            END IF;
        EXCEPTION
            WHEN transaction_rollback THEN RAISE;
            WHEN OTHERS THEN omitted := left(SQLERRM, 1000);
        END;
    END IF;
END $$;

-- Why images are not carried; null if they are. 256 MiB is the largest TIDEWIRE_EVENT_BYTES that there is, and a quarter of what
-- a row or a message of Postgres can hold.
CREATE FUNCTION tidewire.reason_to_omit(failure text, bytes bigint) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF failure IS NOT NULL THEN
        RETURN 'the row cannot be written as JSON: ' || failure
            || CASE WHEN failure LIKE 'out of memory%' OR failure LIKE 'invalid memory alloc%' THEN ' (no value can be larger than 1 GB)' ELSE '' END;
    ELSIF bytes > 268435456 THEN
        RETURN 'the row is larger than 256 MiB as JSON';
    END IF;
    RETURN NULL;
END $$;

-- A key is kept with an omitted row up to 8 KiB, as the relay keeps it.
CREATE FUNCTION tidewire.small_key(key json) RETURNS json LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN CASE WHEN octet_length(key::text) <= 8192 THEN key END;
END $$;

-- For tables with columns whose text depends on more of the session than capture() sets: those two settings cost a writer 5 µs a row.
CREATE FUNCTION tidewire.to_pinned_json(given anyelement) RETURNS json LANGUAGE plpgsql STABLE
    SET lc_monetary = 'C' SET quote_all_identifiers = off AS $$
BEGIN
    RETURN to_json(given);
END $$;

CREATE OR REPLACE FUNCTION tidewire.capture() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET TimeZone = 'UTC' SET DateStyle = 'ISO' SET IntervalStyle = 'iso_8601' SET bytea_output = 'hex' SET extra_float_digits = 1
    AS $$
DECLARE
    relation  oid := TG_RELID;
    name      text := TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME;
    listed    boolean := strpos(TG_ARGV[0], 'i') > 0 OR strpos(TG_ARGV[0], 'x') > 0;
    numbered  boolean := strpos(TG_ARGV[0], 'n') > 0;
    before    json;
    after     json;
    value     text;
    key       json;
    key_was   json;
    names     text[];
    context   json;
    -- The direct way has led to something.
    direct    boolean := false;
    failure   text;
    -- Where the names of the key columns begin among the arguments.
    first     int := CASE WHEN strpos(TG_ARGV[0], 'n') > 0 THEN 6 ELSE 5 END;
    -- No column's text depends on a setting that this function does not set.
    pinned    boolean := strpos(TG_ARGV[0], 'n') > 0 AND strpos(TG_ARGV[0], 'm') = 0;
    key_names text[];
    number    int2;
    numbers   int2[];
    keep      boolean;
    short_old record;
    short_new record;
    options   jsonb;
    images    text;
    keys      text;
    failure_of_old text;
    failure_of_new text;
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
    IF current_setting('tidewire.traceparent', true) <> '' OR current_setting('tidewire.headers', true) <> '' THEN
        context := tidewire.context_headers(NULL);
    END IF;

    <<rendering>>
    BEGIN
        IF listed THEN
            keep := strpos(TG_ARGV[0], 'i') > 0;
            names := TG_ARGV[3];
            EXIT rendering WHEN NOT tidewire.still_named(relation, TG_ARGV[2]::int2[], names);
            IF TG_OP <> 'INSERT' THEN
                short_old := json_populate_record(OLD, TG_ARGV[4]::json);
                before := CASE WHEN pinned THEN to_json(short_old) ELSE tidewire.to_pinned_json(short_old) END;
            END IF;
            IF TG_OP <> 'DELETE' THEN
                short_new := json_populate_record(NEW, TG_ARGV[4]::json);
                after := CASE WHEN pinned THEN to_json(short_new) ELSE tidewire.to_pinned_json(short_new) END;
            END IF;
            -- The trigger has no such condition: it would read values that are not carried.
            IF TG_OP = 'UPDATE' THEN
                IF short_old *= short_new AND OLD *= NEW THEN
                    RETURN NULL;
                END IF;
            END IF;
        ELSE
            IF TG_OP <> 'INSERT' THEN
                before := CASE WHEN pinned THEN to_json(OLD) ELSE tidewire.to_pinned_json(OLD) END;
            END IF;
            IF TG_OP <> 'DELETE' THEN
                after := CASE WHEN pinned THEN to_json(NEW) ELSE tidewire.to_pinned_json(NEW) END;
            END IF;
        END IF;
        IF TG_NARGS = first + 1 THEN
            value := coalesce(after, before) -> TG_ARGV[first];
            EXIT rendering WHEN value IS NULL;
            key := concat('{', to_json(TG_ARGV[first]), ':', value, '}');
            IF TG_OP = 'UPDATE' AND value <> (before -> TG_ARGV[first])::text THEN
                key_was := concat('{', to_json(TG_ARGV[first]), ':', before -> TG_ARGV[first], '}');
            END IF;
        ELSIF TG_NARGS > first + 1 THEN
            key_names := TG_ARGV[first:];
            key := tidewire.key_of(coalesce(after, before), key_names);
            EXIT rendering WHEN key IS NULL;
            IF TG_OP = 'UPDATE' THEN
                key_was := tidewire.key_of(before, key_names);
                IF key_was::text = key::text THEN
                    key_was := NULL;
                END IF;
            END IF;
        END IF;
        IF strpos(TG_ARGV[0], 'b') = 0 THEN
            before := NULL;
        END IF;
        IF listed THEN
            before := CASE WHEN before IS NOT NULL THEN tidewire.picked(before, names, keep) END;
            after := CASE WHEN after IS NOT NULL THEN tidewire.picked(after, names, keep) END;
        END IF;
        -- Half of what is carried at most: the rest, with its exact length, is looked at below.
        direct := coalesce(octet_length(before::text), 0) + coalesce(octet_length(after::text), 0) <= 134217728;
    EXCEPTION
        WHEN transaction_rollback THEN RAISE;
        WHEN OTHERS THEN failure := left(SQLERRM, 1000);
    END;

    IF direct THEN
        IF NOT numbered OR TG_NARGS <= first
            -- The first column that there was is still there, so it is still the first, and that is its name.
            OR (strpos(TG_ARGV[0], 'f') > 0 AND starts_with(coalesce(after, before)::text, left(key::text, -1))
                AND has_column_privilege(relation, TG_ARGV[5]::int2, 'SELECT') IS NOT NULL) THEN
            INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
            VALUES (name, TG_OP, key, key_was, before, after, context);
            RETURN NULL;
        ELSIF TG_NARGS = first + 1 THEN
            -- Within the statement that writes the check costs a third of what a statement of its own would.
            number := TG_ARGV[5];
            INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
            SELECT name, TG_OP, key, key_was, before, after, context
            FROM pg_attribute
            WHERE attrelid = relation AND attnum = number AND attname = TG_ARGV[6] AND NOT attisdropped;
        ELSE
            numbers := string_to_array(TG_ARGV[5], ' ');
            INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
            SELECT name, TG_OP, key, key_was, before, after, context
            FROM (SELECT count(*) FILTER (WHERE attname = key_names[array_position(numbers, attnum)]) AS bound
                  FROM pg_attribute
                  WHERE attrelid = relation AND attnum > 0) AS a
            WHERE bound = cardinality(numbers);
        END IF;
        IF FOUND THEN
            RETURN NULL;
        END IF;
    END IF;

    -- Rare: something cannot be decoded or rendered, is very large, or columns have other names than when the trigger was made.
    options := tidewire.options_of(TG_ARGV[1]);
    keys := tidewire.image_statement(tidewire.bound_columns(relation, options, 'key'));
    IF listed THEN
        IF TG_OP = 'UPDATE' THEN
            BEGIN
                IF OLD *= NEW THEN
                    RETURN NULL;
                END IF;
            EXCEPTION
                WHEN transaction_rollback THEN RAISE;
                -- Too large to be compared: a change.
                WHEN OTHERS THEN NULL;
            END;
        END IF;
        images := tidewire.image_statement(tidewire.carried_columns(relation, options));
    ELSIF failure IS NOT NULL AND before IS NULL AND TG_OP <> 'INSERT' THEN
        failure_of_old := failure;
    ELSIF failure IS NOT NULL AND after IS NULL AND TG_OP <> 'DELETE' THEN
        failure_of_new := failure;
    END IF;
    failure := NULL;
    before := NULL;
    after := NULL;
    key_was := NULL;
    IF TG_OP <> 'INSERT' THEN
        SELECT r.image, r.key, r.omitted INTO before, key_was, failure_of_old
        FROM tidewire.rendered_slowly(OLD, images, keys, CASE WHEN strpos(TG_ARGV[0], 'b') = 0 THEN '' ELSE failure_of_old END) AS r;
        IF strpos(TG_ARGV[0], 'b') > 0 THEN
            failure := failure_of_old;
        END IF;
        key := key_was;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        SELECT r.image, r.key, r.omitted INTO after, key, failure_of_new
        FROM tidewire.rendered_slowly(NEW, images, keys, failure_of_new) AS r;
        failure := coalesce(failure_of_new, failure);
    END IF;
    IF TG_OP <> 'UPDATE' OR key_was::text = key::text THEN
        key_was := NULL;
    END IF;
    failure := tidewire.reason_to_omit(failure, coalesce(octet_length(before::text), 0)::bigint + coalesce(octet_length(after::text), 0)
        + coalesce(octet_length(key::text), 0) + coalesce(octet_length(key_was::text), 0));
    IF failure IS NOT NULL THEN
        before := NULL;
        after := NULL;
        key := tidewire.small_key(key);
        key_was := tidewire.small_key(key_was);
        RAISE WARNING 'tidewire: a change of % is told without its rows: %', name, failure;
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers, omitted)
    VALUES (name, TG_OP, key, key_was, before, after, context, failure);
    RETURN NULL;
END $$;

-- One change of a statement: rows and keys already cut to their columns; null where there is none.
CREATE FUNCTION tidewire.rendered_change(name text, operation text, old_row record, old_key record, new_row record, new_key record,
    OUT row_key json, OUT key_was json, OUT before json, OUT after json, OUT omitted text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    failure text;
BEGIN
    BEGIN
        key_was := to_json(old_key);
        row_key := CASE operation WHEN 'DELETE' THEN key_was ELSE to_json(new_key) END;
        before := to_json(old_row);
        after := to_json(new_row);
    EXCEPTION
        WHEN transaction_rollback THEN RAISE;
        WHEN OTHERS THEN failure := left(SQLERRM, 1000);
    END;
    IF operation <> 'UPDATE' OR key_was::text = row_key::text THEN
        key_was := NULL;
    END IF;
    omitted := tidewire.reason_to_omit(failure, coalesce(octet_length(before::text), 0)::bigint + coalesce(octet_length(after::text), 0)
        + coalesce(octet_length(row_key::text), 0) + coalesce(octet_length(key_was::text), 0));
    IF omitted IS NOT NULL THEN
        before := NULL;
        after := NULL;
        row_key := tidewire.small_key(row_key);
        key_was := tidewire.small_key(key_was);
        RAISE WARNING 'tidewire: a change of % is told without its rows: %', name, omitted;
    END IF;
END $$;

-- Nothing is decoded: the statement is composed of today's column names. Both transition tables are filled together, so where
-- they have as many rows, rows of one position belong together. They have not where a trigger of a partition swallowed a row that
-- moved there: then all old rows are deleted and all new ones inserted, which is true of every row.
CREATE OR REPLACE FUNCTION tidewire.capture_bulk() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET TimeZone = 'UTC' SET DateStyle = 'ISO' SET IntervalStyle = 'iso_8601' SET bytea_output = 'hex' SET extra_float_digits = 1
    SET lc_monetary = 'C' SET quote_all_identifiers = off
    AS $$
DECLARE
    relation   oid := TG_RELID;
    options    jsonb := tidewire.options_of(TG_ARGV[1]);
    operations text[] := ARRAY[TG_OP];
    operation  text;
    name       text;
    carried    text[];
    keys       text[];
    rows       text;
    context    json;
BEGIN
    IF strpos(TG_ARGV[0], 'p') > 0 THEN
        relation := tidewire.root_of(TG_RELID);
        IF tidewire.is_tracked_root(relation, options) IS NOT TRUE THEN
            RETURN NULL;
        END IF;
    END IF;
    -- Statements that changed nothing fire too.
    IF TG_OP = 'INSERT' THEN
        IF NOT EXISTS (SELECT FROM new_rows) THEN
            RETURN NULL;
        END IF;
    ELSIF NOT EXISTS (SELECT FROM old_rows) THEN
        RETURN NULL;
    END IF;
    name := tidewire.table_text(relation);
    IF current_setting('tidewire.traceparent', true) <> '' OR current_setting('tidewire.headers', true) <> '' THEN
        context := tidewire.context_headers(NULL);
    END IF;
    IF TG_OP <> 'INSERT' AND strpos(TG_ARGV[0], 'p') = 0 AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = TG_RELID) THEN
        -- Rows of tables that inherit from this one may be among them, and nothing says which: a table that takes part in
        -- inheritance has row triggers, but these were made before it did.
        INSERT INTO tidewire.outbox (table_name, operation, after_data)
        VALUES (name, 'SCHEMA', json_build_object('changes', json_build_array(json_build_object('kind', 'capture_gap', 'message',
            'rows of tables that inherit from it cannot be told from its own')), 'columns', '[]'::json, 'relid', relation::bigint));
        RETURN NULL;
    END IF;
    IF TG_OP = 'UPDATE' AND strpos(TG_ARGV[0], 'p') > 0 THEN
        IF (SELECT count(*) FROM old_rows) <> (SELECT count(*) FROM new_rows) THEN
            operations := '{DELETE,INSERT}';
        END IF;
    END IF;

    carried := tidewire.carried_columns(relation, options);
    keys := tidewire.bound_columns(relation, options, 'key');
    FOREACH operation IN ARRAY operations LOOP
        rows := CASE operation
            WHEN 'INSERT' THEN 'new_rows AS new_row'
            WHEN 'DELETE' THEN 'old_rows AS old_row'
            ELSE '(SELECT pg_catalog.row_number() OVER () AS "!tidewire position", o.* FROM old_rows AS o) AS old_row
                JOIN (SELECT pg_catalog.row_number() OVER () AS "!tidewire position", n.* FROM new_rows AS n) AS new_row
                    ON old_row."!tidewire position" OPERATOR(pg_catalog.=) new_row."!tidewire position"
                        AND old_row.* OPERATOR(pg_catalog.*<>) new_row.*' END;
        IF operation <> 'INSERT' THEN
            rows := concat(rows, ' CROSS JOIN LATERAL (SELECT ', tidewire.select_list('old_row', carried), ') AS old_image',
                ' CROSS JOIN LATERAL (SELECT ' || tidewire.select_list('old_row', keys) || ') AS old_key');
        END IF;
        IF operation <> 'DELETE' THEN
            rows := concat(rows, ' CROSS JOIN LATERAL (SELECT ', tidewire.select_list('new_row', carried), ') AS new_image',
                ' CROSS JOIN LATERAL (SELECT ' || tidewire.select_list('new_row', keys) || ') AS new_key');
        END IF;
        EXECUTE format(
            'INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers, omitted)
             SELECT $1, $2, (c).row_key, (c).key_was, (c).before, (c).after, $3, (c).omitted
             FROM (SELECT tidewire.rendered_change($1, $2, %s, %s, %s, %s) AS c FROM %s %s OFFSET 0) AS changes',
            CASE WHEN operation <> 'INSERT' AND strpos(TG_ARGV[0], 'b') > 0 THEN 'old_image.*' ELSE 'NULL' END,
            CASE WHEN operation <> 'INSERT' AND keys IS NOT NULL THEN 'old_key.*' ELSE 'NULL' END,
            CASE WHEN operation <> 'DELETE' THEN 'new_image.*' ELSE 'NULL' END,
            CASE WHEN operation <> 'DELETE' AND keys IS NOT NULL THEN 'new_key.*' ELSE 'NULL' END,
            rows, CASE operation WHEN 'UPDATE' THEN 'ORDER BY old_row."!tidewire position"' END)
        USING name, operation, context;
    END LOOP;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION tidewire.capture_truncate() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation oid := coalesce(pg_partition_root(TG_RELID), TG_RELID);
    name     text;
    context  jsonb;
BEGIN
    IF strpos(TG_ARGV[0], 'p') > 0 THEN
        relation := tidewire.root_of(TG_RELID);
        IF tidewire.is_tracked_root(relation, tidewire.options_of(TG_ARGV[1])) IS NOT TRUE THEN
            RETURN NULL;
        END IF;
    END IF;
    name := tidewire.table_text(relation);
    BEGIN
        -- Whoever writes sets the context, and may not say this.
        context := tidewire.context_headers(NULL)::jsonb - 'tidewire.partition';
    EXCEPTION
        -- Headers that cannot be decoded cannot be told from it: none then.
        WHEN OTHERS THEN context := NULL;
    END;
    IF relation <> TG_RELID THEN
        IF (SELECT CASE WHEN operation = 'TRUNCATE' THEN headers -> 'tidewire.partition' IS NULL END
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

-- The writer's headers: those given, over tidewire.headers and tidewire.traceparent, which its transaction may SET LOCAL. Both
-- settings are dropped where they are no JSON object, no traceparent, or large: tracing must not break a write, and must not make
-- an event too large to be carried either.
CREATE OR REPLACE FUNCTION tidewire.context_headers(given json) RETURNS json LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    setting text := coalesce(current_setting('tidewire.headers', true), '');
    trace   text := coalesce(current_setting('tidewire.traceparent', true), '');
    merged  jsonb;
    part    text;
    members text[] := '{}';
BEGIN
    IF setting = '' AND trace = '' THEN
        RETURN given;
    END IF;
    IF setting <> '' THEN
        BEGIN
            IF octet_length(setting) > 65536 OR json_typeof(setting::json) <> 'object' THEN
                setting := '';
            END IF;
        EXCEPTION
            WHEN OTHERS THEN setting := '';
        END;
    END IF;
    IF octet_length(trace) > 512 OR trace !~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?$' THEN
        trace := '';
    END IF;
    IF setting = '' AND trace = '' THEN
        RETURN given;
    END IF;
    BEGIN
        merged := coalesce(nullif(setting, '')::jsonb, '{}')
            || CASE WHEN trace <> '' THEN jsonb_build_object('traceparent', trace) ELSE '{}' END
            || coalesce(given::jsonb, '{}');
        RETURN nullif(merged, '{}')::json;
    EXCEPTION
        WHEN OTHERS THEN NULL;
    END;
    -- Something that jsonb cannot hold: the members as they are written. Of one name the last counts.
    BEGIN
        FOREACH part IN ARRAY ARRAY[setting, CASE WHEN trace <> '' THEN json_build_object('traceparent', trace)::text END, given::text] LOOP
            part := btrim(part, E' \t\r\n');
            part := btrim(substr(part, 2, greatest(length(part) - 2, 0)), E' \t\r\n');
            IF part <> '' THEN
                members := members || part;
            END IF;
        END LOOP;
        RETURN '{' || array_to_string(members, ',') || '}';
    EXCEPTION
        WHEN OTHERS THEN RETURN given;
    END;
END $$;

-- As before, but what the session says is never cast to jsonb.
DO $do$
DECLARE
    form text[];
BEGIN
    FOREACH form SLICE 1 IN ARRAY ARRAY[['json', 'json'], ['jsonb', 'jsonb'], ['text', 'json']] LOOP
        EXECUTE format($create$
CREATE OR REPLACE FUNCTION tidewire.emit(aggregate_type text, aggregate_id text, event_type text, payload %1$s, headers %2$s DEFAULT NULL)
    RETURNS uuid LANGUAGE plpgsql SECURITY DEFINER AS $body$
DECLARE
    emitted pg_catalog.uuid;
    context pg_catalog.json;
BEGIN
    -- One expression for everything rare: each costs about a microsecond.
    IF aggregate_type IS NULL OR aggregate_id IS NULL OR event_type IS NULL OR headers IS NOT NULL
        OR pg_catalog.current_setting('tidewire.traceparent', true) OPERATOR(pg_catalog.<>) ''
        OR pg_catalog.current_setting('tidewire.headers', true) OPERATOR(pg_catalog.<>) '' THEN
        IF aggregate_type IS NULL OR aggregate_id IS NULL OR event_type IS NULL THEN
            RAISE not_null_violation USING MESSAGE = 'aggregate_type, aggregate_id and event_type of a domain event must not be null';
        ELSIF pg_catalog.%2$s_typeof(headers) OPERATOR(pg_catalog.<>) 'object' THEN
            RAISE invalid_parameter_value USING MESSAGE = 'headers of a domain event must be a JSON object';
        END IF;
        context := tidewire.context_headers(headers::pg_catalog.json);
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, row_key, after_data, event_type, headers)
    VALUES ('event:' OPERATOR(pg_catalog.||) aggregate_type, 'EVENT', ('{"aggregate_id":' OPERATOR(pg_catalog.||)
                pg_catalog.to_json(aggregate_id)::pg_catalog.text OPERATOR(pg_catalog.||) '}')::pg_catalog.json,
            payload::pg_catalog.json, event_type, context)
    RETURNING event_id INTO emitted;
    RETURN emitted;
END $body$ $create$, form[1], form[2]);
    END LOOP;
END $do$;

-- Every trigger that tracking with these options means, on the table itself and on its partitions. With the owner's rights, since
-- whoever may track tables calls it; it reads the catalog alone.
CREATE OR REPLACE FUNCTION tidewire.trigger_plan(relation oid, options jsonb, OUT target oid, OUT name text, OUT function oid,
    OUT arguments text[], OUT definition text) RETURNS SETOF record LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET quote_all_identifiers = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH given AS (
        SELECT ARRAY[CASE WHEN relkind = 'p' THEN 'p' ELSE '' END
                     || CASE WHEN (options ->> 'before_image')::boolean THEN 'b' ELSE '' END
                     || CASE WHEN options ? 'columns' THEN 'i' WHEN options ? 'except_columns' THEN 'x' ELSE '' END || 'n'
                     || CASE WHEN listed.unpinned THEN 'm' ELSE '' END
                     || CASE WHEN relkind = 'r' AND listed.key_numbers = listed.first THEN 'f' ELSE '' END,
                     encode(convert_to(options::text, 'UTF8'), 'hex'),
                     listed.attnums::text, listed.names::text, listed.nulls::text, listed.key_numbers]
                   || coalesce(keys, '{}') AS arguments,
               -- A statement's rows are not only the table's own where tables inherit from it, and statements on a table that it
               -- inherits from do not fire its statement triggers.
               (options ->> 'bulk')::boolean AND (relkind = 'p' OR NOT EXISTS (
                   SELECT FROM pg_inherits WHERE inhparent = relation OR inhrelid = relation)) AS bulk,
               (options ->> 'deferred')::boolean AS deferred
        FROM pg_class,
            LATERAL (SELECT tidewire.bound_columns(relation, options, 'key') AS keys,
                            coalesce(tidewire.bound_columns(relation, options, 'columns'),
                                tidewire.bound_columns(relation, options, 'except_columns')) AS names) AS n,
            -- Domains are left alone: one may forbid null.
            LATERAL (SELECT coalesce(array_agg(attnum ORDER BY attnum) FILTER (WHERE attname = ANY (n.names)), '{}') AS attnums,
                            coalesce(array_agg(attname ORDER BY attnum) FILTER (WHERE attname = ANY (n.names)), '{}') AS names,
                            coalesce(json_object_agg(attname, NULL ORDER BY attnum) FILTER (WHERE typtype <> 'd' AND attname <> ALL (coalesce(keys, '{}'))
                                AND (attname = ANY (n.names)) = options ? 'except_columns'), '{}') AS nulls,
                            coalesce(string_agg(attnum::text, ' ' ORDER BY array_position(keys, attname::text))
                                FILTER (WHERE attname = ANY (keys)), '') AS key_numbers,
                            min(attnum)::text AS first,
                            -- What is not built in, and money and names of objects, alone and in arrays.
                            coalesce(bool_or(t.oid >= 16384 AND typtype <> 'e' OR coalesce(nullif(typelem, 0), t.oid) IN
                                ('money'::regtype, 'regclass'::regtype, 'regtype'::regtype, 'regproc'::regtype, 'regprocedure'::regtype,
                                 'regoper'::regtype, 'regoperator'::regtype, 'regrole'::regtype, 'regnamespace'::regtype,
                                 'regconfig'::regtype, 'regdictionary'::regtype, 'regcollation'::regtype)), false) AS unpinned
                     FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
                     WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped) AS listed
        WHERE oid = relation),
    family AS (
        SELECT relation AS target, true AS root, false AS leaf
        UNION ALL
        SELECT relid, false, isleaf AND relkind = 'r'
        FROM pg_partition_tree(relation) JOIN pg_class c ON c.oid = relid
        WHERE relid <> relation AND relkind IN ('r', 'p')),
    wanted (target, name, function, timing, level) AS (
        SELECT target, v.name || coalesce(options ->> 'tag', ''), 'tidewire.capture()'::regprocedure, v.timing, v.level
        FROM given, family, (VALUES
            ('!tidewire', 'AFTER INSERT OR DELETE', 'FOR EACH ROW'),
            ('!tidewire_update', 'AFTER UPDATE', 'FOR EACH ROW'
                || CASE WHEN options ?| '{columns,except_columns}' THEN '' ELSE ' WHEN (OLD.* OPERATOR(pg_catalog.*<>) NEW.*)' END)
            ) AS v (name, timing, level)
        WHERE root AND NOT bulk
        UNION ALL
        SELECT target, v.name, 'tidewire.capture_bulk()'::regprocedure, v.timing, v.level || ' FOR EACH STATEMENT'
        FROM given, family, (VALUES
            ('!tidewire', 'AFTER INSERT', 'REFERENCING NEW TABLE AS new_rows'),
            ('!tidewire_update', 'AFTER UPDATE', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
            ('!tidewire_delete', 'AFTER DELETE', 'REFERENCING OLD TABLE AS old_rows')) AS v (name, timing, level)
        WHERE bulk
        UNION ALL
        SELECT target, '!tidewire_truncate', 'tidewire.capture_truncate()'::regprocedure, 'AFTER TRUNCATE', 'FOR EACH STATEMENT'
        FROM family WHERE root OR leaf)
    SELECT target, name, function::oid, arguments,
           format('CREATE %sTRIGGER %I %s ON %s %s%s EXECUTE FUNCTION %s(%s)',
               CASE WHEN deferred AND function = 'tidewire.capture()'::regprocedure THEN 'CONSTRAINT ' END, name, timing,
               target::regclass, CASE WHEN deferred AND function = 'tidewire.capture()'::regprocedure THEN 'DEFERRABLE INITIALLY DEFERRED ' END,
               level, function::regproc, (SELECT string_agg(quote_literal(a), ', ' ORDER BY n) FROM unnest(arguments) WITH ORDINALITY AS t (a, n)))
    FROM wanted, given;
END $$;

REVOKE ALL ON FUNCTION tidewire.bound_columns(oid, jsonb, text), tidewire.carried_columns(oid, jsonb),
    tidewire.select_list(text, text[]), tidewire.image_statement(text[]), tidewire.to_pinned_json(anyelement), tidewire.rendered_slowly(anyelement, text, text, text),
    tidewire.rendered_change(text, text, record, record, record, record), tidewire.reason_to_omit(text, bigint),
    tidewire.small_key(json) FROM PUBLIC;
DO $$
BEGIN
    IF pg_get_userbyid((SELECT proowner FROM pg_proc WHERE oid = 'tidewire.capture()'::regprocedure)) = 'tidewire_capture' THEN
        GRANT INSERT (omitted) ON tidewire.outbox TO tidewire_capture;
        GRANT EXECUTE ON FUNCTION tidewire.bound_columns(oid, jsonb, text), tidewire.carried_columns(oid, jsonb),
            tidewire.select_list(text, text[]), tidewire.image_statement(text[]), tidewire.to_pinned_json(anyelement), tidewire.rendered_slowly(anyelement, text, text, text),
            tidewire.rendered_change(text, text, record, record, record, record), tidewire.reason_to_omit(text, bigint),
            tidewire.small_key(json) TO tidewire_capture;
    END IF;
END $$;

RESET ROLE;
