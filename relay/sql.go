package relay

import (
	"strings"

	"github.com/jackc/pgx/v5"
)

// statements holds the SQL of one schema. Times come from the database's clock.
type statements struct {
	lease, release       string
	page, due, flushed   string
	delete, park, repark string
}

func newStatements(schema string) statements {
	replacer := strings.NewReplacer(
		"{outbox}", pgx.Identifier{schema, "outbox"}.Sanitize(),
		"{parked}", pgx.Identifier{schema, "outbox_parked"}.Sanitize(),
		"{relay}", pgx.Identifier{schema, "outbox_relay"}.Sanitize(),
		"{lane}", pgx.Identifier{schema, "outbox_lane"}.Sanitize(),
	)
	return statements{
		lease: replacer.Replace(leaseSQL), release: replacer.Replace(releaseSQL),
		page: replacer.Replace(pageSQL), due: replacer.Replace(dueSQL), flushed: flushedSQL,
		delete: replacer.Replace(deleteSQL), park: replacer.Replace(parkSQL), repark: replacer.Replace(reparkSQL),
	}
}

// localCommit and asyncCommit set how long the COMMIT of their own transaction
// waits: for this server's disk, never for standbys, or not at all.
const (
	localCommit = `SELECT set_config('synchronous_commit', 'local', true)`
	asyncCommit = `SELECT set_config('synchronous_commit', 'off', true)`
)

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
		UPDATE {lane} SET owner = NULL WHERE owner = $1 AND lane = ANY($2)
	)
	DELETE FROM {relay} WHERE id = $1 AND $3`

// pageSQL reads the next $2 ids after $1 by primary key, whatever their lane, up
// to $3 bytes of payload, and blanks those of lanes other than $4: filtering
// inside would read on through the rows of others. The positions in the log are
// read after the statement's snapshot was taken, so that every row of the page
// was committed before insert_lsn.
const pageSQL = `SELECT id, lane, message_id, coalesce(key, ''), exchange, routing_key, type, content_type, headers, payload,
		created_at, 0 AS attempts, mine,
		(SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()), (SELECT pg_current_wal_insert_lsn())::text
	FROM (
		SELECT id, lane, message_id, key, exchange, routing_key, type, content_type, headers, created_at, mine,
			CASE WHEN mine THEN payload END AS payload, bytes, sum(bytes) OVER (ORDER BY id) AS running
		FROM (
			SELECT *, lane = ANY($4) AS mine, CASE WHEN lane = ANY($4) THEN octet_length(payload) ELSE 0 END AS bytes
			FROM {outbox} WHERE id > $1 ORDER BY id LIMIT $2
		) AS next
	) AS page
	WHERE running - bytes < $3
	ORDER BY id`

// dueSQL reads parked messages whose time has come, by index (lane, due_at), at
// most $1 per lane and $2 bytes. A scheduled message was created, for its
// consumers, when it was due.
const dueSQL = `SELECT id, lane, message_id, coalesce(key, ''), exchange, routing_key, type, content_type, headers, payload,
		CASE WHEN reason = 'scheduled' THEN greatest(created_at, due_at) ELSE created_at END, attempts, true,
		(SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()), (SELECT pg_current_wal_insert_lsn())::text
	FROM (
		SELECT d.*, sum(octet_length(payload)) OVER (ORDER BY id) AS running
		FROM unnest($3::smallint[]) AS l (lane)
		CROSS JOIN LATERAL (
			SELECT * FROM {parked} AS p
			WHERE p.lane = l.lane AND p.due_at <= clock_timestamp() AND p.id <> ALL($4)
			ORDER BY p.due_at LIMIT $1
		) AS d
	) AS page
	WHERE running - octet_length(payload) < $2
	ORDER BY id`

// flushedSQL asks whether the log is on disk up to $1.
const flushedSQL = `SELECT pg_current_wal_flush_lsn() >= $1::pg_lsn`

// emitSQL writes a record to the log, so that the COMMIT of its transaction
// flushes; that of one that only drew a transaction id does not.
const emitSQL = `SELECT pg_logical_emit_message(true, 'txbox', '')`

// deleteSQL removes confirmed messages wherever they are, by primary key. Ids
// alone do not do: after a fail-over they can be issued again.
const deleteSQL = `WITH confirmed AS MATERIALIZED (
		SELECT * FROM unnest($1::bigint[], $2::uuid[]) AS c (id, message_id)
	), parked AS (
		DELETE FROM {parked} AS p USING confirmed AS c WHERE p.id = c.id AND p.message_id = c.message_id
	)
	DELETE FROM {outbox} AS o USING confirmed AS c WHERE o.id = c.id AND o.message_id = c.message_id`

// refusedRows is what parkSQL and reparkSQL share: the verdicts, one array per
// column, of those messages whose lane is still ours. The lanes' rows are locked
// by FOR SHARE: a test by EXISTS alone lets a write through that began before a
// takeover committed.
const refusedRows = `lanes AS MATERIALIZED (
		SELECT lane FROM {lane} WHERE owner = $1 AND (lane, epoch) IN (SELECT * FROM unnest($2::smallint[], $3::bigint[]))
		ORDER BY lane FOR SHARE
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

// reparkSQL records another verdict on messages that were parked already. From
// its first refusal a message has $10 seconds until it is dead.
const reparkSQL = `WITH ` + refusedRows + `
	UPDATE {parked} AS p SET
		reason = v.reason,
		due_at = CASE v.reason WHEN 'retry' THEN clock_timestamp() + r.delay * interval '1 second' END,
		attempts = p.attempts + r.attempts,
		last_error = r.last_error,
		parked_at = CASE p.reason WHEN 'scheduled' THEN clock_timestamp() ELSE p.parked_at END,
		created_at = CASE p.reason WHEN 'scheduled' THEN greatest(p.created_at, p.due_at) ELSE p.created_at END
	FROM refused AS r, LATERAL (
		SELECT CASE WHEN r.reason = 'retry' AND r.attempts > 0 AND q.reason = 'retry'
				AND q.parked_at < clock_timestamp() - $10 * interval '1 second'
			THEN 'dead' ELSE r.reason END AS reason
		FROM {parked} AS q WHERE q.id = r.id
	) AS v
	WHERE p.id = r.id AND p.message_id = r.message_id AND p.reason IN ('scheduled', 'retry')`
