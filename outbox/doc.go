// Package outbox writes messages in the transaction of the business change that
// they tell of. A relay (package relay, or the daemon cmd/relay) publishes them
// to RabbitMQ after the commit, at least once and always under the same ID.
//
// The tables come from package migrations. Then a producer needs one call, with
// a transaction in its hand:
//
//	err := outbox.Write(ctx, tx, outbox.Message{
//		Exchange:   "orders",
//		RoutingKey: "order.placed",
//		Key:        order.ID,
//		Payload:    payload,
//	})
//
// [Write] takes a [pgx.Tx], [WriteSQL] a [database/sql.Tx] of any PostgreSQL
// driver, and [Queue] adds the statement to a [pgx.Batch] that the caller sends
// anyway, at no further round trip. A pool or a connection does not compile
// where a transaction is meant. Settings are the fields of a [Writer].
//
// # Order
//
// Messages of one Key reach the broker in the order in which they were written,
// if their writers are serialised: lock or update the aggregate that the Key
// names before writing the message. Two transactions that write one Key side by
// side have no order to keep. A message that the broker refuses is parked and tried
// again; those of its Key that follow wait behind it.
//
// # Retrying a transaction
//
// If the outcome of a COMMIT is unknown (the connection broke), a second attempt
// may write the message a second time. Set Message.ID with [NewID] before the
// first attempt: both copies then carry one ID, and consumers drop the second.
//
// # Producers in other languages
//
// One INSERT into the table outbox does what Write does; CHECKs refuse what AMQP
// cannot carry:
//
//	INSERT INTO txbox.outbox (message_id, key, exchange, routing_key, type, headers, payload)
//	VALUES (gen_random_uuid(), 'order-42', 'orders', 'order.placed', 'order.placed', '{}', '\x7b7d');
//
// Use INSERT, not COPY, which draws ids long before it inserts rows if its client is
// slow: the order of a key and a prompt delivery rely on less than a second between.
//
// A scheduled message is an INSERT into outbox_parked:
//
//	INSERT INTO txbox.outbox_parked (reason, due_at, message_id, exchange, routing_key, payload)
//	VALUES ('scheduled', now() + interval '1 hour', gen_random_uuid(), 'orders', 'order.overdue', '\x7b7d');
//
// # Grants
//
// A role that writes needs USAGE on the schema and on the sequence outbox_id_seq,
// and INSERT on outbox; for scheduled messages INSERT on outbox_parked.
package outbox
