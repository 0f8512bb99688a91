package outbox

import "github.com/jackc/pgx/v5"

// Every write is one statement whose text does not depend on the number of
// messages: each column is one array. unnest returns its rows in order, so ids,
// drawn row by row from the sequence, rise in the order of the messages.

const columns = `message_id, key, exchange, routing_key, type, content_type, headers, payload`

// rows turns the arrays into messages. Arrays are declared by casts, since
// drivers differ in what they send them as.
const rows = `SELECT i::uuid AS message_id, nullif(k, '') AS key, x AS exchange, r AS routing_key,
		t AS type, c AS content_type, h::jsonb AS headers, p AS payload, nullif(n, '')::timestamptz AS not_before
	FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bytea[], $9::text[])
		AS m (i, k, x, r, t, c, h, p, n)`

// writeSQL serves calls without NotBefore.
func writeSQL(schema string) string {
	return `INSERT INTO ` + table(schema, "outbox") + ` (` + columns + `)
	SELECT ` + columns + ` FROM (` + rows + `) AS m`
}

// scheduleSQL serves calls in which some message has NotBefore. The clock is read
// once per message, in a materialized step: read twice, a message could end up
// in both tables or in neither.
func scheduleSQL(schema string) string {
	return `WITH m AS MATERIALIZED (
		SELECT *, coalesce(not_before > clock_timestamp(), false) AS later FROM (` + rows + `) AS m
	), scheduled AS (
		INSERT INTO ` + table(schema, "outbox_parked") + ` (reason, due_at, ` + columns + `)
		SELECT 'scheduled', not_before, ` + columns + ` FROM m WHERE later
	)
	INSERT INTO ` + table(schema, "outbox") + ` (` + columns + `)
	SELECT ` + columns + ` FROM m WHERE NOT later`
}

func table(schema, name string) string { return pgx.Identifier{schema, name}.Sanitize() }
