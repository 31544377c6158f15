-- What people ran into with tracking: gaps that nobody was told of, partitions that nobody repaired, tables that change hands.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;
SELECT set_config('standard_conforming_strings', 'on', true);

-- Tables whose capture has a gap: since which transaction. Its end must be told too, also when nobody has looked in between.
-- No constraint: a writer's DDL must wait for no other's.
CREATE TABLE tidewire.capture_gaps (
    relid oid         NOT NULL,
    xid   xid8        NOT NULL DEFAULT pg_current_xact_id(),
    at    timestamptz NOT NULL DEFAULT now()
);

-- A SCHEMA event of a table that is there, as the leader's look writes it.
CREATE FUNCTION tidewire.tell_schema(relation oid, table_name text, changes jsonb) RETURNS void LANGUAGE sql
    SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO tidewire.outbox (table_name, operation, after_data)
    SELECT tell_schema.table_name, 'SCHEMA', jsonb_build_object('changes', changes, 'columns', (
            SELECT coalesce(jsonb_agg(jsonb_build_object('name', attname, 'type', format_type(atttypid, atttypmod)) ORDER BY attnum), '[]')
            FROM pg_attribute WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped), 'relid', relation::bigint)::json
$$;

-- Changes of a table were made, or may have been, that are not in the log.
CREATE FUNCTION tidewire.tell_gap(relation oid, message text) RETURNS void LANGUAGE sql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT tidewire.tell_schema(relation, tidewire.table_text(relation),
        jsonb_build_array(jsonb_build_object('kind', 'capture_gap', 'message', message)))
$$;

-- A row goes when its table is untracked, or is gone, or became a partition of a tracked table; its subscribers must hear of it
-- before anything of a later life of that name.
CREATE OR REPLACE FUNCTION tidewire.tracked_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        DELETE FROM tidewire.capture_gaps WHERE relid = OLD.relid;
        PERFORM tidewire.tell_schema(OLD.relid, coalesce(OLD.fingerprint ->> 'name', OLD.table_name), CASE
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

-- What keeps changes of a tracked table from being captured right now.
CREATE FUNCTION tidewire.has_gap(relation oid) RETURNS boolean LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    options jsonb := tidewire.tracked_options(relation);
BEGIN
    RETURN options IS NULL
        OR EXISTS (
            SELECT FROM tidewire.trigger_faults(relation, tidewire.current_options(relation, options))
            WHERE fault = 'missing' AND (target = relation OR (options ->> 'bulk')::boolean))
        -- Row triggers reach partitions as clones, which can be disabled one by one.
        OR EXISTS (
            SELECT FROM pg_trigger
            WHERE tgrelid IN (SELECT relation UNION SELECT relid FROM pg_partition_tree(relation))
                AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                               'tidewire.capture_truncate()'::regprocedure)
                AND (tgenabled IN ('D', 'R') OR tgenabled <> 'A' AND (options ->> 'replica')::boolean));
END $$;

-- Tells a gap where it begins and where it ends. Both ends of one transaction's gap are one event: who sees it sees the commit.
CREATE FUNCTION tidewire.notice_gap(relation oid) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    since xid8 := (SELECT max(xid::text::numeric)::text::xid8 FROM tidewire.capture_gaps WHERE relid = relation);
BEGIN
    IF tidewire.has_gap(relation) THEN
        IF since IS NULL THEN
            INSERT INTO tidewire.capture_gaps (relid) VALUES (relation);
            PERFORM tidewire.tell_gap(relation, 'its capture triggers were removed or disabled: changes are missing from here on');
        END IF;
    ELSIF since IS NOT NULL THEN
        DELETE FROM tidewire.capture_gaps WHERE relid = relation;
        -- What the leader has told as broken it tells as restored.
        IF since <> pg_current_xact_id() AND NOT EXISTS (
            SELECT FROM tidewire.tracked_tables WHERE relid = relation AND fingerprint -> 'faults' <> '[]') THEN
            PERFORM tidewire.tell_gap(relation, 'its capture triggers are back: what changed meanwhile is not in the log');
        END IF;
    END IF;
END $$;

-- Why clients that keep rows by this key would keep wrong ones; null if they would not.
CREATE FUNCTION tidewire.key_problem(relation oid, keys text[]) RETURNS text LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    nullable text := (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
                      WHERE attrelid = relation AND attname = ANY (keys) AND attnum > 0 AND NOT attnotnull);
    found    record;
BEGIN
    IF keys IS NULL THEN
        RETURN NULL;
    END IF;
    -- Unique over some of the columns is unique over all.
    SELECT count(*) AS indexes, bool_or(indimmediate) AS immediate INTO found
    FROM pg_index
    WHERE indrelid = relation AND indisunique AND indisvalid AND indpred IS NULL AND indexprs IS NULL
        AND NOT EXISTS (
            SELECT FROM unnest((indkey::int2[])[0:indnkeyatts - 1]) AS k (attnum)
            LEFT JOIN pg_attribute a ON a.attrelid = relation AND a.attnum = k.attnum
            WHERE a.attname IS NULL OR a.attname <> ALL (keys));
    RETURN CASE
        WHEN nullable IS NOT NULL THEN format('column %s of its key may be null: rows with a null key cannot be told apart', nullable)
        WHEN found.indexes = 0 THEN 'nothing makes its key unique: clients take several rows for one'
        WHEN NOT found.immediate THEN
            'its key constraint is DEFERRABLE: where one statement moves keys (k = k + 1) two rows have one key for a moment, and clients lose one'
    END;
END $$;

-- As before, without what '\000' means in a session with standard_conforming_strings = off, and with what is too much.
CREATE OR REPLACE FUNCTION tidewire.install_triggers(relation oid, options jsonb) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    t       record;
    outside text := coalesce(current_setting('tidewire.installing', true), '');
BEGIN
    -- What is replaced here is no gap: the table is locked from the first DROP on.
    PERFORM set_config('tidewire.installing', 'on', true);
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
    IF options IS NOT NULL THEN
        FOR t IN SELECT * FROM tidewire.trigger_faults(relation, options) LOOP
            EXECUTE t.definition;
            IF (options ->> 'replica')::boolean THEN
                EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', t.target::regclass, t.name);
            END IF;
        END LOOP;
    END IF;
    PERFORM set_config('tidewire.installing', outside, true);
END $$;

-- Every table but one that was renamed since its row was written, told at once and in order: another is about to take a name.
CREATE FUNCTION tidewire.tell_renames(but oid) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r record;
BEGIN
    FOR r IN
        SELECT relid, coalesce(fingerprint ->> 'name', t.table_name) AS was, tidewire.table_text(relid) AS becomes
        FROM tidewire.tracked_tables t
        WHERE relid <> but AND EXISTS (SELECT FROM pg_class WHERE oid = relid)
        ORDER BY relid
    LOOP
        UPDATE tidewire.tracked_tables t
        SET table_name = r.becomes, fingerprint = jsonb_set(fingerprint, '{name}', to_jsonb(r.becomes))
        WHERE relid = r.relid AND (t.table_name <> r.becomes OR r.was <> r.becomes) AND coalesce(fingerprint ->> 'name', t.table_name) = r.was;
        IF FOUND AND r.was <> r.becomes THEN
            PERFORM tidewire.tell_schema(r.relid, r.was, jsonb_build_array(
                jsonb_build_object('kind', 'rename_table', 'from', r.was, 'to', r.becomes)));
        END IF;
    END LOOP;
END $$;

-- How a table looks to the leader: to a subscriber, and what tells one change from another. `storage` moves with every rewrite,
-- `moved` with every change of a column's definition: only both together mean that ALTER … USING gave a column other values.
CREATE FUNCTION tidewire.table_look(relation oid) RETURNS jsonb LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT fingerprint || jsonb_build_object(
        'options', tidewire.tracked_options(relation),
        'leaves', (SELECT coalesce(jsonb_object_agg(p.relid::oid::text, tidewire.table_text(p.relid)), '{}')
                   FROM pg_partition_tree(relation) p WHERE p.isleaf AND p.relid <> relation),
        -- Leaves that brought rows: not made in place (a column is as it was made, which ATTACH changes in all), or older than a
        -- link between them and the root. A table's tableoid is never altered.
        'attached', (SELECT coalesce(jsonb_agg(DISTINCT p.relid::oid::text), '[]')
                     FROM pg_partition_tree(relation) p
                     JOIN pg_attribute born ON born.attrelid = p.relid AND born.attname = 'tableoid' AND born.attnum < 0
                     CROSS JOIN LATERAL pg_partition_ancestors(p.relid) AS way (member)
                     JOIN pg_inherits i ON i.inhrelid = way.member
                     WHERE p.isleaf AND p.relid <> relation AND pg_relation_size(p.relid) > 0
                         AND CASE WHEN way.member = p.relid THEN NOT EXISTS (
                                 SELECT FROM pg_attribute a
                                 WHERE a.attrelid = p.relid AND a.attnum > 0 AND a.attinhcount > 0
                                     AND a.xmin = born.xmin AND a.cmin = born.cmin)
                             ELSE age(i.xmin) < age(born.xmin)
                                 OR i.xmin = born.xmin AND i.cmin::text::bigint > born.cmin::text::bigint END),
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
                  WHERE base.typtype IN ('e', 'c')))
    FROM (SELECT tidewire.table_fingerprint(relation) AS fingerprint OFFSET 0) AS shape
    WHERE fingerprint IS NOT NULL
$$;

-- Whoever owns a tracked table makes its partitions, and with them copies of its triggers: Postgres refuses that to a role that
-- may not execute their function.
CREATE FUNCTION tidewire.let_owner_capture(relation oid) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    owner oid := (SELECT relowner FROM pg_class WHERE oid = relation);
BEGIN
    -- The schema may be another's: without the right to use it everything works but the repair at the moment of the DDL.
    IF NOT has_schema_privilege(owner, 'tidewire', 'USAGE')
        AND current_user = (SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'tidewire') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA tidewire TO %I', pg_get_userbyid(owner));
    END IF;
    IF has_function_privilege(owner, 'tidewire.capture()', 'EXECUTE')
        AND has_function_privilege(owner, 'tidewire.capture_bulk()', 'EXECUTE')
        AND has_function_privilege(owner, 'tidewire.capture_truncate()', 'EXECUTE')
        AND has_function_privilege(owner, 'tidewire.ddl_repairs()', 'EXECUTE') THEN
        RETURN;
    END IF;
    EXECUTE format('GRANT EXECUTE ON FUNCTION tidewire.capture(), tidewire.capture_bulk(), tidewire.capture_truncate(), tidewire.ddl_repairs() TO %I',
        pg_get_userbyid(owner));
EXCEPTION WHEN OTHERS THEN
    -- Another may be at it at this moment; the leader's next look tries again.
    RAISE DEBUG 'tidewire: %', SQLERRM;
END $$;

CREATE OR REPLACE FUNCTION tidewire.sync_tracked(relation oid) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    o        jsonb := tidewire.tracked_options(relation);
    known    tidewire.tracked_tables;
    seen     tidewire.tracked_tables;
    is_known boolean;
BEGIN
    IF (SELECT relispartition FROM pg_class WHERE oid = relation) AND EXISTS (
        SELECT FROM tidewire.tracked_tables t WHERE t.relid = pg_partition_root(relation)) THEN
        -- It was attached to a tracked table, whose changes its rows' are now.
        o := NULL;
    END IF;
    IF o IS NULL THEN
        DELETE FROM tidewire.tracked_tables t WHERE relid = relation;
        RETURN;
    END IF;
    PERFORM tidewire.let_owner_capture(relation);
    IF EXISTS (SELECT FROM tidewire.capture_gaps g WHERE g.relid = relation) THEN
        PERFORM tidewire.notice_gap(relation);
    END IF;
    seen.table_name := tidewire.table_text(relation);
    -- A table of that name that is gone (dropped, or from before a restore).
    DELETE FROM tidewire.tracked_tables t
    WHERE t.table_name = seen.table_name AND t.relid <> relation AND NOT EXISTS (SELECT FROM pg_class WHERE oid = t.relid);
    SET CONSTRAINTS tidewire.tracked_tables_table_name_key DEFERRED;
    IF EXISTS (SELECT FROM tidewire.tracked_tables t WHERE t.relid <> relation AND seen.table_name IN (t.table_name, t.fingerprint ->> 'name')) THEN
        PERFORM tidewire.tell_renames(relation);
    END IF;
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
        seen.fingerprint := tidewire.table_look(relation);
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

-- What the tables that the current DDL concerns need, as statements for its user, who owns them: triggers on new partitions, a key
-- that changed, what an attached table brought along. Only where the statement holds the lock already: it must wait for nothing.
CREATE FUNCTION tidewire.ddl_repairs() RETURNS SETOF text LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r record;
BEGIN
    FOR r IN
        SELECT DISTINCT t.relid AS relation, tidewire.current_options(t.relid, o.options) AS wanted
        FROM pg_event_trigger_ddl_commands() d
        JOIN tidewire.tracked_tables t ON t.relid = coalesce(pg_partition_root(d.objid), d.objid)
        CROSS JOIN LATERAL (SELECT tidewire.tracked_options(t.relid) AS options) AS o
        WHERE d.classid = 'pg_class'::regclass AND o.options IS NOT NULL
    LOOP
        RETURN QUERY
        WITH locked AS MATERIALIZED (
            SELECT l.relation AS target FROM pg_locks l
            WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.granted
                AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())),
        faults AS MATERIALIZED (
            SELECT f.* FROM tidewire.trigger_faults(r.relation, r.wanted) f JOIN locked USING (target)
            WHERE f.fault = 'different' OR f.fault = 'missing' AND f.target <> r.relation),
        statements (turn, target, name, statement) AS (
            SELECT 1, tgrelid, tgname::text, format('DROP TRIGGER %I ON %s', tgname, tgrelid::regclass)
            FROM pg_trigger
            WHERE tgparentid = 0 AND tgrelid IN (SELECT target FROM locked)
                AND tgrelid IN (SELECT r.relation UNION SELECT p.relid FROM pg_partition_tree(r.relation) p)
                AND tgfoid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure,
                               'tidewire.capture_truncate()'::regprocedure)
                AND ((tgrelid, tgname) IN (SELECT f.target, f.name FROM faults f)
                    OR tgrelid <> r.relation
                        AND (tgrelid, tgname) NOT IN (SELECT p.target, p.name FROM tidewire.trigger_plan(r.relation, r.wanted) p))
            UNION ALL
            SELECT 2, f.target, f.name, f.definition FROM faults f
            UNION ALL
            SELECT 3, f.target, f.name, format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', f.target::regclass, f.name)
            FROM faults f WHERE (r.wanted ->> 'replica')::boolean)
        SELECT s.statement FROM statements s ORDER BY s.turn, s.target, s.name;
    END LOOP;
END $$;

-- Runs with the rights of whoever runs the DDL. Nothing that goes wrong here may fail their statement: the leader reports it. What it
-- calls belongs to the owner of everything, who must not get at the rights of those that do with other tables what they like: so it
-- looks by itself first, and below is given to whoever may create event triggers.
CREATE FUNCTION tidewire.ddl_repair() RETURNS event_trigger LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    statement text;
BEGIN
    IF current_setting('tidewire.installing', true) = 'on' OR NOT has_schema_privilege('tidewire', 'USAGE') THEN
        RETURN;
    ELSIF NOT has_function_privilege('tidewire.ddl_repairs()', 'EXECUTE') OR NOT EXISTS (
        SELECT FROM pg_event_trigger_ddl_commands() d
        JOIN pg_trigger t ON t.tgrelid = coalesce(pg_partition_root(d.objid), d.objid)
        WHERE d.classid = 'pg_class'::regclass AND t.tgparentid = 0 AND t.tgname LIKE '!tidewire%') THEN
        RETURN;
    END IF;
    PERFORM set_config('tidewire.installing', 'on', true);
    FOR statement IN SELECT * FROM tidewire.ddl_repairs() LOOP
        EXECUTE statement;
    END LOOP;
    PERFORM set_config('tidewire.installing', '', true);
EXCEPTION WHEN OTHERS THEN
    RAISE DEBUG 'tidewire: %', SQLERRM;
END $$;

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
                ON d.classid = 'pg_class'::regclass AND d.objid = t.relid
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
    -- The key is always carried.
    listed := tidewire.resolve_columns(relation, columns);
    listed := listed || coalesce((SELECT jsonb_agg(k) FROM jsonb_array_elements(keys) k WHERE NOT listed @> jsonb_build_array(k)), '[]');

    PERFORM tidewire.install_triggers(relation, jsonb_strip_nulls(jsonb_build_object(
        'relid', relation::bigint, 'key', keys, 'primary', CASE WHEN key IS NULL THEN true END, 'columns', listed,
        'except_columns', excepted, 'before_image', before_image, 'notify', notify, 'bulk', bulk, 'deferred', deferred,
        'replica', replica,
        -- Part of the names of triggers that partitions get copies of: a tracked table that is attached has its own.
        'tag', (SELECT '_' || oid FROM pg_class WHERE oid = relation AND relkind = 'p'))));
    PERFORM tidewire.sync_tracked(relation);
END $$;

-- What is wrong with tracked tables, after repairing what can be. `repair_refused` is what the node's role may not repair: it owns
-- neither the table nor is a member of its owner.
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
            IF f.fault IN ('different', 'surplus') OR (f.fault = 'missing' AND f.target <> r.present) THEN
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
COMMENT ON FUNCTION tidewire.refresh_tracked() IS
    'Repairs capture triggers where that is safe and returns what is wrong: dropped, attached, trigger_missing, trigger_disabled, partition_trigger_missing, trigger_outdated, repair_refused.';

-- For roles that own tables and are no members of tidewire_owner.
CREATE OR REPLACE FUNCTION tidewire.grant_tracking(role regrole) RETURNS void LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA tidewire TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION
        tidewire.track(regclass, text[], text[], text[], boolean, boolean, boolean, boolean, boolean), tidewire.untrack(regclass),
        tidewire.check_trackable(oid), tidewire.install_triggers(oid, jsonb), tidewire.trigger_plan(oid, jsonb),
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

-- So that the owners of tracked tables can be let into the schema by its owner: what others grant, DROP OWNED does not revoke.
-- Only where there will be event triggers, which alone need it.
DO $$
DECLARE
    owner name := (SELECT pg_catalog.pg_get_userbyid(relowner) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass);
BEGIN
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
        AND owner <> (SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace WHERE nspname = 'tidewire') THEN
        EXECUTE format('ALTER SCHEMA tidewire OWNER TO %I', owner);
    END IF;
END $$;

-- Fires before tidewire_ddl: Postgres takes them by name.
DO $$
BEGIN
    CREATE EVENT TRIGGER tidewire_attach ON ddl_command_end WHEN TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE SCHEMA')
        EXECUTE FUNCTION tidewire.ddl_repair();
    EXECUTE format('ALTER FUNCTION tidewire.ddl_repair() OWNER TO %I', current_user);
    DROP EVENT TRIGGER IF EXISTS tidewire_ddl;
    CREATE EVENT TRIGGER tidewire_ddl ON ddl_command_end
        WHEN TAG IN ('ALTER TABLE', 'CREATE TABLE', 'CREATE TRIGGER', 'ALTER TRIGGER', 'CREATE INDEX', 'ALTER SCHEMA', 'CREATE SCHEMA',
                     'ALTER TYPE', 'ALTER DOMAIN')
        EXECUTE FUNCTION tidewire.ddl_happened();
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE 'tidewire: role % may not create event triggers; schema changes are found by looking every few seconds', current_user;
END $$;
