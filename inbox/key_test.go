package inbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

// keyed returns numbered messages, all of one key.
func keyed(n int, key string) []amqp.Publishing {
	messages := numbered(n)
	for i := range messages {
		messages[i].Headers = amqp.Table{"outbox-key": key}
	}
	return messages
}

// journal notes the order of effects by a handler that wraps another.
type journal struct {
	mu  sync.Mutex
	ids []string
}

func (j *journal) note(h inbox.Handler) inbox.Handler {
	return func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if err := h(ctx, tx, m); err != nil {
			return err
		}
		j.mu.Lock()
		defer j.mu.Unlock()
		j.ids = append(j.ids, m.ID)
		return nil
	}
}

func (j *journal) want(t *testing.T, n int) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	var want []string
	for i := range n {
		want = append(want, fmt.Sprint(i))
	}
	if !slices.Equal(j.ids, want) {
		t.Errorf("handled in the order %v", j.ids)
	}
}

func TestFollowersWaitBehindAParkedMessageOfTheirKey(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 30
	b.publish(t, keyed(n, "k")...)
	var healed atomic.Bool
	var order journal
	c := b.start(t, order.note(func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		switch {
		case m.ID == "3" && !healed.Load():
			return inbox.RetryAfter(time.Hour, errTest)
		case m.ID == "7" && m.Attempt == 1:
			return errTest
		}
		return b.apply(ctx, tx, m)
	}))
	c.waitFor(t, "followers parked", func(s inbox.Stats) bool { return s.Applied == 3 && s.Parked["blocked"] == n-4 })
	if row := b.parked(t, "4"); row.reason != "blocked" || row.attempts != 0 {
		t.Errorf("%+v", row)
	}
	b.publish(t, amqp.Publishing{MessageId: "other", Headers: amqp.Table{"outbox-key": "l"}}, amqp.Publishing{MessageId: "none"})
	c.waitFor(t, "others applied", func(s inbox.Stats) bool { return s.Applied == 5 })
	b.wantReady(t, 0)
	healed.Store(true)
	b.hasten(t)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n+2 })
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, n+2)
	if left := b.count(t, "inbox_parked", "true"); left != 0 {
		t.Errorf("%d still parked", left)
	}
	order.ids = slices.DeleteFunc(order.ids, func(id string) bool { return id == "other" || id == "none" })
	order.want(t, n)
}

// Messages arrive while others of their key are handled again: whichever way a
// message takes, it does not overtake.
func TestOrderHoldsWhileParkedMessagesAreHandledAgain(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 60
	var order journal
	c := b.start(t, order.note(func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.Attempt == 1 && (m.ID == "0" || m.ID == "20" || m.ID == "40") {
			return errTest
		}
		return b.apply(ctx, tx, m)
	}))
	for _, m := range keyed(n, "k") {
		b.publish(t, m)
	}
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	c.stop()
	b.wantOneEffectEach(t, n)
	order.want(t, n)
}

func TestFollowersOfADeadMessageWaitForAnOperator(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, keyed(4, "k")...)
	var order journal
	c := b.start(t, order.note(func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == "1" {
			return inbox.Reject(errTest)
		}
		return b.apply(ctx, tx, m)
	}))
	c.waitFor(t, "parked", func(s inbox.Stats) bool { return s.Parked["dead"] == 1 && s.Parked["blocked"] == 2 })
	if n := b.count(t, "effects", "true"); n != 1 {
		t.Errorf("%d effects", n)
	}
	b.exec(t, "DELETE FROM "+b.Table("inbox_parked")+" WHERE reason = 'dead'")
	c.waitFor(t, "followers applied", func(s inbox.Stats) bool { return s.Applied == 3 })
	c.stop()
	if !slices.Equal(order.ids, []string{"0", "2", "3"}) {
		t.Errorf("handled in the order %v", order.ids)
	}
}

// What a consumer left that died before it came to unblock is found, page by page.
func TestBlockedMessagesWithNothingBeforeThemAreFound(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const keys = 1200 // more than a page of 1000
	b.exec(t, `INSERT INTO `+b.Table("inbox_parked")+` (consumer, message_id, key, reason)
		SELECT $1, n::text, 'k' || n, CASE WHEN n % 100 = 0 THEN 'blocked' ELSE 'dead' END
		FROM generate_series(1, $2::integer) AS n`, consumer, keys)
	c := b.start(t, b.apply)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == keys/100 })
	c.stop()
	if n := b.count(t, "inbox_parked", "reason = 'dead'"); n != keys-keys/100 {
		t.Errorf("%d dead", n)
	}
}

func TestAKeyThatCannotBeStoredKeepsOrderWhileNothingIsParked(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 20
	b.publish(t, keyed(n, "\xff\x00")...)
	var order journal
	c := b.start(t, order.note(b.apply))
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	c.stop()
	order.want(t, n)
}

func TestFiveConcurrentDeliveriesHaveOneEffect(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"read committed", "repeatable read", "serializable"} {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			const rounds = 5
			for range 5 {
				b.publish(t, numbered(rounds)...)
			}
			db := b.pool(t, withParam(t, withParam(t, b.URL, "default_transaction_isolation", isolation), "pool_max_conns", "6"))
			cfg := b.config(t)
			cfg.Workers = 5
			c := b.run(t, db, testenv.AMQPURL(t), b.apply, cfg)
			c.waitFor(t, "all settled", func(s inbox.Stats) bool { return s.Applied+s.Duplicates == 5*rounds })
			if s := c.Stats(); s.Applied != rounds || s.Failures != 0 {
				t.Errorf("%+v", s)
			}
			c.stop()
			b.wantReady(t, 0)
			b.wantOneEffectEach(t, rounds)
		})
	}
}

// Five deliveries of one message, each on a connection of its own, all of which
// reach the database before the first has committed.
func TestDeliveriesToFiveConsumersHaveOneEffect(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.Prefetch, cfg.Workers = 1, 1
	for range 5 {
		b.publish(t, numbered(1)...)
	}
	goOn := make(chan struct{})
	var consumers []*running
	for range 5 {
		consumers = append(consumers, b.run(t, b.pool(t, b.URL), testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
			select {
			case <-goOn:
			case <-ctx.Done():
				return errors.New("not let go on")
			}
			return b.apply(ctx, tx, m)
		}, cfg))
	}
	testenv.Eventually(t, testLimit, "four twins wait", func() bool {
		return b.lockWaits(t) == 4
	})
	close(goOn)
	testenv.Eventually(t, testLimit, "all settled", func() bool {
		applied, duplicates := uint64(0), uint64(0)
		for _, c := range consumers {
			applied, duplicates = applied+c.Stats().Applied, duplicates+c.Stats().Duplicates
		}
		return applied == 1 && duplicates == 4
	})
	b.wantOneEffectEach(t, 1)
}
