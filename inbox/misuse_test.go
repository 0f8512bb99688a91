package inbox_test

import (
	"context"
	"fmt"
	"io/fs"
	"runtime"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// A nil pointer of a type is no nil error, and such types panic when they are asked
// what they are; others end their goroutine. None of it ends the consumer.
func TestHandlersThatFailOddlyHarmNobody(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	odd := map[string]func() error{
		"0": func() error { var e *pgconn.PgError; return e },
		"1": func() error { var e *fs.PathError; return e },
		"2": func() error { return fmt.Errorf("wrapped: %w", (*fs.PathError)(nil)) },
		"3": func() error { runtime.Goexit(); return nil },
		"4": func() error { panic((*fs.PathError)(nil)) },
	}
	b.publish(t, numbered(10)...)
	cfg := b.config(t)
	cfg.MaxAttempts = 1
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if fail := odd[m.ID]; fail != nil {
			return fail()
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	c.waitFor(t, "all are applied or dead", func(s inbox.Stats) bool { return s.Applied == 5 && s.Parked["dead"] == 5 })
	if n := b.count(t, "inbox_parked", "last_error <> ''"); n != 5 {
		t.Errorf("%d tell why", n)
	}
	for id, fail := range odd {
		if id == "3" || id == "4" { // these end or panic in the caller's goroutine
			continue
		}
		if first, err := b.Handle(b.ctx, b.Pool, consumer, "h"+id, func(context.Context, pgx.Tx) error { return fail() }); first || err == nil {
			t.Errorf("Handle: %v, %v", first, err)
		}
	}
}

// A rolling deployment: one of two consumers stops with messages in hand.
func TestStoppingTheActiveConsumerKeepsTheOrderOfEffects(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"quorum", "classic"} {
		b := setupBroker(t)
		if _, err := b.QueueDelete(b.queue, false, false, false); err != nil {
			t.Fatal(err)
		}
		if _, err := b.QueueDeclare(b.queue, true, false, false, false, amqp.Table{"x-queue-type": kind, "x-single-active-consumer": true}); err != nil {
			t.Fatal(err)
		}
		const n = 200
		b.publish(t, keyed(n, "k")...)
		slowly := func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
			if _, err := tx.Exec(ctx, "SELECT pg_sleep(0.005)"); err != nil {
				return err
			}
			return b.apply(ctx, tx, m)
		}
		first := b.start(t, slowly)
		first.waitFor(t, "some are applied", func(s inbox.Stats) bool { return s.Applied >= 20 })
		second := b.start(t, slowly)
		second.waitReady(t)
		first.stop()
		testenv.Eventually(t, time.Minute, "all are applied", func() bool { return b.count(t, "effects", "true") >= n })
		second.stop()
		b.wantEffectsInOrder(t, n)
	}
}

// An operator who makes a follower due does not make it overtake.
func TestFollowerThatIsMadeDueWaitsForItsHead(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, keyed(3, "k")...)
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "0" {
			return inbox.Reject(errTest)
		}
		return b.apply(ctx, tx, m)
	})
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 && s.Parked["blocked"] == 2 })
	b.exec(t, "UPDATE "+b.Table("inbox_parked")+" SET reason = 'retry', due_at = now(), attempts = 0 WHERE message_id = '2'")
	b.publish(t, amqp.Publishing{MessageId: "other"})
	c.waitFor(t, "another is applied", func(s inbox.Stats) bool { return s.Applied == 1 })
	b.publish(t, amqp.Publishing{MessageId: "dies", Headers: amqp.Table{"outbox-key": "l"}})
	c.waitFor(t, "a third is applied", func(s inbox.Stats) bool { return s.Applied == 2 })
	b.want(t, "2", 1, 0)
	b.exec(t, "DELETE FROM "+b.Table("inbox_parked")+" WHERE message_id = '0'")
	c.waitFor(t, "the followers are applied", func(s inbox.Stats) bool { return s.Applied == 4 })
	var order string
	if err := b.QueryRow(b.ctx, "SELECT string_agg(message_id, ' ' ORDER BY seq) FROM "+b.Table("effects")+" WHERE message_id IN ('1', '2')").Scan(&order); err != nil || order != "1 2" {
		t.Errorf("applied in the order %q: %v", order, err)
	}
}
