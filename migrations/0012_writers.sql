-- Two prices of capture: a statement of one row on a table captured in bulk cost a writer half a millisecond, and the UPDATE of a
-- row that is larger than any value of Postgres can be failed.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- Whether the columns of those numbers have those names now.
CREATE FUNCTION tidewire.are_bound(relation oid, numbers int2[], names text[]) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (
        SELECT count(*) = cardinality(numbers)
        FROM pg_attribute
        WHERE attrelid = relation AND attnum = ANY (numbers) AND attname = names[array_position(numbers, attnum)] AND NOT attisdropped);
END $$;

-- Told once a transaction and table: a COPY of many such rows would fill logs, and a client that reads nothing while it sends would
-- stand for ever.
CREATE FUNCTION tidewire.warn_of_omission(name text, reason text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('tidewire.warned', true) IS DISTINCT FROM name THEN
        PERFORM set_config('tidewire.warned', name, true);
        RAISE WARNING 'tidewire: a change of % is told without its rows: %', name, reason;
    END IF;
END $$;

-- As before, with the words of Postgres 18.
CREATE OR REPLACE FUNCTION tidewire.reason_to_omit(failure text, bytes bigint) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF failure IS NOT NULL THEN
        RETURN 'the row cannot be written as JSON: ' || failure
            || CASE WHEN failure LIKE ANY ('{out of memory%,invalid memory alloc%,string buffer exceeds%}') THEN ' (no value can be larger than 1 GB)' ELSE '' END;
    ELSIF bytes > 268435456 THEN
        RETURN 'the row is larger than 256 MiB as JSON';
    END IF;
    RETURN NULL;
END $$;

-- As before, but for the warning.
CREATE OR REPLACE FUNCTION tidewire.rendered_change(name text, operation text, old_row record, old_key record, new_row record, new_key record,
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
        PERFORM tidewire.warn_of_omission(name, omitted);
    END IF;
END $$;

-- As before, but that few rows take a direct way, and rows larger than any value can be are omitted.
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
    position   text := '!';
    keeps      boolean := strpos(TG_ARGV[0], 'b') > 0;
    touched    int;
    -- The direct way has led to something.
    direct     boolean;
    befores    json[];
    afters     json[];
    old_keys   json[];
    row_keys   json[];
    bytes      bigint;
    failure    text;
    context    json;
BEGIN
    IF strpos(TG_ARGV[0], 'p') > 0 THEN
        relation := tidewire.root_of(TG_RELID);
        IF tidewire.is_tracked_root(relation, options) IS NOT TRUE THEN
            RETURN NULL;
        END IF;
    END IF;
    IF TG_OP = 'UPDATE' AND strpos(TG_ARGV[0], 'p') > 0 THEN
        IF (SELECT count(*) FROM old_rows) <> (SELECT count(*) FROM new_rows) THEN
            operations := '{DELETE,INSERT}';
        END IF;
    END IF;
    -- (`n` could be a column, `n.*` is the row; but in a SELECT list that would be its columns.)
    -- Few rows are rendered by statements that are planned once a session: to compose and plan one costs half a millisecond. They
    -- are held until all are known to be well, up to half of what is carried; in a block that writes nothing, which is free.
    IF cardinality(operations) = 1 AND TG_ARGV[0] ~ 'n' AND TG_ARGV[0] !~ '[ix]'
        AND tidewire.are_bound(relation, string_to_array(TG_ARGV[5], ' ')::int2[], TG_ARGV[6:])
    THEN
        keys := CASE WHEN TG_NARGS > 6 THEN TG_ARGV[6:] END;
        BEGIN
            IF TG_OP = 'INSERT' THEN
                SELECT count(*), array_agg(after), array_agg(tidewire.key_of(after, keys)), sum(octet_length(after::text))
                INTO touched, afters, row_keys, bytes
                FROM (SELECT to_json(n.*) AS after FROM new_rows AS n LIMIT 101) AS changes;
            ELSIF TG_OP = 'DELETE' THEN
                SELECT count(*), array_agg(before), array_agg(tidewire.key_of(before, keys)), sum(octet_length(before::text))
                INTO touched, befores, row_keys, bytes
                FROM (SELECT to_json(o.*) AS before FROM old_rows AS o LIMIT 101) AS changes;
            ELSE
                SELECT count(*), array_agg(before ORDER BY nth) FILTER (WHERE changed), array_agg(after ORDER BY nth) FILTER (WHERE changed),
                       array_agg(tidewire.key_of(before, keys) ORDER BY nth) FILTER (WHERE changed),
                       array_agg(tidewire.key_of(after, keys) ORDER BY nth) FILTER (WHERE changed),
                       sum(octet_length(before::text) + octet_length(after::text))
                INTO touched, befores, afters, old_keys, row_keys, bytes
                FROM (SELECT nth, to_json(old_row) AS before, to_json(new_row) AS after, old_row *<> new_row AS changed
                      FROM (SELECT row_number() OVER () AS nth, coalesce(o.*) AS old_row FROM old_rows AS o LIMIT 101) AS o
                      JOIN (SELECT row_number() OVER () AS nth, coalesce(n.*) AS new_row FROM new_rows AS n LIMIT 101) AS n USING (nth)
                      OFFSET 0) AS changes;
            END IF;
            direct := touched <= 100 AND coalesce(bytes, 0) <= 134217728;
        EXCEPTION
            WHEN transaction_rollback THEN RAISE;
            WHEN OTHERS THEN direct := false;
        END;
    END IF;
    IF direct IS NOT TRUE THEN
        touched := 1;
        BEGIN
            IF TG_OP = 'INSERT' THEN
                SELECT count(*), max(pg_column_size(n.*)) INTO touched FROM new_rows AS n;
            ELSE
                SELECT count(*), max(pg_column_size(o.*)) INTO touched FROM old_rows AS o;
                IF TG_OP = 'UPDATE' THEN
                    PERFORM max(pg_column_size(n.*)) FROM new_rows AS n;
                END IF;
            END IF;
        EXCEPTION
            WHEN transaction_rollback THEN RAISE;
            -- A row can be stored whose values together are larger than any value can be: nothing can make one value of it.
            WHEN OTHERS THEN failure := left(SQLERRM, 1000);
        END;
    END IF;
    -- Statements that changed nothing fire too.
    IF touched = 0 THEN
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
    IF direct THEN
        INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers)
        SELECT name, TG_OP, row_key, CASE WHEN old_key::text <> row_key::text THEN old_key END,
               CASE WHEN keeps THEN before END, after, context
        FROM unnest(row_keys, old_keys, befores, afters) AS changes (row_key, old_key, before, after);
        RETURN NULL;
    END IF;

    keys := tidewire.bound_columns(relation, options, 'key');
    carried := tidewire.carried_columns(relation, options);
    IF failure IS NOT NULL THEN
        failure := tidewire.reason_to_omit(failure, 0);
        PERFORM tidewire.warn_of_omission(name, failure);
    END IF;
    WHILE EXISTS (SELECT FROM pg_attribute WHERE attrelid = TG_RELID AND attname = position) LOOP
        position := position || '!';
    END LOOP;
    FOREACH operation IN ARRAY operations LOOP
        rows := CASE operation
            WHEN 'INSERT' THEN 'new_rows AS new_row'
            WHEN 'DELETE' THEN 'old_rows AS old_row'
            ELSE format('(SELECT pg_catalog.row_number() OVER () AS %1$I, o.* FROM old_rows AS o) AS old_row
                JOIN (SELECT pg_catalog.row_number() OVER () AS %1$I, n.* FROM new_rows AS n) AS new_row
                    ON old_row.%1$I OPERATOR(pg_catalog.=) new_row.%1$I', position)
                || CASE WHEN failure IS NULL THEN ' AND old_row.* OPERATOR(pg_catalog.*<>) new_row.*' ELSE '' END END;
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
             SELECT $1, $2, (c).row_key, (c).key_was, (c).before, (c).after, $3, coalesce((c).omitted, $4)
             FROM (SELECT tidewire.rendered_change($1, $2, %s, %s, %s, %s) AS c FROM %s %s OFFSET 0) AS changes',
            CASE WHEN operation <> 'INSERT' AND keeps AND failure IS NULL THEN 'old_image.*' ELSE 'NULL' END,
            CASE WHEN operation <> 'INSERT' AND keys IS NOT NULL THEN 'old_key.*' ELSE 'NULL' END,
            CASE WHEN operation <> 'DELETE' AND failure IS NULL THEN 'new_image.*' ELSE 'NULL' END,
            CASE WHEN operation <> 'DELETE' AND keys IS NOT NULL THEN 'new_key.*' ELSE 'NULL' END,
            rows, CASE operation WHEN 'UPDATE' THEN format('ORDER BY old_row.%I', position) END)
        USING name, operation, context, failure;
    END LOOP;
    RETURN NULL;
END $$;

-- As before, but that rows are compared here, in a block that may fail.
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
    bound     boolean;
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
            -- No condition of the trigger: of a row whose values together are larger than any value can be it would fail the write.
            IF TG_OP = 'UPDATE' THEN
                IF OLD *= NEW THEN
                    RETURN NULL;
                END IF;
            END IF;
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
        bound := NOT numbered OR TG_NARGS <= first;
        -- The first columns that there were are still there, so they are still the first, and those are their names.
        IF NOT bound AND strpos(TG_ARGV[0], 'f') > 0 AND starts_with(coalesce(after, before)::text, left(key::text, -1)) THEN
            bound := true;
            FOREACH number IN ARRAY string_to_array(TG_ARGV[5], ' ') LOOP
                bound := bound AND has_column_privilege(relation, number, 'SELECT') IS NOT NULL;
            END LOOP;
        END IF;
        IF bound THEN
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
            FROM (SELECT count(*) FILTER (WHERE attname = key_names[array_position(numbers, attnum)]) AS named
                  FROM pg_attribute
                  WHERE attrelid = relation AND attnum > 0) AS a
            WHERE named = cardinality(numbers);
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
    before := NULL;
    after := NULL;
    key_was := NULL;
    BEGIN
        IF TG_OP <> 'INSERT' THEN
            SELECT r.image, r.key, r.omitted INTO before, key_was, failure_of_old
            FROM tidewire.rendered_slowly(OLD, images, keys, CASE WHEN strpos(TG_ARGV[0], 'b') = 0 THEN '' ELSE failure_of_old END) AS r;
            key := key_was;
        END IF;
        IF TG_OP <> 'DELETE' THEN
            SELECT r.image, r.key, r.omitted INTO after, key, failure_of_new
            FROM tidewire.rendered_slowly(NEW, images, keys, failure_of_new) AS r;
        END IF;
        failure := coalesce(failure_of_new, CASE WHEN strpos(TG_ARGV[0], 'b') > 0 THEN failure_of_old END);
    EXCEPTION
        WHEN transaction_rollback THEN RAISE;
        -- Not even its key can be read: every way to a column leads through the row as one value.
        WHEN OTHERS THEN failure := left(SQLERRM, 1000);
    END;
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
        PERFORM tidewire.warn_of_omission(name, failure);
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, row_key, old_key, before_data, after_data, headers, omitted)
    VALUES (name, TG_OP, key, key_was, before, after, context, failure);
    RETURN NULL;
END $$;

-- As before, without that condition.
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
                     || CASE WHEN relkind = 'r' AND listed.key_numbers <> '' AND listed.key_numbers = listed.first THEN 'f' ELSE '' END,
                     encode(convert_to(options::text, 'UTF8'), 'hex'),
                     listed.attnums::text, listed.names::text, listed.nulls::text, listed.key_numbers]
                   || coalesce(keys, '{}') AS arguments,
               -- A statement's rows are not only the table's own where tables inherit from it, and statements on a table that it
               -- inherits from do not fire its statement triggers.
               (options ->> 'bulk')::boolean AND (relkind = 'p' OR NOT EXISTS (
                   SELECT FROM pg_inherits WHERE inhparent = relation OR inhrelid = relation))
                   -- Nor do statements show what they change in a foreign partition: Postgres refuses them.
                   AND NOT EXISTS (
                       SELECT FROM pg_partition_tree(relation) p JOIN pg_class c ON c.oid = p.relid WHERE c.relkind = 'f') AS bulk,
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
                            array_to_string((array_agg(attnum ORDER BY attnum))[:cardinality(keys)], ' ') AS first,
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
        SELECT relid, false,
               -- Foreign tables have TRUNCATE triggers since Postgres 16.
               isleaf AND (relkind = 'r' OR current_setting('server_version_num')::int >= 160000)
        FROM pg_partition_tree(relation) JOIN pg_class c ON c.oid = relid
        WHERE relid <> relation AND relkind IN ('r', 'p', 'f')),
    wanted (target, name, function, timing, level) AS (
        SELECT target, v.name || coalesce(options ->> 'tag', ''), 'tidewire.capture()'::regprocedure, v.timing, v.level
        FROM given, family, (VALUES
            ('!tidewire', 'AFTER INSERT OR DELETE', 'FOR EACH ROW'),
            ('!tidewire_update', 'AFTER UPDATE', 'FOR EACH ROW')) AS v (name, timing, level)
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

-- As before; a condition is none of ours.
CREATE OR REPLACE FUNCTION tidewire.trigger_faults(relation oid, options jsonb, OUT target oid, OUT name text, OUT definition text,
    OUT fault text) RETURNS SETOF record LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT target, name, definition, fault
    FROM (
        SELECT p.target, p.name, p.definition,
               CASE WHEN t.oid IS NULL THEN 'missing'
                    WHEN tgfoid <> function OR tgqual IS NOT NULL OR tgdeferrable <> (definition LIKE 'CREATE CONSTRAINT%')
                        OR tgargs <> (SELECT string_agg(convert_to(a, getdatabaseencoding()) || '\x00'::bytea, '' ORDER BY n)
                                      FROM unnest(arguments) WITH ORDINALITY AS u (a, n)) THEN 'different'
                    WHEN tgenabled <> CASE WHEN (options ->> 'replica')::boolean THEN 'A' ELSE 'O' END THEN 'disabled' END AS fault
        FROM tidewire.trigger_plan(relation, options) p
        LEFT JOIN pg_trigger t ON tgrelid = p.target AND tgname = p.name) AS judged
    WHERE fault IS NOT NULL;
END $$;

REVOKE ALL ON FUNCTION tidewire.are_bound(oid, int2[], text[]), tidewire.warn_of_omission(text, text) FROM PUBLIC;
DO $$
BEGIN
    IF pg_get_userbyid((SELECT proowner FROM pg_proc WHERE oid = 'tidewire.capture()'::regprocedure)) = 'tidewire_capture' THEN
        GRANT EXECUTE ON FUNCTION tidewire.are_bound(oid, int2[], text[]), tidewire.warn_of_omission(text, text) TO tidewire_capture;
    END IF;
END $$;

RESET ROLE;
