package inbox

import (
	"strings"

	"github.com/jackc/pgx/v5"
)

// All statements of the package. Each touches its rows through the index that
// its comment names, whatever the statistics of a table that is usually empty say.
// Those that are not for each message are planned whenever they run, see unplanned.

// unplanned makes PostgreSQL plan a statement for each execution, by the size that the table
// has then: a plan that was made and kept while it was small may read all of it.
const unplanned = pgx.QueryExecModeCacheDescribe

func table(schema, name string) string { return pgx.Identifier{schema, name}.Sanitize() }

// recordSQL records that a consumer has a message: one row affected means for the
// first time. It waits on inbox_pkey for a concurrent twin. The bare ON CONFLICT
// needs INSERT alone and never raises 23505 during REINDEX CONCURRENTLY. Its
// transaction's commit waits for the disk, see durably.
func recordSQL(schema string) string {
	return `INSERT INTO ` + table(schema, "inbox") + ` (consumer, message_id, digest)
	SELECT $1::text, $2::text, $3::bigint FROM ` + durably + ` ON CONFLICT DO NOTHING`
}

// recordAllSQL is recordSQL for the messages $2 with the digests $3, in the order of their
// IDs, lest two transactions wait for each other, within limits. It returns those that are
// recorded for the first time, and the transaction. When it has the first it sets the limit
// for the locks of handlers. One alone is no array: it costs PostgreSQL a fifth less then.
func recordAllSQL(schema string, one bool) string {
	messages, order := `unnest($2::text[], $3::bigint[])`, `ORDER BY m.id COLLATE "C"`
	if one {
		messages, order = `(SELECT $2::text, $3::bigint)`, ""
	}
	return `INSERT INTO ` + table(schema, "inbox") + ` (consumer, message_id, digest)
	SELECT $1::text, m.id, m.digest FROM ` + messages + ` AS m(id, digest), ` + durably + `,
		(SELECT ` + limits("$4", "$5", "$6") + `) AS limits
	` + order + ` ON CONFLICT DO NOTHING RETURNING message_id, txid_current(), set_config('lock_timeout', $7, true)`
}

// forgetSQL deletes those records of messages that transaction $3 made (inbox_pkey).
func forgetSQL(schema string) string {
	return `DELETE FROM ` + table(schema, "inbox") + ` WHERE consumer = $1 AND message_id = ANY ($2::text[])
	AND xmin::text = ($3::bigint)::text`
}

// digestsSQL returns the digests of messages that are recorded, one range of inbox_pkey for
// each: of = ANY the planner makes a filter of all that the consumer has recorded, if that
// was little when it planned.
func digestsSQL(schema string) string {
	return `SELECT of.id, r.digest FROM unnest((SELECT $2::text[])) AS of(id), LATERAL (
		SELECT digest FROM ` + table(schema, "inbox") + `
		WHERE (consumer, message_id) >= ($1::text, of.id) AND (consumer, message_id) <= ($1, of.id)
		ORDER BY consumer, message_id LIMIT 1) AS r WHERE r.digest IS NOT NULL`
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

// limits bound, until the end of the transaction, the wait for a twin or another lock, and
// how long the locks of a consumer that has died or hangs outlive it.
func limits(lock, idle, tcp string) string {
	return `set_config('lock_timeout', ` + lock + `, true),
	set_config('idle_in_transaction_session_timeout', ` + idle + `, true), set_config('tcp_user_timeout', ` + tcp + `, true)`
}

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

// parkRecordedSQL parks a message that the same transaction has recorded.
func parkRecordedSQL(schema string) string {
	return `INSERT INTO ` + table(schema, "inbox_parked") + ` ` + ownedColumns + ` SELECT ` + ownedValues
}

// parkEndedSQL parks a message whose handler ended the transaction, be it
// recorded or not, parked (inbox_parked_owned) or not.
func parkEndedSQL(schema string) string {
	return `WITH recorded AS (` + recordSQL(schema) + `)
	INSERT INTO ` + table(schema, "inbox_parked") + ` ` + ownedColumns + `
	SELECT ` + ownedValues + onEnded
}

// parkEndedAgainSQL is parkEndedSQL for one that was parked with the id $12, which it
// keeps: its followers stay behind it.
func parkEndedAgainSQL(schema string) string {
	return `WITH recorded AS (` + recordSQL(schema) + `)
	INSERT INTO ` + table(schema, "inbox_parked") + ` (id, ` + strings.TrimPrefix(ownedColumns, "(") + ` OVERRIDING SYSTEM VALUE
	SELECT $12::bigint, ` + ownedValues + onEnded
}

const onEnded = `
	ON CONFLICT (consumer, message_id) WHERE reason IN ('retry', 'blocked', 'dead')
	DO UPDATE SET reason = excluded.reason, due_at = excluded.due_at, last_error = excluded.last_error`

// parkUnownedSQL parks a message of which there is no record. The digest of all of
// it makes that idempotent (inbox_parked_unowned).
func parkUnownedSQL(schema string) string {
	return `INSERT INTO ` + table(schema, "inbox_parked") + ` (consumer, message_id, reason, digest, last_error, properties, headers, body)
	SELECT $1::text, $2::text, $3::text, $4::bigint, $5::text, $6::bytea, $7::bytea, $8::bytea FROM ` + durably + `
	ON CONFLICT DO NOTHING`
}

// first is the id of the first parked message of a key, by one range of inbox_parked_key;
// those that are not recorded have no key in the table. Of consumer = and key = the planner
// would make of ORDER BY one by id, or go through all of the consumer's while it has no
// statistics. The range has an end, lest it go on through rows of other keys that are dead.
func first(schema, consumer, key string) string {
	return `(SELECT h.id FROM ` + table(schema, "inbox_parked") + ` AS h
		WHERE h.key IS NOT NULL AND (h.consumer, h.key, h.id) >= (` + consumer + `, ` + key + `, 0)
			AND (h.consumer, h.key) <= (` + consumer + `, ` + key + `)
		ORDER BY h.consumer, h.key, h.id LIMIT 1)`
}

// dueSQL lists what waits for another attempt, soonest first, in the order of
// inbox_parked_due, except what is behind an earlier one of its key.
// It has a range and a coalesce, lest it sort all and look
// for each one's key: the planner thinks that many pass these, and few an = and an OR.
func dueSQL(schema string) string {
	return `SELECT id, attempts, due_at <= statement_timestamp() FROM ` + table(schema, "inbox_parked") + ` AS p
	WHERE due_at IS NOT NULL AND (consumer, due_at) >= ($1::text, '-infinity') AND (consumer, due_at) <= ($1, 'infinity')
		AND coalesce(id = ` + first(schema, "p.consumer", "p.key") + `, true)
	ORDER BY consumer, due_at LIMIT $2`
}

// blockedSQL returns those of the keys $2 of which a message is parked. Sent after
// recordAllSQL, so that it sees what was committed while that waited. The planner must not
// know what or how many keys there are: it would plan anew each time, for a third of all the
// processor time that PostgreSQL takes for a message.
func blockedSQL(schema string, one bool) string {
	keys := `unnest((SELECT $2::text[]))`
	if one {
		keys = `(SELECT $2::text OFFSET 0)`
	}
	return `SELECT key FROM ` + keys + ` AS of(key) WHERE ` + first(schema, "$1::text", "of.key") + ` IS NOT NULL`
}

// skipBeforeSQL is true if message $2 is recorded (inbox_pkey), or one of key $3 is parked.
func skipBeforeSQL(schema string) string {
	return `SELECT EXISTS (SELECT FROM ` + table(schema, "inbox") + ` WHERE consumer = $1 AND message_id = $2)
	OR ` + first(schema, "$1", "$3::text") + ` IS NOT NULL`
}

// unblockSQL makes the first parked message of a key due, if it waits for another
// that is gone.
func unblockSQL(schema string) string {
	return `UPDATE ` + table(schema, "inbox_parked") + ` SET reason = 'retry', due_at = clock_timestamp()
	WHERE id = ` + first(schema, "$1::text", "$2::text") + ` AND reason || '' = 'blocked'`
}

// unblockAllSQL is unblockSQL for the next $3 keys after $2, and returns the last
// of them, ” at the end. It goes from key to key (inbox_parked_key), however
// many messages a key has. The || keeps the UPDATE off an index that has reason.
func unblockAllSQL(schema string) string {
	parked := table(schema, "inbox_parked")
	next := func(after, n string) string {
		return `SELECT key, id, reason, ` + n + ` AS n FROM ` + parked + `
			WHERE key IS NOT NULL AND (consumer, key) > ($1::text, ` + after + `) AND consumer <= $1
			ORDER BY consumer, key, id LIMIT 1`
	}
	return `WITH RECURSIVE head AS (
		(` + next("$2::text", "1") + `)
		UNION ALL
		SELECT next.* FROM head, LATERAL (` + next("head.key", "head.n + 1") + `) AS next WHERE head.n < $3
	), unblocked AS (
		UPDATE ` + parked + ` SET reason = 'retry', due_at = clock_timestamp()
		WHERE id = ANY (ARRAY(SELECT id FROM head WHERE reason = 'blocked')) AND reason || '' = 'blocked'
	)
	SELECT CASE WHEN count(*) = $3 THEN max(key) ELSE '' END FROM head`
}

// claimSQL counts an attempt before it is made, and puts the row off until it
// must be over (inbox_parked_pkey). No row: somebody else has it, or has had it since it
// was listed with $3 attempts.
func claimSQL(schema string) string {
	parked := table(schema, "inbox_parked")
	return `UPDATE ` + parked + ` SET attempts = attempts + 1,
		due_at = clock_timestamp() + make_interval(secs => $2::float8)
	WHERE id = (SELECT id FROM ` + parked + ` WHERE id = $1 AND attempts = $3 AND due_at <= statement_timestamp() FOR UPDATE SKIP LOCKED)
	RETURNING attempts, properties, headers, body`
}

// unparkSQL opens the transaction of a claimed attempt: the row is locked and
// gone if the transaction commits (inbox_parked_pkey). No row affected: a later
// attempt has begun elsewhere, or an operator was faster. It waits for the lock:
// another consumer's claimSQL, which comes too late, holds it for a moment.
func unparkSQL(schema string) string {
	return `DELETE FROM ` + table(schema, "inbox_parked") + ` WHERE id = $1 AND attempts = $2 AND reason = 'retry'`
}

// settleSQL ends a claimed attempt that failed, or, without an error, was not made
// (inbox_parked_pkey). attempts tells this attempt from a later one.
func settleSQL(schema string) string {
	return `UPDATE ` + table(schema, "inbox_parked") + ` SET reason = $3, attempts = $4, last_error = coalesce($5, last_error),
		due_at = CASE WHEN $3 = 'retry' THEN clock_timestamp() + make_interval(secs => $6::float8) END
	WHERE id = $1 AND attempts = $2 AND reason = 'retry'`
}

// pruneLockSQL takes, until the end of the transaction, what one process may have that
// prunes the records of a consumer; false if another has it.
const pruneLockSQL = `SELECT pg_try_advisory_xact_lock(hashtextextended('txbox prune ' || $1::text || ' ' || $2::text, 0))`

// pruneSQL examines the next page in the order of inbox_pkey, of one consumer or of all,
// deletes what is older than $3 seconds and not parked (inbox_parked_owned), and returns
// where the page ended. Deleting by ctid keeps the plan: rows that one statement sees do
// not move.
func pruneSQL(schema string, only bool) string {
	inbox, parked := table(schema, "inbox"), table(schema, "inbox_parked")
	after := `(consumer, message_id) > ($1, $2)`
	if only {
		after += ` AND consumer = $5`
	}
	return `WITH page AS MATERIALIZED (
		SELECT ctid, consumer, message_id, received_at FROM ` + inbox + `
		WHERE ` + after + ` ORDER BY consumer, message_id LIMIT $4
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
