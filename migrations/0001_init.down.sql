DROP TABLE inbox_parked, inbox, outbox_lane, outbox_relay, outbox_parked, outbox, txbox_version;
DROP FUNCTION outbox_headers_valid(jsonb);
