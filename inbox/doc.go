// Package inbox gives a received message one effect in the database, however
// often it is delivered. It records (consumer, message ID) in the transaction of
// the effect: both commit, or neither.
//
//	delivered --handler returns nil--> applied: recorded, with its effects, in one commit
//	    |                                  ^
//	    |                                  | handler returns nil; the parked row goes in the same commit
//	    |--handler fails--> parked: retry -+--handler fails--> retry, MaxAttempts times, then dead
//	    |--Reject---------> parked: dead   (so does Reject; a human looks)
//	    |--an earlier one of its key is parked--> parked: blocked --that one is gone--> retry, at once
//	    |--no usable ID---> parked: missing_id, bad_id   (never recorded)
//	    `--older than the horizon--> parked: too_old     (likewise)
//
//	delivered again, after any of these: dropped as a duplicate
//	delivered with the ID of another message: parked: id_conflict
//
// A message is acknowledged to RabbitMQ after the commit that records or parks
// it, never before. Parked messages are in the table inbox_parked of the
// consumer's own database, whole; no dead-letter exchange is needed.
//
// # In your own transaction
//
// The tables come from package migrations. A consumer that has its own loop, of
// RabbitMQ or anything else that numbers its messages, calls [Record] first in
// its transaction, or [RecordSQL] with any driver of database/sql:
//
//	first, err := inbox.Record(ctx, tx, "payments", messageID)
//	if err != nil || !first {
//		return err // a duplicate changes nothing
//	}
//
// # In a transaction made for it
//
// [Handle] and [HandleSQL] do that, run a function, commit, and run all of it again
// after a deadlock or a serialization failure. What suits a webhook:
//
//	_, err := inbox.Handle(ctx, db, "stripe", event.ID, func(ctx context.Context, tx pgx.Tx) error { ... })
//
// After [ErrCommitUnknown] call again with the same ID: the record tells whether
// the transaction committed.
//
// # As a consumer of RabbitMQ
//
// A [Consumer] receives a queue and calls a [Handler] for each message:
//
//	consumer, err := inbox.NewConsumer(db, amqpURL, "payments", handler, inbox.Config{})
//	...
//	err = consumer.Run(ctx)
//
// Run ends with ctx and otherwise waits for whatever is away; [Consumer.Ready]
// says what that is. A failed message is tried again within a second, later
// within a minute, [Config.MaxAttempts] times; [Reject] and [RetryAfter] say
// otherwise. An outage of database or broker spends no attempts, nor does an error that says
// that the server lacks something, such as disk (SQLSTATE class 53), or takes no writes (25006).
//
// Messages with one Key are handled in the order in which this consumer receives
// them. While one of them is parked, for retry or dead, those that follow are
// parked behind it as blocked; other keys and messages without a key go on. With
// several consumers on one queue order ends at the broker: give the queue
// x-single-active-consumer. A message without a usable ID, or with a key that
// PostgreSQL cannot store (not UTF-8, NUL, over 1,024 bytes), holds nobody up
// once it is parked.
//
// # Batches
//
// With [Config.Batch] what has been delivered by the time a worker is free shares a
// transaction, one INSERT for all IDs and one COMMIT. It waits for nothing: a trickle is
// handled message by message. When a Handler fails, all is rolled back; those before it are
// handled again, then it alone, then the rest. When others want the same rows at the same
// time the consumer makes smaller batches for a while. A message whose ID another
// transaction holds is tried again every 100 ms, and after it those of its key; no others
// wait for it.
//
// What a Handler sends through tx is a round trip for each message. Statements that need no
// answer go through [Pipeline], all of a transaction in one.
//
// # What kills a process
//
// A message that comes back again and again, three times from a quorum queue, once from a
// classic one, which does not count, may have killed those who had it in hand. It is parked
// first and handled from the table, where each attempt is counted before it is made.
//
// # How long it remembers
//
// A Consumer parks what is older than [Config.Horizon], by header outbox-created-at or the
// property timestamp, as too_old, and deletes records a day after that. For what is recorded
// in other ways [Prune] forgets what is older than you say; run it daily. After that a
// delivery of the message is a new message.
//
// # What it does not do
//
// Effects outside tx (a call to a payment provider) happen as often as the
// Handler runs: hand the message's ID over as the idempotency key. Messages
// without an ID are told apart by their contents; two that are the same, to the
// byte, are parked once. The database must be encoded in UTF-8.
//
// # Grants
//
// For Record and Handle a role needs USAGE on the schema and INSERT on inbox. A
// Consumer's needs SELECT and DELETE on inbox, SELECT, INSERT, UPDATE and DELETE on
// inbox_parked and SELECT on txbox_version besides, that of Prune SELECT and DELETE on
// inbox and SELECT on inbox_parked.
package inbox
