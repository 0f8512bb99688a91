package inbox_test

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// batched starts a consumer of one worker that has all messages of the queue ahead.
func (b *broker) batched(t *testing.T, size int, h inbox.Handler) *running {
	t.Helper()
	cfg := b.config(t)
	cfg.Batch, cfg.Workers, cfg.Prefetch = size, 1, 1000
	return b.run(t, b.Pool, testenv.AMQPURL(t), h, cfg)
}

// txOf returns the transaction in which it is called.
func txOf(ctx context.Context, tx pgx.Tx) (id int64, err error) {
	err = tx.QueryRow(ctx, "SELECT txid_current()").Scan(&id)
	return id, err
}

func TestBatchSharesATransactionAndWaitsForNothing(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 500
	b.publish(t, numbered(n)...)
	txs := make(map[int64]int) // of one worker
	c := b.batched(t, 100, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		id, err := txOf(ctx, tx)
		txs[id]++
		return errors.Join(err, b.apply(ctx, tx, m))
	})
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	b.publish(t, amqp.Publishing{MessageId: strconv.Itoa(n)}) // one that nobody follows
	c.waitFor(t, "the last applied", func(s inbox.Stats) bool { return s.Applied == n+1 })
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, n+1)
	if len(txs) > n/10 {
		t.Errorf("%d transactions for %d messages", len(txs), n)
	}
}

// One message of each kind that fails, among others; a key whose first message fails.
func TestBatchParksWhatFailsAndAppliesTheRest(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 100
	messages := numbered(n)
	for _, i := range []int{20, 30, 40, 50} {
		messages[i].Headers = amqp.Table{"outbox-key": "k"}
	}
	messages = slices.Insert(messages, 60, messages[10]) // a duplicate
	other := messages[11]
	other.Body = []byte("another")
	messages = slices.Insert(messages, 70, other)
	b.publish(t, messages...)
	var postponed atomic.Bool
	c := b.batched(t, n, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		switch {
		case m.ID == "5":
			return inbox.Reject(errTest)
		case m.ID == "6":
			panic("six")
		case m.ID == "7":
			_, err := tx.Exec(ctx, "SELECT 1/0")
			return err
		case m.ID == "8" && postponed.CompareAndSwap(false, true):
			return inbox.RetryAfter(time.Second, errTest)
		case m.ID == "9":
			_, _ = tx.Exec(ctx, "SELECT 1/0") // it ignores the error
			return nil
		case m.ID == "20" && m.Attempt < 3:
			return errTest
		}
		return b.apply(ctx, tx, m)
	})
	c.waitFor(t, "all settled", func(s inbox.Stats) bool { return s.Applied == n-4 && s.Parked["dead"] == 1 })
	if s := c.Stats(); s.Duplicates != 1 || s.Parked["id_conflict"] != 1 {
		t.Errorf("%+v", s)
	}
	c.stop()
	b.wantReady(t, 0)
	if n := b.count(t, "inbox_parked", "message_id IN ('6', '7', '9') AND reason = 'retry'"); n != 3 {
		t.Errorf("%d wait for another attempt", n)
	}
	if n := b.count(t, "inbox_parked", "reason = 'id_conflict' AND message_id = '11' AND body = 'another'"); n != 1 {
		t.Errorf("%d conflicts", n)
	}
	for i := range n {
		want := 1
		if i == 5 || i == 6 || i == 7 || i == 9 {
			want = 0
		}
		b.want(t, strconv.Itoa(i), 1, want)
	}
	rows, err := b.Query(b.ctx, "SELECT message_id FROM "+b.Table("effects")+" WHERE message_id IN ('20', '30', '40', '50') ORDER BY seq")
	if err != nil {
		t.Fatal(err)
	}
	order, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || !slices.Equal(order, []string{"20", "30", "40", "50"}) {
		t.Errorf("order of the key: %v, %v", order, err)
	}
}

// A handler that commits or rolls back behind the back of the consumer leaves no message
// recorded whose handler did not run.
func TestBatchLosesNothingToAHandlerThatEndsTheTransaction(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"COMMIT", "ROLLBACK"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			const n = 50
			b.publish(t, numbered(n)...)
			c := b.batched(t, n, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
				if m.ID == "20" {
					_, err := tx.Conn().Exec(ctx, end)
					return err
				}
				return b.apply(ctx, tx, m)
			})
			c.waitFor(t, "all settled", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 })
			b.wantReady(t, 0)
			testenv.Eventually(t, testLimit, "the others are applied", func() bool {
				return b.count(t, "effects", "message_id <> '20'") == n-1
			})
			c.stop()
			for i := range n {
				if i != 20 {
					b.want(t, strconv.Itoa(i), 1, 1)
				}
			}
		})
	}
}

// The ID of one message is held by somebody else's transaction. The others of the batch do
// not wait for it.
func TestBatchWaitsForNoIDThatAnotherHolds(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	tx, err := b.Begin(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(b.ctx)
	if _, err := b.Record(b.ctx, tx, consumer, "7"); err != nil {
		t.Fatal(err)
	}
	const n = 40
	b.publish(t, numbered(n)...)
	c := b.batched(t, n, b.apply)
	c.waitFor(t, "the others applied", func(s inbox.Stats) bool { return s.Applied >= n/2 })
	if err := tx.Rollback(b.ctx); err != nil {
		t.Fatal(err)
	}
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, n)
}

// Connections to both servers are cut twice a second, for a quarter of a minute at most: a
// busy machine would never come to the end.
func TestBatchesHaveOneEffectPerMessageWhileConnectionsAreCut(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 1500
	b.publish(t, numbered(n)...)
	server := newProxy(t, testenv.AMQPURL(t))
	database := newProxy(t, b.URL)
	cfg := b.config(t)
	cfg.Batch = 50
	c := b.run(t, b.pool(t, database.url), server.url, b.apply, cfg)
	stop := make(chan struct{})
	var cutting sync.WaitGroup
	cutting.Go(func() {
		for i := range 30 {
			select {
			case <-stop:
				return
			case <-time.After(500 * time.Millisecond):
				[]*proxy{server, database}[i%2].cut()
			}
		}
	})
	testenv.Eventually(t, 2*testLimit, "all have an effect", func() bool { return b.count(t, "effects", "true") >= n })
	close(stop)
	cutting.Wait()
	b.wantReady(t, 0)
	c.stop()
	b.wantOneEffectEach(t, n)
}
