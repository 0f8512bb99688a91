// Package relay publishes what package outbox wrote to RabbitMQ: at least once,
// always under the same ID, in order for each key. It runs inside a service or as
// the daemon cmd/relay.
//
//	publisher, err := relay.RabbitMQ("amqp://localhost", relay.RabbitMQConfig{})
//	...
//	r, err := relay.New(db, publisher, relay.Config{})
//	...
//	err = r.Run(ctx) // until ctx ends
//
// Run as many as you like: they share the work, and when one dies the others take
// over what it had within Config.Lease. Run waits for a database, a schema or a
// broker that is not there; [Relay.Ready] says what for. Messages for an exchange or
// a queue that is not there are parked, with a line in the log, and sent when it is.
//
// # A message
//
// It is in the table outbox until the broker has confirmed it, or in
// outbox_parked while it is not to be sent:
//
//	                      confirmed, not returned
//	outbox --- publish ----------------------------> deleted
//	  ^          |   |
//	  |          |   | refused: returned, nacked, no such exchange, no permission
//	  | unknown  |   `--> outbox_parked: retry --- due ---> publish, from where it is
//	  `----------'                         |
//	    connection or channel              | refused for longer than Config.RetryFor,
//	    lost, no answer: nothing           | or nothing that AMQP can carry
//	    is known, nothing is spent         v
//	                                     dead: a human looks
//
// Whatever the head of a key waits for, its followers wait behind it as blocked.
// Messages with NotBefore begin in outbox_parked, as scheduled. Only what the
// broker refused spends an attempt; an outage never does. The next attempt comes
// after a random pause, of a second at first and up to a minute later, so an exchange or a queue that is put
// back gets its messages with no human.
//
// # In the hand
//
// What the relay has read is in its hand until its row is gone and no read that
// could still have seen the row is under way:
//
//	                                      unknown: again; alone, if it may have
//	                                      ended a channel or a connection
//	                                                   .------------.
//	                                                   v            |
//	read --> waiting (behind another of its key) --> ready --> in flight
//	  |         ^                                                   |
//	  |         | there is room                                     | confirmed or refused
//	  v         |                                                   v
//	passed over: stays in the table, too many wait    forgotten <-- gone <-- settling
//
// At most one message of a key is ready or in flight, so that whatever is
// published again is so in order. Ready messages are taken by destination, in
// turn, and each destination has its share of the window, a quarter of it where
// there are four or more. The hand has a bound in messages and in bytes, and the reader waits
// while it is full. Of one key at most 256 messages or 1 MiB wait in it: what
// follows is passed over, and read when there is room. If the hand is full of
// messages that wait while the broker could take others, what would have to wait
// too is passed over; or parked for some seconds, if it is for a destination that
// has kept others waiting for more than a second.
//
// # A blocked key
//
// While a message is parked, those of its key that follow are parked behind it, as
// blocked, never before it is parked itself. Only the first of them, the head, is
// published:
//
//	head: retry ---- due, published --> deleted; the next is the head
//	head: blocked -- published at once --> deleted; the next is the head
//	head: dead ----- waits for a human, who deletes it, or makes it retry
//	no head -------- the key is open: its messages are published from outbox
//
// Other keys are not delayed. That a key is blocked stands in the table alone: it
// is read with each page, in the same snapshot. Once all that is parked of a key is
// in the hand, what follows waits there behind it.
//
// # Suspects and culprits
//
// An exchange that is missing or forbidden closes a channel with each message, and
// a queue that does not confirm holds up all that is on the connection. Such a place
// is suspect: its messages are parked as retry, without an attempt, and one of them is
// tried alone, every few seconds. When that has its answer the others are read, before
// they are due.
//
//	trusted -- the broker named it ------------------------------> suspect
//	 ^ ^  |                                                         |  ^
//	 | |  `--- answers ceased to come while it was in flight        |  |
//	 | |       --> on trial: one message alone, the others wait     |  |
//	 | |                |          |                                |  |
//	 | `--- answered ---'          `--- no answer within 1.5 s -----|--'
//	 `--------------------------------- its probe was answered -----'
//
// A destination that answers, but late, is given twice the time that it took, 4 s at most,
// until no answer of it has been late for a minute. A message that had no answer as the probe is
// suspect itself when others for its destination have theirs: it is tried alone, and
// holds up nothing but its key.
//
// A message that ends connections, or that never gets an answer, is found by halves: what
// was in flight at two such ends is published apart from all others. The one with which
// connections end also when it is alone is dead, once others have got through.
//
// # The floor
//
// Ids are drawn in order and commit in any order. The relay reads above a floor
// and looks again into the gaps below it, those ids of which a transaction that
// still runs may yet commit, all in one snapshot: what commits late is found at
// the next look, and before what was written after it. Lanes that are newly owned are
// scanned up to the floor first; what is in a gap is left to that look, too. So the
// relay passes neither over the rows that it has deleted, however long somebody's
// snapshot keeps them, nor waits for anybody's transaction. In outbox_parked, where
// nothing is in order, it passes over such rows only now and then; in between it finds
// what has become due within the last minute.
//
// # A lane
//
// Each message belongs to one of 64 lanes, by its key or else its ID. A relay owns
// lanes by a lease, and publishes only what is in them:
//
//	free --- lease (epoch + 1) ---> owned --- renew, every third of the lease ---> owned
//	 ^                                |
//	 |<-- release --------------------+--- clean stop
//	 |<-- release <-- draining -------+--- more than its share: finished, not begun
//	 |<-- release --------------------+--- the broker away for longer than the lease
//	 `<-- lease ran out --------------'--- not renewed in time: the owner has stopped
//	                                       publishing before, by its own clock
//
// Each live relay takes its share, 64 divided by their number; one that has more
// finishes what it has in flight of a lane, for a lease at most, and gives it up.
// Whatever a relay writes about a message depends on its still owning the lane at that
// epoch; only the deletion of what was confirmed does not.
//
// # Grants, and what else it asks of the database
//
// At most 3 connections, free when it needs them, which may go through a pgbouncer in
// transaction mode with no setting of its own, and for the role USAGE on the schema, SELECT and DELETE on
// outbox, all on outbox_parked and outbox_relay, SELECT and UPDATE on outbox_lane, SELECT
// on txbox_version and on the sequence outbox_id_seq.
//
// A message is published only when its transaction is on the server's disk, also
// if its producer commits with synchronous_commit=off: what a crash of PostgreSQL
// takes back has not been published.
package relay
