package inbox

import "github.com/jackc/pgx/v5"

// All statements of the package. Each touches its rows through the index that
// its comment names, whatever the statistics of a table that is usually empty say.

func table(schema, name string) string { return pgx.Identifier{schema, name}.Sanitize() }

// recordSQL records that a consumer has a message: one row affected means for the
// first time. It waits on inbox_pkey for a concurrent twin. The bare ON CONFLICT
// needs INSERT alone and never raises 23505 during REINDEX CONCURRENTLY. Its
// transaction's commit waits for the disk, see durably.
func recordSQL(schema string) string {
	return `INSERT INTO ` + table(schema, "inbox") + ` (consumer, message_id, digest)
	SELECT $1::text, $2::text, $3::bigint FROM ` + durably + ` ON CONFLICT DO NOTHING`
}

// durably makes the COMMIT of its transaction wait for this server's disk at
// least, also where synchronous_commit is off: what is recorded is acknowledged
// next, and a crash of PostgreSQL must not forget it.
const durably = `(SELECT set_config('synchronous_commit',
	coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'local'), true)) AS durably`

// recordXIDSQL is recordSQL that returns which transaction this is, for drivers
// that do not tell whether a transaction is still open.
func recordXIDSQL(schema string) string { return recordSQL(schema) + ` RETURNING txid_current()` }

// sameXIDSQL is false after the transaction $1 has ended, and fails in an aborted one.
const sameXIDSQL = `SELECT coalesce(txid_current_if_assigned() = $1, false)`

// settingsSQL bounds, until the end of the transaction, the wait for a twin or
// another lock, and how long the locks of a consumer that has died or hangs
// outlive it.
const settingsSQL = `SELECT set_config('lock_timeout', $1, true),
	set_config('idle_in_transaction_session_timeout', $2, true), set_config('tcp_user_timeout', $3, true)`

// ownedColumns are those of a parked message that owns its row in inbox.
const ownedColumns = `(consumer, message_id, digest, key, reason, due_at, attempts, last_error, properties, headers, body)`

const ownedValues = `$1::text, $2::text, $3::bigint, $4::text, $5::text,
	CASE WHEN $5 = 'retry' THEN clock_timestamp() + make_interval(secs => $6::float8) END,
	$7::integer, $8::text, $9::bytea, $10::bytea, $11::bytea`

// parkSQL records a message and parks it, both or neither. No row affected: it
// was recorded before (inbox_pkey), so it is applied or parked already.
func parkSQL(schema string) string {
	return `WITH first AS (` + recordSQL(schema) + ` RETURNING 1)
	INSERT INTO ` + table(schema, "inbox_parked") + ` ` + ownedColumns + `
	SELECT ` + ownedValues + ` FROM first ON CONFLICT DO NOTHING`
}

// parkEndedSQL parks a message whose handler ended the transaction, be it
// recorded or not, parked (inbox_parked_owned) or not.
func parkEndedSQL(schema string) string {
	return `WITH recorded AS (` + recordSQL(schema) + `)
	INSERT INTO ` + table(schema, "inbox_parked") + ` ` + ownedColumns + `
	SELECT ` + ownedValues + `
	ON CONFLICT (consumer, message_id) WHERE reason IN ('retry', 'blocked', 'dead')
	DO UPDATE SET reason = excluded.reason, due_at = excluded.due_at, last_error = excluded.last_error`
}

// parkUnusableSQL parks a message that cannot be recorded. The digest of all of
// it makes that idempotent (inbox_parked_unowned).
func parkUnusableSQL(schema string) string {
	return `INSERT INTO ` + table(schema, "inbox_parked") + ` (consumer, reason, digest, last_error, properties, headers, body)
	SELECT $1::text, $2::text, $3::bigint, $4::text, $5::bytea, $6::bytea, $7::bytea FROM ` + durably + `
	ON CONFLICT DO NOTHING`
}

// dueSQL lists what waits for another attempt, soonest first, in the order of
// inbox_parked_due, except what is behind an earlier one of its key
// (inbox_parked_key). statement_timestamp is stable, so that an index may use it.
func dueSQL(schema string) string {
	parked := table(schema, "inbox_parked")
	return `SELECT id, due_at <= statement_timestamp() FROM ` + parked + ` AS p
	WHERE consumer = $1 AND due_at IS NOT NULL AND NOT EXISTS (
		SELECT FROM ` + parked + ` AS h WHERE h.consumer = p.consumer AND h.key = p.key AND h.id < p.id
			AND h.reason IN ('retry', 'blocked', 'dead'))
	ORDER BY due_at LIMIT $2`
}

// The columns of a message that is parked for its key to wait behind.
const ofKey = `consumer = $1 AND key = $2 AND reason IN ('retry', 'blocked', 'dead')`

// blockedSQL finds a row if a message of the key is parked (inbox_parked_key).
// Sent after recordSQL, so that it sees what was committed while that waited.
func blockedSQL(schema string) string {
	return `SELECT FROM ` + table(schema, "inbox_parked") + ` WHERE ` + ofKey + ` LIMIT 1`
}

// unblockSQL makes the first parked message of a key due, if it waits for another
// that is gone (inbox_parked_key).
func unblockSQL(schema string) string {
	parked := table(schema, "inbox_parked")
	return `UPDATE ` + parked + ` SET reason = 'retry', due_at = clock_timestamp()
	WHERE id = (SELECT id FROM ` + parked + ` WHERE ` + ofKey + ` ORDER BY id LIMIT 1) AND reason = 'blocked'`
}

// unblockAllSQL is unblockSQL for the next $3 keys after $2, and returns the last
// of them, ” at the end. It goes from key to key (inbox_parked_key), however
// many messages a key has. The || keeps the UPDATE off an index that has reason.
func unblockAllSQL(schema string) string {
	parked := table(schema, "inbox_parked")
	first := func(after, n string) string {
		return `SELECT key, id, reason, ` + n + ` AS n FROM ` + parked + ` WHERE consumer = $1 AND key > ` + after + `
			AND reason IN ('retry', 'blocked', 'dead') ORDER BY key, id LIMIT 1`
	}
	return `WITH RECURSIVE head AS (
		(` + first("$2", "1") + `)
		UNION ALL
		SELECT next.* FROM head, LATERAL (` + first("head.key", "head.n + 1") + `) AS next WHERE head.n < $3
	), unblocked AS (
		UPDATE ` + parked + ` SET reason = 'retry', due_at = clock_timestamp()
		WHERE id = ANY (ARRAY(SELECT id FROM head WHERE reason = 'blocked')) AND reason || '' = 'blocked'
	)
	SELECT CASE WHEN count(*) = $3 THEN max(key) ELSE '' END FROM head`
}

// claimSQL counts an attempt before it is made, and puts the row off until it
// must be over (inbox_parked_pkey). No row: somebody else has it.
func claimSQL(schema string) string {
	parked := table(schema, "inbox_parked")
	return `UPDATE ` + parked + ` SET attempts = attempts + 1,
		due_at = clock_timestamp() + make_interval(secs => $2::float8)
	WHERE id = (SELECT id FROM ` + parked + ` WHERE id = $1 AND due_at <= statement_timestamp() FOR UPDATE SKIP LOCKED)
	RETURNING attempts, properties, headers, body`
}

// unparkSQL opens the transaction of a claimed attempt: the row is locked and
// gone if the transaction commits (inbox_parked_pkey). No row affected: a later
// attempt has begun elsewhere, or an operator was faster. It waits for the lock:
// another consumer's claimSQL, which comes too late, holds it for a moment.
func unparkSQL(schema string) string {
	return `DELETE FROM ` + table(schema, "inbox_parked") + ` WHERE id = $1 AND attempts = $2 AND reason = 'retry'`
}

// settleSQL ends a claimed attempt that failed (inbox_parked_pkey). attempts
// tells this attempt from a later one.
func settleSQL(schema string) string {
	return `UPDATE ` + table(schema, "inbox_parked") + ` SET reason = $3, attempts = $4, last_error = $5,
		due_at = CASE WHEN $3 = 'retry' THEN clock_timestamp() + make_interval(secs => $6::float8) END
	WHERE id = $1 AND attempts = $2 AND reason = 'retry'`
}

// pruneSQL examines the next page in the order of inbox_pkey, deletes what is
// older than $3 seconds and not parked (inbox_parked_owned), and returns where
// the page ended. Deleting by ctid keeps the plan: rows that one statement sees
// do not move.
func pruneSQL(schema string) string {
	inbox, parked := table(schema, "inbox"), table(schema, "inbox_parked")
	return `WITH page AS MATERIALIZED (
		SELECT ctid, consumer, message_id, received_at FROM ` + inbox + `
		WHERE (consumer, message_id) > ($1, $2) ORDER BY consumer, message_id LIMIT $4
	), pruned AS (
		DELETE FROM ` + inbox + ` WHERE ctid = ANY (ARRAY(
			SELECT ctid FROM page
			WHERE received_at < statement_timestamp() - make_interval(secs => $3::float8)
				AND NOT EXISTS (SELECT FROM ` + parked + ` AS p WHERE p.consumer = page.consumer
					AND p.message_id = page.message_id AND p.reason IN ('retry', 'blocked', 'dead'))))
		RETURNING 1
	)
	SELECT consumer, message_id, (SELECT count(*) FROM pruned) FROM page
	ORDER BY consumer DESC, message_id DESC LIMIT 1`
}
