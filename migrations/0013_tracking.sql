-- What escaped those who follow a table: partitions that leave and come back between two looks, foreign partitions, keys that lose
-- a column, types inside types, owners that change, restored dumps; and what `track` costs the writers of a busy table.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;
SELECT set_config('standard_conforming_strings', 'on', true);

-- As before, but a table whose triggers came out of a dump, with the OID that it had there, is there and was not dropped.
CREATE OR REPLACE FUNCTION tidewire.tracked_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name     text;
    restored oid;
BEGIN
    IF TG_OP = 'DELETE' THEN
        DELETE FROM tidewire.capture_gaps WHERE relid = OLD.relid;
        name := coalesce(OLD.fingerprint ->> 'name', OLD.table_name);
        restored := (
            SELECT tgrelid FROM pg_trigger
            WHERE tgparentid = 0 AND tgname LIKE '!tidewire%' AND NOT EXISTS (SELECT FROM pg_class WHERE oid = OLD.relid)
                AND tidewire.table_text(tgrelid) = name AND (tidewire.tracked_options(tgrelid) ->> 'relid')::oid = OLD.relid
            LIMIT 1);
        PERFORM tidewire.tell_schema(coalesce(restored, OLD.relid), name, CASE
            WHEN restored IS NOT NULL THEN jsonb_build_array(jsonb_build_object('kind', 'capture_gap', 'message',
                'the table was restored from a dump: what had changed since that was made is not in the log'))
            WHEN c.oid IS NULL THEN '[{"kind": "drop_table"}]'::jsonb
            WHEN relispartition THEN jsonb_build_array(jsonb_build_object('kind', 'untrack', 'to', tidewire.table_text(pg_partition_root(c.oid))))
            ELSE '[{"kind": "untrack"}]'::jsonb END)
        FROM (SELECT OLD.relid) AS gone LEFT JOIN pg_class c ON c.oid = OLD.relid;
    END IF;
    -- Every node keeps the tracked tables in mind.
    IF tidewire.wake_mode() = 'notify' THEN
        PERFORM pg_notify('tidewire_schema', '');
    END IF;
    RETURN NULL;
END $$;

-- As before, but a key of which a column is gone is none: the others do not tell rows apart. It is kept as it was asked for.
CREATE OR REPLACE FUNCTION tidewire.current_options(relation oid, options jsonb) RETURNS jsonb LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    list     text;
    resolved jsonb;
BEGIN
    FOREACH list IN ARRAY '{key,columns,except_columns}'::text[] LOOP
        CONTINUE WHEN NOT options ? list;
        IF list = 'key' AND tidewire.bound_columns(relation, options, 'key') IS NULL THEN
            options := options - 'key' || jsonb_build_object('key_gone', options -> 'key');
            CONTINUE;
        END IF;
        SELECT coalesce(jsonb_agg(jsonb_build_object('name', attname, 'attnum', attnum) ORDER BY position), '[]') INTO resolved
        FROM unnest(tidewire.column_names(relation, options, list)) WITH ORDINALITY AS t (name, position)
        JOIN pg_attribute ON attrelid = relation AND attname = name AND attnum > 0 AND NOT attisdropped;
        -- Nothing left out is no list; nothing left in is a list of nothing.
        options := CASE WHEN resolved = '[]' AND list <> 'columns' THEN options - list ELSE options || jsonb_build_object(list, resolved) END;
    END LOOP;
    IF (options -> 'primary')::boolean THEN
        options := jsonb_strip_nulls(options - 'key_gone' || jsonb_build_object('key', tidewire.primary_key(relation)));
    END IF;
    RETURN options || jsonb_build_object('relid', relation::bigint);
END $$;

-- As before, but for such a key.
CREATE OR REPLACE FUNCTION tidewire.table_fingerprint(relation oid) RETURNS jsonb LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'name', tidewire.table_text(c.oid),
        'kind', relkind,
        'row_security', relrowsecurity,
        'key', CASE WHEN tidewire.tracked_options(c.oid) ? 'key_gone' THEN 'null' ELSE coalesce(to_jsonb(tidewire.column_names(c.oid, tidewire.tracked_options(c.oid), 'key')),
                        jsonb_path_query_array(tidewire.primary_key(c.oid), '$[*].name'), 'null') END,
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

-- The partitions that hold rows. `links` moves with every ATTACH: the transactions that tied a leaf, and what it hangs on, to the root.
CREATE FUNCTION tidewire.partitions_look(relation oid) RETURNS jsonb LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_build_object(
        'leaves', (SELECT coalesce(jsonb_object_agg(p.relid::oid::text, tidewire.table_text(p.relid)), '{}')
                   FROM pg_partition_tree(relation) p WHERE p.isleaf AND p.relid <> relation),
        -- Leaves that brought rows: not made in place (a column is as it was made, which ATTACH changes in all), or older than a
        -- link between them and the root. A foreign table may have any. A table's tableoid is never altered.
        'attached', (SELECT coalesce(jsonb_agg(DISTINCT p.relid::oid::text), '[]')
                     FROM pg_partition_tree(relation) p
                     JOIN pg_class holder ON holder.oid = p.relid
                     JOIN pg_attribute born ON born.attrelid = p.relid AND born.attname = 'tableoid' AND born.attnum < 0
                     CROSS JOIN LATERAL pg_partition_ancestors(p.relid) AS way (member)
                     JOIN pg_inherits i ON i.inhrelid = way.member
                     WHERE p.isleaf AND p.relid <> relation AND (holder.relkind = 'f' OR pg_relation_size(p.relid) > 0 AND CASE WHEN way.member = p.relid THEN NOT EXISTS (
                                 SELECT FROM pg_attribute a
                                 WHERE a.attrelid = p.relid AND a.attnum > 0 AND a.attinhcount > 0
                                     AND a.xmin = born.xmin AND a.cmin = born.cmin)
                             ELSE age(i.xmin) < age(born.xmin)
                                 OR i.xmin = born.xmin AND i.cmin::text::bigint > born.cmin::text::bigint END)),
        'links', (SELECT coalesce(jsonb_object_agg(leaf, link), '{}')
                  FROM (SELECT p.relid::oid::text AS leaf, string_agg(i.xmin::text, ' ' ORDER BY i.inhrelid) AS link
                        FROM pg_partition_tree(relation) p
                        CROSS JOIN LATERAL pg_partition_ancestors(p.relid) AS way (member)
                        JOIN pg_inherits i ON i.inhrelid = way.member
                        WHERE p.isleaf AND p.relid <> relation
                        GROUP BY p.relid) AS linked))
$$;

-- As before, with those and with types inside of types.
CREATE OR REPLACE FUNCTION tidewire.table_look(relation oid) RETURNS jsonb LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT fingerprint || tidewire.partitions_look(relation) || jsonb_build_object(
        'options', tidewire.tracked_options(relation),
        'storage', (SELECT coalesce(jsonb_object_agg(p.relid::oid::text, c.relfilenode::bigint), '{}')
                    FROM (SELECT relation AS relid UNION SELECT relid FROM pg_partition_tree(relation)) p JOIN pg_class c ON c.oid = p.relid
                    WHERE c.relfilenode <> 0),
        'moved', (SELECT coalesce(jsonb_object_agg(attnum::text, xmin::text), '{}')
                  FROM pg_attribute WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped),
        'types', (SELECT coalesce(jsonb_object_agg(attnum::text, CASE base.typtype
                      WHEN 'e' THEN (SELECT coalesce(jsonb_object_agg(e.oid::text, enumlabel), '{}') FROM pg_enum e WHERE enumtypid = base.oid)
                      ELSE (SELECT coalesce(jsonb_object_agg(m.attnum::text, m.attname::text || ' ' || format_type(m.atttypid, m.atttypmod)), '{}')
                            FROM pg_attribute m WHERE m.attrelid = base.typrelid AND m.attnum > 0 AND NOT m.attisdropped) END), '{}')
                  FROM jsonb_to_recordset(fingerprint -> 'columns') AS col (attnum int, type_oid bigint)
                  JOIN pg_type named ON named.oid = col.type_oid::oid
                  JOIN pg_type base ON base.oid = CASE WHEN named.typcategory = 'A' AND named.typelem <> 0 THEN named.typelem ELSE named.oid END
                  WHERE base.typtype IN ('e', 'c')),
        -- The same however deep inside other types: what to_json writes and filters compare depends on all of it.
        'parts', (
            WITH RECURSIVE part (attnum, path, of_type, said, depth) AS (
                SELECT col.attnum, '', col.type_oid::oid, NULL::text COLLATE "C", 0
                FROM jsonb_to_recordset(fingerprint -> 'columns') AS col (attnum int, type_oid bigint)
                WHERE col.type_oid >= 16384
                UNION ALL
                SELECT p.attnum, p.path || inside.step, inside.of_type, inside.said, p.depth + 1
                FROM part p
                JOIN pg_type t ON t.oid = p.of_type
                CROSS JOIN LATERAL (
                    SELECT '', t.typelem, NULL WHERE t.typcategory = 'A' AND t.typelem <> 0
                    UNION ALL
                    SELECT '', t.typbasetype, NULL WHERE t.typtype = 'd'
                    UNION ALL
                    SELECT '', rngsubtype, NULL FROM pg_range WHERE t.oid IN (rngtypid, rngmultitypid)
                    UNION ALL
                    SELECT '.' || m.attnum, m.atttypid, m.attname::text || ' ' || format_type(m.atttypid, m.atttypmod)
                    FROM pg_attribute m WHERE t.typtype = 'c' AND m.attrelid = t.typrelid AND m.attnum > 0 AND NOT m.attisdropped
                    UNION ALL
                    SELECT '#' || e.oid, 0, e.enumlabel::text FROM pg_enum e WHERE t.typtype = 'e' AND enumtypid = t.oid
                    ) AS inside (step, of_type, said)
                -- Deeper than anybody nests types.
                WHERE p.depth < 32)
            SELECT coalesce(jsonb_object_agg(attnum::text, members), '{}')
            FROM (SELECT attnum, coalesce(jsonb_object_agg(path, said) FILTER (WHERE said IS NOT NULL), '{}') AS members
                  FROM part GROUP BY attnum) AS columns))
    FROM (SELECT tidewire.table_fingerprint(relation) AS fingerprint OFFSET 0) AS shape
    WHERE fingerprint IS NOT NULL
$$;

-- Tells of partitions that came and went, in the statement that makes them: another one of the same transaction may undo it. What
-- was told is noted in the fingerprint, so that the leader does not tell it again.
CREATE FUNCTION tidewire.tell_partitions(relation oid) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    waits   text := current_setting('lock_timeout');
    was     jsonb;
    present jsonb;
    changes jsonb;
BEGIN
    IF (SELECT relkind FROM pg_class WHERE oid = relation) IS DISTINCT FROM 'p' THEN
        RETURN;
    END IF;
    -- The leader holds this row for a moment, and others who alter partitions of the table until they commit: no DDL waits for those.
    PERFORM set_config('lock_timeout', '200ms', true);
    SELECT fingerprint || jsonb_build_object('name', coalesce(fingerprint ->> 'name', table_name)) INTO was
    FROM tidewire.tracked_tables WHERE relid = relation FOR UPDATE;
    PERFORM set_config('lock_timeout', waits, true);
    present := tidewire.partitions_look(relation);
    IF was -> 'leaves' IS NULL OR present -> 'leaves' = was -> 'leaves' AND present -> 'links' = was -> 'links' THEN
        RETURN;
    END IF;
    SELECT jsonb_agg(change ORDER BY turn, leaf) INTO changes
    FROM (
        SELECT 1 AS turn, l.leaf, jsonb_build_object('kind', 'detach_partition', 'from', l.name,
                   'message', 'its rows left the table without an event for each') AS change
        FROM jsonb_each_text(was -> 'leaves') AS l (leaf, name)
        WHERE NOT present -> 'leaves' ? l.leaf OR was -> 'links' -> l.leaf <> present -> 'links' -> l.leaf
        UNION ALL
        SELECT 2, l.leaf, jsonb_build_object('kind', 'attach_partition', 'to', l.name,
                   'message', 'rows that it already had came into the table without an event for each')
        FROM jsonb_each_text(present -> 'leaves') AS l (leaf, name)
        WHERE present -> 'attached' ? l.leaf
            AND (NOT was -> 'leaves' ? l.leaf OR was -> 'links' -> l.leaf <> present -> 'links' -> l.leaf)) AS found;
    UPDATE tidewire.tracked_tables SET fingerprint = fingerprint || present WHERE relid = relation;
    IF changes IS NOT NULL THEN
        PERFORM tidewire.tell_schema(relation, was ->> 'name', changes);
    END IF;
EXCEPTION WHEN OTHERS THEN
    RAISE DEBUG 'tidewire: %', SQLERRM;
    PERFORM tidewire.tell_gap(relation, 'its partitions are altered by several transactions at once: rows may have come or gone');
END $$;

-- Whether a table that is to be captured in bulk has the triggers of the other way than it needs: row triggers while it has a foreign
-- partition, whose rows statement triggers do not see. Null: it has not.
CREATE FUNCTION tidewire.other_way(relation oid, options jsonb) RETURNS regprocedure LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (options ->> 'bulk')::boolean IS NOT TRUE OR (SELECT relkind FROM pg_class WHERE oid = relation) IS DISTINCT FROM 'p' THEN
        RETURN NULL;
    END IF;
    RETURN (
        SELECT tgfoid FROM pg_trigger
        WHERE tgrelid = relation AND tgparentid = 0
            AND tgfoid = CASE WHEN EXISTS (
                SELECT FROM pg_partition_tree(relation) p JOIN pg_class c ON c.oid = p.relid WHERE c.relkind = 'f')
                THEN 'tidewire.capture_bulk()'::regprocedure ELSE 'tidewire.capture()'::regprocedure END
        LIMIT 1);
END $$;

-- As before, with foreign partitions.
CREATE OR REPLACE FUNCTION tidewire.has_gap(relation oid) RETURNS boolean LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    options jsonb := tidewire.tracked_options(relation);
BEGIN
    RETURN options IS NULL
        OR EXISTS (
            SELECT FROM tidewire.trigger_faults(relation, tidewire.current_options(relation, options))
            WHERE fault = 'missing' AND (target = relation OR (options ->> 'bulk')::boolean)
                -- Row triggers that are no longer needed lose nothing.
                AND tidewire.other_way(relation, options) IS DISTINCT FROM 'tidewire.capture()'::regprocedure)
        OR tidewire.other_way(relation, options) = 'tidewire.capture_bulk()'::regprocedure
        -- Row triggers reach partitions as clones, which can be disabled one by one.
        OR EXISTS (
            SELECT FROM pg_trigger
            WHERE tgrelid IN (SELECT relation UNION SELECT relid FROM pg_partition_tree(relation))
                AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                               'tidewire.capture_truncate()'::regprocedure)
                AND (tgenabled IN ('D', 'R') OR tgenabled <> 'A' AND (options ->> 'replica')::boolean));
END $$;

-- As before, but for a table captured in bulk that gets a foreign partition.
CREATE OR REPLACE FUNCTION tidewire.ddl_repairs() RETURNS SETOF text LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r     record;
    whole boolean;
BEGIN
    FOR r IN
        SELECT DISTINCT t.relid AS relation, tidewire.current_options(t.relid, o.options) AS wanted
        FROM pg_event_trigger_ddl_commands() d
        JOIN tidewire.tracked_tables t ON t.relid = coalesce(pg_partition_root(d.objid), d.objid)
        CROSS JOIN LATERAL (SELECT tidewire.tracked_options(t.relid) AS options) AS o
        WHERE d.classid = 'pg_class'::regclass AND o.options IS NOT NULL
    LOOP
        -- A foreign partition came to a table that is captured in bulk: writes through the root would fail. Or the last one went.
        -- Nobody is waited for.
        whole := tidewire.other_way(r.relation, r.wanted) IS NOT NULL;
        IF whole THEN
            RETURN NEXT format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE NOWAIT', r.relation::regclass);
        END IF;
        RETURN QUERY
        WITH locked AS MATERIALIZED (
            SELECT l.relation AS target FROM pg_locks l
            WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.granted
                AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            UNION
            SELECT p.relid FROM pg_partition_tree(r.relation) p WHERE whole),
        faults AS MATERIALIZED (
            SELECT f.* FROM tidewire.trigger_faults(r.relation, r.wanted) f JOIN locked USING (target)
            WHERE f.fault = 'different' OR f.fault = 'missing' AND (f.target <> r.relation OR whole)),
        statements (turn, target, name, statement) AS (
            SELECT 1, tgrelid, tgname::text, format('DROP TRIGGER %I ON %s', tgname, tgrelid::regclass)
            FROM pg_trigger
            WHERE tgparentid = 0 AND tgrelid IN (SELECT target FROM locked)
                AND tgrelid IN (SELECT r.relation UNION SELECT p.relid FROM pg_partition_tree(r.relation) p)
                AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                               'tidewire.capture_truncate()'::regprocedure)
                AND ((tgrelid, tgname) IN (SELECT f.target, f.name FROM faults f)
                    OR (tgrelid <> r.relation OR whole)
                        AND (tgrelid, tgname) NOT IN (SELECT p.target, p.name FROM tidewire.trigger_plan(r.relation, r.wanted) p))
            UNION ALL
            SELECT 2, f.target, f.name, f.definition FROM faults f
            UNION ALL
            SELECT 3, f.target, f.name, format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', f.target::regclass, f.name)
            FROM faults f WHERE (r.wanted ->> 'replica')::boolean)
        SELECT s.statement FROM statements s ORDER BY s.turn, s.target, s.name;
    END LOOP;
END $$;

-- As before, but that partitions are told, and that a new owner may make some.
CREATE OR REPLACE FUNCTION tidewire.ddl_happened() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    concerned oid[];
    relation  oid;
    types     boolean := false;
BEGIN
    IF TG_EVENT = 'sql_drop' THEN
        concerned := ARRAY(
            SELECT DISTINCT t.relid
            FROM pg_event_trigger_dropped_objects() d
            JOIN tidewire.tracked_tables t
                ON d.classid = 'pg_class'::regclass AND (d.objid = t.relid
                    OR d.object_type IN ('table', 'foreign table') AND NOT d.is_temporary AND t.fingerprint -> 'leaves' ? d.objid::text)
                OR d.classid = 'pg_trigger'::regclass AND d.address_names[3] LIKE '!tidewire%'
                    AND t.relid IN (SELECT coalesce(pg_partition_root(c.oid), c.oid)
                                    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                                    WHERE n.nspname = d.address_names[1] AND c.relname = d.address_names[2]));
    ELSE
        concerned := ARRAY(
            SELECT DISTINCT t.relid
            FROM pg_event_trigger_ddl_commands() d
            LEFT JOIN pg_trigger g ON d.classid = 'pg_trigger'::regclass AND g.oid = d.objid
            JOIN tidewire.tracked_tables t
                ON t.relid IN (pg_partition_root(coalesce(g.tgrelid, d.objid)), coalesce(g.tgrelid, d.objid))
            WHERE d.classid IN ('pg_class'::regclass, 'pg_trigger'::regclass));
        types := EXISTS (SELECT FROM pg_event_trigger_ddl_commands() d WHERE d.classid = 'pg_type'::regclass AND TG_TAG LIKE 'ALTER %');
    END IF;
    IF coalesce(current_setting('tidewire.installing', true), '') <> 'on' THEN
        FOREACH relation IN ARRAY concerned LOOP
            -- Tracked tables that this statement made partitions of a tracked one.
            PERFORM tidewire.sync_tracked(t.relid)
            FROM pg_partition_tree(relation) p JOIN tidewire.tracked_tables t ON t.relid = p.relid
            WHERE p.relid <> relation;
            IF TG_TAG IN ('ALTER TABLE', 'ALTER FOREIGN TABLE') AND EXISTS (SELECT FROM pg_class WHERE oid = relation) THEN
                -- An owner who came just now makes partitions, also while nobody looks.
                PERFORM tidewire.let_owner_capture(relation);
            END IF;
            IF TG_EVENT = 'sql_drop' OR TG_TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE SCHEMA', 'CREATE FOREIGN TABLE') THEN
                PERFORM tidewire.tell_partitions(relation);
            END IF;
            IF EXISTS (SELECT FROM pg_class WHERE oid = relation) AND NOT (SELECT relispartition FROM pg_class WHERE oid = relation) THEN
                PERFORM tidewire.notice_gap(relation);
            END IF;
        END LOOP;
    END IF;
    IF (concerned <> '{}' OR types) AND tidewire.wake_mode() = 'notify' THEN
        PERFORM pg_notify('tidewire_schema', '');
    END IF;
EXCEPTION WHEN OTHERS THEN
    -- The leader's own look finds the change a few seconds later.
    RAISE DEBUG 'tidewire: %', SQLERRM;
END $$;

-- Puts triggers on a table or takes them off without holding up its writers: whoever waits for a table's lock stops everybody behind
-- him. Each try waits a second at most (of two, writers have one), five tries, or as long as the caller's own lock_timeout says.
CREATE FUNCTION tidewire.install_soon(relation oid, options jsonb) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tries    CONSTANT int := 5;
    own      boolean := current_setting('lock_timeout') = '0';
    attempt  int := 1;
    holder   text;
BEGIN
    LOOP
        BEGIN
            IF own THEN
                PERFORM set_config('lock_timeout', '1s', true);
            END IF;
            PERFORM tidewire.install_triggers(relation, options);
            IF own THEN
                PERFORM set_config('lock_timeout', '0', true);
            END IF;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            -- The settings are as before, and the locks are given up.
            SELECT format('process %s%s%s holds a lock on %s', l.pid, ' of role ' || a.usename,
                       ', in a transaction since ' || date_trunc('second', clock_timestamp() - a.xact_start), tidewire.table_text(l.relation))
            INTO holder
            FROM pg_locks l
            LEFT JOIN pg_stat_activity a ON a.pid = l.pid
            WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_backend_pid()
                AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND l.relation IN (SELECT install_soon.relation UNION SELECT p.relid FROM pg_partition_tree(install_soon.relation) p)
                AND (l.mode <> 'AccessShareLock' OR tidewire.tracked_options(install_soon.relation) IS NOT NULL)
                AND l.mode <> 'RowShareLock'
            ORDER BY a.xact_start
            LIMIT 1;
            IF attempt = tries OR NOT own THEN
                RAISE lock_not_available USING
                    MESSAGE = format('table %s is in use: %s', tidewire.table_text(relation),
                        coalesce(holder, 'another transaction holds a lock on it')),
                    HINT = format('Wait until that transaction ends, or end it with SELECT pg_terminate_backend(pid); then try again. Nothing was changed%s.',
                        CASE WHEN own THEN ', and writers were held up for a second at a time' ELSE '' END);
            END IF;
        END;
        attempt := attempt + 1;
        PERFORM pg_sleep(1);
    END LOOP;
END $$;

-- As before, in turns with its writers, and with a warning of triggers that change rows.
CREATE OR REPLACE FUNCTION tidewire.track("table" regclass, columns text[] DEFAULT NULL, except_columns text[] DEFAULT NULL, key text[] DEFAULT NULL,
    before_image boolean DEFAULT true, notify boolean DEFAULT false, bulk boolean DEFAULT false, deferred boolean DEFAULT false,
    replica boolean DEFAULT false) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation oid := "table";
    channel  text := tidewire.notify_channel("table");
    keys     jsonb;
    listed   jsonb;
    excepted jsonb;
    problem  text;
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
    problem := tidewire.key_problem(relation, ARRAY(SELECT k ->> 'name' FROM jsonb_array_elements(nullif(keys, 'null')) k));
    IF keys IS NOT NULL AND problem IS NOT NULL THEN
        RAISE WARNING 'table %: %', tidewire.table_text(relation), problem;
    END IF;
    IF bulk AND EXISTS (
        SELECT FROM pg_trigger
        WHERE NOT tgisinternal AND tgparentid = 0 AND tgtype & 1 = 1 AND tgtype & 66 = 0 AND tgname NOT LIKE '!tidewire%'
            AND tgrelid IN (SELECT relation UNION SELECT p.relid FROM pg_partition_tree(relation) p)) THEN
        RAISE WARNING 'table % has AFTER ROW triggers of its own: where one changes rows of this table, bulk gives their events a wrong order, also those of the row that it fires for',
            tidewire.table_text(relation) USING HINT = 'Track it without bulk, or make it a BEFORE trigger.';
    END IF;
    -- The key is always carried.
    listed := tidewire.resolve_columns(relation, columns);
    listed := listed || coalesce((SELECT jsonb_agg(k) FROM jsonb_array_elements(keys) k WHERE NOT listed @> jsonb_build_array(k)), '[]');

    PERFORM tidewire.install_soon(relation, jsonb_strip_nulls(jsonb_build_object(
        'relid', relation::bigint, 'key', keys, 'primary', CASE WHEN key IS NULL THEN true END, 'columns', listed,
        'except_columns', excepted, 'before_image', before_image, 'notify', notify, 'bulk', bulk, 'deferred', deferred,
        'replica', replica,
        -- Part of the names of triggers that partitions get copies of: a tracked table that is attached has its own.
        'tag', (SELECT '_' || oid FROM pg_class WHERE oid = relation AND relkind = 'p'))));
    PERFORM tidewire.sync_tracked(relation);
END $$;

CREATE OR REPLACE FUNCTION tidewire.untrack("table" regclass) RETURNS void LANGUAGE plpgsql
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
        PERFORM tidewire.install_soon(relation, NULL);
    END IF;
    PERFORM tidewire.sync_tracked(relation);
END $$;
COMMENT ON FUNCTION tidewire.track(regclass, text[], text[], text[], boolean, boolean, boolean, boolean, boolean) IS
    'Captures every change of a table from now on. Called again it changes the options to those given. deferred: events are written at the commit; until then the transaction may neither ALTER nor TRUNCATE a table that it has written to. bulk: one call for each statement; the events of AFTER ROW triggers that change rows of the table come before those of the statement itself.';

-- As before, but that tables captured in bulk get row triggers with their first foreign partition.
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
               CASE WHEN o.options IS NOT NULL THEN tidewire.current_options(c.oid, o.options) END AS wanted,
               tidewire.other_way(c.oid, o.options) IS NOT NULL AS changes_way
        FROM tidewire.tracked_tables t
        LEFT JOIN pg_class c ON c.oid = t.relid
        LEFT JOIN LATERAL (SELECT tidewire.tracked_options(c.oid) AS options) AS o ON true
        ORDER BY t.relid
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
            IF EXISTS (SELECT FROM tidewire.tracked_tables t WHERE t.relid = pg_partition_root(r.present)) THEN
                -- The root's turn takes off what it brought along.
                PERFORM tidewire.sync_tracked(r.present);
                CONTINUE;
            END IF;
            problem := 'attached';
            detail := tidewire.table_text(pg_partition_root(r.present));
            RETURN NEXT;
        END IF;
        FOR f IN
            SELECT * FROM tidewire.trigger_faults(r.present, r.wanted)
            UNION ALL
            SELECT tgrelid, tgname::text, NULL, 'surplus'
            FROM pg_trigger
            WHERE tgparentid = 0 AND tgrelid <> r.present AND tgrelid IN (SELECT p.relid FROM pg_partition_tree(r.present) p)
                AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                               'tidewire.capture_truncate()'::regprocedure)
                AND (tgrelid, tgname) NOT IN (SELECT p.target, p.name FROM tidewire.trigger_plan(r.present, r.wanted) p)
        LOOP
            IF f.fault IN ('different', 'surplus') OR (f.fault = 'missing' AND (f.target <> r.present OR r.changes_way)) THEN
                BEGIN
                    PERFORM tidewire.install_triggers(r.present, r.wanted);
                    EXIT;
                EXCEPTION
                    WHEN insufficient_privilege THEN
                        -- Triggers of an older release that say the same in another form lose nothing.
                        problem := CASE WHEN f.fault = 'different' AND r.options = r.wanted AND EXISTS (
                                SELECT FROM pg_trigger
                                WHERE tgrelid = f.target AND tgname = f.name AND strpos(f.definition, tgfoid::regproc::text || '(') > 0)
                            THEN 'trigger_outdated' ELSE 'repair_refused' END;
                        detail := format('%s on %s is %s: %s', f.name, tidewire.table_text(f.target), f.fault, SQLERRM);
                        RETURN NEXT;
                        EXIT;
                    WHEN OTHERS THEN
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

CREATE OR REPLACE FUNCTION tidewire.grant_tracking(role regrole) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA tidewire TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION
        tidewire.track(regclass, text[], text[], text[], boolean, boolean, boolean, boolean, boolean), tidewire.untrack(regclass),
        tidewire.check_trackable(oid), tidewire.install_triggers(oid, jsonb), tidewire.install_soon(oid, jsonb), tidewire.trigger_plan(oid, jsonb),
        tidewire.trigger_faults(oid, jsonb), tidewire.tracked_options(oid), tidewire.sync_tracked(oid),
        tidewire.resolve_columns(oid, text[]), tidewire.primary_key(oid), tidewire.notify_channel(oid),
        tidewire.column_names(oid, jsonb, text), tidewire.options_of(text), tidewire.table_text(oid), tidewire.name_text(text),
        tidewire.key_problem(oid, text[]), tidewire.ddl_repairs(),
        tidewire.capture(), tidewire.capture_bulk(), tidewire.capture_truncate() TO %s', role);
END $$;

-- Those that were granted tracking before may go on.
DO $$
DECLARE
    grantee regrole;
BEGIN
    FOR grantee IN
        SELECT DISTINCT a.grantee::regrole
        FROM pg_catalog.pg_proc p, aclexplode(p.proacl) a
        WHERE p.oid = 'tidewire.untrack(regclass)'::regprocedure AND a.grantee <> p.proowner AND a.grantee <> 0
    LOOP
        PERFORM tidewire.grant_tracking(grantee);
    END LOOP;
END $$;

-- Backslashes in these bodies mean themselves, whatever the session, the role or the database has set. Not in what every write
-- calls: there are none, and each setting costs.
DO $$
DECLARE
    f regprocedure;
BEGIN
    FOR f IN
        SELECT p.oid FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = 'tidewire'::regnamespace AND p.proowner = (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user)
            AND p.proconfig IS NOT NULL AND p.proname NOT LIKE 'capture%' AND p.proname NOT IN ('emit', 'context_headers', 'ring')
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET standard_conforming_strings = on', f);
        -- Nothing new is for everybody.
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
    END LOOP;
END $$;

RESET ROLE;

-- ALWAYS: who alters a table with session_replication_role = replica (restores do) makes the same gaps. Foreign tables are partitions
-- too.
DO $$
BEGIN
    DROP EVENT TRIGGER IF EXISTS tidewire_attach;
    CREATE EVENT TRIGGER tidewire_attach ON ddl_command_end
        WHEN TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE SCHEMA', 'CREATE FOREIGN TABLE')
        EXECUTE FUNCTION tidewire.ddl_repair();
    DROP EVENT TRIGGER IF EXISTS tidewire_ddl;
    CREATE EVENT TRIGGER tidewire_ddl ON ddl_command_end
        WHEN TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE TRIGGER', 'ALTER TRIGGER', 'CREATE INDEX', 'ALTER SCHEMA', 'CREATE SCHEMA',
                     'ALTER TYPE', 'ALTER DOMAIN', 'CREATE FOREIGN TABLE', 'ALTER FOREIGN TABLE')
        EXECUTE FUNCTION tidewire.ddl_happened();
    ALTER EVENT TRIGGER tidewire_attach ENABLE ALWAYS;
    ALTER EVENT TRIGGER tidewire_ddl ENABLE ALWAYS;
    ALTER EVENT TRIGGER tidewire_drop ENABLE ALWAYS;
EXCEPTION WHEN insufficient_privilege OR undefined_object THEN
    RAISE NOTICE 'tidewire: role % may not create event triggers; schema changes are found by looking every few seconds', current_user;
END $$;
