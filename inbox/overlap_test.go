package inbox_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// Two things happen at once.

// classic replaces the queue by one that does not count deliveries.
func (b *broker) classic(t *testing.T) {
	t.Helper()
	if _, err := b.QueueDelete(b.queue, false, false, false); err != nil {
		t.Fatal(err)
	}
	if _, err := b.QueueDeclare(b.queue, true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
}

// giveBack takes n messages and gives them back, so that they count as redelivered.
func (b *broker) giveBack(t *testing.T, n int) {
	t.Helper()
	var last uint64
	testenv.Eventually(t, testLimit, "all are to be had", func() bool {
		d, ok, err := b.Get(b.queue, false)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			n, last = n-1, d.DeliveryTag
		}
		return n == 0
	})
	if err := b.Nack(last, true, true); err != nil {
		t.Fatal(err)
	}
}

// holding is a handler that waits with message "hold", so that those that come meanwhile are
// one batch.
func holding(h inbox.Handler) (held inbox.Handler, inHand <-chan struct{}, goOn func()) {
	in, on := make(chan struct{}), make(chan struct{})
	return func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "hold" {
			close(in)
			<-on
			return nil
		}
		return h(ctx, tx, m)
	}, in, func() { close(on) }
}

// delivered waits until all that was published is in hand.
func (b *broker) delivered(t *testing.T) {
	t.Helper()
	b.wantReady(t, 0)
	time.Sleep(100 * time.Millisecond) // from the socket to the worker's queue
}

// inOneBatch starts a consumer of one worker, and gives it messages that share a transaction,
// after message "hold", which is applied, too.
func (b *broker) inOneBatch(t *testing.T, db *pgxpool.Pool, cfg inbox.Config, h inbox.Handler, messages ...amqp.Publishing) *running {
	t.Helper()
	cfg.Batch, cfg.Workers, cfg.Prefetch = len(messages), 1, len(messages)+1
	h, inHand, goOn := holding(h)
	c := b.run(t, db, testenv.AMQPURL(t), h, cfg)
	b.publish(t, amqp.Publishing{MessageId: "hold"})
	<-inHand
	b.publish(t, messages...)
	b.delivered(t)
	goOn()
	return c
}

func TestAnotherBodyThatWasGivenBackIsParked(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.classic(t)
	c := b.start(t, b.apply)
	b.publish(t, amqp.Publishing{MessageId: "m", Body: []byte("a")})
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
	c.stop()
	b.publish(t, amqp.Publishing{MessageId: "m", Body: []byte("b")})
	b.giveBack(t, 1)
	c = b.start(t, b.apply)
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["id_conflict"] == 1 })
	c.stop()
	if n := b.count(t, "inbox_parked", "reason = 'id_conflict' AND body = 'b'"); n != 1 {
		t.Errorf("%d parked", n)
	}
}

// Before is not called for what has to wait behind another of its key. That one goes before
// the transaction begins.
func TestBeforeIsCalledForWhatNeedsToWaitNoLonger(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	var prepared sync.Map
	cfg := b.config(t)
	cfg.Before = func(ctx context.Context, m inbox.Message) (context.Context, error) {
		prepared.Store(m.ID, true)
		return ctx, nil
	}
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if _, ok := prepared.Load(m.ID); !ok {
			t.Errorf("message %s is handled, and Before was not called", m.ID)
		}
		if m.ID == "0" {
			return inbox.Reject(errTest)
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	messages := keyed(2, "k")
	b.publish(t, messages[0])
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	tx, err := b.Begin(b.ctx) // holds the second up
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(b.ctx)
	if _, err := b.Record(b.ctx, tx, consumer, "1"); err != nil {
		t.Fatal(err)
	}
	b.publish(t, messages[1])
	b.delivered(t)
	b.exec(t, "DELETE FROM "+b.Table("inbox_parked"))
	if err := tx.Rollback(b.ctx); err != nil {
		t.Fatal(err)
	}
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
	c.stop()
}

// A handler commits behind the back of the consumer, and so that its neighbours are parked
// behind another. They are handled elsewhere before that is found out.
func TestWhatAnEndedTransactionParkedHasOneEffect(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.Batch, cfg.Workers, cfg.Prefetch = 10, 1, 100
	committed, handled := make(chan struct{}), make(chan struct{})
	h, inHand, goOn := holding(func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		switch {
		case m.ID == "0" && m.Attempt == 1:
			return inbox.RetryAfter(time.Hour, errTest)
		case m.ID == "raw":
			_, err := tx.Conn().Exec(ctx, "COMMIT")
			close(committed)
			<-handled
			return err
		}
		return b.apply(ctx, tx, m)
	})
	c := b.run(t, b.Pool, testenv.AMQPURL(t), h, cfg)
	messages := keyed(3, "k")
	b.publish(t, messages[0])
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["retry"] == 1 })
	b.publish(t, amqp.Publishing{MessageId: "hold"})
	<-inHand
	b.publish(t, messages[1], amqp.Publishing{MessageId: "raw", Headers: amqp.Table{"outbox-key": "raw"}}, messages[2])
	b.delivered(t)
	goOn()
	<-committed
	other := b.run(t, b.pool(t, b.URL), testenv.AMQPURL(t), b.apply, cfg)
	b.exec(t, "UPDATE "+b.Table("inbox_parked")+" SET due_at = now(), attempts = 1 WHERE message_id = '0'")
	testenv.Eventually(t, testLimit, "all of the key have an effect", func() bool { return b.count(t, "effects", "true") >= 3 })
	close(handled)
	c.waitFor(t, "the culprit is dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	b.wantReady(t, 0)
	c.stop()
	other.stop()
	for _, m := range messages {
		b.want(t, m.MessageId, 1, 1)
	}
}

// Both connections are lost while the first of several that were given back is parked.
func TestNothingOvertakesWhatCouldNotBeParked(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.classic(t)
	const n = 5
	b.publish(t, amqp.Publishing{MessageId: "another"})
	b.publish(t, keyed(n, "k")...)
	b.giveBack(t, n+1)
	server := newProxy(t, testenv.AMQPURL(t))
	database := b.newDatabase(t)
	var parks atomic.Int64
	database.onWrite = func(sent []byte) (cut, swallow bool) {
		if !executes(sent, "WITH first AS") {
			return false, false
		}
		switch parks.Add(1) {
		case 1:
			time.Sleep(300 * time.Millisecond) // the others are delivered
		case 2:
			go server.cut()
			time.Sleep(500 * time.Millisecond)
			return true, false
		}
		return false, false
	}
	cfg := b.config(t)
	cfg.Batch, cfg.Workers, cfg.Prefetch = 10, 1, 10
	c := b.run(t, b.pool(t, database.url), server.url, b.apply, cfg)
	testenv.Eventually(t, testLimit, "all have an effect", func() bool { return b.count(t, "effects", "true") >= n+1 })
	b.wantReady(t, 0)
	c.stop()
	b.exec(t, "DELETE FROM "+b.Table("effects")+" WHERE message_id = 'another'")
	b.exec(t, "DELETE FROM "+b.Table("inbox")+" WHERE message_id = 'another'")
	b.wantEffectsInOrder(t, n)
}

// The ID of the first of a batch is held by others; the second says that it was delivered
// many times.
func TestWhatMayHaveKilledAProcessOvertakesNothing(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.classic(t) // which leaves the header as it comes
	tx, err := b.Begin(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(b.ctx)
	if _, err := b.Record(b.ctx, tx, consumer, "0"); err != nil {
		t.Fatal(err)
	}
	messages := keyed(3, "k")
	messages[1].Headers["x-delivery-count"] = int64(5)
	c := b.inOneBatch(t, b.Pool, b.config(t), b.apply, messages...)
	time.Sleep(time.Second) // longer than a batch waits for the ID
	if n := b.count(t, "effects", "true"); n != 0 {
		t.Errorf("%d messages have overtaken the first", n)
	}
	if err := tx.Rollback(b.ctx); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, testLimit, "all have an effect", func() bool { return b.count(t, "effects", "true") >= len(messages) })
	c.stop()
	b.exec(t, "DELETE FROM "+b.Table("inbox")+" WHERE message_id = 'hold'")
	b.wantEffectsInOrder(t, len(messages))
}

// A parked message ends its transaction with a COMMIT of its own when it is handled again,
// which takes its row away. It is dead in its old place.
func TestFollowersStayBehindWhatEndedItsTransactionLater(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		switch {
		case m.ID != "0":
			return b.apply(ctx, tx, m)
		case m.Attempt == 1:
			return inbox.RetryAfter(time.Hour, errTest)
		}
		_, err := tx.Conn().Exec(ctx, "COMMIT")
		return err
	})
	b.publish(t, keyed(3, "k")...)
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["blocked"] == 2 })
	b.exec(t, "UPDATE "+b.Table("inbox_parked")+" SET due_at = now(), attempts = 1 WHERE reason = 'retry'")
	c.waitFor(t, "dead", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
	time.Sleep(6 * time.Second) // longer than between two looks for what waits behind nothing
	c.stop()
	var left string
	err := b.QueryRow(b.ctx, "SELECT string_agg(message_id || ' ' || reason, ', ' ORDER BY id) FROM "+b.Table("inbox_parked")).Scan(&left)
	if err != nil || left != "0 dead, 1 blocked, 2 blocked" {
		t.Errorf("parked: %s, %v", left, err)
	}
}

// Others hold the IDs of as many messages as there are workers, as a consumer does that stands
// still. Those that come later do not wait.
func TestIDsThatOthersHoldKeepNoWorkerWaiting(t *testing.T) {
	t.Parallel()
	for _, batch := range []int{1, 40} {
		for _, workers := range []int{1, 3} {
			t.Run(fmt.Sprintf("batch=%d workers=%d", batch, workers), func(t *testing.T) {
				t.Parallel()
				b := setupBroker(t)
				tx, err := b.Begin(b.ctx)
				if err != nil {
					t.Fatal(err)
				}
				defer tx.Rollback(b.ctx)
				for i := range workers {
					id := fmt.Sprint("held ", i)
					if _, err := b.Record(b.ctx, tx, consumer, id); err != nil {
						t.Fatal(err)
					}
					b.publish(t, amqp.Publishing{MessageId: id})
				}
				cfg := b.config(t)
				cfg.Batch, cfg.Workers = batch, workers
				c := b.run(t, b.Pool, testenv.AMQPURL(t), b.apply, cfg)
				b.delivered(t)
				const n = 200
				b.publish(t, numbered(n)...)
				c.waitFor(t, "all others applied", func(s inbox.Stats) bool { return s.Applied == n })
				if err := tx.Rollback(b.ctx); err != nil {
					t.Fatal(err)
				}
				c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == uint64(n+workers) })
				c.stop()
				b.wantReady(t, 0)
				if s := c.Stats(); s.Failures+s.Duplicates != 0 {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}
