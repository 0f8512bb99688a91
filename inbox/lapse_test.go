package inbox_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
)

// wantEffectsInOrder fails the test unless messages 0 to n-1, of one key, had one effect
// each, in that order.
func (b *broker) wantEffectsInOrder(t *testing.T, n int) {
	t.Helper()
	rows, err := b.Query(b.ctx, "SELECT message_id::int FROM "+b.Table("effects")+" ORDER BY seq")
	if err != nil {
		t.Fatal(err)
	}
	order, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil || len(order) != n || !slices.IsSorted(order) {
		t.Errorf("%v, %d effects in the order %v", err, len(order), order)
	}
	b.wantOneEffectEach(t, n)
}

// cutOnce is a broker's connection that a handler cuts, and sees replaced.
type cutOnce struct {
	*proxy
	once      sync.Once
	connected chan struct{} // once more
}

func newCutOnce(t *testing.T) *cutOnce {
	return &cutOnce{proxy: newProxy(t, testenv.AMQPURL(t)), connected: make(chan struct{})}
}

// inHandler returns when all deliveries that were in hand have lapsed.
func (c *cutOnce) inHandler() {
	c.once.Do(func() {
		c.cut()
		<-c.connected
	})
}

// again waits until the consumer is connected again, and lets the handler go on.
func (c *cutOnce) again(t *testing.T, r *running) {
	t.Helper()
	r.waitFor(t, "connected again", func(s inbox.Stats) bool { return s.Reconnects == 1 && s.Connected })
	close(c.connected)
}

func TestAFullBatchWhoseConnectionWasLostHasOneEffect(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 50
	b.publish(t, keyed(n, "k")...)
	server := newCutOnce(t)
	cfg := b.config(t)
	cfg.Batch, cfg.Workers, cfg.Prefetch = n, 1, n
	c := b.run(t, b.Pool, server.url, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == fmt.Sprint(n-1) {
			server.inHandler()
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	server.again(t, c)
	c.waitFor(t, "all applied, and dropped", func(s inbox.Stats) bool { return s.Applied == n && s.Duplicates >= n/2 })
	b.wantReady(t, 0)
	c.stop()
	b.wantReady(t, 0)
	b.wantEffectsInOrder(t, n)
}

// The connection is lost while a batch of one key is tried in parts, since others are in the
// way of one of its messages. Those after it come again, and so does it: nothing of the lapsed
// batch overtakes it.
func TestNothingOfALapsedBatchOvertakesWhatItLeft(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n, deepest = 20, 5 // calls until the message is tried alone
	b.publish(t, keyed(n, "k")...)
	server := newCutOnce(t)
	cfg := b.config(t)
	cfg.Batch, cfg.Workers, cfg.Prefetch = n, 1, n
	var calls atomic.Int64
	c := b.run(t, b.Pool, server.url, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == fmt.Sprint(n/2) && calls.Add(1) <= deepest {
			server.inHandler()
			return &pgconn.PgError{Severity: "ERROR", Code: "40001"}
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	server.again(t, c)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	b.wantReady(t, 0)
	c.stop()
	if s := c.Stats(); s.Failures != 0 {
		t.Errorf("an outage cost attempts: %+v", s)
	}
	b.wantEffectsInOrder(t, n)
}

// Of two consumers of a queue with a single active one the first loses its connection while
// it handles; RabbitMQ gives what it had in hand to the second. Whatever the first makes of
// it then, the order of effects is that of the key.
func TestAConsumerThatIsNoLongerTheActiveOneKeepsTheOrder(t *testing.T) {
	t.Parallel()
	for _, batch := range []int{1, 8} {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprintf("batch=%d fails=%v", batch, fails), func(t *testing.T) {
				t.Parallel()
				zombie(t, batch, fails)
			})
		}
	}
}

func zombie(t *testing.T, batch int, fails bool) {
	b := setupBroker(t)
	if _, err := b.QueueDelete(b.queue, false, false, false); err != nil {
		t.Fatal(err)
	}
	if _, err := b.QueueDeclare(b.queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum", "x-single-active-consumer": true}); err != nil {
		t.Fatal(err)
	}
	const n, at = 30, "3"
	cfg := b.config(t)
	cfg.Batch, cfg.Prefetch = batch, n
	server := newProxy(t, testenv.AMQPURL(t))
	inHand, goOn := make(chan struct{}), make(chan struct{})
	b.publish(t, keyed(n, "k")...)
	first := b.run(t, b.Pool, server.url, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if m.ID == at {
			close(inHand)
			<-goOn
			if fails {
				return errTest
			}
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	<-inHand
	second := b.run(t, b.pool(t, b.URL), testenv.AMQPURL(t), b.apply, cfg)
	second.waitReady(t)
	server.setDown(true)
	testenv.Eventually(t, testLimit, "the second waits for what the first has in hand", func() bool {
		var waiting bool
		err := b.QueryRow(b.ctx, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%')`,
			b.DB.Schema).Scan(&waiting)
		return err == nil && waiting
	})
	close(goOn)
	testenv.Eventually(t, testLimit, "all have an effect", func() bool { return b.count(t, "effects", "true") >= n })
	b.wantReady(t, 0)
	first.stop()
	second.stop()
	b.wantReady(t, 0)
	b.wantEffectsInOrder(t, n)
}

// The broker closes the channel of a consumer that has not acknowledged for long.
func TestAConsumerTimeoutCostsNothing(t *testing.T) {
	t.Parallel()
	rabbit := serverstest.RabbitMQ(t)
	_, err := rabbit.Ctl(testenv.Context(t), "eval", "application:set_env(rabbit, consumer_timeout, 2000), application:set_env(rabbit, channel_tick_interval, 500).")
	if err != nil {
		t.Fatal(err)
	}
	for _, batch := range []int{1, 10} {
		b := setupBrokerOf(t, setup(t), rabbit.URL())
		const n = 20
		b.publish(t, keyed(n, "k")...)
		cfg := b.config(t)
		cfg.Batch, cfg.Timeout = batch, time.Minute
		closed := make(chan struct{})
		var once sync.Once
		c := b.run(t, b.Pool, rabbit.URL(), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
			once.Do(func() { <-closed })
			return b.apply(ctx, tx, m)
		}, cfg)
		c.waitFor(t, "the channel was closed", func(s inbox.Stats) bool { return s.Reconnects >= 1 })
		close(closed)
		c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
		b.wantReady(t, 0)
		c.stop()
		b.wantEffectsInOrder(t, n)
	}
}
