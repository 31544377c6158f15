-- Tracking: which tables are captured, and how they look now. track() and untrack() run with the caller's rights, because
-- only the owner of a table may put triggers on it; what they write in this schema goes through two functions that
-- believe nothing but the catalog.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- The channel of plain LISTEN users of a table tracked with `notify`.
CREATE FUNCTION tidewire.notify_channel(relation oid) RETURNS text LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE nspname WHEN 'public' THEN 'cdc_' || relname ELSE 'cdc_' || nspname || '_' || relname END
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE c.oid = relation
$$;

-- [{"name", "attnum"}] of named columns, in their order; raises for one that does not exist.
CREATE FUNCTION tidewire.resolve_columns(relation oid, names text[]) RETURNS jsonb LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    unknown  text;
    resolved jsonb;
BEGIN
    IF names IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT min(n) FILTER (WHERE attnum IS NULL), coalesce(jsonb_agg(jsonb_build_object('name', n, 'attnum', attnum) ORDER BY position), '[]')
    INTO unknown, resolved
    FROM unnest(names) WITH ORDINALITY AS t (n, position)
    LEFT JOIN pg_attribute ON attrelid = relation AND attname = n AND attnum > 0 AND NOT attisdropped;
    IF unknown IS NOT NULL OR array_position(names, NULL) IS NOT NULL THEN
        RAISE undefined_column USING
            MESSAGE = format('table %s has no column %s', tidewire.table_text(relation), coalesce(quote_ident(unknown), 'NULL')),
            HINT = (SELECT 'Its columns are: ' || string_agg(quote_ident(attname), ', ' ORDER BY attnum) || '.'
                    FROM pg_attribute WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped);
    END IF;
    RETURN resolved;
END $$;

CREATE FUNCTION tidewire.primary_key(relation oid) RETURNS jsonb LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_agg(jsonb_build_object('name', attname, 'attnum', attnum) ORDER BY position)
        FROM pg_constraint, unnest(conkey) WITH ORDINALITY AS t (k, position)
        JOIN pg_attribute ON attnum = k
        WHERE conrelid = relation AND contype = 'p' AND attrelid = conrelid);
END $$;

-- Every trigger that tracking with these options means, on the table itself and on its partitions.
CREATE FUNCTION tidewire.trigger_plan(relation oid, options jsonb, OUT target oid, OUT name text, OUT function oid,
    OUT arguments text[], OUT definition text) RETURNS SETOF record LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH given AS (
        SELECT ARRAY[CASE WHEN relkind = 'p' THEN 'p' ELSE '' END
                     || CASE WHEN (options ->> 'before_image')::boolean THEN 'b' ELSE '' END
                     || CASE WHEN options ? 'columns' THEN 'i' WHEN options ? 'except_columns' THEN 'x' ELSE '' END,
                     encode(convert_to(options::text, 'UTF8'), 'hex'),
                     listed.attnums::text, listed.names::text, listed.nulls::text]
                   || coalesce(keys, '{}') AS arguments,
               (options ->> 'bulk')::boolean AS bulk, (options ->> 'deferred')::boolean AS deferred
        FROM pg_class,
            LATERAL (SELECT tidewire.column_names(relation, options, 'key') AS keys,
                            coalesce(tidewire.column_names(relation, options, 'columns'), tidewire.column_names(relation, options, 'except_columns')) AS names) AS n,
            -- Domains are left alone: one may forbid null.
            LATERAL (SELECT coalesce(array_agg(attnum ORDER BY attnum) FILTER (WHERE attname = ANY (n.names)), '{}') AS attnums,
                            coalesce(array_agg(attname ORDER BY attnum) FILTER (WHERE attname = ANY (n.names)), '{}') AS names,
                            coalesce(json_object_agg(attname, NULL ORDER BY attnum) FILTER (WHERE typtype <> 'd' AND attname <> ALL (coalesce(keys, '{}'))
                                AND (attname = ANY (n.names)) = options ? 'except_columns'), '{}') AS nulls
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
        SELECT target, v.name::text, 'tidewire.capture()'::regprocedure, v.timing, v.level
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

-- The planned triggers that are not there as planned.
CREATE FUNCTION tidewire.trigger_faults(relation oid, options jsonb, OUT target oid, OUT name text, OUT definition text,
    OUT fault text) RETURNS SETOF record LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT target, name, definition, fault
    FROM (
        SELECT p.target, p.name, p.definition,
               CASE WHEN t.oid IS NULL THEN 'missing'
                    WHEN tgfoid <> function OR tgdeferrable <> (definition LIKE 'CREATE CONSTRAINT%')
                        OR tgargs <> (SELECT string_agg(convert_to(a, getdatabaseencoding()) || '\x00'::bytea, '' ORDER BY n)
                                      FROM unnest(arguments) WITH ORDINALITY AS u (a, n)) THEN 'different'
                    WHEN tgenabled <> CASE WHEN (options ->> 'replica')::boolean THEN 'A' ELSE 'O' END THEN 'disabled' END AS fault
        FROM tidewire.trigger_plan(relation, options) p
        LEFT JOIN pg_trigger t ON tgrelid = p.target AND tgname = p.name) AS judged
    WHERE fault IS NOT NULL;
END $$;

-- The options that the triggers of a table carry; null if it is not tracked.
CREATE FUNCTION tidewire.tracked_options(relation oid) RETURNS jsonb LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT tidewire.options_of(split_part(encode(tgargs, 'escape'), '\000', 2))
        FROM pg_trigger
        WHERE tgrelid = relation AND tgparentid = 0 AND tgname LIKE '!tidewire%'
            AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                           'tidewire.capture_truncate()'::regprocedure)
        ORDER BY tgname LIMIT 1);
END $$;

-- The same options with today's names and numbers: of columns that were renamed, of the primary key if that is the key, of a
-- table that was restored from a dump. Columns that are gone are left out.
CREATE FUNCTION tidewire.current_options(relation oid, options jsonb) RETURNS jsonb LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    list     text;
    resolved jsonb;
BEGIN
    FOREACH list IN ARRAY '{key,columns,except_columns}'::text[] LOOP
        CONTINUE WHEN NOT options ? list;
        SELECT coalesce(jsonb_agg(jsonb_build_object('name', attname, 'attnum', attnum) ORDER BY position), '[]') INTO resolved
        FROM unnest(tidewire.column_names(relation, options, list)) WITH ORDINALITY AS t (name, position)
        JOIN pg_attribute ON attrelid = relation AND attname = name AND attnum > 0 AND NOT attisdropped;
        -- Nothing left out is no list; nothing left in is a list of nothing.
        options := CASE WHEN resolved = '[]' AND list <> 'columns' THEN options - list ELSE options || jsonb_build_object(list, resolved) END;
    END LOOP;
    IF (options -> 'primary')::boolean THEN
        options := jsonb_strip_nulls(options || jsonb_build_object('key', tidewire.primary_key(relation)));
    END IF;
    RETURN options || jsonb_build_object('relid', relation::bigint);
END $$;

-- How a table (or view) looks to a subscriber: compared by the leader to see what changed. Null if there is none.
CREATE FUNCTION tidewire.table_fingerprint(relation oid) RETURNS jsonb LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'name', tidewire.table_text(c.oid),
        'kind', relkind,
        'row_security', relrowsecurity,
        'key', coalesce(to_jsonb(tidewire.column_names(c.oid, tidewire.tracked_options(c.oid), 'key')),
                        jsonb_path_query_array(tidewire.primary_key(c.oid), '$[*].name'), 'null'),
        'columns', (
            SELECT coalesce(jsonb_agg(jsonb_build_object(
                'attnum', attnum, 'name', attname, 'type', format_type(atttypid, atttypmod), 'type_oid', base.oid::bigint,
                'type_name', base.typname, 'type_kind', base.typtype, 'not_null', attnotnull) ORDER BY attnum), '[]')
            FROM pg_attribute
            CROSS JOIN LATERAL (
                WITH RECURSIVE domain AS (
                    SELECT t.oid, t.typname, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid = atttypid
                    UNION ALL
                    SELECT t.oid, t.typname, t.typtype, t.typbasetype FROM pg_type t JOIN domain d ON t.oid = d.typbasetype AND d.typtype = 'd')
                SELECT d.oid, d.typname, d.typtype FROM domain d WHERE d.typtype <> 'd') AS base
            WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped),
        'triggers', (
            SELECT coalesce(jsonb_object_agg(tgname, tgenabled), '{}')
            FROM pg_trigger WHERE tgrelid = c.oid AND tgname LIKE '!tidewire%'),
        'partitions', (
            SELECT coalesce(jsonb_agg(tidewire.table_text(relid) ORDER BY relid), '[]')
            FROM pg_partition_tree(c.oid) WHERE isleaf AND relid <> c.oid))
    FROM pg_class c
    WHERE c.oid = relation AND relkind IN ('r', 'p', 'v', 'm', 'f')
$$;
COMMENT ON FUNCTION tidewire.table_fingerprint(oid) IS 'Name, columns, key, capture triggers and partitions of a table; null if it is gone.';

-- Writes what the catalog says about a table's capture triggers; nothing is taken from the caller but which table.
CREATE FUNCTION tidewire.sync_tracked(relation oid) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    o        jsonb := tidewire.tracked_options(relation);
    known    tidewire.tracked_tables;
    seen     tidewire.tracked_tables;
    is_known boolean;
BEGIN
    IF o IS NULL THEN
        DELETE FROM tidewire.tracked_tables t WHERE relid = relation;
        RETURN;
    END IF;
    -- A table of that name that is gone (dropped, or from before a restore).
    DELETE FROM tidewire.tracked_tables t
    WHERE t.table_name = tidewire.table_text(relation) AND t.relid <> relation AND NOT EXISTS (SELECT FROM pg_class WHERE oid = t.relid);
    SET CONSTRAINTS tidewire.tracked_tables_table_name_key DEFERRED;
    SELECT * INTO known FROM tidewire.tracked_tables t WHERE t.relid = relation;
    is_known := FOUND;
    seen := known;
    seen.relid := relation;
    seen.table_name := tidewire.table_text(relation);
    seen.key_columns := tidewire.column_names(relation, o, 'key');
    seen.columns := tidewire.column_names(relation, o, 'columns');
    seen.except_columns := tidewire.column_names(relation, o, 'except_columns');
    seen.before_image := o -> 'before_image';
    seen.notify := o -> 'notify';
    seen.bulk := o -> 'bulk';
    seen.deferred := o -> 'deferred';
    seen.replica := o -> 'replica';
    IF NOT is_known THEN
        seen.fingerprint := tidewire.table_fingerprint(relation);
        seen.tracked_at := now();
        INSERT INTO tidewire.tracked_tables SELECT seen.* ON CONFLICT (relid) DO NOTHING;
    ELSIF seen IS DISTINCT FROM known THEN
        UPDATE tidewire.tracked_tables t
        SET table_name = seen.table_name, key_columns = seen.key_columns, columns = seen.columns,
            except_columns = seen.except_columns, before_image = seen.before_image, notify = seen.notify, bulk = seen.bulk,
            deferred = seen.deferred, replica = seen.replica
        WHERE t.relid = relation;
    END IF;
END $$;

-- Puts the planned triggers on a table and its partitions and takes all other capture triggers away. With the caller's rights.
CREATE FUNCTION tidewire.install_triggers(relation oid, options jsonb) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    t record;
BEGIN
    FOR t IN
        SELECT tgrelid::regclass AS target, tgname AS name
        FROM pg_trigger
        WHERE tgparentid = 0 AND tgrelid IN (SELECT relation UNION SELECT relid FROM pg_partition_tree(relation))
            AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                           'tidewire.capture_truncate()'::regprocedure)
            AND (options IS NULL
                OR (tgrelid, tgname) IN (SELECT f.target, f.name FROM tidewire.trigger_faults(relation, options) f)
                OR (tgrelid, tgname) NOT IN (SELECT p.target, p.name FROM tidewire.trigger_plan(relation, options) p))
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', t.name, t.target);
    END LOOP;
    IF options IS NULL THEN
        RETURN;
    END IF;
    FOR t IN SELECT * FROM tidewire.trigger_faults(relation, options) LOOP
        EXECUTE t.definition;
        IF (options ->> 'replica')::boolean THEN
            EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', t.target::regclass, t.name);
        END IF;
    END LOOP;
END $$;

-- Whether a table can be tracked by this caller; raises if not.
CREATE FUNCTION tidewire.check_trackable(relation oid) RETURNS void LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r    record;
    name text := tidewire.table_text(relation);
BEGIN
    SELECT c.*, nspname INTO r FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = relation;
    IF NOT FOUND THEN
        RAISE undefined_table USING MESSAGE = format('there is no table with OID %s', relation);
    ELSIF r.nspname = 'tidewire' THEN
        RAISE invalid_parameter_value USING MESSAGE = format('%s belongs to Tidewire and cannot be tracked', name);
    ELSIF r.nspname IN ('pg_catalog', 'information_schema', 'pg_toast') THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('%s is a system table and cannot be tracked', name),
            HINT = 'Postgres fires no triggers on its catalogs.';
    ELSIF r.relkind NOT IN ('r', 'p') THEN
        RAISE wrong_object_type USING
            MESSAGE = format('%s is a %s, not a table, and cannot be tracked', name, CASE r.relkind WHEN 'v' THEN 'view'
                WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'S' THEN 'sequence' WHEN 'i' THEN 'index'
                WHEN 'I' THEN 'index' WHEN 'c' THEN 'type' ELSE format('relation of kind %s', r.relkind) END),
            HINT = 'Track the tables that it is made of.';
    ELSIF r.relpersistence = 't' THEN
        RAISE wrong_object_type USING MESSAGE = format('%s is a temporary table and cannot be tracked', name);
    ELSIF r.relispartition THEN
        RAISE wrong_object_type USING
            MESSAGE = format('%s is a partition of %s', name, tidewire.table_text(pg_partition_root(relation))),
            HINT = format('Track the whole table: SELECT tidewire.track(%L).', pg_partition_root(relation)::regclass);
    ELSIF NOT pg_has_role(r.relowner, 'USAGE') THEN
        RAISE insufficient_privilege USING
            MESSAGE = format('role %s may not track table %s', current_user, name),
            HINT = format('Only its owner %s, a member of that role or a superuser can put triggers on it.', pg_get_userbyid(r.relowner));
    END IF;
    IF r.relpersistence = 'u' THEN
        RAISE WARNING 'table % is unlogged: after a crash Postgres empties it without an event', name;
    END IF;
    IF EXISTS (SELECT FROM pg_inherits WHERE inhparent = relation) AND r.relkind = 'r' THEN
        RAISE WARNING 'tables that inherit from % are not captured with it; track each of them', name;
    END IF;
END $$;

CREATE FUNCTION tidewire.track("table" regclass, columns text[] DEFAULT NULL, except_columns text[] DEFAULT NULL, key text[] DEFAULT NULL,
    before_image boolean DEFAULT true, notify boolean DEFAULT false, bulk boolean DEFAULT false, deferred boolean DEFAULT false,
    replica boolean DEFAULT false) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation oid := "table";
    channel  text := tidewire.notify_channel("table");
    keys     jsonb;
    listed   jsonb;
    excepted jsonb;
BEGIN
    IF relation IS NULL OR before_image IS NULL OR notify IS NULL OR bulk IS NULL OR deferred IS NULL OR replica IS NULL THEN
        RAISE null_value_not_allowed USING MESSAGE = 'the table and the switches of tidewire.track() must not be null';
    END IF;
    PERFORM tidewire.check_trackable(relation);
    IF columns IS NOT NULL AND except_columns IS NOT NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = 'columns and except_columns exclude each other', HINT = 'Name the columns to carry, or those to leave out.';
    ELSIF bulk AND deferred THEN
        RAISE invalid_parameter_value USING
            MESSAGE = 'bulk and deferred exclude each other', HINT = 'Only row triggers can wait for the end of the transaction.';
    ELSIF notify AND octet_length(channel) > 63 THEN
        RAISE name_too_long USING
            MESSAGE = format('the channel %L of table %s is longer than 63 bytes', channel, tidewire.table_text(relation)),
            HINT = 'Track the table without notify, or give it a shorter name.';
    ELSIF notify AND EXISTS (SELECT FROM pg_trigger WHERE tgrelid <> relation AND tgparentid = 0 AND tgname = '!tidewire_truncate'
            AND tgfoid = 'tidewire.capture_truncate()'::regprocedure AND tidewire.notify_channel(tgrelid) = channel
            AND (tidewire.tracked_options(tgrelid) ->> 'notify')::boolean) THEN
        RAISE duplicate_object USING MESSAGE = format('the channel %L already belongs to another tracked table', channel);
    END IF;

    keys := CASE WHEN key IS NULL THEN tidewire.primary_key(relation) ELSE tidewire.resolve_columns(relation, nullif(key, '{}')) END;
    excepted := tidewire.resolve_columns(relation, nullif(except_columns, '{}'));
    IF EXISTS (SELECT FROM jsonb_array_elements(excepted) e JOIN jsonb_array_elements(keys) k ON e = k) THEN
        RAISE invalid_parameter_value USING
            MESSAGE = 'a key column cannot be left out', HINT = 'Every event carries its row''s key.';
    END IF;
    -- The key is always carried.
    listed := tidewire.resolve_columns(relation, columns);
    listed := listed || coalesce((SELECT jsonb_agg(k) FROM jsonb_array_elements(keys) k WHERE NOT listed @> jsonb_build_array(k)), '[]');

    PERFORM tidewire.install_triggers(relation, jsonb_strip_nulls(jsonb_build_object(
        'relid', relation::bigint, 'key', keys, 'primary', CASE WHEN key IS NULL THEN true END, 'columns', listed,
        'except_columns', excepted, 'before_image', before_image, 'notify', notify, 'bulk', bulk, 'deferred', deferred,
        'replica', replica)));
    PERFORM tidewire.sync_tracked(relation);
END $$;
COMMENT ON FUNCTION tidewire.track(regclass, text[], text[], text[], boolean, boolean, boolean, boolean, boolean) IS
    'Captures every change of a table from now on. Called again it changes the options to those given.';

CREATE FUNCTION tidewire.untrack("table" regclass) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation oid := "table";
BEGIN
    IF tidewire.tracked_options(relation) IS NULL THEN
        RAISE NOTICE 'table % is not tracked', tidewire.table_text(relation);
    ELSE
        IF NOT pg_has_role((SELECT relowner FROM pg_class WHERE oid = relation), 'USAGE') THEN
            RAISE insufficient_privilege USING
                MESSAGE = format('role %s may not untrack table %s', current_user, tidewire.table_text(relation)),
                HINT = 'Only its owner, a member of that role or a superuser can take triggers off it.';
        END IF;
        PERFORM tidewire.install_triggers(relation, NULL);
    END IF;
    PERFORM tidewire.sync_tracked(relation);
END $$;
COMMENT ON FUNCTION tidewire.untrack(regclass) IS 'Stops capturing a table.';

-- What is wrong with tracked tables, after repairing what can be: triggers on new partitions, a primary key that changed,
-- and what a dump and restore renumbered. A missing or disabled trigger is reported, never put back: changes were lost
-- meanwhile, and it may have been meant. Called by the leader every few seconds; waits for no lock longer than a moment.
CREATE FUNCTION tidewire.refresh_tracked(OUT relid oid, OUT table_name text, OUT problem text, OUT detail text)
    RETURNS SETOF record LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    r record;
    f record;
BEGIN
    -- Tables that bear our triggers and are not known: restored from a dump, where everything has another OID.
    PERFORM tidewire.sync_tracked(tgrelid)
    FROM pg_trigger
    WHERE tgname = '!tidewire_truncate' AND tgfoid = 'tidewire.capture_truncate()'::regprocedure
        AND NOT (SELECT relispartition FROM pg_class WHERE oid = tgrelid)
        AND tgrelid NOT IN (SELECT t.relid FROM tidewire.tracked_tables t);
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
COMMENT ON FUNCTION tidewire.refresh_tracked() IS
    'Repairs capture triggers where that is safe and returns what is wrong: dropped, attached, trigger_missing, trigger_disabled, partition_trigger_missing, trigger_outdated.';

-- With event triggers the leader hears of a change at once instead of at its next look. They tell nothing but "look", only
-- for tracked tables, only if writers may notify at all (PREPARE TRANSACTION), and cannot fail a user's statement.
CREATE FUNCTION tidewire.ddl_happened() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    concerned boolean;
BEGIN
    IF tidewire.wake_mode() IS DISTINCT FROM 'notify' THEN
        RETURN;
    END IF;
    IF TG_EVENT = 'sql_drop' THEN
        concerned := EXISTS (
            SELECT FROM pg_event_trigger_dropped_objects() d
            WHERE (d.classid = 'pg_class'::regclass AND d.objid IN (SELECT relid FROM tidewire.tracked_tables))
                OR (d.classid = 'pg_trigger'::regclass AND d.object_identity LIKE '%!tidewire%'));
    ELSE
        concerned := EXISTS (
            SELECT FROM pg_event_trigger_ddl_commands() d
            JOIN tidewire.tracked_tables t ON t.relid = coalesce(pg_partition_root(d.objid), d.objid)
            WHERE d.classid = 'pg_class'::regclass);
    END IF;
    IF concerned THEN
        PERFORM pg_notify('tidewire_schema', '');
    END IF;
EXCEPTION WHEN OTHERS THEN
    -- The leader's own look finds the change a few seconds later.
    RAISE DEBUG 'tidewire: %', SQLERRM;
END $$;

-- For roles that own tables and are no members of tidewire_owner.
CREATE FUNCTION tidewire.grant_tracking(role regrole) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA tidewire TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION
        tidewire.track(regclass, text[], text[], text[], boolean, boolean, boolean, boolean, boolean), tidewire.untrack(regclass),
        tidewire.check_trackable(oid), tidewire.install_triggers(oid, jsonb), tidewire.trigger_plan(oid, jsonb),
        tidewire.trigger_faults(oid, jsonb), tidewire.tracked_options(oid), tidewire.sync_tracked(oid),
        tidewire.resolve_columns(oid, text[]), tidewire.primary_key(oid), tidewire.notify_channel(oid),
        tidewire.column_names(oid, jsonb, text), tidewire.options_of(text), tidewire.table_text(oid), tidewire.name_text(text),
        tidewire.capture(), tidewire.capture_bulk(), tidewire.capture_truncate() TO %s', role);
END $$;
COMMENT ON FUNCTION tidewire.grant_tracking(regrole) IS 'Lets a role track and untrack the tables that it owns.';

DO $$
DECLARE
    f regprocedure;
BEGIN
    FOR f IN
        SELECT p.oid FROM pg_proc p
        WHERE pronamespace = 'tidewire'::regnamespace AND proname <> 'emit' AND proowner = (SELECT oid FROM pg_roles WHERE rolname = current_user)
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
    END LOOP;
END $$;

RESET ROLE;

DO $$
BEGIN
    CREATE EVENT TRIGGER tidewire_ddl ON ddl_command_end
        WHEN TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE TRIGGER', 'ALTER TRIGGER', 'CREATE INDEX', 'ALTER SCHEMA')
        EXECUTE FUNCTION tidewire.ddl_happened();
    CREATE EVENT TRIGGER tidewire_drop ON sql_drop EXECUTE FUNCTION tidewire.ddl_happened();
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE 'tidewire: role % may not create event triggers; schema changes are found by looking every few seconds', current_user;
END $$;
