-- Statements are unqualified: they run with search_path set to the schema that
-- the caller chose. Applied files are never edited; later ones may only add.

CREATE TABLE txbox_version (
    version          integer NOT NULL,
    compatible_since integer NOT NULL
);
-- One row, for ever: every migration updates it, whichever tool runs it.
CREATE UNIQUE INDEX txbox_version_one_row ON txbox_version ((true));
INSERT INTO txbox_version (version, compatible_since) VALUES (1, 1);

-- True if headers can travel as AMQP headers: a flat object of strings, at most
-- 64 of them and 32 KiB of wire bytes (names plus values), each name of 1 to 255
-- bytes without line breaks, and none that RabbitMQ or txbox gives a meaning.
-- outbox.Message is validated by the same rules in Go; a property test compares
-- the two. In PL/pgSQL, since an SQL function is planned anew by each INSERT
-- (0.24 ms instead of 0.11 ms for a one-row statement on PostgreSQL 15).
CREATE FUNCTION outbox_headers_valid(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
AS $$
DECLARE
    name  text;
    value jsonb;
    count integer := 0;
    bytes integer := 0;
BEGIN
    IF pg_catalog.jsonb_typeof(headers) <> 'object' THEN
        RETURN false;
    END IF;
    FOR name, value IN SELECT * FROM pg_catalog.jsonb_each(headers) LOOP
        count := count + 1;
        bytes := bytes + pg_catalog.octet_length(name) + pg_catalog.octet_length(value #>> '{}');
        IF count > 64 OR bytes > 32768
            OR pg_catalog.jsonb_typeof(value) <> 'string'
            OR pg_catalog.octet_length(name) NOT BETWEEN 1 AND 255
            OR pg_catalog.translate(name, E'\r\n', '') <> name
            OR name IN ('CC', 'BCC', 'x-death', 'x-delivery-count', 'x-acquired-count', 'x-delay',
                        'x-received-from', 'x-shovelled')
            OR name ~ '^(outbox|x-first-death|x-last-death|x-opt|x-stream)-'
        THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
END
$$;

-- Hot and small: a row is here if and only if it has yet to be confirmed and is
-- not parked. The primary key is the only index; the relay reads in its order.
CREATE SEQUENCE outbox_id_seq AS bigint CACHE 1;

CREATE TABLE outbox (
    id           bigint      NOT NULL DEFAULT nextval('outbox_id_seq'),
    lane         smallint    NOT NULL GENERATED ALWAYS AS
                 ((hashtextextended(coalesce(nullif(key, ''), message_id::text) COLLATE "C", 0) & 63)::smallint) STORED,
    message_id   uuid        NOT NULL,
    key          text COLLATE "C",
    exchange     text        NOT NULL DEFAULT '',
    routing_key  text        NOT NULL DEFAULT '',
    type         text        NOT NULL DEFAULT '',
    content_type text        NOT NULL DEFAULT 'application/json',
    headers      jsonb       NOT NULL DEFAULT '{}',
    payload      bytea       NOT NULL DEFAULT '',
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT outbox_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_id_check CHECK (id > 0),
    CONSTRAINT outbox_key_check CHECK (octet_length(key) BETWEEN 1 AND 1024),
    CONSTRAINT outbox_exchange_check CHECK (octet_length(exchange) <= 255 AND translate(exchange, E'\r\n', '') = exchange),
    CONSTRAINT outbox_routing_key_check CHECK (octet_length(routing_key) <= 255 AND translate(routing_key, E'\r\n', '') = routing_key),
    CONSTRAINT outbox_destination_check CHECK (exchange <> '' OR routing_key <> ''),
    CONSTRAINT outbox_type_check CHECK (octet_length(type) <= 255 AND translate(type, E'\r\n', '') = type),
    CONSTRAINT outbox_content_type_check CHECK (octet_length(content_type) <= 255 AND translate(content_type, E'\r\n', '') = content_type),
    CONSTRAINT outbox_headers_check CHECK (headers = '{}' OR outbox_headers_valid(headers)),
    CONSTRAINT outbox_payload_check CHECK (octet_length(payload) <= 134217728),
    -- What AMQP and RFC 3339 can say; infinity is neither.
    CONSTRAINT outbox_created_at_check CHECK (created_at >= '1970-01-01 00:00:00+00' AND created_at < '10000-01-01 00:00:00+00')
);
ALTER SEQUENCE outbox_id_seq OWNED BY outbox.id;

-- Rows live for milliseconds: vacuum by count and without pauses, do not give
-- pages back (truncation takes an exclusive lock), do not compress what is read
-- once, and do not analyze: statistics of a table that is usually empty mislead.
ALTER TABLE outbox ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE outbox SET (
    vacuum_truncate = off, toast.vacuum_truncate = off,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000,
    toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_threshold = -1, toast.autovacuum_vacuum_insert_threshold = -1,
    autovacuum_vacuum_cost_delay = 0, toast.autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 2147483647
);

-- A message that is not to be sent now. It is published from here and never
-- moves back; ids come from the same sequence, so id orders both tables.
CREATE TABLE outbox_parked (
    id           bigint      NOT NULL DEFAULT nextval('outbox_id_seq'),
    reason       text        NOT NULL,
    due_at       timestamptz,
    attempts     integer     NOT NULL DEFAULT 0,
    last_error   text        NOT NULL DEFAULT '',
    parked_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    lane         smallint    NOT NULL GENERATED ALWAYS AS
                 ((hashtextextended(coalesce(nullif(key, ''), message_id::text) COLLATE "C", 0) & 63)::smallint) STORED,
    message_id   uuid        NOT NULL,
    key          text COLLATE "C",
    exchange     text        NOT NULL DEFAULT '',
    routing_key  text        NOT NULL DEFAULT '',
    type         text        NOT NULL DEFAULT '',
    content_type text        NOT NULL DEFAULT 'application/json',
    headers      jsonb       NOT NULL DEFAULT '{}',
    payload      bytea       NOT NULL DEFAULT '',
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT outbox_parked_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_parked_id_check CHECK (id > 0),
    CONSTRAINT outbox_parked_attempts_check CHECK (attempts >= 0),
    CONSTRAINT outbox_parked_reason_check CHECK (reason IN ('scheduled', 'retry', 'blocked', 'dead')),
    CONSTRAINT outbox_parked_due_at_check CHECK ((due_at IS NOT NULL) = (reason IN ('scheduled', 'retry'))),
    -- An order that waits is no order.
    CONSTRAINT outbox_parked_scheduled_check CHECK (reason <> 'scheduled' OR key IS NULL),
    CONSTRAINT outbox_parked_key_check CHECK (octet_length(key) BETWEEN 1 AND 1024),
    CONSTRAINT outbox_parked_exchange_check CHECK (octet_length(exchange) <= 255 AND translate(exchange, E'\r\n', '') = exchange),
    CONSTRAINT outbox_parked_routing_key_check CHECK (octet_length(routing_key) <= 255 AND translate(routing_key, E'\r\n', '') = routing_key),
    CONSTRAINT outbox_parked_destination_check CHECK (exchange <> '' OR routing_key <> ''),
    CONSTRAINT outbox_parked_type_check CHECK (octet_length(type) <= 255 AND translate(type, E'\r\n', '') = type),
    CONSTRAINT outbox_parked_content_type_check CHECK (octet_length(content_type) <= 255 AND translate(content_type, E'\r\n', '') = content_type),
    CONSTRAINT outbox_parked_headers_check CHECK (headers = '{}' OR outbox_headers_valid(headers)),
    CONSTRAINT outbox_parked_payload_check CHECK (octet_length(payload) <= 134217728),
    CONSTRAINT outbox_parked_created_at_check CHECK (created_at >= '1970-01-01 00:00:00+00' AND created_at < '10000-01-01 00:00:00+00')
);
ALTER TABLE outbox_parked ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE outbox_parked SET (
    vacuum_truncate = off, toast.vacuum_truncate = off,
    autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000,
    toast.autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_threshold = 1000
);
-- What is due in a lane.
CREATE INDEX outbox_parked_due ON outbox_parked (lane, due_at) WHERE due_at IS NOT NULL;
-- The head of a key, and the keys that are blocked in a lane.
CREATE INDEX outbox_parked_key ON outbox_parked (lane, key, id) WHERE key IS NOT NULL;

-- One row per live relay process, renewed.
CREATE TABLE outbox_relay (
    id           uuid        NOT NULL,
    name         text        NOT NULL,
    leased_until timestamptz NOT NULL,
    CONSTRAINT outbox_relay_pkey PRIMARY KEY (id)
);

-- Who publishes a lane; changed only when a lane moves. Free when owner is null
-- or has no live row in outbox_relay. The epoch rises with every move and fences
-- the writes of a former owner.
CREATE TABLE outbox_lane (
    lane  smallint NOT NULL,
    owner uuid,
    epoch bigint   NOT NULL DEFAULT 0,
    CONSTRAINT outbox_lane_pkey PRIMARY KEY (lane),
    CONSTRAINT outbox_lane_lane_check CHECK (lane BETWEEN 0 AND 63)
);
INSERT INTO outbox_lane (lane) SELECT generate_series(0, 63);

-- What each consumer has received. IDs of foreign producers are not always UUIDs.
CREATE TABLE inbox (
    consumer    text COLLATE "C" NOT NULL,
    message_id  text COLLATE "C" NOT NULL,
    digest      bigint,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT inbox_pkey PRIMARY KEY (consumer, message_id),
    CONSTRAINT inbox_consumer_check CHECK (octet_length(consumer) BETWEEN 1 AND 100),
    CONSTRAINT inbox_message_id_check CHECK (octet_length(message_id) BETWEEN 1 AND 255)
);
ALTER TABLE inbox SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.05);

-- A received message that has no effect yet. AMQP carries bytes that text
-- refuses (NUL, invalid UTF-8), so what came from the wire is kept as bytea.
CREATE TABLE inbox_parked (
    id          bigint      NOT NULL GENERATED ALWAYS AS IDENTITY,
    consumer    text COLLATE "C" NOT NULL,
    message_id  text COLLATE "C",
    key         text COLLATE "C",
    reason      text        NOT NULL,
    due_at      timestamptz,
    attempts    integer     NOT NULL DEFAULT 0,
    last_error  text        NOT NULL DEFAULT '',
    parked_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    digest      bigint,
    properties  bytea       NOT NULL DEFAULT '',
    headers     bytea       NOT NULL DEFAULT '',
    body        bytea       NOT NULL DEFAULT '',
    CONSTRAINT inbox_parked_pkey PRIMARY KEY (id),
    CONSTRAINT inbox_parked_attempts_check CHECK (attempts >= 0),
    CONSTRAINT inbox_parked_consumer_check CHECK (octet_length(consumer) BETWEEN 1 AND 100),
    CONSTRAINT inbox_parked_reason_check CHECK (reason IN
        ('retry', 'blocked', 'dead', 'missing_id', 'bad_id', 'id_conflict', 'too_old')),
    CONSTRAINT inbox_parked_due_at_check CHECK ((due_at IS NOT NULL) = (reason = 'retry')),
    CONSTRAINT inbox_parked_owned_check CHECK (reason NOT IN ('retry', 'blocked', 'dead') OR message_id IS NOT NULL)
);
ALTER TABLE inbox_parked ALTER COLUMN body SET STORAGE EXTERNAL;
-- These own their inbox row.
CREATE UNIQUE INDEX inbox_parked_owned ON inbox_parked (consumer, message_id)
    WHERE reason IN ('retry', 'blocked', 'dead');
-- These do not; the digest makes parking them idempotent.
CREATE UNIQUE INDEX inbox_parked_unowned ON inbox_parked (consumer, reason, digest)
    WHERE reason IN ('missing_id', 'bad_id', 'id_conflict', 'too_old');
CREATE INDEX inbox_parked_due ON inbox_parked (consumer, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX inbox_parked_key ON inbox_parked (consumer, key, id) WHERE key IS NOT NULL;
