CREATE FUNCTION txbox.outbox_headers_valid(headers jsonb) RETURNS boolean
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
CREATE TABLE txbox.inbox (
    consumer text NOT NULL COLLATE pg_catalog."C",
    message_id text NOT NULL COLLATE pg_catalog."C",
    digest bigint,
    received_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT inbox_consumer_check CHECK (((octet_length(consumer) >= 1) AND (octet_length(consumer) <= 100))),
    CONSTRAINT inbox_message_id_check CHECK (((octet_length(message_id) >= 1) AND (octet_length(message_id) <= 255)))
)
WITH (autovacuum_vacuum_scale_factor='0.02', autovacuum_vacuum_insert_scale_factor='0.05');
CREATE TABLE txbox.inbox_parked (
    id bigint NOT NULL,
    consumer text NOT NULL COLLATE pg_catalog."C",
    message_id text COLLATE pg_catalog."C",
    key text COLLATE pg_catalog."C",
    reason text NOT NULL,
    due_at timestamp with time zone,
    attempts integer DEFAULT 0 NOT NULL,
    last_error text DEFAULT ''::text NOT NULL,
    parked_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    digest bigint,
    properties bytea DEFAULT '\x'::bytea NOT NULL,
    headers bytea DEFAULT '\x'::bytea NOT NULL,
    body bytea DEFAULT '\x'::bytea NOT NULL,
    CONSTRAINT inbox_parked_attempts_check CHECK ((attempts >= 0)),
    CONSTRAINT inbox_parked_consumer_check CHECK (((octet_length(consumer) >= 1) AND (octet_length(consumer) <= 100))),
    CONSTRAINT inbox_parked_due_at_check CHECK (((due_at IS NOT NULL) = (reason = 'retry'::text))),
    CONSTRAINT inbox_parked_owned_check CHECK (((reason <> ALL (ARRAY['retry'::text, 'blocked'::text, 'dead'::text])) OR (message_id IS NOT NULL))),
    CONSTRAINT inbox_parked_reason_check CHECK ((reason = ANY (ARRAY['retry'::text, 'blocked'::text, 'dead'::text, 'missing_id'::text, 'bad_id'::text, 'id_conflict'::text, 'too_old'::text])))
);
ALTER TABLE ONLY txbox.inbox_parked ALTER COLUMN body SET STORAGE EXTERNAL;
ALTER TABLE txbox.inbox_parked ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME txbox.inbox_parked_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE txbox.outbox (
    id bigint NOT NULL,
    lane smallint GENERATED ALWAYS AS (((hashtextextended((COALESCE(NULLIF(key, ''::text), (message_id)::text) COLLATE "C"), (0)::bigint) & (63)::bigint))::smallint) STORED NOT NULL,
    message_id uuid NOT NULL,
    key text COLLATE pg_catalog."C",
    exchange text DEFAULT ''::text NOT NULL,
    routing_key text DEFAULT ''::text NOT NULL,
    type text DEFAULT ''::text NOT NULL,
    content_type text DEFAULT 'application/json'::text NOT NULL,
    headers jsonb DEFAULT '{}'::jsonb NOT NULL,
    payload bytea DEFAULT '\x'::bytea NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT outbox_content_type_check CHECK (((octet_length(content_type) <= 255) AND (translate(content_type, '
'::text, ''::text) = content_type))),
    CONSTRAINT outbox_created_at_check CHECK (((created_at >= '1970-01-01 00:00:00+00'::timestamp with time zone) AND (created_at < '10000-01-01 00:00:00+00'::timestamp with time zone))),
    CONSTRAINT outbox_destination_check CHECK (((exchange <> ''::text) OR (routing_key <> ''::text))),
    CONSTRAINT outbox_exchange_check CHECK (((octet_length(exchange) <= 255) AND (translate(exchange, '
'::text, ''::text) = exchange))),
    CONSTRAINT outbox_headers_check CHECK (((headers = '{}'::jsonb) OR txbox.outbox_headers_valid(headers))),
    CONSTRAINT outbox_id_check CHECK ((id > 0)),
    CONSTRAINT outbox_key_check CHECK (((octet_length(key) >= 1) AND (octet_length(key) <= 1024))),
    CONSTRAINT outbox_payload_check CHECK ((octet_length(payload) <= 134217728)),
    CONSTRAINT outbox_routing_key_check CHECK (((octet_length(routing_key) <= 255) AND (translate(routing_key, '
'::text, ''::text) = routing_key))),
    CONSTRAINT outbox_type_check CHECK (((octet_length(type) <= 255) AND (translate(type, '
'::text, ''::text) = type)))
)
WITH (vacuum_truncate=off, autovacuum_vacuum_scale_factor='0', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_threshold='-1', autovacuum_vacuum_cost_delay='0', autovacuum_analyze_scale_factor='0', autovacuum_analyze_threshold='2147483647', toast.vacuum_truncate=off, toast.autovacuum_vacuum_scale_factor='0', toast.autovacuum_vacuum_threshold='10000', toast.autovacuum_vacuum_insert_threshold='-1', toast.autovacuum_vacuum_cost_delay='0');
ALTER TABLE ONLY txbox.outbox ALTER COLUMN payload SET STORAGE EXTERNAL;
CREATE SEQUENCE txbox.outbox_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE txbox.outbox_id_seq OWNED BY txbox.outbox.id;
CREATE TABLE txbox.outbox_lane (
    lane smallint NOT NULL,
    owner uuid,
    epoch bigint DEFAULT 0 NOT NULL,
    CONSTRAINT outbox_lane_lane_check CHECK (((lane >= 0) AND (lane <= 63)))
);
CREATE TABLE txbox.outbox_parked (
    id bigint DEFAULT nextval('txbox.outbox_id_seq'::regclass) NOT NULL,
    reason text NOT NULL,
    due_at timestamp with time zone,
    attempts integer DEFAULT 0 NOT NULL,
    last_error text DEFAULT ''::text NOT NULL,
    parked_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    lane smallint GENERATED ALWAYS AS (((hashtextextended((COALESCE(NULLIF(key, ''::text), (message_id)::text) COLLATE "C"), (0)::bigint) & (63)::bigint))::smallint) STORED NOT NULL,
    message_id uuid NOT NULL,
    key text COLLATE pg_catalog."C",
    exchange text DEFAULT ''::text NOT NULL,
    routing_key text DEFAULT ''::text NOT NULL,
    type text DEFAULT ''::text NOT NULL,
    content_type text DEFAULT 'application/json'::text NOT NULL,
    headers jsonb DEFAULT '{}'::jsonb NOT NULL,
    payload bytea DEFAULT '\x'::bytea NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT outbox_parked_attempts_check CHECK ((attempts >= 0)),
    CONSTRAINT outbox_parked_content_type_check CHECK (((octet_length(content_type) <= 255) AND (translate(content_type, '
'::text, ''::text) = content_type))),
    CONSTRAINT outbox_parked_created_at_check CHECK (((created_at >= '1970-01-01 00:00:00+00'::timestamp with time zone) AND (created_at < '10000-01-01 00:00:00+00'::timestamp with time zone))),
    CONSTRAINT outbox_parked_destination_check CHECK (((exchange <> ''::text) OR (routing_key <> ''::text))),
    CONSTRAINT outbox_parked_due_at_check CHECK (((due_at IS NOT NULL) = (reason = ANY (ARRAY['scheduled'::text, 'retry'::text])))),
    CONSTRAINT outbox_parked_exchange_check CHECK (((octet_length(exchange) <= 255) AND (translate(exchange, '
'::text, ''::text) = exchange))),
    CONSTRAINT outbox_parked_headers_check CHECK (((headers = '{}'::jsonb) OR txbox.outbox_headers_valid(headers))),
    CONSTRAINT outbox_parked_id_check CHECK ((id > 0)),
    CONSTRAINT outbox_parked_key_check CHECK (((octet_length(key) >= 1) AND (octet_length(key) <= 1024))),
    CONSTRAINT outbox_parked_payload_check CHECK ((octet_length(payload) <= 134217728)),
    CONSTRAINT outbox_parked_reason_check CHECK ((reason = ANY (ARRAY['scheduled'::text, 'retry'::text, 'blocked'::text, 'dead'::text]))),
    CONSTRAINT outbox_parked_routing_key_check CHECK (((octet_length(routing_key) <= 255) AND (translate(routing_key, '
'::text, ''::text) = routing_key))),
    CONSTRAINT outbox_parked_scheduled_check CHECK (((reason <> 'scheduled'::text) OR (key IS NULL))),
    CONSTRAINT outbox_parked_type_check CHECK (((octet_length(type) <= 255) AND (translate(type, '
'::text, ''::text) = type)))
)
WITH (vacuum_truncate=off, autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='1000', toast.vacuum_truncate=off, toast.autovacuum_vacuum_scale_factor='0.05', toast.autovacuum_vacuum_threshold='1000');
ALTER TABLE ONLY txbox.outbox_parked ALTER COLUMN payload SET STORAGE EXTERNAL;
CREATE TABLE txbox.outbox_relay (
    id uuid NOT NULL,
    name text NOT NULL,
    leased_until timestamp with time zone NOT NULL
);
CREATE TABLE txbox.txbox_migrations (
    version bigint NOT NULL,
    dirty boolean NOT NULL
);
CREATE TABLE txbox.txbox_version (
    version integer NOT NULL,
    compatible_since integer NOT NULL
);
ALTER TABLE ONLY txbox.outbox ALTER COLUMN id SET DEFAULT nextval('txbox.outbox_id_seq'::regclass);
ALTER TABLE ONLY txbox.inbox_parked
    ADD CONSTRAINT inbox_parked_pkey PRIMARY KEY (id);
ALTER TABLE ONLY txbox.inbox
    ADD CONSTRAINT inbox_pkey PRIMARY KEY (consumer, message_id);
ALTER TABLE ONLY txbox.outbox_lane
    ADD CONSTRAINT outbox_lane_pkey PRIMARY KEY (lane);
ALTER TABLE ONLY txbox.outbox_parked
    ADD CONSTRAINT outbox_parked_pkey PRIMARY KEY (id);
ALTER TABLE ONLY txbox.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (id);
ALTER TABLE ONLY txbox.outbox_relay
    ADD CONSTRAINT outbox_relay_pkey PRIMARY KEY (id);
ALTER TABLE ONLY txbox.txbox_migrations
    ADD CONSTRAINT txbox_migrations_pkey PRIMARY KEY (version);
CREATE INDEX inbox_parked_due ON txbox.inbox_parked USING btree (consumer, due_at) WHERE (due_at IS NOT NULL);
CREATE INDEX inbox_parked_key ON txbox.inbox_parked USING btree (consumer, key, id) WHERE (key IS NOT NULL);
CREATE UNIQUE INDEX inbox_parked_owned ON txbox.inbox_parked USING btree (consumer, message_id) WHERE (reason = ANY (ARRAY['retry'::text, 'blocked'::text, 'dead'::text]));
CREATE UNIQUE INDEX inbox_parked_unowned ON txbox.inbox_parked USING btree (consumer, reason, digest) WHERE (reason = ANY (ARRAY['missing_id'::text, 'bad_id'::text, 'id_conflict'::text, 'too_old'::text]));
CREATE INDEX outbox_parked_due ON txbox.outbox_parked USING btree (lane, due_at) WHERE (due_at IS NOT NULL);
CREATE INDEX outbox_parked_key ON txbox.outbox_parked USING btree (lane, key, id) WHERE (key IS NOT NULL);
CREATE UNIQUE INDEX txbox_version_one_row ON txbox.txbox_version USING btree ((true));
