-- How applications write: tidewire.emit(), the view tidewire.outbox_event, and the wake-up of a parked relay.
--
-- Security-definer functions on the hot path carry no SET clause (each costs a writer close to a microsecond). Instead every
-- name in them, operators and types included, is qualified: a caller's search_path cannot bend them.
SELECT set_config('role', pg_get_userbyid(relowner), true) FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass;

-- The relay holds advisory lock 8388068008253452902 exclusively only while it is parked. A writer that gets it shared has
-- proof that the relay is awake, and keeps it from parking until the writer's rows can be seen; one that does not, rings.
-- The test stands in WHEN, so that a writer who finds the relay awake does not even call a function. ENABLE ALWAYS: a
-- restore or a logical subscriber (session_replication_role = replica) must wake the relay too.
CREATE FUNCTION tidewire.ring() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_notify('tidewire_wake', '');
    RETURN NULL;
END $$;
CREATE TRIGGER wake AFTER INSERT ON tidewire.outbox FOR EACH STATEMENT
    WHEN (NOT pg_catalog.pg_try_advisory_xact_lock_shared(8388068008253452902))
    EXECUTE FUNCTION tidewire.ring();
ALTER TABLE tidewire.outbox ENABLE ALWAYS TRIGGER wake;

CREATE FUNCTION tidewire.wake_mode() RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE tgenabled WHEN 'D' THEN 'poll' ELSE 'notify' END
    FROM pg_trigger
    WHERE tgrelid = 'tidewire.outbox'::regclass AND tgname = 'wake'
$$;
COMMENT ON FUNCTION tidewire.wake_mode() IS '''notify'': writers ring a parked relay; ''poll'': they never do, the relay polls.';

CREATE FUNCTION tidewire.set_wake(mode text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    CASE mode
        WHEN 'notify' THEN ALTER TABLE tidewire.outbox ENABLE ALWAYS TRIGGER wake;
        WHEN 'poll' THEN ALTER TABLE tidewire.outbox DISABLE TRIGGER wake;
        ELSE RAISE invalid_parameter_value USING
            MESSAGE = format('unknown wake mode %L', mode),
            HINT = 'Use ''notify'', or ''poll'' where applications use PREPARE TRANSACTION (which refuses NOTIFY).';
    END CASE;
    PERFORM pg_notify('tidewire_wake', '');
END $$;
COMMENT ON FUNCTION tidewire.set_wake(text) IS
    'Whether writers ring a parked relay (notify) or the relay polls (poll, for databases that use PREPARE TRANSACTION).';

-- The writer's headers: those given, over tidewire.headers and tidewire.traceparent, which its transaction may SET LOCAL.
-- A traceparent that is none is dropped: tracing must not break a write.
CREATE FUNCTION tidewire.context_headers(given json) RETURNS json LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    setting text := coalesce(current_setting('tidewire.headers', true), '');
    trace   text := coalesce(current_setting('tidewire.traceparent', true), '');
    merged  jsonb := '{}';
BEGIN
    IF setting = '' AND trace = '' THEN
        RETURN given;
    ELSIF setting <> '' THEN
        merged := setting::jsonb;
        IF jsonb_typeof(merged) <> 'object' THEN
            RAISE invalid_parameter_value USING
                MESSAGE = 'the setting tidewire.headers is not a JSON object', HINT = 'SET LOCAL tidewire.headers = ''{"key": "value"}''';
        END IF;
    END IF;
    IF trace ~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?$' THEN
        merged := merged || jsonb_build_object('traceparent', trace);
    END IF;
    IF given IS NOT NULL THEN
        merged := merged || given::jsonb;
    END IF;
    RETURN CASE WHEN merged <> '{}' THEN merged::json END;
END $$;

-- Three forms from one text, so that a literal, a text parameter, json and jsonb all find one without a cast, and none pays
-- for calling another.
DO $do$
DECLARE
    form text[];
BEGIN
    FOREACH form SLICE 1 IN ARRAY ARRAY[['json', 'json'], ['jsonb', 'jsonb'], ['text', 'json']] LOOP
        EXECUTE format($create$
CREATE FUNCTION tidewire.emit(aggregate_type text, aggregate_id text, event_type text, payload %1$s, headers %2$s DEFAULT NULL)
    RETURNS uuid LANGUAGE plpgsql SECURITY DEFINER AS $body$
DECLARE
    emitted pg_catalog.uuid;
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
        headers := tidewire.context_headers(headers::pg_catalog.json);
    END IF;
    INSERT INTO tidewire.outbox (table_name, operation, row_key, after_data, event_type, headers)
    VALUES ('event:' OPERATOR(pg_catalog.||) aggregate_type, 'EVENT', ('{"aggregate_id":' OPERATOR(pg_catalog.||)
                pg_catalog.to_json(aggregate_id)::pg_catalog.text OPERATOR(pg_catalog.||) '}')::pg_catalog.json,
            payload::pg_catalog.json, event_type, headers::pg_catalog.json)
    RETURNING event_id INTO emitted;
    RETURN emitted;
END $body$ $create$, form[1], form[2]);
        EXECUTE format('COMMENT ON FUNCTION tidewire.emit(text, text, text, %s, %s) IS %L', form[1], form[2],
            'Publishes a domain event as part of the calling transaction; returns its id, the idempotency key of its consumers.');
    END LOOP;
END $do$;

-- For applications that insert into an outbox table of their own: they change its name. A trigger rather than a rule: rules
-- evaluate volatile expressions twice and do not take part in COPY.
CREATE VIEW tidewire.outbox_event AS
    SELECT substr(table_name, 7) AS aggregate_type, row_key ->> 'aggregate_id' AS aggregate_id, event_type,
           after_data AS payload, headers
    FROM tidewire.outbox
    WHERE operation = 'EVENT';
CREATE FUNCTION tidewire.outbox_event_insert() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    emitted pg_catalog.uuid;
BEGIN
    emitted := tidewire.emit(NEW.aggregate_type, NEW.aggregate_id, NEW.event_type, NEW.payload, NEW.headers);
    RETURN NEW;
END $$;
CREATE TRIGGER emit INSTEAD OF INSERT ON tidewire.outbox_event FOR EACH ROW EXECUTE FUNCTION tidewire.outbox_event_insert();
COMMENT ON VIEW tidewire.outbox_event IS 'Insert here to publish a domain event as part of the same transaction.';

-- A key's version rises with every change of what it may do; nodes hear of it at once. last_used_at alone is bookkeeping.
CREATE FUNCTION tidewire.api_key_changed() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        PERFORM pg_notify('tidewire_keys', '');
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' AND NEW IS DISTINCT FROM OLD THEN
        PERFORM pg_notify('tidewire_keys', OLD.key_id);
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    PERFORM pg_notify('tidewire_keys', NEW.key_id);
    NEW.version := nextval('tidewire.api_key_version');
    RETURN NEW;
END $$;
CREATE TRIGGER changed BEFORE INSERT OR DELETE ON tidewire.api_keys
    FOR EACH ROW EXECUTE FUNCTION tidewire.api_key_changed();
CREATE TRIGGER changed_update BEFORE UPDATE ON tidewire.api_keys FOR EACH ROW
    WHEN ((OLD.key_id, OLD.name, OLD.key_hash, OLD.scopes, OLD.version, OLD.created_at, OLD.is_active, OLD.expires_at)
        IS DISTINCT FROM (NEW.key_id, NEW.name, NEW.key_hash, NEW.scopes, NEW.version, NEW.created_at, NEW.is_active, NEW.expires_at))
    EXECUTE FUNCTION tidewire.api_key_changed();
CREATE TRIGGER changed_all AFTER TRUNCATE ON tidewire.api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION tidewire.api_key_changed();
ALTER TABLE tidewire.api_keys ENABLE ALWAYS TRIGGER changed;
ALTER TABLE tidewire.api_keys ENABLE ALWAYS TRIGGER changed_update;
ALTER TABLE tidewire.api_keys ENABLE ALWAYS TRIGGER changed_all;

REVOKE ALL ON FUNCTION
    tidewire.ring(), tidewire.wake_mode(), tidewire.set_wake(text), tidewire.context_headers(json),
    tidewire.emit(text, text, text, json, json), tidewire.emit(text, text, text, jsonb, jsonb), tidewire.emit(text, text, text, text, json),
    tidewire.outbox_event_insert(), tidewire.api_key_changed()
    FROM PUBLIC;
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'tidewire_app') THEN
        GRANT EXECUTE ON FUNCTION tidewire.emit(text, text, text, json, json), tidewire.emit(text, text, text, jsonb, jsonb),
            tidewire.emit(text, text, text, text, json) TO tidewire_app;
        GRANT INSERT ON tidewire.outbox_event TO tidewire_app;
    END IF;
END $$;

RESET ROLE;
