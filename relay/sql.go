package relay

import (
	"strings"

	"github.com/jackc/pgx/v5"
)

// statements holds the SQL of one schema. Times come from the database's clock.
type statements struct {
	lease, release       string
	drawn                string
	page, pages, due     string
	flushed              string
	blocked, heads       string
	delete, deleteParked string
	leftParked           string
	park, repark         string
}

func newStatements(schema string) statements {
	replacer := strings.NewReplacer(
		"{outbox}", pgx.Identifier{schema, "outbox"}.Sanitize(),
		"{sequence}", pgx.Identifier{schema, "outbox_id_seq"}.Sanitize(),
		"{parked}", pgx.Identifier{schema, "outbox_parked"}.Sanitize(),
		"{relay}", pgx.Identifier{schema, "outbox_relay"}.Sanitize(),
		"{lane}", pgx.Identifier{schema, "outbox_lane"}.Sanitize(),
		"{wait}", "$10::text",
	)
	return statements{
		lease: replacer.Replace(leaseSQL), release: replacer.Replace(releaseSQL),
		drawn: replacer.Replace(drawnSQL),
		page:  replacer.Replace(strings.Replace(pageSQL, "{ids}", idsFrom, 1)),
		pages: replacer.Replace(strings.Replace(pageSQL, "{ids}", idsOfSpans, 1)),
		due:   replacer.Replace(dueSQL), flushed: flushedSQL,
		blocked: replacer.Replace(blockedSQL), heads: replacer.Replace(headsSQL),
		delete:       replacer.Replace(strings.NewReplacer("{table}", "{outbox}", "{lock}", "", "{wait}", "$3::text").Replace(deleteSQL)),
		deleteParked: replacer.Replace(strings.NewReplacer("{table}", "{parked}", "{lock}", "FOR UPDATE SKIP LOCKED", "{wait}", "$3::text").Replace(deleteSQL)),
		leftParked:   replacer.Replace(leftParkedSQL),
		park:         replacer.Replace(parkSQL), repark: replacer.Replace(reparkSQL),
	}
}

// Commits that others rely on, those that move lanes, wait for this server's disk and
// never for standbys: synchronous_commit is local. What only says how far the relay has
// come sets it to off: a crash then costs duplicates. Both do so in the statement
// itself, so that it is all there is between two round trips of a pooler.

// leaseSQL renews the relay's row if $4 says so, takes free lanes up to its fair
// share, and returns all it owns. A lane is free if its owner is null or was not
// live when the statement began; a concurrent taker's lane is skipped or, if its
// move has just been committed, no longer among those. 64 rows, 1 per relay.
const leaseSQL = `WITH renewed AS (
		INSERT INTO {relay} (id, name, leased_until)
		SELECT $1, $2, clock_timestamp() + $3::interval WHERE $4
		ON CONFLICT (id) DO UPDATE SET name = EXCLUDED.name, leased_until = EXCLUDED.leased_until
	), buried AS (
		DELETE FROM {relay} WHERE $4 AND leased_until < clock_timestamp() - interval '1 minute' - 4 * $3::interval
	), live AS MATERIALIZED (
		SELECT id FROM {relay} WHERE leased_until > clock_timestamp() AND id <> $1
	), share AS MATERIALIZED (
		SELECT ceil(64.0 / (1 + (SELECT count(*) FROM live)))::int AS lanes
		FROM (SELECT set_config('synchronous_commit', 'local', true)) AS setting
	), free AS MATERIALIZED (
		SELECT lane FROM {lane}
		WHERE owner IS NULL OR owner IN (
			SELECT owner FROM {lane} WHERE owner <> $1 AND owner NOT IN (SELECT id FROM live))
		ORDER BY lane
		LIMIT greatest(0, (SELECT lanes FROM share) - (SELECT count(*) FROM {lane} WHERE owner = $1))
		FOR UPDATE SKIP LOCKED
	), taken AS (
		UPDATE {lane} AS l SET owner = $1, epoch = epoch + 1 FROM free WHERE l.lane = free.lane
		RETURNING l.lane, l.epoch
	)
	SELECT lane, epoch, (SELECT lanes FROM share) FROM {lane} WHERE owner = $1
	UNION ALL
	SELECT lane, epoch, (SELECT lanes FROM share) FROM taken
	ORDER BY lane`

// releaseSQL frees the lanes $2 for the next owner to take at once; with no lanes
// left the relay is no longer live.
const releaseSQL = `WITH freed AS (
		UPDATE {lane} SET owner = NULL
		WHERE owner = $1 AND lane = ANY($2) AND (SELECT set_config('synchronous_commit', 'local', true)) IS NOT NULL
	)
	DELETE FROM {relay} WHERE id = $1 AND $3`

// Pages are read by statements of one form, bounded by $1 bytes of payload, $2
// rows and the lanes $3. One row, that without an id, says: whether the log was on
// disk up to a position after every commit that the statement can see (it is read
// after the snapshot was taken), that position, the transactions in progress (listed,
// then those above xmax, up to the next number, which xid_age tells), the last id drawn,
// and whether somebody has left lanes to take. The rows are sorted by who reads them:
// PostgreSQL would copy each for it.
const (
	headSQL = `
	SELECT NULL::bigint, NULL::smallint, NULL::uuid, NULL, NULL, NULL, NULL, NULL, NULL::jsonb, NULL::bytea,
		NULL::timestamptz, NULL::int, NULL::text, NULL::boolean, NULL::boolean,
		pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn(), pg_current_wal_insert_lsn()::text,
		ARRAY(SELECT pg_snapshot_xip(pg_current_snapshot())::text::bigint),
		pg_snapshot_xmax(pg_current_snapshot())::text::bigint, age('3'::xid),
		(SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {sequence}),
		EXISTS (SELECT FROM {lane} WHERE owner IS NULL)
	UNION ALL
	SELECT id, lane, message_id, coalesce(key, ''), exchange, routing_key, type, content_type, headers, payload,
		created_at, attempts, last_error, mine, behind, NULL, NULL, NULL, NULL, NULL, NULL, NULL
	FROM page WHERE running - bytes < $1`
	messageColumns = `id, lane, message_id, key, exchange, routing_key, type, content_type, headers`
)

// pageSQL reads the ids from $4 on by primary key, whatever their lane, and blanks
// those of lanes other than $3, or, if $5 is given, of other keys: filtering inside
// would read on through the rows of others. It ends after $6 that are not blank. behind
// says that a message of the key is parked; if none of any key is, that costs one look
// for the page, unless $7 says that it would have to pass over many dead rows. EXISTS
// would drop the ORDER BY that pins the plan of both looks.
//
// Parked messages of a key are found by one range of index (lane, key, id), here and
// below. Of lane = and key = the planner would make of ORDER BY one by id: where one
// key has most of the messages it then looks for the others through all of them. The
// range has an end, lest it go on through rows of other keys that are dead.
const pageSQL = `WITH page AS (
		SELECT ` + messageColumns + `, created_at, 0 AS attempts, '' AS last_error, mine,
			CASE WHEN mine AND key IS NOT NULL AND ($7::boolean OR (
				SELECT id FROM {parked} WHERE key IS NOT NULL ORDER BY lane, key, id LIMIT 1
			) IS NOT NULL) THEN coalesce((
				SELECT true FROM {parked} AS p
				WHERE p.key IS NOT NULL AND (p.lane, p.key, p.id) >= (next.lane, next.key, 0) AND (p.lane, p.key) <= (next.lane, next.key)
				ORDER BY p.lane, p.key, p.id LIMIT 1
			), false) ELSE false END AS behind,
			CASE WHEN mine THEN payload END AS payload, bytes,
			sum(bytes) OVER upto AS running, count(*) FILTER (WHERE mine) OVER upto AS nth
		FROM (
			SELECT n.*, CASE WHEN mine THEN octet_length(payload) ELSE 0 END AS bytes
			FROM (
				SELECT o.*, ($3::bigint >> lane) & 1 = 1 AND coalesce(key = ANY($5::text[]), $5 IS NULL) AS mine
				FROM {ids} AS o
			) AS n
		) AS next
		WINDOW upto AS (ORDER BY id ROWS UNBOUNDED PRECEDING)
	)` + headSQL + ` AND nth <= $6::int`

// A range of ids looks small to the planner, which has no statistics, and it would
// sort all of it; the lower bound alone pins the index scan. Below the floor there may
// be any number of rows that are dead or not yet committed: there each span has its
// end as a bound of the scan. Only ids are sorted.
const (
	idsFrom = `(SELECT * FROM {outbox} WHERE id >= $4::bigint ORDER BY id LIMIT $2)`
	// idsOfSpans reads the spans from $8 to $9, too.
	idsOfSpans = `(
					SELECT o.* FROM (
						SELECT i.id FROM unnest($8::bigint[], $9::bigint[]) AS s (low, high)
						CROSS JOIN LATERAL (
							SELECT id FROM {outbox} WHERE id >= s.low AND id <= s.high ORDER BY id LIMIT least($2, s.high - s.low + 1)
						) AS i
						UNION ALL
						(SELECT id FROM {outbox} WHERE id >= $4::bigint ORDER BY id LIMIT $2)
						ORDER BY id LIMIT $2
					) AS i CROSS JOIN LATERAL (SELECT * FROM {outbox} WHERE id = i.id ORDER BY id LIMIT 1) AS o
				)`
)

// drawnSQL returns the last id drawn, whether somebody has left lanes to take, and, if
// $1 asks for it, whether anything is parked.
const drawnSQL = `SELECT CASE WHEN is_called THEN last_value ELSE 0 END, EXISTS (SELECT FROM {lane} WHERE owner IS NULL),
	NOT $1::boolean OR (SELECT id FROM {parked} ORDER BY id LIMIT 1) IS NOT NULL
	FROM {sequence}`

// dueSQL reads parked messages whose time has come, not more than $8 seconds ago if
// that is given, or those for the exchange $6 and, if given, the routing key $7 whose time
// comes within $5 seconds, and which were parked for one of the reasons $9; other than those with
// the ids $4, and with a key only its head. It goes by index (lane, due_at); $2 rows are
// per lane. A scheduled message was created, for its consumers, when it was due. (clock_timestamp is volatile: an index
// condition with it would be a filter over all that is not due yet.)
const dueSQL = `WITH page AS (
		SELECT ` + messageColumns + `, attempts, last_error, true AS mine, true AS behind, payload,
			CASE WHEN reason = 'scheduled' THEN greatest(created_at, due_at) ELSE created_at END AS created_at,
			octet_length(payload) AS bytes, sum(octet_length(payload)) OVER (ORDER BY id) AS running
		FROM generate_series(0, 63) AS l (lane_wanted)
		CROSS JOIN LATERAL (
			SELECT * FROM {parked} AS p
			WHERE p.lane = l.lane_wanted AND ($3::bigint >> l.lane_wanted) & 1 = 1 AND p.due_at <= statement_timestamp() + $5::float8 * interval '1 second'
				AND p.due_at >= CASE WHEN $8::float8 IS NULL THEN '-infinity' ELSE statement_timestamp() - $8 * interval '1 second' END
				AND p.id <> ALL($4::bigint[])
				AND ($6::text IS NULL OR p.reason = 'retry' AND p.exchange = $6 AND coalesce(p.routing_key = $7::text, $7 IS NULL)
					AND p.last_error = ANY ($9::text[]))
				AND (p.key IS NULL OR p.id = (
					SELECT h.id FROM {parked} AS h
					WHERE h.key IS NOT NULL AND (h.lane, h.key, h.id) >= (p.lane, p.key, 0) ORDER BY h.lane, h.key, h.id LIMIT 1))
			ORDER BY p.due_at LIMIT $2
		) AS d
	)` + headSQL

// blockedSQL returns, of each of the lanes $1, the first $3 keys after $2 that have
// a message in outbox_parked, going from key to key in the index (lane, key, id).
const blockedSQL = `WITH RECURSIVE blocked AS (
		SELECT l.lane, (SELECT min(key) FROM {parked} AS p WHERE p.lane = l.lane AND p.key > $2) AS key, 1 AS n
		FROM unnest($1::smallint[]) AS l (lane)
		UNION ALL
		SELECT b.lane, (SELECT min(key) FROM {parked} AS p WHERE p.lane = b.lane AND p.key > b.key), n + 1
		FROM blocked AS b WHERE b.key IS NOT NULL AND n < $3
	)
	SELECT lane, key, n FROM blocked WHERE key IS NOT NULL`

// headsSQL reads the first parked messages of each of the keys $5 in the lanes $4,
// by index (lane, key, id); $2 rows are per key, or one if that is not to be sent
// now. Such come without payload.
const headsSQL = `WITH page AS (
		SELECT ` + messageColumns + `, attempts, last_error, created_at, ($3::bigint >> lane) & 1 = 1 AND due AS mine, false AS behind,
			CASE WHEN due THEN payload END AS payload, CASE WHEN due THEN octet_length(payload) ELSE 0 END AS bytes,
			sum(CASE WHEN due THEN octet_length(payload) ELSE 0 END) OVER (ORDER BY id) AS running
		FROM unnest($4::smallint[], $5::text[]) AS k (lane_wanted, key_wanted)
		CROSS JOIN LATERAL (
			SELECT *, reason = 'blocked' OR reason = 'retry' AND due_at <= statement_timestamp() AS due FROM {parked} AS p
			WHERE p.key IS NOT NULL AND (p.lane, p.key, p.id) >= (k.lane_wanted, k.key_wanted, 0)
				AND (p.lane, p.key) <= (k.lane_wanted, k.key_wanted)
			ORDER BY p.lane, p.key, p.id LIMIT (
				SELECT CASE WHEN h.reason = 'blocked' OR h.reason = 'retry' AND h.due_at <= statement_timestamp() THEN $2::int ELSE 1 END
				FROM {parked} AS h WHERE h.key IS NOT NULL AND (h.lane, h.key, h.id) >= (k.lane_wanted, k.key_wanted, 0)
					AND (h.lane, h.key) <= (k.lane_wanted, k.key_wanted)
				ORDER BY h.lane, h.key, h.id LIMIT 1
			)
		) AS d
	)` + headSQL

// beginSQL begins the transaction of a read, of one snapshot. Compiling would take a hundred times as long
// as reading: the planner takes each gap, and each key, for a part of the table.
const beginSQL = `BEGIN ISOLATION LEVEL REPEATABLE READ; SET LOCAL jit = off`

// flushedSQL asks whether the log is on disk up to $1.
const flushedSQL = `SELECT pg_current_wal_flush_lsn() >= $1::pg_lsn`

// emitSQL writes a record to the log, so that the COMMIT of its transaction
// flushes; that of one that only drew a transaction id does not.
const emitSQL = `SELECT set_config('synchronous_commit', 'local', true), pg_logical_emit_message(true, 'txbox', '')`

// What is written about messages does not wait long for a row that somebody has locked,
// such as an operator who deletes it. In outbox_parked it passes over such rows; in
// outbox, where nobody has a reason to, it gives up with 55P03: passing over would need
// the right to UPDATE.
const settings = `(SELECT set_config('synchronous_commit', 'off', true) || set_config('lock_timeout', {wait}, true))`

// deleteSQL removes confirmed messages from one of the two tables by primary key,
// one look-up for each whatever the planner thinks of the table's size. Ids alone
// do not do: after a fail-over they can be issued again. It waits for a lock for $3.
const deleteSQL = `DELETE FROM {table} WHERE ctid = ANY(ARRAY(
		SELECT o.ctid FROM unnest($1::bigint[], $2::uuid[]) AS c (id, message_id)
		CROSS JOIN LATERAL (SELECT ctid, message_id FROM {table} WHERE id = c.id ORDER BY id LIMIT 1 {lock}) AS o
		WHERE o.message_id = c.message_id AND ` + settings + ` IS NOT NULL))`

// leftParkedSQL returns which of the messages are in outbox_parked.
const leftParkedSQL = `SELECT c.id FROM unnest($1::bigint[], $2::uuid[]) AS c (id, message_id)
	WHERE (SELECT message_id FROM {parked} WHERE id = c.id ORDER BY id LIMIT 1) = c.message_id`

// refusedRows is what parkSQL and reparkSQL share: the verdicts, one array per
// column, of those messages whose lane is still ours. The lanes' rows are locked
// by FOR SHARE: a test by EXISTS alone lets a write through that began before a
// takeover committed. They wait for a lock for $10.
const refusedRows = `lanes AS MATERIALIZED (
		SELECT l.lane FROM {lane} AS l, (SELECT ` + settings + `) AS settings
		WHERE l.owner = $1 AND (l.lane, l.epoch) IN (SELECT * FROM unnest($2::smallint[], $3::bigint[]))
		ORDER BY l.lane FOR SHARE OF l
	), refused AS MATERIALIZED (
		SELECT r.* FROM unnest($4::bigint[], $5::uuid[], $2::smallint[], $6::text[], $7::int[], $8::float8[], $9::text[])
			AS r (id, message_id, lane, reason, attempts, delay, last_error)
		WHERE r.lane IN (SELECT lane FROM lanes)
	)`

// parkSQL moves messages from outbox to outbox_parked.
const parkSQL = `WITH ` + refusedRows + `, moved AS (
		DELETE FROM {outbox} AS o USING refused AS r WHERE o.id = r.id AND o.message_id = r.message_id
		RETURNING o.*, r.reason, r.attempts, r.delay, r.last_error
	)
	INSERT INTO {parked} (id, reason, due_at, attempts, last_error,
		message_id, key, exchange, routing_key, type, content_type, headers, payload, created_at)
	SELECT id, reason, CASE reason WHEN 'retry' THEN clock_timestamp() + delay * interval '1 second' END, attempts, last_error,
		message_id, key, exchange, routing_key, type, content_type, headers, payload, created_at
	FROM moved`

// reparkSQL records another verdict on messages that were parked already, other than
// those that somebody has locked: they stay due. From its first refusal a message has
// $11 seconds until it is dead, which is returned, and as many attempts as it makes in half
// of them at least: while a relay or the broker was away it made none.
const reparkSQL = `WITH ` + refusedRows + `
	UPDATE {parked} AS p SET
		reason = v.reason,
		due_at = CASE v.reason WHEN 'retry' THEN clock_timestamp() + r.delay * interval '1 second' END,
		attempts = r.attempts,
		last_error = r.last_error,
		parked_at = CASE WHEN p.reason = 'retry' AND p.attempts > 0 THEN p.parked_at ELSE clock_timestamp() END,
		created_at = CASE p.reason WHEN 'scheduled' THEN greatest(p.created_at, p.due_at) ELSE p.created_at END
	FROM refused AS r, LATERAL (
		SELECT CASE WHEN r.reason = 'retry' AND r.attempts > q.attempts AND q.reason = 'retry' AND q.attempts > 0
				AND q.parked_at < clock_timestamp() - $11 * interval '1 second' AND r.attempts >= $11 / 60
			THEN 'dead' ELSE r.reason END AS reason
		FROM {parked} AS q WHERE q.id = r.id ORDER BY q.id LIMIT 1 FOR UPDATE SKIP LOCKED
	) AS v
	WHERE p.id = r.id AND p.message_id = r.message_id AND p.reason IN ('scheduled', 'retry', 'blocked')
	RETURNING p.id, p.reason = 'dead'`
