package inbox_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strconv"
	"strings"
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

// broker is an env with a queue of its own and a channel to publish on.
type broker struct {
	*env
	queue string
	*amqp.Channel
}

func setupBroker(t *testing.T) *broker {
	t.Helper()
	return setupBrokerOf(t, setup(t), testenv.AMQPURL(t))
}

func setupBrokerOf(t *testing.T, e *env, amqpURL string) *broker {
	t.Helper()
	b := &broker{env: e, queue: testenv.Name(t)}
	conn, err := amqp.Dial(amqpURL)
	if err != nil {
		t.Fatal(err)
	}
	if b.Channel, err = conn.Channel(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := b.QueueDelete(b.queue, false, false, false); err != nil {
			t.Error(err)
		}
		conn.Close()
	})
	b.declare(t)
	return b
}

func (b *broker) declare(t *testing.T) {
	t.Helper()
	if _, err := b.QueueDeclare(b.queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		t.Fatal(err)
	}
	if err := b.Confirm(false); err != nil {
		t.Fatal(err)
	}
}

// publish returns after the broker has the messages.
func (b *broker) publish(t *testing.T, messages ...amqp.Publishing) {
	t.Helper()
	var confirms []*amqp.DeferredConfirmation
	for _, m := range messages {
		m.DeliveryMode = amqp.Persistent
		confirm, err := b.PublishWithDeferredConfirmWithContext(b.ctx, "", b.queue, true, false, m)
		if err != nil {
			t.Fatal(err)
		}
		confirms = append(confirms, confirm)
	}
	for _, confirm := range confirms {
		if ok, err := confirm.WaitContext(b.ctx); !ok || err != nil {
			t.Fatalf("not confirmed: %v", err)
		}
	}
}

// numbered returns messages with the IDs 0 to n-1.
func numbered(n int) []amqp.Publishing {
	messages := make([]amqp.Publishing, n)
	for i := range messages {
		messages[i] = amqp.Publishing{MessageId: strconv.Itoa(i), Body: []byte(strconv.Itoa(i))}
	}
	return messages
}

// ready returns how many messages the queue holds that nobody has in hand.
func (b *broker) ready(t *testing.T) int {
	t.Helper()
	q, err := b.QueueDeclarePassive(b.queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"})
	if err != nil {
		t.Fatal(err)
	}
	return q.Messages
}

func (b *broker) wantReady(t *testing.T, n int) {
	t.Helper()
	testenv.Eventually(t, testLimit, fmt.Sprintf("%d messages in the queue", n), func() bool { return b.ready(t) == n })
}

// apply is a Handler that leaves one row in effects.
func (b *broker) apply(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
	_, err := tx.Exec(ctx, "INSERT INTO "+b.Table("effects")+" VALUES ($1, $2)", m.ID, m.Attempt)
	return err
}

// running is a Consumer in Run.
type running struct {
	*inbox.Consumer
	cancel context.CancelFunc
	stop   func() // cancels, returns when Run has, and fails the test unless that returned nil
}

func (b *broker) config(t *testing.T) inbox.Config {
	return inbox.Config{Name: consumer, Schema: b.DB.Schema, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
}

func (b *broker) start(t *testing.T, h inbox.Handler) *running {
	t.Helper()
	return b.run(t, b.Pool, testenv.AMQPURL(t), h, b.config(t))
}

func (b *broker) run(t *testing.T, db *pgxpool.Pool, amqpURL string, h inbox.Handler, cfg inbox.Config) *running {
	t.Helper()
	c, err := inbox.NewConsumer(db, amqpURL, b.queue, h, cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	r := &running{Consumer: c, cancel: cancel, stop: sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(testLimit):
			t.Error("Run does not return")
		}
	})}
	t.Cleanup(r.stop)
	return r
}

// waitFor waits until the counters are as done wants them.
func (r *running) waitFor(t *testing.T, what string, done func(inbox.Stats) bool) {
	t.Helper()
	testenv.Eventually(t, testLimit, what, func() bool { return done(r.Stats()) })
}

func (r *running) waitReady(t *testing.T) {
	t.Helper()
	testenv.Eventually(t, testLimit, "consumer is ready", func() bool { return r.Ready() == nil })
}

func (r *running) waitNotReady(t *testing.T, why string) {
	t.Helper()
	testenv.Eventually(t, testLimit, "not ready: "+why, func() bool {
		err := r.Ready()
		return err != nil && strings.Contains(err.Error(), why)
	})
}

// wantOneEffectEach fails the test unless messages 0 to n-1 have one effect each.
func (b *broker) wantOneEffectEach(t *testing.T, n int) {
	t.Helper()
	var rows, distinct, records int
	err := b.QueryRow(b.ctx, `SELECT count(*), count(DISTINCT message_id), (SELECT count(*) FROM `+b.Table("inbox")+`)
		FROM `+b.Table("effects")).Scan(&rows, &distinct, &records)
	if err != nil || rows != n || distinct != n || records != n {
		t.Errorf("%d effects of %d messages, %d records, want %d: %v", rows, distinct, records, n, err)
	}
}

func TestConsumerAppliesEachMessageOnceAndAcknowledgesIt(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"cache_statement", "exec"} { // exec is for old poolers
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := setupBroker(t)
			db := b.pool(t, withParam(t, b.URL, "default_query_exec_mode", mode))
			b.publish(t, numbered(200)...)
			c := b.run(t, db, testenv.AMQPURL(t), b.apply, b.config(t))
			c.waitFor(t, "200 applied", func(s inbox.Stats) bool { return s.Applied == 200 })
			c.waitReady(t)
			if s := c.Stats(); !s.Connected || s.Duplicates+s.Failures+s.Reconnects != 0 {
				t.Errorf("%+v", s)
			}
			c.stop()
			b.wantOneEffectEach(t, 200)
			b.wantReady(t, 0)
			if n := b.count(t, "inbox", "consumer <> $1 OR digest IS NULL", consumer); n != 0 {
				t.Errorf("%d records of another consumer or without digest", n)
			}
		})
	}
}

func TestConsumerDropsDuplicates(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	for range 3 {
		b.publish(t, numbered(20)...)
	}
	db := b.pool(t, b.serializable(t)) // 40001 of concurrent twins must end as duplicates too
	cfg := b.config(t)
	one := b.run(t, b.Pool, testenv.AMQPURL(t), b.apply, cfg)
	two := b.run(t, db, testenv.AMQPURL(t), b.apply, cfg)
	testenv.Eventually(t, testLimit, "60 deliveries settled", func() bool {
		s1, s2 := one.Stats(), two.Stats()
		return s1.Applied+s2.Applied == 20 && s1.Duplicates+s2.Duplicates == 40
	})
	one.stop()
	two.stop()
	b.wantOneEffectEach(t, 20)
	b.wantReady(t, 0)
}

func TestConsumersOfAnotherNameHaveAnEffectOfTheirOwn(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	for _, name := range []string{"a", "b"} {
		cfg := b.config(t)
		cfg.Name = name
		b.publish(t, numbered(1)...)
		c := b.run(t, b.Pool, testenv.AMQPURL(t), b.apply, cfg)
		c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
		c.stop()
	}
	b.want(t, "0", 2, 2)
}

func TestConsumerHandlesTheMessagesOfAKeyInOrder(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	messages := numbered(300)
	for i := range messages {
		if i%3 != 0 { // a third has no key
			messages[i].Headers = amqp.Table{"outbox-key": fmt.Sprint("key ", i%10)}
		}
	}
	b.publish(t, messages...)
	var mu sync.Mutex
	last, inHand := map[string]int{}, map[string]bool{}
	c := b.start(t, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		n, err := strconv.Atoi(m.ID)
		mu.Lock()
		if m.Key != "" && (inHand[m.Key] || n < last[m.Key]) {
			t.Errorf("%s handled after %d of %q, or beside it", m.ID, last[m.Key], m.Key)
		}
		last[m.Key], inHand[m.Key] = n, true
		mu.Unlock()
		err = errors.Join(err, b.apply(ctx, tx, m))
		mu.Lock()
		inHand[m.Key] = false
		mu.Unlock()
		return err
	})
	c.waitFor(t, "300 applied", func(s inbox.Stats) bool { return s.Applied == 300 })
	c.stop()
	b.wantOneEffectEach(t, 300)
}

func TestConsumerWorksInParallelUpToWorkers(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(6)...)
	cfg := b.config(t)
	cfg.Workers = 3
	begun, goOn := make(chan struct{}, 6), make(chan struct{})
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		begun <- struct{}{}
		<-goOn
		return nil
	}, cfg)
	for range 3 {
		<-begun
	}
	if n := int(b.Stat().AcquiredConns()); n > 4 { // and perhaps one look for what is due
		t.Errorf("%d connections in use", n)
	}
	select {
	case <-begun:
		t.Error("a fourth message in hand")
	default:
	}
	close(goOn)
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 6 })
}

func TestStopFinishesWhatIsInHandAndGivesBackTheRest(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(10)...)
	cfg := b.config(t)
	cfg.Workers = 2
	begun, goOn := make(chan struct{}, 10), make(chan struct{})
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		begun <- struct{}{}
		<-goOn
		return b.apply(ctx, tx, m)
	}, cfg)
	<-begun
	<-begun
	c.cancel()
	close(goOn)
	c.stop()
	b.wantReady(t, 8)
	b.wantOneEffectEach(t, 2)
	if err := c.Ready(); err == nil {
		t.Error("ready after Run has returned")
	}
}

func TestStopTimeoutEndsHandlersAndTheirMessagesComeAgain(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	cfg := b.config(t)
	cfg.StopTimeout = 10 * time.Millisecond
	begun := make(chan struct{})
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		close(begun)
		_, err := tx.Exec(ctx, "SELECT pg_sleep(600)")
		return err
	}, cfg)
	<-begun
	c.stop()
	b.want(t, "0", 0, 0)
	if s := c.Stats(); s.Failures != 0 || b.count(t, "inbox_parked", "true") != 0 {
		t.Errorf("counted as a failure: %+v", s)
	}
	b.wantReady(t, 1)
	c = b.start(t, b.apply)
	c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
}

func TestRunIsRefusedWhileItRuns(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	c := b.start(t, b.apply)
	c.waitReady(t)
	if err := c.Run(b.ctx); err == nil {
		t.Error("no error")
	}
	c.stop()
	ctx, cancel := context.WithCancel(b.ctx)
	cancel()
	if err := c.Run(ctx); err != nil {
		t.Errorf("run again: %v", err)
	}
}

func TestSetupRunsOnEveryConnection(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	if _, err := b.QueueDelete(b.queue, false, false, false); err != nil {
		t.Fatal(err)
	}
	calls := make(chan struct{}, 100)
	cfg := b.config(t)
	cfg.Setup = func(ch *amqp.Channel) error {
		calls <- struct{}{}
		if len(calls) == 1 {
			return errTest
		}
		_, err := ch.QueueDeclare(b.queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"})
		return err
	}
	server := newProxy(t, testenv.AMQPURL(t))
	c := b.run(t, b.Pool, server.url, b.apply, cfg)
	c.waitReady(t)
	server.cut()
	c.waitFor(t, "another connection", func(s inbox.Stats) bool { return s.Reconnects == 1 && s.Connected })
	if len(calls) != 3 {
		t.Errorf("%d calls", len(calls))
	}
}

func TestNewConsumerReportsAllProblemsAtOnce(t *testing.T) {
	t.Parallel()
	e := setup(t)
	refused := func(db *pgxpool.Pool, amqpURL, queue string, h inbox.Handler, cfg inbox.Config, want ...string) {
		t.Helper()
		_, err := inbox.NewConsumer(db, amqpURL, queue, h, cfg)
		for _, field := range want {
			if err == nil || !strings.Contains(err.Error(), field+": ") {
				t.Errorf("%s is not named: %v", field, err)
			}
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("shows the password: %v", err)
		}
	}
	refused(nil, "amqp://u:s3cret@127.0.0.1,http://x", "", nil, inbox.Config{
		Name: strings.Repeat("x", 101), Schema: "a.b", Prefetch: -1, Workers: -1, MaxAttempts: -1, Batch: -1,
		Timeout: -1, StopTimeout: -1, TLS: &tls.Config{},
	}, "db", "h", "queue", "Name", "Schema", "Prefetch", "Workers", "MaxAttempts", "Batch", "Timeout", "StopTimeout", "amqpURL")
	handler := func(context.Context, pgx.Tx, inbox.Message) error { return nil }
	const url = "amqp://127.0.0.1"
	refused(e.Pool, url, strings.Repeat("q", 256), handler, inbox.Config{Name: "n"}, "queue")
	refused(e.Pool, url, strings.Repeat("q", 101), handler, inbox.Config{}, "Name")
	refused(e.Pool, url, "q", handler, inbox.Config{Name: "a\x00b"}, "Name")
	refused(e.Pool, url, "q", handler, inbox.Config{Prefetch: 65536}, "Prefetch")
	refused(e.Pool, url, "q", handler, inbox.Config{Prefetch: 9, Batch: 10}, "Prefetch")
	refused(e.Pool, url, "q", handler, inbox.Config{Workers: int(e.Stat().MaxConns())}, "Workers")
	refused(e.Pool, "amqp://u:s3cret@example.com", "q", handler, inbox.Config{}, "amqpURL")
	refused(e.Pool, url, "q", handler, inbox.Config{Batch: 10_001, Horizon: time.Minute}, "Batch", "Horizon")
	before := func(ctx context.Context, m inbox.Message) (context.Context, error) { return ctx, nil }
	refused(e.Pool, url, "q", handler, inbox.Config{Batch: 2, Before: before}, "Before")
	refused(e.Pool, url, "q", inbox.JSON[int](nil), inbox.Config{}, "h")
	refused(e.pool(t, withParam(t, e.URL, "pool_max_conns", "1")), url, "q", handler, inbox.Config{}, "db")
	for _, cfg := range []inbox.Config{{}, {Workers: int(e.Stat().MaxConns()) - 1}} {
		c, err := inbox.NewConsumer(e.Pool, url, strings.Repeat("é", 50), handler, cfg)
		if err != nil || c.Ready() == nil {
			t.Errorf("%v; ready before Run", err)
		}
	}
}

func TestCredentialsAreAskedAtEachDial(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	server := newProxy(t, testenv.AMQPURL(t))
	u, err := url.Parse(server.url)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := u.User.Password()
	user, asked := u.User.Username(), atomic.Int64{}
	u.User = url.UserPassword("nobody", "wrong")
	cfg := b.config(t)
	cfg.Credentials = func(context.Context) (string, string, error) {
		if asked.Add(1) == 1 {
			return "", "", errTest
		}
		return user, password, nil
	}
	c := b.run(t, b.Pool, u.String(), b.apply, cfg)
	c.waitReady(t)
	server.cut()
	c.waitFor(t, "another connection", func(s inbox.Stats) bool { return s.Reconnects == 1 && s.Connected })
	if n := asked.Load(); n != 3 {
		t.Errorf("asked %d times", n)
	}
}
