package relay_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// open returns a connection that the end of the test closes.
func (b *bundle) open() *pgx.Conn {
	b.Helper()
	conn, err := pgx.Connect(testenv.Context(b.T), b.db.URL)
	b.must(err)
	b.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// begin opens a transaction on a connection of its own.
func (b *bundle) begin() pgx.Tx {
	b.Helper()
	tx, err := b.open().Begin(testenv.Context(b.T))
	b.must(err)
	return tx
}

// writeIn writes messages in a transaction that stays open.
func (b *bundle) writeIn(tx pgx.Tx, msgs ...outbox.Message) {
	b.Helper()
	b.must(b.writer.Write(testenv.Context(b.T), tx, msgs...))
}

// deliveries consumes the bundle's queue until the test ends.
func (b *bundle) deliveries() <-chan amqp.Delivery {
	b.Helper()
	got, err := b.ch.Consume(b.queue, "", true, false, false, false, nil)
	b.must(err)
	return got
}

func (b *bundle) await(got <-chan amqp.Delivery, want outbox.Message, within time.Duration) {
	b.Helper()
	limit := time.After(within)
	for {
		select {
		case d := <-got:
			if d.MessageId == want.ID.String() {
				return
			}
		case <-limit:
			b.Fatalf("%s was not delivered within %s", want.ID, within)
		}
	}
}

// Its id is far below what the relay has read when it commits, and another writer
// stays open all the time.
func TestLateCommitGoesOutWhileOtherWritersStayOpen(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()
	got := b.deliveries()

	other := b.begin()
	b.writeIn(other, b.messages(1, noKey)...)
	for round := range 3 { // soon after it was written, and later
		late := b.begin()
		message := b.messages(1, noKey)[0]
		b.writeIn(late, message)
		for range round + 1 {
			b.write(b.messages(100, noKey)...)
			b.must(pauseFor(t, time.Duration(round)*time.Second))
		}
		b.eventuallyCount("outbox", 0)
		b.must(late.Commit(testenv.Context(t)))
		b.await(got, message, 5*time.Second)
	}
}

// Nobody else writes while a transaction is open: no snapshot lists it, since none
// with a higher number has ended. What it wrote is found when it commits, and goes
// out before what is written to the same key after that.
func TestLateCommitOfALoneWriterGoesOutInOrder(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()
	conn := b.open()
	const rounds, n = 3, 5
	var want []outbox.Message
	for round := range rounds {
		msgs := b.messages(n+1, func(int) string { return fmt.Sprint("k", round) })
		lone, err := conn.Begin(testenv.Context(t))
		b.must(err)
		for i := range n {
			b.writeIn(lone, msgs[i])
			b.must(pauseFor(t, 600*time.Millisecond))
		}
		b.must(lone.Commit(testenv.Context(t)))
		b.write(msgs[n])
		want = append(want, msgs...)
		testenv.Eventually(t, 3*time.Second, "delivered", func() bool { return b.count("outbox") == 0 })
	}
	got := b.drain(b.queue, len(want))
	b.checkAll(got, want, 0)
	b.checkOrder(got, want)
}

// A writer that stays open leaves a gap, and nothing else happens: the time of scheduled
// messages comes all the same.
func TestScheduledMessagesGoOutWhileALoneWriterStaysOpen(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()
	got := b.deliveries()
	for range 2 {
		b.must(pauseFor(t, time.Second)) // it idles
		open := b.begin()
		b.writeIn(open, b.messages(1, noKey)...)
		b.must(pauseFor(t, time.Second))
		scheduled := b.messages(1, noKey)[0]
		scheduled.NotBefore = time.Now().Add(500 * time.Millisecond)
		b.write(scheduled)
		b.await(got, scheduled, 5*time.Second)
		b.must(open.Rollback(testenv.Context(t)))
	}
}

// Each time a transaction writes the first message of a key and commits late, when
// the relay has long read what was written after it. The second message of the key
// follows at once: it must not be read alone.
func TestOrderIsKeptWhenAKeyCommitsLate(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()

	conn := b.open()
	const rounds = 100
	var want []outbox.Message
	for i := range rounds {
		key := func(int) string { return fmt.Sprint("late-", i) }
		late, err := conn.Begin(testenv.Context(t))
		pair, others := b.messages(2, key), b.messages(3, noKey)
		b.must(err)
		b.writeIn(late, pair[0])
		b.write(others...)
		b.eventuallyCount("outbox", 0)
		b.must(late.Commit(testenv.Context(t)))
		b.write(pair[1])
		want = append(append(want, others...), pair...)
	}
	got := b.drain(b.queue, len(want))
	b.checkAll(got, want, 0)
	b.checkOrder(got, want)
}

// Rolled back ids are gaps for ever. They are forgotten, so that what comes later
// does not pay for them.
func TestRolledBackIdsDelayNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()
	for range 50 {
		tx := b.begin()
		b.writeIn(tx, b.messages(20, noKey)...)
		b.must(tx.Rollback(testenv.Context(t)))
		b.write(b.messages(1, noKey)...)
	}
	b.eventuallyCount("outbox", 0)
	b.drain(b.queue, 50)
}

// A lane that moves is read from its first message, also if the relay that takes
// it has read others far beyond.
func TestLaneThatMovesIsReadFromItsFirstMessage(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx := testenv.Context(t)
	// Somebody who does nothing holds half of the lanes.
	_, err := b.db.Exec(ctx, `INSERT INTO `+b.db.Table("outbox_relay")+` VALUES (gen_random_uuid(), 'idle', now() + interval '1 hour')`)
	b.must(err)
	_, err = b.db.Exec(ctx, `UPDATE `+b.db.Table("outbox_lane")+` SET epoch = 1, owner = (SELECT id FROM `+b.db.Table("outbox_relay")+`) WHERE lane < 32`)
	b.must(err)
	_, stop := b.start()
	defer stop()

	messages := b.messages(3000, func(i int) string { return fmt.Sprint(i % 500) })
	for part := range 3 {
		b.write(messages[part*1000 : (part+1)*1000]...)
		testenv.Eventually(t, 20*time.Second, "its lanes empty", func() bool {
			var n int
			b.must(b.db.QueryRow(ctx, `SELECT count(*) FROM `+b.db.Table("outbox")+` WHERE lane >= 32`).Scan(&n))
			return n == 0
		})
	}
	if b.count("outbox") == 0 {
		t.Fatal("nothing waits in the other lanes")
	}
	_, err = b.db.Exec(ctx, `UPDATE `+b.db.Table("outbox_lane")+` SET owner = NULL WHERE lane < 32`)
	b.must(err)
	_, err = b.db.Exec(ctx, `DELETE FROM `+b.db.Table("outbox_relay")+` WHERE name = 'idle'`)
	b.must(err)
	got := b.drain(b.queue, len(messages))
	b.checkAll(got, messages, 0)
	b.checkOrder(got, messages)
}

// An id that was drawn long before it is used is below the floor and in no gap.
func TestIdsThatWereDrawnInAdvanceAreFound(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()
	got := b.deliveries()
	ctx := testenv.Context(t)
	var id int64
	b.must(b.db.QueryRow(ctx, `SELECT nextval('`+b.db.Table("outbox_id_seq")+`')`).Scan(&id))
	for range 4 {
		b.write(b.messages(10, noKey)...)
		b.must(pauseFor(t, time.Second))
	}
	b.eventuallyCount("outbox", 0)
	message := b.messages(1, noKey)[0]
	_, err := b.db.Exec(ctx, `INSERT INTO `+b.db.Table("outbox")+` (id, message_id, exchange, routing_key) VALUES ($1, $2, $3, $4)`,
		id, message.ID, message.Exchange, message.RoutingKey)
	b.must(err)
	b.await(got, message, 15*time.Second)
}

// pauseFor lets time pass that the relay is to see passing.
func pauseFor(t *testing.T, d time.Duration) error {
	ctx, cancel := context.WithTimeout(testenv.Context(t), d)
	defer cancel()
	<-ctx.Done()
	if ctx.Err() == context.DeadlineExceeded {
		return nil
	}
	return ctx.Err()
}

// A row whose id did not come from the sequence, as after a restore, is published; those
// that come after it in time, with lower ids, are not late for it.
func TestIdAboveTheSequenceDelaysNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()
	got := b.deliveries()
	far := b.messages(1, noKey)[0]
	_, err := b.db.Exec(testenv.Context(t), `INSERT INTO `+b.db.Table("outbox")+` (id, message_id, exchange) VALUES ($1, $2, $3)`,
		1_000_000, far.ID, far.Exchange)
	b.must(err)
	b.await(got, far, 5*time.Second)
	for range 4 {
		message := b.messages(1, noKey)[0]
		b.write(message)
		b.await(got, message, 2*time.Second)
		b.must(pauseFor(t, 1200*time.Millisecond)) // longer than gaps are looked into
	}
}

// So are the rows of one key, more than wait in memory, as after a fail-over to a server
// to which the sequence was not replicated.
func TestIdsOfOneKeyAboveTheSequenceAreReadInOrder(t *testing.T) {
	t.Parallel()
	b := setup(t)
	log := &lockedBuffer{}
	b.start(b.logTo(log))
	const n = 1500
	msgs := b.messages(n, func(int) string { return "k" })
	b.must(pgx.BeginFunc(testenv.Context(t), b.db, func(tx pgx.Tx) error {
		for i, m := range msgs {
			if _, err := tx.Exec(testenv.Context(t), `INSERT INTO `+b.db.Table("outbox")+` (id, message_id, key, exchange, type) VALUES ($1, $2, $3, $4, $5)`,
				1_000_000+i, m.ID, m.Key, m.Exchange, m.Type); err != nil {
				return err
			}
		}
		return nil
	}))
	got := b.drain(b.queue, n)
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	if failed := log.lines("fails"); failed > 0 {
		t.Errorf("%d failures logged", failed)
	}
}

// A transaction that has drawn thousands of ids between those of others commits: what
// is written then does not wait, nor did anything before.
func TestLongTransactionWithManyIdsDelaysNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, stop := b.start()
	defer stop()
	got := b.deliveries()
	ctx := testenv.Context(t)
	const n = 5000
	insert := `INSERT INTO ` + b.db.Table("outbox") + ` (id, message_id, exchange)
		SELECT 2 * i + $1, gen_random_uuid(), $2 FROM generate_series(1, $3::int) AS i`
	_, err := b.db.Exec(ctx, `SELECT setval('`+b.db.Table("outbox_id_seq")+`', $1)`, 2*n+1)
	b.must(err)
	long, err := b.db.Begin(ctx)
	b.must(err)
	defer long.Rollback(ctx)
	_, err = long.Exec(ctx, insert, 0, b.queue, n)
	b.must(err)
	_, err = b.db.Exec(ctx, insert, 1, b.queue, n)
	b.must(err)
	for range n {
		select {
		case <-got:
		case <-ctx.Done():
			t.Fatal("those of the others do not come")
		}
	}
	b.must(long.Commit(ctx))
	after := b.messages(1, noKey)[0]
	b.write(after)
	for limit, seen := time.After(20*time.Second), 0; ; seen++ {
		select {
		case d := <-got:
			if d.MessageId == after.ID.String() {
				return
			}
		case <-limit:
			t.Fatalf("what came after has not come, %d of %d before it have", seen, n)
		}
	}
}
